// out = alpha fewᵀ many on tensor cores: few [rows, up to 64] of F, many [rows, n] of bf16, a long sum over rows, out in f32;
// one such product or several over equally many rows, side by side. Products of one `many` are a group, which reads it once;
// their narrow sides stand one behind the other as tiles of 8 columns. `group_of` finds the group of a block.
// A block takes 64 columns and a chunk of rows, a warp 16 rows by turns. A lane reads 16 bytes of four rows and pairs
// neighbouring rows itself: which of a tile's columns is which does not matter, so nothing goes through shared memory.
// The warps' sums are joined in order, and where there are several chunks the last block of a column joins their sums in
// order: equal runs give equal bits. Bound by reading `many` once.
// MOST: tiles of the widest group. SIZES: calls for each number of tiles that a group has. BLOCKS: that share a processor.
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
// Up to eight narrow columns and where their sums go: to `out` in rows or, turned, in columns that lie `row` apart.
struct Tile { const F* few; float* out; u32 fr, cols, row; float alpha; bool turned; };
// A block's group and which 64 of its columns; `part` is the column's own.
struct Group { const bf16* many; float* part; u32 column, n, mr, tiles; Tile tile[MOST]; };
DEV Group group_of(u32 o, float* part, u32 chunks PARAMS) {
  Group p = {};
  PICK
  return p;
}
// What a lane has of 16 rows: of rows 2t, 2t + 1, 2t + 8 and 2t + 9 eight columns of many, and column g of each tile.
struct Wide { uint4 x[4]; };
template <int NT> struct Narrow { float v[NT][4]; };
DEV u32 row_of_lane(int i) { return (threadIdx.x & 3) * 2 + (i >> 1) * 8 + (i & 1); }
DEV void fetch(Wide* s, const Group& p, const bf16* from, u32 k) {
#pragma unroll
  for (int i = 0; i < 4; ++i) s->x[i] = *(const uint4*)(from + (u64)(k * 128 + row_of_lane(i)) * p.mr);
}
template <int NT> DEV void fetch(Narrow<NT>* s, const Group& p, u32 r, u32 end) {
  const u32 g = threadIdx.x >> 2 & 7;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int q = 0; q < NT; ++q) {
      const u32 row = r + row_of_lane(i);
      s->v[q][i] = row < end && g < p.tile[q].cols ? ld(p.tile[q].few + (u64)row * p.tile[q].fr + g) : 0.f;
    }
}
// Turns of a warp that are on their way, as many as its registers hold: of many, and of few, which the cache has.
#define AHEAD(NT) (NT == 1 && BLOCKS < 3 ? 3 : 2)
#define FEW_AHEAD(NT) (NT <= 2 ? AHEAD(NT) : 1)
// acc[q][j]: of tile q the columns g * 8 + 2 j and one more of many, by 2t and 2t + 1 of few.
template <int NT> DEV void add(float acc[NT][4][4], const Wide& s, const Narrow<NT>& n) {
  u32 a[4][4];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint4 p = s.x[2 * h], o = s.x[2 * h + 1];
    const u32 lo[4] = {p.x, p.y, p.z, p.w}, hi[4] = {o.x, o.y, o.z, o.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      a[j][2 * h] = __byte_perm(lo[j], hi[j], 0x5410);
      a[j][2 * h + 1] = __byte_perm(lo[j], hi[j], 0x7632);
    }
  }
