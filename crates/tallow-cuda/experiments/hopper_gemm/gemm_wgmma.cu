// gemm_wgmma: out[m,n] = sum over segments s of a_s[m,len_s] b_s[len_s,n] (+ bias[n]) (+ residual[m,n]), bf16 operands, sums in f32.
// Two warpgroups multiply, one thread of a third brings tiles of 64 columns by tensor maps into a ring in shared memory; two
// blocks of a cluster share one operand. A persistent grid; the second warpgroup runs SKEW steps behind, so that one multiplies
// while the other stores. Outside of a map's extents the copy engine fills with zeros, so no extent need be a multiple of a tile.
// Defines: BM BN (tile), TB (b lies [len,n], else [n,len]), STAGES, SHARE_A (the cluster lies along n and shares a; else along m
// and shares b), SEGS, BLOCKS (of n, each with its own b; then SEGS is 1), B_BOX (rows of one copy of b, TB 0), OUT, ADD, BIAS,
// SKEW, GROUP (clusters of rows that are walked together), MMA (the instruction's text for BN columns), BOUNDED (debugging:
// says who waits in vain and goes on, instead of waiting for ever).
struct alignas(64) Map { u64 opaque[16]; };
struct Maps { Map a[SEGS]; Map b[SEGS * BLOCKS]; };
struct Sizes {
  u32 m, n, out_row, add_row;
  u32 len[SEGS];    // of each segment
  u32 end[BLOCKS];  // column behind each block
  const OUT* bias[BLOCKS];
  u32* stuck;       // BOUNDED: who waits in vain
};
enum : u32 {
  MI = BM / 128,                   // products of 64 rows in each warpgroup
  A_BYTES = BM * 128,
  B_BOXES = (BN + 63) / 64,        // TB: boxes of 64 by 64
  B_BYTES = TB ? B_BOXES * 8192 : BN * 128,
  STAGE_BYTES = A_BYTES + B_BYTES,
  BARRIERS = STAGES * STAGE_BYTES,
};
static_assert(BM == 128 || BM == 256, "rows of a tile");
static_assert(SKEW < STAGES, "the skew must fit the ring");
static_assert(TB || BN % (SHARE_A ? B_BOX : 2 * B_BOX) == 0, "boxes fill a tile");
static_assert(!TB || SHARE_A || B_BOXES % 2 == 0, "boxes are shared evenly");
static_assert(A_BYTES % 1024 == 0 && B_BYTES % 1024 == 0, "tiles start where the swizzle does");

