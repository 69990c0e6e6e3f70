// Attention on tensor cores: operands in bf16, sums, softmax and results in f32. A block is 4 warps; a warp owns 16 rows
// of a tile of 64 and all its columns, so that sums over a row stay inside four lanes.
// mma m16n8k16: with g = lane / 4, t = lane % 4 a lane holds, of a 16 x 8 result, (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
// Where the card has products of a whole warp group (wgmma, Hopper alone), and a head is 64 or 128 wide, the four warps
// multiply together: a lane holds the same of a result, and the right sides are read from shared memory once for all of them.
// Tiles lie in shared memory as rows of DP bf16 and 8 more, so that neighbouring rows use other banks; for wgmma as panels of
// 64 columns in rows of 128 bytes, their sixteens swizzled by the row. There are two pairs of them: one is multiplied while
// the other is on its way. Blocks with most to do come first in the grid, [heads, batch, tiles].
// Powers are of two: scores times SCALE log2(e), where SCALE > 0: the largest score is the largest then.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && DP % 64 == 0
#define WGMMA 1
#else
#define WGMMA 0
#endif
#define ROWS 64
#define HS (WGMMA ? 64 : DP + 8)
#define KT (DP / 16)
#define DT (DP / 8)
#define TILE (ROWS * (WGMMA ? DP : HS))
// Where the rows lie that a block keeps. Where warps multiply, registers have them and other tiles take their place.
#define OWN (WGMMA ? 4 * TILE : 2 * TILE)
#define LOG2E 1.4426950408889634f
DEV u16* tiles_in(float4* memory) {
  return (u16*)(WGMMA ? ((u64)memory + 1023) & ~1023ull : (u64)memory);
}
// Where element (r, c) of a tile lies.
DEV u32 at(u32 r, u32 c) { return WGMMA ? c / 64 * (ROWS * 64) + r * 64 + ((c & 63) ^ (r & 7) * 8) : r * HS + c; }
DEV void mma(float* c, const u32* a, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEV float two_to(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// Sixteen bytes of a tile, or zeros: bf16 past the registers, f32 through them.
DEV void copy16(u16* to, const bf16* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
    :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(there ? 16u : 0u) : "memory");
}
DEV void copy16(u16* to, const float* from, bool there) { *(uint4*)to = there ? halves8(from) : make_uint4(0, 0, 0, 0); }
// Asks for rows first.. of a head as bf16, zeros past the end and past D; they lie there after `arrived`.
template <class T> DEV void ask(u16* tile, const T* head, u32 first, u32 limit, u32 stride) {
  const bool lies_well = (D & 7) == 0 && (stride & 7) == 0 && ((u64)head & 15) == 0;
  // A whole tile of bf16 needs no questions, which are a fifth of the instructions of a tile.
  if (lies_well && sizeof(T) == 2 && D == DP && 128 % (DP / 8) == 0 && first + ROWS <= limit) {
    const u32 r = threadIdx.x / (DP / 8), c = threadIdx.x % (DP / 8) * 8, step = 128 / (DP / 8) * stride;
    u16* to = tile + at(r, c);
    const T* from = head + (u64)(first + r) * stride + c;
#pragma unroll
    for (int i = 0; i < ROWS * (DP / 8) / 128; ++i, from += step) copy16(to + i * (128 / (DP / 8)) * HS, from, true);
  } else if (lies_well) {
#pragma unroll 1
    for (u32 e = threadIdx.x; e < ROWS * (DP / 8); e += 128) {
      const u32 r = e / (DP / 8), c = e % (DP / 8) * 8;
      const bool there = first + r < limit && c < D;
      copy16(tile + at(r, c), there ? head + (u64)(first + r) * stride + c : head, there);
    }
  } else {
#pragma unroll 1
    for (u32 e = threadIdx.x; e < ROWS * DP; e += 128) {
      const u32 r = e / DP, c = e % DP;
      tile[at(r, c)] = first + r < limit && c < D ? to_bf16(ld(head + (u64)(first + r) * stride + c)) : 0;
    }
  }
}
// Waits for all that was asked for, of all warps.
DEV void arrived() {
  asm volatile("cp.async.wait_all;" ::: "memory");
#if WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  __syncthreads();
}
#if WGMMA
#define FOUR(x) "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])
#define D16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define D32 D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
// Rows of a tile for the tensor cores: their first byte; 1024 from eight rows to the next.
DEV u64 described(const u16* p) {
  return (u64)((u32)__cvta_generic_to_shared(p) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
// d = or += a bᵀ, for 16 columns of both: a 64 rows, b 64 or 32.
DEV void rows_by_64(float (*d)[4], u64 a, u64 b, u32 more) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" D32 "}, "
    "%32, %33, p, 1, 1, 0, 0;\n}" : FOUR(d[0]), FOUR(d[1]), FOUR(d[2]), FOUR(d[3]), FOUR(d[4]), FOUR(d[5]), FOUR(d[6]), FOUR(d[7])
    : "l"(a), "l"(b), "r"(more));
}
DEV void rows_by_32(float (*d)[4], u64 a, u64 b, u32 more) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\nwgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" D16 "}, "
    "%16, %17, p, 1, 1, 0, 0;\n}" : FOUR(d[0]), FOUR(d[1]), FOUR(d[2]), FOUR(d[3]) : "l"(a), "l"(b), "r"(more));
}
// d += a b: a 16 columns in registers, b 16 rows of 64 columns.
DEV void columns_by_64(float (*d)[4], const u32* a, u64 b) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" D32 "}, "
    "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}" : FOUR(d[0]), FOUR(d[1]), FOUR(d[2]), FOUR(d[3]), FOUR(d[4]), FOUR(d[5]), FOUR(d[6]),
    FOUR(d[7]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEV void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Nothing of `d` is read before this.
template <int N> DEV void ended(float (&d)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) asm volatile("" : FOUR(d[n]) :: "memory");
}
// Waits for all products that began; `d` is theirs.
template <int N> DEV void end_products(float (&d)[N][4]) {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
  ended(d);
}
typedef const u16* Rows;
DEV Rows rows_of(const u16* tile) { return tile; }
// out[n] = 64 rows times the rows n * 8.. of a tile, N of them, after `end_products`.
template <int N> DEV void dots(Rows rows, const u16* tile, float (&out)[N][4]) {
  begin_products();
#pragma unroll
  for (int k = 0; k < KT; ++k) {
    const u32 from = k / 4 * (ROWS * 64) + k % 4 * 16;
    if constexpr (N == 8) rows_by_64(out, described(rows + from), described(tile + from), k);
    else rows_by_32(out, described(rows + from), described(tile + from), k);
  }
}
// p [64, N * 8] as left operands.
template <int N> DEV void packed(const float (&p)[N][4], u32 (&a)[N / 2][4]) {
#pragma unroll
  for (int k = 0; k < N / 2; ++k) {
    a[k][0] = pack2(p[2 * k][0], p[2 * k][1]);
    a[k][1] = pack2(p[2 * k][2], p[2 * k][3]);
    a[k][2] = pack2(p[2 * k + 1][0], p[2 * k + 1][1]);
    a[k][3] = pack2(p[2 * k + 1][2], p[2 * k + 1][3]);
  }
}
// acc += p [64, N * 8] times the N * 8 rows of a tile, after `end_products`.
template <int N> DEV void accumulate(const float (&p)[N][4], const u16* tile, float (&acc)[DT][4]) {
  u32 a[N / 2][4];
  packed(p, a);
  begin_products();
#pragma unroll
  for (int k = 0; k < N / 2; ++k)
#pragma unroll
    for (int c = 0; c < DT; c += 8) columns_by_64(acc + c, a[k], described(tile + c / 8 * (ROWS * 64) + k * 16 * 64));
}
#else
// The warp's 16 rows as left operands.
struct Rows { u32 a[KT][4]; };
template <int N> DEV void end_products(float (&)[N][4]) {}
template <int N> DEV void ended(float (&)[N][4]) {}
DEV Rows rows_of(const u16* tile) {
  Rows r;
  u32 (&a)[KT][4] = r.a;
  const u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const u16* p = tile + ((threadIdx.x >> 5) * 16 + g) * HS + 2 * t;
#pragma unroll
  for (int k = 0; k < KT; ++k) {
    a[k][0] = *(const u32*)(p + k * 16);
    a[k][1] = *(const u32*)(p + 8 * HS + k * 16);
    a[k][2] = *(const u32*)(p + k * 16 + 8);
    a[k][3] = *(const u32*)(p + 8 * HS + k * 16 + 8);
  }
  return r;
}
// Four 8 x 8 matrices of a tile: `at` is this lane's row of its matrix.
DEV void four(u32* b, u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
    : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(at));
}
DEV void four_turned(u32* b, u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
    : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(at));
}
// out[n] = the warp's rows times the rows n * 8.. of a tile, N of them.
template <int N> DEV void dots(const Rows& rows, const u16* tile, float (&out)[N][4]) {
  const u32 (&a)[KT][4] = rows.a;
  const u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const u32 at = (u32)__cvta_generic_to_shared(tile + (lane & 7) * HS + (lane >> 3) * 8);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0.f;
#pragma unroll
    for (int k = 0; k + 1 < KT; k += 2) {
      u32 b[4];
      four(b, at + n * 16 * HS + k * 32);
      mma(out[n], a[k], b[0], b[1]);
      mma(out[n], a[k + 1], b[2], b[3]);
    }
    if (KT % 2) {
      const u16* p = tile + (n * 8 + g) * HS + 2 * t + (KT - 1) * 16;
      mma(out[n], a[KT - 1], *(const u32*)p, *(const u32*)(p + 8));
    }
  }
}
// acc += p [16, N * 8] times the N * 8 rows of a tile.
template <int N> DEV void accumulate(const float (&p)[N][4], const u16* tile, float (&acc)[DT][4]) {
  const u32 lane = threadIdx.x & 31;
#pragma unroll
  for (int k = 0; k < N / 2; ++k) {
    const u32 a[4] = {pack2(p[2 * k][0], p[2 * k][1]), pack2(p[2 * k][2], p[2 * k][3]),
                      pack2(p[2 * k + 1][0], p[2 * k + 1][1]), pack2(p[2 * k + 1][2], p[2 * k + 1][3])};
    const u32 at = (u32)__cvta_generic_to_shared(tile + (k * 16 + (lane & 15)) * HS + (lane >> 4) * 8);
#pragma unroll
    for (int d = 0; d < DT; d += 2) {
      u32 b[4];
      four_turned(b, at + d * 16);
      mma(acc[d], a, b[0], b[1]);
      mma(acc[d + 1], a, b[2], b[3]);
    }
  }
}
#endif
DEV float quad_sum(float v) { v += __shfl_xor_sync(~0u, v, 1); return v + __shfl_xor_sync(~0u, v, 2); }
DEV float quad_max(float v) { v = fmaxf(v, __shfl_xor_sync(~0u, v, 1)); return fmaxf(v, __shfl_xor_sync(~0u, v, 2)); }
// What query i of a batch row sees; past the end nothing.
DEV Range seen_by(const u32* pos, const u32* starts, u32 b, u32 i, u32 t, u32 s) {
  return i < t ? seen(pos, starts, b * t + i, s) : Range{0, 0};
}
// Of the queries of a warp, two a lane: keys lo.. hi hold all that one of them sees; each of from.. to is seen by all.
struct Span { u32 lo, hi, from, to; };
DEV Span span_of(Range x, Range y) {
  const u32 lo = min(x.hi > x.lo ? x.lo : ~0u, y.hi > y.lo ? y.lo : ~0u), hi = max(x.hi > x.lo ? x.hi : 0, y.hi > y.lo ? y.hi : 0);
  return {__reduce_min_sync(~0u, lo), __reduce_max_sync(~0u, hi), __reduce_max_sync(~0u, max(x.lo, y.lo)),
          __reduce_min_sync(~0u, min(x.hi, y.hi))};
}
// The ends of what the block's queries see.
DEV Range joined(Span w) {
  __shared__ Range ends[4];
  if ((threadIdx.x & 31) == 0) ends[threadIdx.x >> 5] = {w.lo, w.hi};
  __syncthreads();
  return {min(min(ends[0].lo, ends[1].lo), min(ends[2].lo, ends[3].lo)), max(max(ends[0].hi, ends[1].hi), max(ends[2].hi, ends[3].hi))};
}
// Writes the warp's 16 rows of a result: rows first.. below `limit`, each times its scale.
DEV void pair(float* p, float a, float b) { *(float2*)p = make_float2(a, b); }
DEV void pair(bf16* p, float a, float b) { *(u32*)p = pack2(a, b); }
template <class T> DEV void write_rows(T* head, u32 stride, u32 first, u32 limit, const float acc[DT][4], float s0, float s1) {
  const u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, r = first + (threadIdx.x >> 5) * 16 + g;
  if ((D & 1) == 0 && (stride & 1) == 0 && ((u64)head & (2 * sizeof(T) - 1)) == 0) {
#pragma unroll
    for (int d = 0; d < DT; ++d) {
      const u32 c = d * 8 + 2 * t;
      if (r < limit && c < D) pair(head + (u64)r * stride + c, acc[d][0] * s0, acc[d][1] * s0);
      if (r + 8 < limit && c < D) pair(head + (u64)(r + 8) * stride + c, acc[d][2] * s1, acc[d][3] * s1);
    }
    return;
  }
#pragma unroll
  for (int d = 0; d < DT; ++d)
    for (int e = 0; e < 4; ++e) {
      const u32 row = r + (e >> 1) * 8, c = d * 8 + 2 * t + (e & 1);
      if (row < limit && c < D) st(head + (u64)row * stride + c, acc[d][e] * (e >> 1 ? s1 : s0));
    }
}
#ifdef FORWARD
extern "C" __global__ void __launch_bounds__(128, DP > 64 ? 2 : 3) attention(const TQ* q, const TK* k, const TV* v, const u32* pos,
    const u32* starts, TO* o, float* lse, u32 t, u32 h, u32 s, u32 qb, u32 qt, u32 qh, u32 kb, u32 kt, u32 kh,
    u32 vb, u32 vt, u32 vh, u32 ob, u32 ot, u32 oh) {
  GRID_WAIT;
  extern __shared__ float4 memory[];
  u16* tiles = tiles_in(memory);
  // The last queries see the most keys: they go first.
  const u32 b = blockIdx.y, head = blockIdx.x, first = (gridDim.z - 1 - blockIdx.z) * ROWS;
  const u32 lane = threadIdx.x & 31, g = lane >> 2, tt = lane & 3, mine = (threadIdx.x >> 5) * 16 + g;
  const Range r0 = seen_by(pos, starts, b, first + mine, t, s), r1 = seen_by(pos, starts, b, first + mine + 8, t, s);
  const Span w = span_of(r0, r1);
  const Range all = joined(w);
  const u32 begin = all.hi ? all.lo / ROWS * ROWS : 0;
  const TK* keys = k + (u64)b * kb + (u64)(head / G) * kh;
  const TV* values = v + (u64)b * vb + (u64)(head / G) * vh;
  ask(tiles, keys, begin, s, kt);
  ask(tiles + TILE, values, begin, s, vt);
  ask(tiles + OWN, q + (u64)b * qb + (u64)head * qh, first, t, qt);
  arrived();
  const Rows a = rows_of(tiles + OWN);
  __syncthreads();
  float acc[DT][4] = {}, m0 = -inff, m1 = -inff, l0 = 0.f, l1 = 0.f;
  u32 stage = 0;
  for (u32 k0 = begin; k0 < all.hi; k0 += ROWS, stage ^= 1) {
    const u16* ks = tiles + stage * 2 * TILE;
    if (k0 + ROWS < all.hi) {
      u16* next = tiles + (stage ^ 1) * 2 * TILE;
      ask(next, keys, k0 + ROWS, s, kt);
      ask(next + TILE, values, k0 + ROWS, s, vt);
    }
    if (WGMMA || (k0 < w.hi && k0 + ROWS > w.lo)) {
      float p[8][4];
      dots<8>(a, ks, p);
      end_products(p);
      const bool whole = k0 >= w.from && k0 + ROWS <= w.to;
//cap #pragma unroll
//cap       for (int n = 0; n < 8; ++n)
//cap #pragma unroll
//cap         for (int e = 0; e < 4; ++e) p[n][e] = bent(p[n][e]);
      if (!whole) {
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const u32 key = k0 + n * 8 + 2 * tt + e;
            if (key < r0.lo || key >= r0.hi) p[n][e] = -inff;
            if (key < r1.lo || key >= r1.hi) p[n][e + 2] = -inff;
          }
      }
      float n0 = m0, n1 = m1;
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          n0 = fmaxf(n0, p[n][e]);
          n1 = fmaxf(n1, p[n][e + 2]);
        }
      n0 = quad_max(n0);
      n1 = quad_max(n1);
      const float z0 = n0 == -inff ? 0.f : n0 * (SCALE * LOG2E), z1 = n1 == -inff ? 0.f : n1 * (SCALE * LOG2E);
      const float f0 = two_to(m0 * (SCALE * LOG2E) - z0), f1 = two_to(m1 * (SCALE * LOG2E) - z1);
      l0 *= f0;
      l1 *= f1;
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          p[n][e] = two_to(p[n][e] * (SCALE * LOG2E) - z0);
          p[n][e + 2] = two_to(p[n][e + 2] * (SCALE * LOG2E) - z1);
          l0 += p[n][e];
          l1 += p[n][e + 2];
        }
      m0 = n0;
      m1 = n1;
