// One axis of `count` elements, `along` apart, to one. Results are numbered over up to four merged axes.
// ACROSS 0: one block a result, threads side by side along the axis.
// ACROSS 1: 32 results a block, one lane each; 16 warps share the axis.
#if MAX
#define START (-inff)
#define JOIN(a, b) fmaxf(a, b)
#else
#define START 0.f
#define JOIN(a, b) ((a) + (b))
#endif
#ifdef PIECE
// Pieces of PIECE elements of each result, side by side; the first of two steps.
extern "C" __global__ void pieces(const X* x, Y* y, u32 results, u32 count, u32 along,
    u32 n0, u32 n1, u32 n2, u32 n3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, u32 b2, u32 b3) {
  const u32 n = (count + PIECE - 1) / PIECE, piece = blockIdx.x % n;
  u32 r = blockIdx.x / n;
  const u32 i3 = r % n3; r /= n3;
  const u32 i2 = r % n2; r /= n2;
  const u32 i1 = r % n1; r /= n1;
  const X* p = x + (u64)r * a0 + (u64)i1 * a1 + (u64)i2 * a2 + (u64)i3 * a3;
  const u32 last = min(count, (piece + 1) * PIECE);
  float v = START;
  for (u32 k = piece * PIECE + threadIdx.x; k < last; k += 256) { const float t = ld(p + k); v = JOIN(v, t); }
#if MAX
  v = block_max(v);
#else
  v = block_sum(v);
#endif
  if (threadIdx.x == 0) st(y + blockIdx.x, v);
}
#endif
extern "C" __global__ void reduce(const X* x, Y* y, u32 results, u32 count, u32 along,
    u32 n0, u32 n1, u32 n2, u32 n3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, u32 b2, u32 b3) {
#if ACROSS
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 result = blockIdx.x * 32 + lane;
#else
  const u32 result = blockIdx.x;
#endif
  u32 r = result;
  const u32 i3 = r % n3; r /= n3;
  const u32 i2 = r % n2; r /= n2;
  const u32 i1 = r % n1; r /= n1;
  const X* p = x + (u64)r * a0 + (u64)i1 * a1 + (u64)i2 * a2 + (u64)i3 * a3;
  Y* q = y + (u64)r * b0 + (u64)i1 * b1 + (u64)i2 * b2 + (u64)i3 * b3;
  float v = START;
#if ACROSS
  __shared__ float part[16][33];
  if (result < results)
    for (u32 k = warp; k < count; k += 16) { const float t = ld(p + (u64)k * along); v = JOIN(v, t); }
  part[warp][lane] = v;
  __syncthreads();
  if (warp == 0 && result < results) {
    for (int w = 1; w < 16; ++w) v = JOIN(v, part[w][lane]);
    st(q, v);
  }
#else
  for (u32 k = threadIdx.x; k < count; k += blockDim.x) { const float t = ld(p + (u64)k * along); v = JOIN(v, t); }
#if MAX
  v = block_max(v);
#else
  v = block_sum(v);
#endif
  if (threadIdx.x == 0) st(q, v);
#endif
}