#pragma unroll
  for (int q = 0; q < NT; ++q) {
    const u32 b0 = pack2(n.v[q][0], n.v[q][1]), b1 = pack2(n.v[q][2], n.v[q][3]);
#pragma unroll
    for (int j = 0; j < 4; ++j) mma(acc[q][j], a[j], b0, b1);
  }
}
// The warp's rows of the chunk.
template <int NT> DEV void multiply(float acc[NT][4][4], const Group& p, u32 rows, u32 chunk) {
  const u32 first = p.column * 64, col = first + (threadIdx.x >> 2 & 7) * 8, end = min(rows, (blockIdx.y + 1) * chunk);
  const bool wide = (p.mr & 7) == 0 && ((u64)p.many & 15) == 0;
  u32 r = blockIdx.y * chunk + (threadIdx.x >> 5) * 16;
  // The whole block goes one way: the lanes of a warp multiply together.
  if (wide && first + 64 <= p.n && r + 16 <= end) {
    // Whole tiles: the next turns are on their way while one is multiplied.
    const u32 turns = (end - r - 16) / 128 + 1;
    const bf16* from = p.many + (u64)r * p.mr + col;
    Wide wide_ring[AHEAD(NT)];
    Narrow<NT> few_ring[FEW_AHEAD(NT)];
#pragma unroll
    for (int d = 0; d < AHEAD(NT); ++d) if (d < turns) fetch(&wide_ring[d], p, from, d);
#pragma unroll
    for (int d = 0; d < FEW_AHEAD(NT); ++d) if (d < turns) fetch(&few_ring[d], p, r + d * 128, end);
    for (u32 k = 0; k < turns; k += AHEAD(NT)) {
#pragma unroll
      for (int d = 0; d < AHEAD(NT); ++d) {
        if (k + d >= turns) break;
        const int f = d % FEW_AHEAD(NT);
        add<NT>(acc, wide_ring[d], few_ring[f]);
        if (k + d + AHEAD(NT) < turns) fetch(&wide_ring[d], p, from, k + d + AHEAD(NT));
        if (k + d + FEW_AHEAD(NT) < turns) fetch(&few_ring[f], p, r + (k + d + FEW_AHEAD(NT)) * 128, end);
      }
    }
    r += turns * 128;
  }
  // Where rows or columns end inside.
  for (; r < end; r += 128) {
    Wide s;
    Narrow<NT> n;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 row = r + row_of_lane(i);
      s.x[i] = eight(p.many + (u64)row * p.mr + col, row < end && col < p.n ? p.n - col : 0, wide);
    }
    fetch(&n, p, r, end);
    add<NT>(acc, s, n);
  }
}
// The warps' sums joined: to the result, or to the chunk's part.
template <int NT> DEV void put(const Group& p, const float acc[NT][4][4], float sums[8][8][68]) {
  const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, first = p.column * 64;
#pragma unroll
  for (int q = 0; q < NT; ++q) {
    const Tile to = p.tile[q];
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int j = 0; j < 4; j += 2)
        *(float4*)&sums[warp][2 * t + e][g * 8 + 2 * j] =
            make_float4(acc[q][j][e], acc[q][j][e + 2], acc[q][j + 1][e], acc[q][j + 1][e + 2]);
    __syncthreads();
    for (u32 e = threadIdx.x; e < 512; e += 256) {
      const u32 f = to.turned ? e & 7 : e / 64, c = to.turned ? e / 8 : e % 64;
      float v = 0.f;
#pragma unroll
      for (int w = 0; w < 8; ++w) v += sums[w][f][c];
      if (gridDim.y > 1) p.part[(blockIdx.y * NT + q) * 512 + e] = v;
      else if (f < to.cols && first + c < p.n)
        to.out[to.turned ? (u64)(first + c) * to.row + f : (u64)f * to.row + first + c] = to.alpha * v;
    }
  }
}
template <int NT> DEV void join(const Group& p) {
  const u32 first = p.column * 64;
#pragma unroll
  for (int q = 0; q < NT; ++q) {
    const Tile to = p.tile[q];
    for (u32 e = threadIdx.x; e < 512; e += 256) {
      const u32 f = to.turned ? e & 7 : e / 64, c = to.turned ? e / 8 : e % 64;
      if (f >= to.cols || first + c >= p.n) continue;
      float v = 0.f;
#pragma unroll 8
      for (u32 i = 0; i < gridDim.y; ++i) v += __ldcg(p.part + (i * NT + q) * 512 + e);
      to.out[to.turned ? (u64)(first + c) * to.row + f : (u64)f * to.row + first + c] = to.alpha * v;
    }
  }
}
// Blocks of a column that are done; 0 between launches, which come one after another.
__device__ u32 arrived[COLUMNS];
// The block's column, as if unknown: its group is looked up again rather than kept in registers.
DEV u32 again() { u32 c = blockIdx.x; asm volatile("" : "+r"(c)); return c; }
extern "C" __global__ void __launch_bounds__(256, BLOCKS) outer(float* parts, u32 rows, u32 chunk PARAMS) {
  __shared__ __align__(16) float sums[8][8][68];
  __shared__ u32 last;
#define GROUP(AT) group_of(AT, parts, gridDim.y NAMES)
  const Group p = GROUP(blockIdx.x);
  GRID_WAIT;
#define PRODUCTS(NT) case NT: { \
    float acc[NT][4][4] = {}; \
    multiply<NT>(acc, p, rows, chunk); \
    put<NT>(GROUP(again()), acc, sums); \
    break; }
  switch (p.tiles) { SIZES(PRODUCTS) }
  if (gridDim.y == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&arrived[blockIdx.x], 1u) == gridDim.y - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  const Group to = GROUP(again());
#define JOIN(NT) case NT: join<NT>(to); break;
  switch (to.tiles) { SIZES(JOIN) }
  if (threadIdx.x == 0) arrived[blockIdx.x] = 0;
}