DEV u32 smem_at(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEV u32 cluster_rank() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
DEV void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#ifdef BOUNDED
#define POLL "test"
#else
#define POLL "try"
#endif
DEV bool passed(u32 bar, u32 parity) {
  u32 ok;
  asm volatile("{\n\t.reg .pred p;\n\tmbarrier." POLL "_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
               : "=r"(ok) : "r"(bar), "r"(parity) : "memory");
  return ok != 0;
}
DEV void wait(u32 bar, u32 parity, const Sizes& z, u32 who) {
#ifdef BOUNDED
  for (u32 polls = 1; !passed(bar, parity); ++polls) {
    if (polls % 1024) continue;
    if (*(volatile u32*)z.stuck) break;
    if (polls > 1u << 22) *(volatile u32*)z.stuck = who;
  }
#else
  while (!passed(bar, parity)) {}
#endif
}
DEV void expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(bytes) : "memory");
}
// Arrives at the same barrier of block `cta` of the cluster.
DEV void release(u32 bar, u32 cta) {
  asm volatile("{\n\t.reg .b32 r;\n\tmapa.shared::cluster.u32 r, %0, %1;\n\tmbarrier.arrive.shared::cluster.b64 _, [r];\n\t}"
               :: "r"(bar), "r"(cta) : "memory");
}
template <bool BOTH> DEV void copy(u32 to, const Map* map, int c, int r, u32 bar) {
  if constexpr (BOTH)
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2, %3}], [%4], %5;"
                 :: "r"(to), "l"(map), "r"(c), "r"(r), "r"(bar), "h"((u16)3) : "memory");
  else
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 :: "r"(to), "l"(map), "r"(c), "r"(r), "r"(bar) : "memory");
}
// A matrix in shared memory whose rows of 128 bytes are swizzled; `far`: bytes between 64 columns of a transposed one.
DEV u64 described(u32 at, u32 far) {
  return (u64)((at & 0x3ffff) >> 4) | (u64)(far >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}
MMA

// Four words of each of four lanes, exchanged: lane q has word q of all.
DEV void turn(u32 (&v)[4], u32 lane) {
  const bool odd = lane & 1, high = lane & 2;
  const u32 a = __shfl_xor_sync(~0u, odd ? v[0] : v[1], 1), b = __shfl_xor_sync(~0u, odd ? v[2] : v[3], 1);
  (odd ? v[0] : v[1]) = a;
  (odd ? v[2] : v[3]) = b;
  const u32 c = __shfl_xor_sync(~0u, high ? v[0] : v[2], 2), d = __shfl_xor_sync(~0u, high ? v[1] : v[3], 2);
  (high ? v[0] : v[2]) = c;
  (high ? v[1] : v[3]) = d;
}
// Which rows and columns tile `t` of this cluster begins at; clusters of rows are walked GROUP at a time.
DEV void place(u32 t, u32 rank, u32 rows, u32 cols, u32& m0, u32& n0) {
  const u32 group = t / (GROUP * cols), first = group * GROUP, high = min((u32)GROUP, rows - first);
  const u32 within = t - group * GROUP * cols, c = within / high, r = first + within - c * high;
  m0 = (SHARE_A ? r : 2 * r + rank) * BM;
  n0 = (SHARE_A ? 2 * c + rank : c) * BN;
}
DEV u32 block_of(const Sizes& z, u32 col) {
  u32 b = 0;
#pragma unroll
  for (u32 i = 0; i + 1 < BLOCKS; ++i) b += col >= z.end[i];
  return b;
}
DEV void bring(const Maps& maps, const Sizes& z, u32 s, u32 k, u32 m0, u32 n0, u32 rank, u32 at, u32 bar) {
  if (SHARE_A) copy<true>(at + rank * (A_BYTES / 2), &maps.a[s], k, m0 + rank * (BM / 2), bar);
  else copy<false>(at, &maps.a[s], k, m0, bar);
  const u32 to = at + A_BYTES;
  if constexpr (TB) {
    const u32 few = SHARE_A ? B_BOXES : B_BOXES / 2, first = SHARE_A ? 0 : rank * few;
#pragma unroll
    for (u32 i = 0; i < few; ++i) copy<!SHARE_A>(to + (first + i) * 8192, &maps.b[s], n0 + (first + i) * 64, k, bar);
  } else {
    const u32 few = BN / B_BOX / (SHARE_A ? 1 : 2), first = SHARE_A ? 0 : rank * few;
#pragma unroll
    for (u32 i = 0; i < few; ++i) {
      const u32 row = n0 + (first + i) * B_BOX, b = block_of(z, row);
      const u32 start = b ? z.end[b - 1] : 0;
      copy<!SHARE_A>(to + (first + i) * (B_BOX * 128), &maps.b[s * BLOCKS + b], k, row - start, bar);
    }
  }
}

struct Ring {
  u32 base, slot, parity;
  DEV u32 data() const { return base + slot * STAGE_BYTES; }
  DEV u32 full() const { return base + BARRIERS + slot * 8; }
  DEV u32 empty() const { return base + BARRIERS + (STAGES + slot) * 8; }
  DEV void step() { if (++slot == STAGES) { slot = 0; parity ^= 1; } }
};

// Products of `few` times 16 columns of one stage.
template <bool ALL> DEV void multiply(float (&d)[MI][BN / 2], u32 at, u32 group, u32 few, u32& goes_on) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  const u64 a = described(at + group * (A_BYTES / 2), 16), b = described(at + A_BYTES, TB ? 8192 : 16);
#pragma unroll
  for (u32 q = 0; q < 4; ++q) {
    if (ALL || q < few) {
#pragma unroll
      for (u32 i = 0; i < MI; ++i) mma(d[i], a + i * (64 * 128 >> 4) + q * 2, b + q * (TB ? 2048 >> 4 : 2), goes_on);
      goes_on = 1;
    }
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

DEV void release_both(u32 bar) {
  const u32 cta = threadIdx.x / 32 & 3;
  if ((threadIdx.x & 31) == 0 && cta < 2) release(bar, cta);
}

// One stage of a tile. `before`: the barrier of the stage before it, if any.
template <bool ALL>
DEV void stage(float (&d)[MI][BN / 2], Ring& ring, const Sizes& z, u32 group, u32 few, u32& goes_on, u32& before, u32& steps) {
  wait(ring.full(), ring.parity, z, 100 * (1 + group) + ring.slot);
  multiply<ALL>(d, ring.data(), group, few, goes_on);
  if (SKEW && group == 0 && ++steps == SKEW) asm volatile("bar.arrive 1, 256;" ::: "memory");
  // All products but these are done: what they read may be overwritten, in both blocks.
  asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
  if (before) release_both(before);
  before = ring.empty();
  ring.step();
}

DEV float bias_at(const Sizes& z, u32 col, u32 b) { return ld(z.bias[b] + (col - (b ? z.end[b - 1] : 0))); }

// Adds bias and residual to a row's 2 columns.
DEV void add_to(float& x, float& y, const Sizes& z, const OUT* add, u32 row, u32 col) {
#if defined(BIAS) || defined(ADD)
  const bool one = row < z.m && col < z.n, two = row < z.m && col + 1 < z.n;
#endif
#ifdef BIAS
  const u32 b = block_of(z, col);
  if (one) x += bias_at(z, col, b);
  if (two) y += bias_at(z, col + 1, b);
#endif
#ifdef ADD
  const OUT* p = add + (u64)row * z.add_row + col;
  if (two) {
    if constexpr (sizeof(OUT) == 2) { const u32 w = *(const u32*)p; x += as_f32(w << 16); y += as_f32(w & 0xffff0000u); }
    else { const float2 w = *(const float2*)p; x += w.x; y += w.y; }
  } else if (one) x += ld(p);
#endif
}

DEV void store(float (&d)[MI][BN / 2], const Sizes& z, OUT* out, const OUT* add, u32 m0, u32 n0) {
  const u32 lane = threadIdx.x & 31, q = lane & 3;
#pragma unroll
  for (u32 i = 0; i < MI; ++i)
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
      const u32 row = m0 + i * 64 + (threadIdx.x / 32 & 3) * 16 + lane / 4 + h * 8;
      OUT* const to = out + (u64)row * z.out_row;
#pragma unroll
      for (u32 g = 0; g < (BN / 8 + 3) / 4; ++g) {
        const u32 few = BN / 8 - 4 * g < 4 ? BN / 8 - 4 * g : 4;
        u32 v[4] = {0, 0, 0, 0};
#pragma unroll
        for (u32 t = 0; t < 4; ++t) {
          if (t >= few) continue;
          float x = d[i][(4 * g + t) * 4 + 2 * h], y = d[i][(4 * g + t) * 4 + 2 * h + 1];
          const u32 col = n0 + g * 32 + t * 8 + q * 2;
          add_to(x, y, z, add, row, col);
          if constexpr (sizeof(OUT) == 2) v[t] = pack2(x, y);
          else if (row < z.m) {
            if (col + 1 < z.n) *(float2*)(to + col) = make_float2(x, y);
            else if (col < z.n) *(float*)(to + col) = x;
          }
        }
        if constexpr (sizeof(OUT) == 2) {
          turn(v, lane);
          const u32 col = n0 + g * 32 + q * 8;
          if (row < z.m && q < few) {
            if (col + 8 <= z.n) *(uint4*)(to + col) = make_uint4(v[0], v[1], v[2], v[3]);
            else
#pragma unroll
              for (u32 e = 0; e < 8; ++e)
                if (col + e < z.n) ((u16*)to)[col + e] = (u16)(v[e / 2] >> (e & 1) * 16);
          }
        }
      }
    }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
gemm_wgmma(const __grid_constant__ Maps maps, const __grid_constant__ Sizes z, OUT* out, const OUT* add) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 rank = cluster_rank(), group = threadIdx.x / 128;
  Ring ring = {smem_at(shared), 0, 0};
#ifdef BOUNDED
  if (ring.base & 1023) *(volatile u32*)z.stuck = 999;
#endif
  const u32 mt = (z.m + BM - 1) / BM, nt = (z.n + BN - 1) / BN;
  const u32 rows = SHARE_A ? mt : (mt + 1) / 2, cols = SHARE_A ? (nt + 1) / 2 : nt;
  const u32 tiles = rows * cols, cluster = blockIdx.x / 2, clusters = gridDim.x / 2;
  if (threadIdx.x == 0) {
    for (u32 s = 0; s < STAGES; ++s) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(ring.base + BARRIERS + s * 8) : "memory");
      // Both warpgroups of both blocks.
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 4;" :: "r"(ring.base + BARRIERS + (STAGES + s) * 8) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  cluster_sync();
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (threadIdx.x == 0) {
      u32 m0, n0;
      for (u32 t = cluster; t < tiles; t += clusters) {
        place(t, rank, rows, cols, m0, n0);
        for (u32 s = 0; s < SEGS; ++s)
          for (u32 k = 0; k < z.len[s]; k += 64) {
            wait(ring.empty(), ring.parity ^ 1, z, 1 + ring.slot);
            expect(ring.full(), STAGE_BYTES);
            bring(maps, z, s, k, m0, n0, rank, ring.data(), ring.full());
            ring.step();
          }
      }
      // Both blocks have released every stage: nobody arrives here any more.
      for (u32 s = 0; s < STAGES; ++s, ring.step()) wait(ring.empty(), ring.parity ^ 1, z, 50 + ring.slot);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    const u32 mine = group - 1;
    float d[MI][BN / 2];
    u32 m0, n0, steps = 0;
    if (SKEW && mine == 1) asm volatile("bar.sync 1, 256;" ::: "memory");
    for (u32 t = cluster; t < tiles; t += clusters) {
      place(t, rank, rows, cols, m0, n0);
      u32 goes_on = 0, before = 0;
      for (u32 s = 0; s < SEGS; ++s) {
        const u32 whole = z.len[s] / 64, rest = z.len[s] % 64;
#pragma unroll 1
        for (u32 i = 0; i < whole; ++i) stage<true>(d, ring, z, mine, 4, goes_on, before, steps);
        if (rest) stage<false>(d, ring, z, mine, (rest + 15) / 16, goes_on, before, steps);
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      release_both(before);
#pragma unroll
      for (u32 i = 0; i < MI; ++i)
#pragma unroll
        for (u32 j = 0; j < BN / 2; ++j) asm volatile("" : "+f"(d[i][j]) :: "memory");
      store(d, z, out, add, m0 + mine * (BM / 2), n0);
    }
    if (SKEW && mine == 0 && steps < SKEW) asm volatile("bar.arrive 1, 256;" ::: "memory");
  }
}