#pragma unroll
      for (int d = 0; d < DT; ++d) { acc[d][0] *= f0; acc[d][1] *= f0; acc[d][2] *= f1; acc[d][3] *= f1; }
      accumulate<8>(p, ks + TILE, acc);
      end_products(acc);
    }
    arrived();
  }
  l0 = quad_sum(l0);
  l1 = quad_sum(l1);
  if (o) write_rows(o + (u64)b * ob + (u64)head * oh, ot, first, t, acc, l0 > 0.f ? 1.f / l0 : 0.f, l1 > 0.f ? 1.f / l1 : 0.f);
  if (lse && tt == 0) {
    float* to = lse + ((u64)b * h + head) * t;
    if (first + mine < t) to[first + mine] = l0 > 0.f ? logf(l0) + m0 * SCALE : 0.f;
    if (first + mine + 8 < t) to[first + mine + 8] = l1 > 0.f ? logf(l1) + m1 * SCALE : 0.f;
  }
}
#else
#define ARGS const TQ* q, const TK* k, const TV* v, const u32* pos, const u32* starts, const float* lse, \
    const TG* go, const float* delta_, u32 t, u32 h, u32 s, u32 qb, u32 qt, u32 qh, u32 kb, u32 kt, u32 kh, \
    u32 vb, u32 vt, u32 vh, u32 gb, u32 gt, u32 gh
