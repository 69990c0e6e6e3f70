// Attention of few queries over many keys. `decode`: one block for BT keys of a key head and all its queries;
// `join`: the parts of a query. Row r of a block is query r % t of head r / t. Bound by reading keys and values once.
#define ARGS const float* q, const float* k, const float* v, const u32* pos, const u32* starts, float* o, float* lse, \
    u32 t, u32 h, u32 s, u32 qb, u32 qt, u32 qh, u32 kb, u32 kt, u32 kh, u32 vb, u32 vt, u32 vh, u32 ob, u32 ot, u32 oh, \
    float* part, float2* stats, u32 hk
// BT rows of a head into a tile, 16 bytes at a time where they lie so.
DEV void load_keys(float* tile, const float* head, u32 first, u32 limit, u32 stride) {
  if (D % 4 == 0 && (stride & 3) == 0 && ((u64)head & 15) == 0) {
#pragma unroll 4
    for (u32 e = threadIdx.x; e < BT * (DP / 4); e += 128) {
      const u32 r = e / (DP / 4), c = e % (DP / 4) * 4;
      float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
      if (first + r < limit && c < D) x = *(const float4*)(head + (u64)(first + r) * stride + c);
      *(float4*)(tile + r * DS + c) = x;
    }
  } else load_tile(tile, head, first, limit, stride);
}
extern "C" __global__ void __launch_bounds__(128) decode(ARGS) {
  extern __shared__ float4 memory[];
  const u32 rows = G * t, b = blockIdx.z, kv = blockIdx.y, split = blockIdx.x, splits = gridDim.x, k0 = split * BT;
  float* ks = (float*)memory;
  float* vs = ks + BT * DS;
  float* qs = vs + BT * DS;
  float* ps = qs + rows * DS;
  const u64 base = ((u64)(b * hk + kv) * splits + split) * rows;
  GRID_WAIT;
  int any = 0;
  for (u32 i = threadIdx.x; i < t; i += blockDim.x) {
    const Range r = seen(pos, starts, b * t + i, s);
    any |= r.hi > r.lo && r.lo < k0 + BT && r.hi > k0;
  }
  if (!__syncthreads_or(any)) {
    for (u32 r = threadIdx.x; r < rows; r += blockDim.x) stats[base + r] = make_float2(-inff, 0.f);
    return;
  }
  load_keys(ks, k + (u64)b * kb + (u64)kv * kh, k0, s, kt);
  load_keys(vs, v + (u64)b * vb + (u64)kv * vh, k0, s, vt);
  for (u32 e = threadIdx.x; e < rows * DP; e += blockDim.x) {
    const u32 r = e / DP, c = e % DP;
    qs[r * DS + c] = c < D ? q[(u64)b * qb + (u64)(r % t) * qt + (u64)(kv * G + r / t) * qh + c] : 0.f;
  }
  __syncthreads();
  // A warp for a row, a lane for a key.
  const u32 lane = threadIdx.x & 31;
  for (u32 r = threadIdx.x >> 5; r < rows; r += 4) {
    const Range see = seen(pos, starts, b * t + r % t, s);
    float d = 0.f;
#pragma unroll 4
    for (int c = 0; c < D4; c += 4) {
      const float4 x = *(const float4*)&qs[r * DS + c], y = *(const float4*)&ks[lane * DS + c];
      d += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
    }
//cap     d = bent(d);
    const float score = k0 + lane >= see.lo && k0 + lane < see.hi ? d * SCALE : -inff;
    const float m = warp_max(score), e = expf(score - (m == -inff ? 0.f : m)), sum = warp_sum(e);
    ps[r * BT + lane] = e;
    if (lane == 0) stats[base + r] = make_float2(m, sum);
  }
  __syncthreads();
  for (u32 e = threadIdx.x; e < rows * D; e += blockDim.x) {
    const u32 r = e / D, c = e % D;
    float sum = 0.f;
#pragma unroll 8
    for (u32 i = 0; i < BT; ++i) sum += ps[r * BT + i] * vs[i * DS + c];
    part[base * D + e] = sum;
  }
}
// With NEXT ranks each block also leaves behind its part of the h that the next linear makes of o, for one row: np [NEXT, h].
#ifndef NEXT
#define NEXT 0
#endif
extern "C" __global__ void __launch_bounds__(128, 1) join(ARGS, u32 splits PARAMS) {
  extern __shared__ float weight[];
#if NEXT > 0
  __shared__ float made[D], weigh[NEXT][D];
  for (u32 e = threadIdx.x; e < NEXT * D; e += 128) {
    const u32 r = e / D;
    const float* down = 0;
    NEXT_ROW
    weigh[r][e % D] = down[blockIdx.y * D + e % D];
  }
#endif
  GRID_WAIT;
  const u32 i = blockIdx.x, head = blockIdx.y, b = blockIdx.z, rows = G * t, r = (head % G) * t + i;
  const u64 base = (u64)(b * hk + head / G) * splits * rows + r;
  // Parts of keys that this query does not see have no weight.
  const Range see = seen(pos, starts, b * t + i, s);
  const u32 from = see.lo / BT, to = see.hi > see.lo ? min(splits, (see.hi + BT - 1) / BT) : 0;
  float m = -inff;
  for (u32 p = from + threadIdx.x; p < to; p += 128) m = fmaxf(m, stats[base + (u64)p * rows].x);
  m = block_max(m);
  float sum = 0.f;
  for (u32 p = from + threadIdx.x; p < to; p += 128) {
    const float2 x = stats[base + (u64)p * rows];
    const float w = x.y > 0.f ? expf(x.x - m) : 0.f;
    weight[p] = w;
    sum += x.y * w;
  }
  sum = block_sum(sum);
  if (o)
    for (u32 c = threadIdx.x; c < D; c += 128) {
      float a = 0.f;
#pragma unroll 8
      for (u32 p = from; p < to; ++p) {
        const float w = weight[p], x = part[(base + (u64)p * rows) * D + c];
        // Where a part has no weight nothing was written.
        a += w > 0.f ? w * x : 0.f;
      }
      const float v = sum > 0.f ? a / sum : 0.f;
      o[(u64)b * ob + (u64)i * ot + (u64)head * oh + c] = v;
#if NEXT > 0
      made[c] = v;
#endif
    }
#if NEXT > 0
  __syncthreads();
  for (u32 r = threadIdx.x >> 5; r < NEXT; r += 4) {
    float h = 0.f;
    for (u32 c = threadIdx.x & 31; c < D; c += 32) h += weigh[r][c] * made[c];
    h = warp_sum(h);
    if ((threadIdx.x & 31) == 0) np[r * gridDim.y + head] = h;
  }
#endif
  if (lse && threadIdx.x == 0) lse[((u64)b * h + head) * t + i] = sum > 0.f ? logf(sum) + m : 0.f;
}
