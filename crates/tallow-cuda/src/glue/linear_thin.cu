// y = x Wᵀ + bias for few outputs: x [m, K], W [OUTPUTS, K]. A block makes ROWS x TILE of y. Its threads lie side by side
// along k, four elements each, so that a row's loads are whole and all on their way at once; what threads have is summed at the
// end, always in the same order. Bound by the way to L2 and back, where every block finds W.
// Constants: K, OUTPUTS, row strides XS, WS, YS, ROWS, TILE; BIAS is code that sets `v` for output `o`.
#define WARPS 4
#define STEP (WARPS * 32 * 4)
#define ALL (ROWS * TILE)
// Sums N values of 32 lanes. Value i is then with lanes i * 32 / N and up, in v[0].
template <int N> DEV void sum_values(float* v, u32 lane) {
  int o = 16;
#pragma unroll
  for (int half = N / 2; half; half /= 2, o /= 2) {
    const bool upper = lane & o;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float give = upper ? v[i] : v[i + half], keep = upper ? v[i + half] : v[i];
      v[i] = keep + __shfl_xor_sync(~0u, give, o);
    }
  }
#pragma unroll
  for (; o; o /= 2) v[0] += __shfl_xor_sync(~0u, v[0], o);
}
DEV float dot4(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
extern "C" __global__ void __launch_bounds__(WARPS * 32) thin(const float* x, const float* w, float* y, u32 m PARAMS) {
  __shared__ float part[WARPS][ALL];
  const u32 t = threadIdx.x, row0 = blockIdx.x * ROWS, o0 = blockIdx.y * TILE;
  float acc[ALL] = {};
  // Rows and outputs past the end are the last one once more; nobody writes them.
  if (K % 4 == 0 && XS % 4 == 0 && WS % 4 == 0 && (((u64)x | (u64)w) & 15) == 0) {
    u32 i = t * 4;
    float4 b[TILE];
    // No launch of a plan writes weights.
#pragma unroll
    for (u32 o = 0; o < TILE; ++o)
      b[o] = i < K ? ld4(w + (u64)min(o0 + o, OUTPUTS - 1) * WS + i) : make_float4(0.f, 0.f, 0.f, 0.f);
    GRID_WAIT;
    for (; i < K;) {
      float4 a[ROWS];
#pragma unroll
      for (u32 r = 0; r < ROWS; ++r) a[r] = ld4(x + (u64)min(row0 + r, m - 1) * XS + i);
#pragma unroll
      for (u32 r = 0; r < ROWS; ++r)
#pragma unroll
        for (u32 o = 0; o < TILE; ++o) acc[r * TILE + o] += dot4(a[r], b[o]);
      i += STEP;
      if (K > STEP && i < K)
#pragma unroll
        for (u32 o = 0; o < TILE; ++o) b[o] = ld4(w + (u64)min(o0 + o, OUTPUTS - 1) * WS + i);
    }
  } else {
    GRID_WAIT;
    for (u32 i = t; i < K; i += WARPS * 32)
#pragma unroll
      for (u32 r = 0; r < ROWS; ++r) {
        const float a = x[(u64)min(row0 + r, m - 1) * XS + i];
#pragma unroll
        for (u32 o = 0; o < TILE; ++o) acc[r * TILE + o] += a * w[(u64)min(o0 + o, OUTPUTS - 1) * WS + i];
      }
  }
  const u32 lane = t & 31, warp = t >> 5;
  const int N = ALL < 32 ? ALL : 32;
#pragma unroll
  for (int g = 0; g < ALL; g += N) {
    sum_values<N>(acc + g, lane);
    if (lane % (32 / N) == 0) part[warp][g + lane / (32 / N)] = acc[g];
  }
  __syncthreads();
  if (t >= ALL) return;
  const u32 row = row0 + t / TILE, o = o0 + t % TILE;
  float v = 0.f;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) v += part[i][t];
  if (row < m && o < OUTPUTS) {
    BIAS
    y[(u64)row * YS + o] = v;
  }
}
