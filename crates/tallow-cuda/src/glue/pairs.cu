// Linears of one row, as in decoding: 32 * SPLIT lanes make two outputs (a pair: rows that belong together), weights on
// their way before the launch before is done. In front the norm of x, if it has one; behind what is made of a pair:
// KIND 0: two outputs side by side; 1: silu(gate) * up; 2: rotated queries and keys, keys and values into the cache.
// The adapter is the tail of each sum. Its h comes as sums of parts, which whoever made x left behind: hp [R, PARTS];
// and as many parts of the h that the next linear wants are left behind here: np [NEXT, blocks].
// With OWN nobody left any: eight neighbouring blocks make h, each every eighth rank while x passes through its registers,
// and write it into each other's memory while the products are made.
// Constants: K inner extent, UNITS pairs, R and NEXT ranks, LOADS 16-byte loads a lane and row.
#define LANES (32 * SPLIT)
#define PAIRS (8 / SPLIT)
#define ROUNDS ((R + 7) / 8)
#define MOST (ROUNDS < 2 ? 20 : ROUNDS < 20 ? 20 / ROUNDS : 1)
#define AHEAD ((PARTS + 31) / 32 < MOST ? (PARTS + 31) / 32 : MOST)
// Loads of x of a thread that are under way at once, and whether there are more.
#define XALL ((K / 4 + 255) / 256)
#define XLOADS (XALL < (NORM ? 2 : 5) ? XALL : (NORM ? 2 : 5))
#define XREST (XALL > XLOADS)
#define VALUES (KIND == 1 ? PAIRS : 2 * PAIRS)
struct Row { const bf16* w; const float* up; const float* bias; float scale; u32 r0, rank; };
DEV Row row_of(u32 o LOCATE) {
  Row row = {0, 0, 0, 0.f, 0, 0};
  PICK
  return row;
}
#if __CUDA_ARCH__ < 900
// Cards without groups of blocks are never asked for it.
#undef OWN
#define OWN 0
#endif
#if OWN
#define GROUP __attribute__((cluster_dims(8, 1, 1)))
#define MINE ((R + 7) / 8)
// Loads of A of a thread that are on their way before the launch before is done.
#define ALOADS (MINE * XLOADS <= 2 ? XLOADS : 0)
DEV const float* row_of_a(u32 o LOCATE) {
  PICK_A
  return 0;
}
DEV void arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
DEV void meet() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// Writes v to where `p` is in block `to` of the eight.
DEV void hand(float* p, u32 to, float v) {
  u32 at;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"((u32)__cvta_generic_to_shared(p)), "r"(to));
  asm volatile("st.shared::cluster.f32 [%0], %1;" :: "r"(at), "f"(v) : "memory");
}
DEV float dot4(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
#else
#define GROUP
#endif
DEV uint4 stream(const bf16* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
DEV float dot8(uint4 q, float4 a, float4 b) {
  return as_f32(q.x << 16) * a.x + as_f32(q.x & 0xffff0000u) * a.y + as_f32(q.y << 16) * a.z + as_f32(q.y & 0xffff0000u) * a.w
       + as_f32(q.z << 16) * b.x + as_f32(q.z & 0xffff0000u) * b.y + as_f32(q.w << 16) * b.z + as_f32(q.w & 0xffff0000u) * b.w;
}
// Where many blocks must fit a processor, a lane holds HOLD loads of a row ahead of time; the others are on their way
// to the cache.
#if SPLIT == 1 && LOADS == 4
#define HOLD 2
#define BLOCKS 4
#else
#define HOLD LOADS
#define BLOCKS (LOADS <= 2 ? 4 : LOADS <= 5 ? 3 : 2)
#endif
#if __CUDA_ARCH__ < 900
#undef BLOCKS
#define BLOCKS 2
#endif
DEV void fetch(const bf16* p) { asm volatile("prefetch.global.L2 [%0];" :: "l"(p)); }
extern "C" __global__ void GROUP __launch_bounds__(256, BLOCKS) pairs(const float* x, float* y, const float* past, const float* norm, float eps,
    const float* hp, float* np, const float* nw, const u32* pos, const float* freq, float* kc, float* vc, u32 slots PARAMS) {
  extern __shared__ float4 xs[];
#if R > 0
  __shared__ float hs[R];
#endif
#if OWN
  __shared__ float sums[8][MINE];
#endif
#if SPLIT > 1
  __shared__ float left[8][2];
#endif
#if NEXT > 0
  __shared__ float made[VALUES], weigh[NEXT][VALUES];
#endif
  const u32 warp = threadIdx.x >> 5, unit = blockIdx.x * PAIRS + warp / SPLIT, lane = threadIdx.x & (LANES - 1);
  const bool real = unit < UNITS;
  next_may_begin();
#if KIND == 0
  const u32 oa = 2 * unit, ob = oa + 1;
#elif KIND == 1
  const u32 oa = unit, ob = unit + UNITS;
#else
  const u32 head = unit / (D / 2), e = unit % (D / 2), oa = head * D + e, ob = oa + D / 2;
#endif
  const Row a = row_of(real ? oa : 0 NAMES), b = row_of(real && ob < OUTPUTS ? ob : 0 NAMES);
  uint4 qa[HOLD], qb[HOLD];
#pragma unroll
  for (int i = 0; i < LOADS; ++i) {
    const u32 c = (i * LANES + lane) * 8;
    if (i < HOLD) qa[i] = qb[i] = make_uint4(0, 0, 0, 0);
    if (!real || c >= K) continue;
    if (i < HOLD) { qa[i] = stream(a.w + c); qb[i] = stream(b.w + c); }
    else if (lane % 8 == 0) { fetch(a.w + c); fetch(b.w + c); }
  }
  // What a lane has of the tail of each sum, and what lane 0 adds.
  float ua = 0.f, ub = 0.f, ca = 0.f, cb = 0.f;
#if R > 0
  if (lane < a.rank) ua = a.scale * a.up[lane];
  if (lane < b.rank) ub = b.scale * b.up[lane];
#endif
  if (lane == 0) { ca = a.bias ? *a.bias : 0.f; cb = b.bias ? *b.bias : 0.f; }
#if OWN
  arrive();
  const u32 first = blockIdx.x & 7;
  const float* down[MINE];
#pragma unroll
  for (u32 k = 0; k < MINE; ++k) down[k] = first + 8 * k < R ? row_of_a(first + 8 * k NAMES) : 0;
  float4 av[MINE][ALOADS + 1];
#pragma unroll
  for (u32 k = 0; k < MINE; ++k)
#pragma unroll
    for (u32 i = 0; i < ALOADS; ++i) {
      const u32 at = i * 256 + threadIdx.x;
      av[k][i] = down[k] && at < K / 4 ? *(const float4*)(down[k] + at * 4) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
  float hv[MINE] = {};
#endif
#if NEXT > 0
  // What the next h makes of this block's values.
  for (u32 i = threadIdx.x; i < NEXT * VALUES; i += 256) {
    const u32 r = i / VALUES, v = i % VALUES, at = blockIdx.x * VALUES + v;
    const float* down = 0;
    NEXT_ROW
    weigh[r][v] = at < NEXT_K ? down[at] * (nw ? nw[at] : 1.f) : 0.f;
  }
#endif
  wait_for_last();
#if KIND == 0
  if (past && real && lane == 0) { ca += past[oa]; if (ob < OUTPUTS) cb += past[ob]; }
#elif KIND == 2
  const u32 p = pos[0];
#endif
  // x is on its way before anything waits for it.
  float4 xv[XLOADS], nv[XLOADS];
#pragma unroll
  for (int i = 0; i < XLOADS; ++i) {
    const u32 at = i * 256 + threadIdx.x;
    xv[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (at < K / 4) xv[i] = *(const float4*)(x + at * 4);
    if (NORM && at < K / 4) nv[i] = *(const float4*)(norm + at * 4);
  }
#if R > 0 && !OWN
  // A warp has every eighth rank; many parts are asked for before the first is added.
  float part[ROUNDS][AHEAD];
#pragma unroll
  for (u32 k = 0; k < ROUNDS; ++k)
#pragma unroll
    for (u32 i = 0; i < AHEAD; ++i) {
      const u32 q = warp + 8 * k, at = (threadIdx.x & 31) + 32 * i;
      part[k][i] = q < R && at < PARTS ? __ldcg(hp + q * PARTS + at) : 0.f;
    }
#pragma unroll
  for (u32 k = 0; k < ROUNDS; ++k) {
    const u32 q = warp + 8 * k;
    float h = 0.f;
#pragma unroll
    for (u32 i = 0; i < AHEAD; ++i) h += part[k][i];
    for (u32 at = (threadIdx.x & 31) + 32 * AHEAD; q < R && at < PARTS; at += 32) h += __ldcg(hp + q * PARTS + at);
    h = warp_sum(h);
    if (q < R && (threadIdx.x & 31) == 0) hs[q] = h;
  }
#endif
  // Eight values of x lie in two places, so that neighbouring lanes read neighbouring banks.
  float s = 0.f;
#pragma unroll
  for (int i = 0; i < XLOADS; ++i) {
    const u32 at = i * 256 + threadIdx.x;
    if (at >= K / 4) continue;
    float4 v = xv[i];
    s += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    if (NORM) { v.x *= nv[i].x; v.y *= nv[i].y; v.z *= nv[i].z; v.w *= nv[i].w; }
    xs[(at & 1) * (K / 8) + at / 2] = v;
#if OWN
#pragma unroll
    for (u32 k = 0; k < MINE; ++k)
      if (down[k]) hv[k] += dot4(i < ALOADS ? av[k][i] : *(const float4*)(down[k] + at * 4), v);
#endif
  }
#if XREST
  for (u32 i = XLOADS * 256 + threadIdx.x; i < K / 4; i += 256) {
    float4 v = *(const float4*)(x + i * 4);
    s += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    if (NORM) { const float4 k = *(const float4*)(norm + i * 4); v.x *= k.x; v.y *= k.y; v.z *= k.z; v.w *= k.w; }
    xs[(i & 1) * (K / 8) + i / 2] = v;
#if OWN
#pragma unroll
    for (u32 k = 0; k < MINE; ++k)
      if (down[k]) hv[k] += dot4(*(const float4*)(down[k] + i * 4), v);
#endif
  }
#endif
#if OWN
#pragma unroll
  for (u32 k = 0; k < MINE; ++k) {
    const float v = warp_sum(hv[k]);
    if ((threadIdx.x & 31) == 0) sums[warp][k] = v;
  }
#endif
  const float r = NORM ? rsqrtf(block_sum(s) / K + eps) : 1.f;
  __syncthreads();
#if OWN
  // All eight have begun; then each has all of h.
  meet();
  for (u32 i = threadIdx.x; i < 8 * MINE; i += 256) {
    const u32 k = i / 8, q = first + 8 * k;
    float h = 0.f;
#pragma unroll
    for (u32 w = 0; w < 8; ++w) h += sums[w][k];
    if (q < R) hand(hs + q, i & 7, h);
  }
  arrive();
#endif
  float sa = 0.f, sb = 0.f;
#pragma unroll
  for (int i = 0; i < LOADS; ++i) {
    const u32 c = i * LANES + lane;
    if (c < K / 8) {
      const float4 lo = xs[c], hi = xs[K / 8 + c];
      sa += dot8(i < HOLD ? qa[i] : stream(a.w + c * 8), lo, hi);
      sb += dot8(i < HOLD ? qb[i] : stream(b.w + c * 8), lo, hi);
    }
  }
#if OWN
  meet();
#endif
#if R > 0
  // h without the norm's factor, which the whole sum gets.
  if (lane < a.rank) sa += ua * hs[a.r0 + lane];
  if (lane < b.rank) sb += ub * hs[b.r0 + lane];
  for (u32 q = lane + LANES; q < a.rank; q += LANES) sa += a.scale * a.up[q] * hs[a.r0 + q];
  for (u32 q = lane + LANES; q < b.rank; q += LANES) sb += b.scale * b.up[q] * hs[b.r0 + q];
#endif
  sa = warp_sum(sa) * r;
  sb = warp_sum(sb) * r;
#if SPLIT > 1
  if ((threadIdx.x & 31) == 0) { left[warp][0] = sa; left[warp][1] = sb; }
  __syncthreads();
  sa = sb = 0.f;
#pragma unroll
  for (int i = 0; i < SPLIT; ++i) { sa += left[warp / SPLIT * SPLIT + i][0]; sb += left[warp / SPLIT * SPLIT + i][1]; }
#endif
  if (lane == 0) {
    float va = 0.f, vb = 0.f;
    if (real) {
      va = sa + ca;
      vb = sb + cb;
#if KIND == 0
      y[oa] = va;
      if (ob < OUTPUTS) y[ob] = vb; else vb = 0.f;
#elif KIND == 1
      va = va / (1.f + expf(-va)) * vb;
      y[unit] = va;
#else
      if (head < QUERIES + KEYS) {
        const float angle = (float)p * freq[e];
        const float co = cosf(angle), si = sinf(angle), lo = va * co - vb * si, hi = vb * co + va * si;
        va = lo;
        vb = hi;
        y[oa] = va;
        y[ob] = vb;
      }
      if (head >= QUERIES && p < slots) {
        float* to = (head < QUERIES + KEYS ? kc : vc) + ((u64)p * KEYS + (head - QUERIES) % KEYS) * D;
        to[e] = va;
        to[e + D / 2] = vb;
      }
#endif
    }
#if NEXT > 0
    made[warp / SPLIT * (VALUES / PAIRS)] = va;
    if (KIND != 1) made[warp / SPLIT * 2 + 1] = vb;
#endif
  }
#if NEXT > 0
  __syncthreads();
  for (u32 q = threadIdx.x; q < NEXT; q += 256) {
    float h = 0.f;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) h += weigh[q][i] * made[i];
    np[q * gridDim.x + blockIdx.x] = h;
  }
#endif
}
