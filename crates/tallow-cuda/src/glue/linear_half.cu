// Around the bf16 products of a linear with many rows. Each is bound by the bytes it moves.
// `narrow`: rows to bf16 with another pitch. `frame`: the same with h = x aᵀ made on the way and put behind the rows.
// `small`: the adapter's matrices to bf16, where the others read them; generated for each linear.
#ifdef NARROW
extern "C" __global__ void __launch_bounds__(256) narrow(const X* x, u16* y, u32 m, u32 c, u32 xs, u32 pitch) {
  if (((c | xs | pitch) & 7) == 0 && (((u64)x | (u64)y) & 15) == 0) {
    const u32 q = c / 8, n = m * q;
    for (u32 i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256) {
      const u32 r = i / q, k = (i - r * q) * 8;
      *(uint4*)(y + (u64)r * pitch + k) = halves8(x + (u64)r * xs + k);
    }
  } else {
    for (u32 i = blockIdx.x * 256 + threadIdx.x; i < m * c; i += gridDim.x * 256) {
      const u32 r = i / c, k = i - r * c;
      y[(u64)r * pitch + k] = to_bf16(ld(x + (u64)r * xs + k));
    }
  }
}
#endif
#ifdef FRAME
// y [m, pitch] = [x | x aᵀ | 0] in bf16 and h [m, R] = x aᵀ in f32, for x [m, K] and a [R, K]. A block takes 16 rows; its
// eight warps take 32 columns each by turns, on tensor cores, and their sums are joined in order. The columns inside
// such a piece are counted in another order, the same for x and a, so that a lane reads 16 bytes of a row at once.
// Rows of SHARES equal parts have an `a` (one behind the other) and an `h` each; in y these lie side by side, with zeros
// where a row has none. A block's rows are of one part; m counts those of a part.
// APART: x is not copied and y holds what lies behind it alone.
// ONLY: code that limits the tiles of eight rows of `a` to those that are not zero in columns c.. c + 31.
#ifdef APART
#define COPIES false
#define TAIL 0
#else
#define COPIES true
#define TAIL K
#endif
#define NT ((R + 7) / 8)
#define TG (NT < 4 ? NT : 4)
DEV void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Eight columns of a row from column c on; past the end zeros.
template <class T> DEV uint4 eight(const T* row, u32 c, bool wide) {
  if (wide) return c < K ? halves8(row + c) : make_uint4(0, 0, 0, 0);
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = c + i < K ? ld(row + c + i) : 0.f;
  return make_uint4(pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7]));
}
DEV void keep(u16* row, u32 c, uint4 v, bool wide) {
  if (wide) { if (c < K) *(uint4*)(row + c) = v; return; }
  const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) if (c + i < K) row[c + i] = (u16)(w[i / 2] >> (i % 2 * 16));
}
extern "C" __global__ void __launch_bounds__(256, 3) frame(const X* x, u16* y, float* h, const bf16* a, u32 m, u32 xs, u32 pitch, u32 hs PARAMS) {
  GRID_WAIT;
  const u32 each = gridDim.x / SHARES, share = SHARES > 1u ? blockIdx.x / each : 0u, base = share * R;
  HIDDEN_OF
  x += (u64)share * m * xs;
  y += (u64)share * m * pitch;
  a += (u64)base * K;
  __shared__ float part[8][16][TG * 8];
  const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, first = (blockIdx.x - share * each) * 16;
  const bool wide = ((K | xs | pitch) & 7) == 0 && (((u64)x | (u64)y | (u64)a) & 15) == 0;
  const bool in0 = first + g < m, in1 = first + g + 8 < m;
  const X* x0 = x + (u64)(first + g) * xs;
  const X* x1 = x0 + (u64)8 * xs;
  u16* y0 = y + (u64)(first + g) * pitch;
  u16* y1 = y0 + (u64)8 * pitch;
  for (u32 tile = 0; tile < NT; tile += TG) {
    float acc[TG][4] = {};
#pragma unroll 2
    for (u32 k0 = warp * 32; k0 < K; k0 += 256) {
      const u32 c = k0 + t * 8;
      const uint4 zero = make_uint4(0, 0, 0, 0);
      const uint4 v = in0 ? eight(x0, c, wide) : zero, w = in1 ? eight(x1, c, wide) : zero;
      if (COPIES && tile == 0 && in0) keep(y0, c, v, wide);
      if (COPIES && tile == 0 && in1) keep(y1, c, w, wide);
      u32 lo = 0, hi = NT;
      ONLY
#pragma unroll
      for (u32 n = 0; n < TG; ++n) {
        const u32 r = (tile + n) * 8 + g;
        if (tile + n < lo || tile + n >= hi) continue;
        const uint4 b = r < R ? eight(a + (u64)r * K, c, wide) : zero;
        mma(acc[n], v.x, w.x, v.y, w.y, b.x, b.y);
        mma(acc[n], v.z, w.z, v.w, w.w, b.z, b.w);
      }
    }
    __syncthreads();
#pragma unroll
    for (u32 n = 0; n < TG; ++n)
      for (u32 e = 0; e < 4; ++e) part[warp][g + (e >> 1) * 8][n * 8 + 2 * t + (e & 1)] = acc[n][e];
    __syncthreads();
    for (u32 e = threadIdx.x; e < 16 * TG * 8; e += 256) {
      const u32 row = e / (TG * 8), j = e % (TG * 8), q = tile * 8 + j;
      if (first + row >= m || q >= R) continue;
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += part[i][row][j];
      h[(u64)(first + row) * hs + q] = sum;
      y[(u64)(first + row) * pitch + TAIL + base + q] = to_bf16(sum);
    }
  }
  const u32 rest = pitch - TAIL - R;
  for (u32 e = threadIdx.x; e < 16 * rest; e += 256) {
    const u32 row = first + e / rest, q = e % rest;
    if (row < m) y[(u64)row * pitch + TAIL + (q < base ? q : q + R)] = 0;
  }
}
#endif
#ifdef SMALL
extern "C" __global__ void __launch_bounds__(256) small(u16* out PARAMS) {
  next_may_begin();
  u32 e = blockIdx.x * 256 + threadIdx.x;
  BODY
}
#endif
