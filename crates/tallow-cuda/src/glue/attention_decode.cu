// Attention of few queries over many keys. `decode`: one block for BT keys of a key head and all its queries;
// `join`: the parts of a query. Row r of a block is query r % t of head r / t. Bound by reading keys and values once.
#define ARGS const float* q, const float* k, const float* v, const u32* pos, const u32* starts, float* o, float* lse, \
    u32 t, u32 h, u32 s, u32 qb, u32 qt, u32 qh, u32 kb, u32 kt, u32 kh, u32 vb, u32 vt, u32 vh, u32 ob, u32 ot, u32 oh, \
    float* part, float2* stats, u32 hk
extern "C" __global__ void __launch_bounds__(128) decode(ARGS) {
  extern __shared__ float4 memory[];
  const u32 rows = G * t, b = blockIdx.z, kv = blockIdx.y, split = blockIdx.x, splits = gridDim.x, k0 = split * BT;
  float* ks = (float*)memory;
  float* qs = ks + BT * DS;
  float* ps = qs + rows * DS;
  const u64 base = ((u64)(b * hk + kv) * splits + split) * rows;
  int any = 0;
  for (u32 i = threadIdx.x; i < t; i += blockDim.x) {
    const Range r = seen(pos, starts, b * t + i, s);
    any |= r.hi > r.lo && r.lo < k0 + BT && r.hi > k0;
  }
  if (!__syncthreads_or(any)) {
    for (u32 r = threadIdx.x; r < rows; r += blockDim.x) stats[base + r] = make_float2(-inff, 0.f);
    return;
  }
  load_tile(ks, k + (u64)b * kb + (u64)kv * kh, k0, s, kt);
  for (u32 e = threadIdx.x; e < rows * DP; e += blockDim.x) {
    const u32 r = e / DP, c = e % DP;
    qs[r * DS + c] = c < D ? q[(u64)b * qb + (u64)(r % t) * qt + (u64)(kv * G + r / t) * qh + c] : 0.f;
  }
  __syncthreads();
  for (u32 e = threadIdx.x; e < rows * BT; e += blockDim.x) {
    const u32 key = e % BT, r = e / BT;
    const Range see = seen(pos, starts, b * t + r % t, s);
    float d = 0.f;
#pragma unroll 4
    for (int c = 0; c < D4; c += 4) {
      const float4 x = *(const float4*)&qs[r * DS + c], y = *(const float4*)&ks[key * DS + c];
      d += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
    }
    ps[r * BT + key] = k0 + key >= see.lo && k0 + key < see.hi ? d * SCALE : -inff;
  }
  __syncthreads();
  const u32 lane = threadIdx.x & 31;
  for (u32 r = threadIdx.x >> 5; r < rows; r += 4) {
    float m = -inff, sum = 0.f;
    for (u32 i = lane; i < BT; i += 32) m = fmaxf(m, ps[r * BT + i]);
    m = warp_max(m);
    const float shift = m == -inff ? 0.f : m;
    for (u32 i = lane; i < BT; i += 32) { const float e = expf(ps[r * BT + i] - shift); ps[r * BT + i] = e; sum += e; }
    sum = warp_sum(sum);
    if (lane == 0) stats[base + r] = make_float2(m, sum);
  }
  __syncthreads();
  const float* values = v + (u64)b * vb + (u64)kv * vh + (u64)k0 * vt;
  const u32 here = min((u32)BT, s - k0);
  for (u32 e = threadIdx.x; e < rows * D; e += blockDim.x) {
    const u32 r = e / D, c = e % D;
    float sum = 0.f;
#pragma unroll 8
    for (u32 i = 0; i < here; ++i) sum += ps[r * BT + i] * values[(u64)i * vt + c];
    part[base * D + e] = sum;
  }
}
extern "C" __global__ void __launch_bounds__(64, 1) join(ARGS, u32 splits) {
  const u32 i = blockIdx.x, head = blockIdx.y, b = blockIdx.z, rows = G * t, r = (head % G) * t + i;
  const u64 base = (u64)(b * hk + head / G) * splits * rows + r;
  float m = -inff, sum = 0.f;
  for (u32 p = 0; p < splits; ++p) m = fmaxf(m, stats[base + (u64)p * rows].x);
  const float shift = m == -inff ? 0.f : m;
  for (u32 p = 0; p < splits; ++p) { const float2 x = stats[base + (u64)p * rows]; sum += x.y * expf(x.x - shift); }
  if (o)
    for (u32 c = threadIdx.x; c < D; c += blockDim.x) {
      float a = 0.f;
      for (u32 p = 0; p < splits; ++p) {
        const u64 at = base + (u64)p * rows;
        const float2 x = stats[at];
        if (x.y > 0.f) a += part[at * D + c] * expf(x.x - shift);
      }
      o[(u64)b * ob + (u64)i * ot + (u64)head * oh + c] = sum > 0.f ? a / sum : 0.f;
    }
  if (lse && threadIdx.x == 0) lse[((u64)b * h + head) * t + i] = sum > 0.f ? logf(sum) + m : 0.f;
}
