// out = alpha fewᵀ many on tensor cores: few [rows, FEW] of F, many [rows, n] of bf16, a long sum over rows, out in f32;
// one such product or several over equally many rows, side by side. `product_of` finds that of a block.
// A block takes 64 columns and a chunk of rows, a warp 16 rows by turns. A lane reads 16 bytes of four rows and pairs
// neighbouring rows itself: which of a tile's columns is which does not matter, so nothing goes through shared memory.
// The warps' sums are joined in order, and the last block of a column joins the chunks' sums in order: equal runs give
// equal bits. `turned`: the result is [n, FEW]. Bound by reading `many` once.
#define MT ((FEW + 15) / 16)
DEV void mma(float* c, const u32* a, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEV uint4 eight(const bf16* p, u32 left, bool wide) {
  if (left == 0) return make_uint4(0, 0, 0, 0);
  if (wide && left >= 8) return *(const uint4*)p;
  u32 w[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) if (i < left) w[i / 2] |= (u32)p[i].bits << (i % 2 * 16);
  return make_uint4(w[0], w[1], w[2], w[3]);
}
// acc += fewᵀ many for 16 rows, of which a lane has rows 2t, 2t + 1, 2t + 8 and 2t + 9: eight columns of many, and of few
// the columns g and g + 8 of every 16.
DEV void add(float acc[MT][8][4], const uint4* x, const float v[MT][2][4]) {
  u32 b[2][8];
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const uint4 p = x[2 * q], s = x[2 * q + 1];
    const u32 lo[4] = {p.x, p.y, p.z, p.w}, hi[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      b[q][2 * i] = __byte_perm(lo[i], hi[i], 0x5410);
      b[q][2 * i + 1] = __byte_perm(lo[i], hi[i], 0x7632);
    }
  }
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    const u32 a[4] = {pack2(v[m][0][0], v[m][0][1]), pack2(v[m][1][0], v[m][1][1]),
                      pack2(v[m][0][2], v[m][0][3]), pack2(v[m][1][2], v[m][1][3])};
#pragma unroll
    for (int j = 0; j < 8; ++j) mma(acc[m][j], a, b[0][j], b[1][j]);
  }
}
// The same where rows or columns end inside.
DEV void slow(float acc[MT][8][4], const F* few, const bf16* many, u32 r0, u32 end, u32 col, u32 left, bool wide, u32 fr, u32 mr) {
  const u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  uint4 x[4];
  float v[MT][2][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 r = r0 + 2 * t + (i >> 1) * 8 + (i & 1);
    x[i] = eight(many + (u64)r * mr + col, r < end ? left : 0, wide);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const u32 c = m * 16 + h * 8 + g;
        v[m][h][i] = c < FEW && r < end ? ld(few + (u64)r * fr + c) : 0.f;
      }
  }
  add(acc, x, v);
}
struct One { const F* few; const bf16* many; float* part; float* out; u32 column, n, fr, mr, row; float alpha; bool turned; };
DEV One product_of(u32 o, float* part PARAMS) {
  One p = {};
  PICK
  return p;
}
// Blocks of a column that are done; 0 between launches, which come one after another.
__device__ u32 arrived[COLUMNS];
extern "C" __global__ void __launch_bounds__(256, 2) outer(float* parts, u32 rows, u32 chunk PARAMS) {
  const One p = product_of(blockIdx.x, parts NAMES);
  const F* few = p.few;
  const bf16* many = p.many;
  float* part = p.part;
  const u32 n = p.n, fr = p.fr, mr = p.mr, first = p.column * 64;
  __shared__ float sums[8][16][64];
  __shared__ u32 last;
  const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const u32 col = first + g * 8, end = min(rows, (blockIdx.y + 1) * chunk);
  const u32 left = col < n ? n - col : 0;
  const bool wide = (mr & 7) == 0 && ((u64)many & 15) == 0;
  float acc[MT][8][4] = {};
  const u32 r0 = blockIdx.y * chunk + warp * 16;
  // The whole block goes one way: the lanes of a warp multiply together.
  if (wide && first + 64 <= n && FEW % 8 == 0) {
    // Whole tiles: many loads are under way at once.
    const u32 whole = end / 16 * 16;
    u32 r = r0;
#pragma unroll 4
    for (; r < whole; r += 128) {
      const bf16* from = many + (u64)(r + 2 * t) * mr + col;
      const F* f = few + (u64)(r + 2 * t) * fr + g;
      uint4 x[4];
      float v[MT][2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = *(const uint4*)(from + (u64)((i >> 1) * 8 + (i & 1)) * mr);
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            v[m][h][i] = 0.f;
            if (m * 16 + h * 8 < FEW) v[m][h][i] = ld(f + (u64)((i >> 1) * 8 + (i & 1)) * fr + m * 16 + h * 8);
          }
      add(acc, x, v);
    }
    if (r < end) slow(acc, few, many, r, end, col, left, wide, fr, mr);
  } else {
    for (u32 r = r0; r < end; r += 128) slow(acc, few, many, r, end, col, left, wide, fr, mr);
  }
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[warp][g + (e >> 1) * 8][(2 * t + (e & 1)) * 8 + j] = acc[m][j][e];
    __syncthreads();
    for (u32 e = threadIdx.x; e < 16 * 64; e += 256) {
      const u32 r = m * 16 + e / 64, c = first + e % 64;
      if (c >= n || r >= FEW) continue;
      float v = 0.f;
#pragma unroll
      for (int w = 0; w < 8; ++w) v += sums[w][e / 64][e % 64];
      part[((u64)blockIdx.y * FEW + r) * n + c] = v;
    }
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&arrived[blockIdx.x], 1u) == gridDim.y - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (u32 e = threadIdx.x; e < FEW * 64; e += 256) {
    const u32 r = p.turned ? e % FEW : e / 64, c = first + (p.turned ? e / FEW : e % 64);
    if (c >= n) continue;
    float v = 0.f;
#pragma unroll 8
    for (u32 i = 0; i < gridDim.y; ++i) v += __ldcg(part + ((u64)i * FEW + r) * n + c);
    p.out[p.turned ? (u64)c * p.row + r : (u64)r * p.row + c] = p.alpha * v;
  }
  if (threadIdx.x == 0) arrived[blockIdx.x] = 0;
}
