// Attention forward: one block for BT queries of a head, tiles of BT keys, softmax as it goes (f32, no tensor cores).
// q [b, t, h, D], k, v [b, s, hk, D] with strides; o like q; lse [b, h, t]. Bound by arithmetic outside tensor cores.
extern "C" __global__ void __launch_bounds__(256) attention(const TQ* q, const TK* k, const TV* v, const u32* pos,
    const u32* starts, TO* o, float* lse, u32 t, u32 h, u32 s, u32 qb, u32 qt, u32 qh, u32 kb, u32 kt, u32 kh,
    u32 vb, u32 vt, u32 vh, u32 ob, u32 ot, u32 oh) {
  extern __shared__ float4 memory[];
  float* qs = (float*)memory;
  float* kv = qs + BT * DS;
  float* ps = kv + BT * DS;
  __shared__ Range range[BT];
  __shared__ u32 lo, hi;
  const u32 b = blockIdx.z, head = blockIdx.y, first = blockIdx.x * BT, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  ranges(range, &lo, &hi, pos, starts, b, t, first, s);
  load_tile(qs, q + (u64)b * qb + (u64)head * qh, first, t, qt);
  const TK* keys = k + (u64)b * kb + (u64)(head / G) * kh;
  const TV* values = v + (u64)b * vb + (u64)(head / G) * vh;
  float acc[MT][NC] = {}, top[MT], sum[MT];
  for (int i = 0; i < MT; ++i) { top[i] = -inff; sum[i] = 0.f; }
  for (u32 k0 = hi ? lo / BT * BT : 0; k0 < hi; k0 += BT) {
    __syncthreads();
    load_tile(kv, keys, k0, s, kt);
    __syncthreads();
    float sc[MT][MT];
    dots(qs, kv, sc, tx, ty);
    for (int i = 0; i < MT; ++i) {
      const Range r = range[ty * MT + i];
      float m = -inff;
      for (int j = 0; j < MT; ++j) {
        const u32 key = k0 + tx + 16 * j;
//cap         sc[i][j] = bent(sc[i][j]);
        sc[i][j] = key >= r.lo && key < r.hi ? sc[i][j] * SCALE : -inff;
        m = fmaxf(m, sc[i][j]);
      }
      m = fmaxf(top[i], half_warp_max(m));
      const float shift = m == -inff ? 0.f : m, keep = expf(top[i] - shift);
      float part = 0.f;
      for (int j = 0; j < MT; ++j) {
        const float e = expf(sc[i][j] - shift);
        part += e;
        ps[(ty * MT + i) * PS + tx + 16 * j] = e;
      }
      sum[i] = sum[i] * keep + half_warp_sum(part);
      top[i] = m;
      for (int c = 0; c < NC; ++c) acc[i][c] *= keep;
    }
    __syncthreads();
    load_tile(kv, values, k0, s, vt);
    __syncthreads();
    accumulate(ps, kv, acc, tx, ty);
  }
  for (int i = 0; i < MT; ++i) {
    const u32 r = first + ty * MT + i;
    if (r >= t) continue;
    const bool real = sum[i] > 0.f;
    const float scale = real ? 1.f / sum[i] : 0.f;
    if (o)
      for (int c = 0; c < NC; ++c)
        if (tx + 16 * c < D) st(o + (u64)b * ob + (u64)r * ot + (u64)head * oh + tx + 16 * c, acc[i][c] * scale);
    if (lse && tx == 0) lse[((u64)b * h + head) * t + r] = real ? logf(sum[i]) + top[i] : 0.f;
  }
}
