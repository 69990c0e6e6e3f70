// out = alpha fewᵀ many: few [rows, FEW], many [rows, n], a long sum over rows. Chunks of rows are summed side by
// side into scratch [chunks, FEW, n], then joined in order: equal runs give equal bits.
// TURNED: the result is [n, FEW]. Bound by reading `many` once.
// A thread has COLS columns side by side. F, M: types of few and many.
DEV void columns(const float* p, float* v) { v[0] = p[0]; if (COLS == 2) v[1] = p[1]; }
DEV void columns(const bf16* p, float* v) {
  if (COLS == 2 && ((u64)p & 3) == 0) {
    const u32 w = *(const u32*)p;
    v[0] = as_f32(w << 16);
    v[1] = as_f32(w & 0xffff0000u);
    return;
  }
  v[0] = ld(p);
  if (COLS == 2) v[1] = ld(p + 1);
}
extern "C" __global__ void __launch_bounds__(128) outer_parts(const F* few, const M* many, float* part,
    u32 rows, u32 n, u32 chunk, u32 fr, u32 mr) {
  __shared__ float f[64][FEW];
  const u32 col = (blockIdx.x * 128 + threadIdx.x) * COLS, first = blockIdx.y * chunk;
  const u32 last = min(first + chunk, rows);
  float acc[COLS][FEW];
#pragma unroll
  for (int r = 0; r < FEW; ++r)
    for (int c = 0; c < COLS; ++c) acc[c][r] = 0.f;
  for (u32 row0 = first; row0 < last; row0 += 64) {
    const u32 here = min(64u, last - row0);
    __syncthreads();
    for (u32 e = threadIdx.x; e < here * FEW; e += 128) f[e / FEW][e % FEW] = ld(few + (u64)(row0 + e / FEW) * fr + e % FEW);
    __syncthreads();
    if (col < n)
#pragma unroll 8
      for (u32 i = 0; i < here; ++i) {
        float v[2];
        columns(many + (u64)(row0 + i) * mr + col, v);
#pragma unroll
        for (int r = 0; r < FEW; ++r)
          for (int c = 0; c < COLS; ++c) acc[c][r] += f[i][r] * v[c];
      }
  }
  if (col < n)
#pragma unroll
    for (int r = 0; r < FEW; ++r)
      for (int c = 0; c < COLS; ++c) part[((u64)blockIdx.y * FEW + r) * n + col + c] = acc[c][r];
}
extern "C" __global__ void outer_join(const float* part, float* out, u32 n, u32 chunks, u32 row, float alpha) {
  const u32 e = blockIdx.x * 256 + threadIdx.x;
  if (e >= FEW * n) return;
  float v = 0.f;
#pragma unroll 8
  for (u32 i = 0; i < chunks; ++i) v += part[(u64)i * FEW * n + e];
  const u32 r = e / n, col = e % n;
#if TURNED
  out[(u64)col * row + r] = alpha * v;
#else
  out[(u64)r * row + col] = alpha * v;
#endif
}