// Columns of a tile whose scores are held at once: what a lane holds of them has to stay in registers.
#define Q_PART (WGMMA ? 64 : 16)
#define KV_PART (WGMMA ? 32 : 16)
// Blocks that share a processor, as many as its registers allow without a spill.
#define KV_BLOCKS (DP > 64 ? 2 : 3)
#define Q_BLOCKS (DP > 64 ? 2 : WGMMA ? 3 : CAUSAL && __CUDA_ARCH__ >= 900 ? 4 : 3)
//cap #undef Q_BLOCKS
//cap #define Q_BLOCKS KV_BLOCKS
// A block for 64 queries of a head.
extern "C" __global__ void __launch_bounds__(128, Q_BLOCKS) grad_q(ARGS, DQ* dq, u32 ob, u32 ot, u32 oh) {
  GRID_WAIT;
  extern __shared__ float4 memory[];
  u16* tiles = tiles_in(memory);
  const u32 b = blockIdx.y, head = blockIdx.x, first = (gridDim.z - 1 - blockIdx.z) * ROWS;
  const u32 lane = threadIdx.x & 31, g = lane >> 2, tt = lane & 3, mine = (threadIdx.x >> 5) * 16 + g;
  const Range r0 = seen_by(pos, starts, b, first + mine, t, s), r1 = seen_by(pos, starts, b, first + mine + 8, t, s);
  const Span w = span_of(r0, r1);
  const Range all = joined(w);
  const u32 begin = all.hi ? all.lo / ROWS * ROWS : 0;
  const TK* keys = k + (u64)b * kb + (u64)(head / G) * kh;
  const TV* values = v + (u64)b * vb + (u64)(head / G) * vh;
  ask(tiles, keys, begin, s, kt);
  ask(tiles + TILE, values, begin, s, vt);
  ask(tiles + OWN, q + (u64)b * qb + (u64)head * qh, first, t, qt);
  ask(tiles + OWN + TILE, go + (u64)b * gb + (u64)head * gh, first, t, gt);
  const u64 at = ((u64)b * h + head) * t + first + mine;
  const bool in0 = first + mine < t, in1 = first + mine + 8 < t;
  const float l0 = in0 ? lse[at] * LOG2E : 0.f, l1 = in1 ? lse[at + 8] * LOG2E : 0.f;
  const float e0 = in0 ? delta_[at] : 0.f, e1 = in1 ? delta_[at + 8] : 0.f;
  arrived();
  const Rows aq = rows_of(tiles + OWN), ag = rows_of(tiles + OWN + TILE);
  __syncthreads();
  float acc[DT][4] = {};
  u32 stage = 0;
  for (u32 k0 = begin; k0 < all.hi; k0 += ROWS, stage ^= 1) {
    const u16* ks = tiles + stage * 2 * TILE;
    if (k0 + ROWS < all.hi) {
      u16* next = tiles + (stage ^ 1) * 2 * TILE;
      ask(next, keys, k0 + ROWS, s, kt);
      ask(next + TILE, values, k0 + ROWS, s, vt);
    }
    constexpr u32 PART = Q_PART, EIGHTS = PART / 8;
#pragma unroll 1
    for (u32 c = 0; c < ROWS; c += PART) {
      const u32 from = k0 + c;
      if (!WGMMA && (from >= w.hi || from + PART <= w.lo)) continue;
      const bool whole = from >= w.from && from + PART <= w.to;
      float p[EIGHTS][4], d[EIGHTS][4];
      dots<EIGHTS>(aq, ks + c * HS, p);
      dots<EIGHTS>(ag, ks + TILE + c * HS, d);
      end_products(p);
      ended(d);
//cap       float w[EIGHTS][4];
#pragma unroll
      for (int n = 0; n < EIGHTS; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
//cap           p[n][e] = bent(p[n][e]);
//cap           w[n][e] = slope(p[n][e]);
          p[n][e] = two_to(p[n][e] * (SCALE * LOG2E) - (e < 2 ? l0 : l1));
        }
      if (!whole) {
#pragma unroll
        for (int n = 0; n < EIGHTS; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const u32 key = from + n * 8 + 2 * tt + e;
            if (key < r0.lo || key >= r0.hi) p[n][e] = 0.f;
            if (key < r1.lo || key >= r1.hi) p[n][e + 2] = 0.f;
          }
      }
#pragma unroll
      for (int n = 0; n < EIGHTS; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          p[n][e] *= d[n][e] - (e < 2 ? e0 : e1);
//cap           p[n][e] *= w[n][e];
        }
      accumulate<EIGHTS>(p, ks + c * HS, acc);
      end_products(acc);
    }
    arrived();
  }
  write_rows(dq + (u64)b * ob + (u64)head * oh, ot, first, t, acc, SCALE, SCALE);
}
// The queries of a tile as the keys need them: what they see, log2 of their sums, what the gradient of softmax subtracts.
struct __align__(16) Queries { float l[ROWS], e[ROWS]; Range range[ROWS]; };
// Bit j: does one of the queries q0 + 64 j.. see one of the keys first.., and do all see all?
DEV void tiles_seen(u32* some, u32* every, const u32* pos, const u32* starts, u32 b, u32 t, u32 s, u32 q0, u32 first) {
  __syncthreads();
  if (threadIdx.x == 0) *some = *every = 0;
  __syncthreads();
  for (u32 j = threadIdx.x >> 5; j < 32 && q0 + j * ROWS < t; j += 4) {
    const u32 i = q0 + j * ROWS + (threadIdx.x & 31);
    const Span w = span_of(seen_by(pos, starts, b, i, t, s), seen_by(pos, starts, b, i + 32, t, s));
    if (threadIdx.x & 31) continue;
    if (w.lo < first + ROWS && w.hi > first) atomicOr(some, 1u << j);
    if (w.from <= first && w.to >= first + ROWS) atomicOr(every, 1u << j);
  }
  __syncthreads();
}
// A block for 64 keys of a key head and one of its query heads; `parts` of several heads are joined by `join_kv`.
extern "C" __global__ void __launch_bounds__(128, KV_BLOCKS) grad_kv(ARGS, float* parts) {
  GRID_WAIT;
  extern __shared__ float4 memory[];
  u16* tiles = tiles_in(memory);
  __shared__ Queries queries[2];
  __shared__ u32 some, every;
  // The first keys are seen by most queries.
  const u32 b = blockIdx.y, head = blockIdx.x, kv = head / G, first = blockIdx.z * ROWS;
  const u32 lane = threadIdx.x & 31, g = lane >> 2, tt = lane & 3, mine = first + (threadIdx.x >> 5) * 16 + g;
  const TQ* rows = q + (u64)b * qb + (u64)head * qh;
  const TG* grads = go + (u64)b * gb + (u64)head * gh;
  const u64 stat = ((u64)b * h + head) * t;
  ask(tiles + OWN, k + (u64)b * kb + (u64)kv * kh, first, s, kt);
  ask(tiles + OWN + TILE, v + (u64)b * vb + (u64)kv * vh, first, s, vt);
  arrived();
  const Rows ak = rows_of(tiles + OWN), av = rows_of(tiles + OWN + TILE);
  float dk[DT][4] = {}, dv[DT][4] = {};
  for (u32 c0 = 0; c0 < t; c0 += 32 * ROWS) {
    tiles_seen(&some, &every, pos, starts, b, t, s, c0, first);
    const u32 whole = every;
    u32 left = some, now = 0, next = 0, stage = 1;
    // The first round only asks.
    for (bool begun = false; begun || left; ) {
      const bool more = left != 0;
      float next_l = 0.f, next_e = 0.f;
      Range next_range = {};
      if (more) {
        next = __ffs(left) - 1;
        left &= left - 1;
        const u32 q0 = c0 + next * ROWS, i = q0 + threadIdx.x;
        u16* to = tiles + (stage ^ 1) * 2 * TILE;
        ask(to, rows, q0, t, qt);
        ask(to + TILE, grads, q0, t, gt);
        if (threadIdx.x < ROWS && i < t) {
          next_range = seen(pos, starts, b * t + i, s);
          next_l = lse[stat + i] * LOG2E;
          next_e = delta_[stat + i];
        }
      }
      if (begun) {
        const u16* qs = tiles + stage * 2 * TILE;
        const bool all = whole >> now & 1;
        const Queries& of = queries[stage];
        constexpr u32 PART = KV_PART, EIGHTS = PART / 8;
#pragma unroll 1
        for (u32 c = 0; c < ROWS; c += PART) {
          float p[EIGHTS][4], d[EIGHTS][4];
          dots<EIGHTS>(ak, qs + c * HS, p);
          dots<EIGHTS>(av, qs + TILE + c * HS, d);
          end_products(p);
          ended(d);
//cap           float w[EIGHTS][4];
#pragma unroll
          for (int n = 0; n < EIGHTS; ++n) {
            const float2 l = *(const float2*)&of.l[c + n * 8 + 2 * tt];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
//cap               p[n][e] = bent(p[n][e]);
//cap               w[n][e] = slope(p[n][e]);
              p[n][e] = two_to(p[n][e] * (SCALE * LOG2E) - (e & 1 ? l.y : l.x));
            }
          }
          if (!all) {
#pragma unroll
            for (int n = 0; n < EIGHTS; ++n)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const Range r = of.range[c + n * 8 + 2 * tt + e];
                if (mine < r.lo || mine >= r.hi) p[n][e] = 0.f;
                if (mine + 8 < r.lo || mine + 8 >= r.hi) p[n][e + 2] = 0.f;
              }
          }
#pragma unroll
          for (int n = 0; n < EIGHTS; ++n) {
            const float2 less = *(const float2*)&of.e[c + n * 8 + 2 * tt];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              d[n][e] = p[n][e] * (d[n][e] - (e & 1 ? less.y : less.x));
//cap               d[n][e] *= w[n][e];
            }
          }
          accumulate<EIGHTS>(p, qs + TILE + c * HS, dv);
          accumulate<EIGHTS>(d, qs + c * HS, dk);
          end_products(dv);
          ended(dk);
        }
      }
      if (more && threadIdx.x < ROWS) {
        Queries& to = queries[stage ^ 1];
        to.l[threadIdx.x] = next_l;
        to.e[threadIdx.x] = next_e;
        to.range[threadIdx.x] = next_range;
      }
      arrived();
      begun = more;
      now = next;
      stage ^= 1;
    }
  }
  // parts [2, b, h, s, D]
  const u64 size = (u64)gridDim.y * h * s * D;
  float* to = parts + ((u64)b * h + head) * s * D;
  write_rows(to, D, first, s, dk, SCALE, SCALE);
  write_rows(to + size, D, first, s, dv, 1.f, 1.f);
}
DEV void add4(float4* x, const float* p) {
  const float4 y = *(const float4*)p;
  x->x += y.x; x->y += y.y; x->z += y.z; x->w += y.w;
}
template <class T> DEV void put4(T* p, float4 v) {
  if (aligned4(p)) { st4(p, v); return; }
  st(p, v.x); st(p + 1, v.y); st(p + 2, v.z); st(p + 3, v.w);
}
// Sums the parts of the query heads of a key head, in order. n: elements of one result.
extern "C" __global__ void join_kv(const float* parts, DK* dk, DV* dv, u32 n, u32 s, u32 hk,
    u32 ab, u32 at, u32 ah, u32 bb, u32 bt, u32 bh) {
  GRID_WAIT;
  const u64 size = (u64)n * G;
  const u32 wide = D % 4 ? 1 : 4;
  for (u32 e = blockIdx.x * blockDim.x + threadIdx.x; e < n / wide; e += gridDim.x * blockDim.x) {
    const u32 i = e * wide, c = i % D, j = i / D % s, kv = i / D / s % hk, b = i / D / s / hk;
    const float* p = parts + (((u64)b * hk + kv) * G * s + j) * D + c;
    DK* x = dk + (u64)b * ab + (u64)j * at + (u64)kv * ah + c;
    DV* y = dv + (u64)b * bb + (u64)j * bt + (u64)kv * bh + c;
    if (wide == 4) {
      float4 sk = make_float4(0.f, 0.f, 0.f, 0.f), sv = sk;
#pragma unroll 8
      for (u32 g = 0; g < G; ++g) { add4(&sk, p + (u64)g * s * D); add4(&sv, p + size + (u64)g * s * D); }
      if (dk) put4(x, sk);
      if (dv) put4(y, sv);
    } else {
      float sk = 0.f, sv = 0.f;
      for (u32 g = 0; g < G; ++g) { sk += p[(u64)g * s * D]; sv += p[size + (u64)g * s * D]; }
      if (dk) st(x, sk);
      if (dv) st(y, sv);
    }
  }
}
#endif
