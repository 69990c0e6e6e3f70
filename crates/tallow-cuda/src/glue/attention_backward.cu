// Attention backward from q, k, v, lse, do and delta. `grad_q`: a block for BT queries of
// a head. `grad_kv`: a block for BT keys of a key head, over its heads in order: no atomics, equal runs give equal bits.
// With p = exp(s - lse): dv = pᵀ do, ds = p (do vᵀ - delta), dq = SCALE ds k, dk = SCALE dsᵀ q.
#define ARGS const TQ* q, const TK* k, const TV* v, const u32* pos, const u32* starts, const float* lse, \
    const TG* go, const float* delta_, u32 t, u32 h, u32 s, u32 qb, u32 qt, u32 qh, u32 kb, u32 kt, u32 kh, \
    u32 vb, u32 vt, u32 vh, u32 gb, u32 gt, u32 gh
extern "C" __global__ void __launch_bounds__(256) grad_q(ARGS, DQ* dq, u32 ob, u32 ot, u32 oh) {
  extern __shared__ float4 memory[];
  float* qs = (float*)memory;
  float* gs = qs + BT * DS;
  float* ks = gs + BT * DS;
  float* vs = ks + BT * DS;
  float* ps = vs + BT * DS;
  __shared__ Range range[BT];
  __shared__ u32 lo, hi;
  const u32 b = blockIdx.z, head = blockIdx.y, first = blockIdx.x * BT, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  ranges(range, &lo, &hi, pos, starts, b, t, first, s);
  load_tile(qs, q + (u64)b * qb + (u64)head * qh, first, t, qt);
  load_tile(gs, go + (u64)b * gb + (u64)head * gh, first, t, gt);
  float acc[MT][NC] = {}, l[MT], d[MT];
  for (int i = 0; i < MT; ++i) {
    const u32 r = first + ty * MT + i;
    const u64 at = ((u64)b * h + head) * t + r;
    l[i] = r < t ? lse[at] : 0.f;
    d[i] = r < t ? delta_[at] : 0.f;
  }
  for (u32 k0 = hi ? lo / BT * BT : 0; k0 < hi; k0 += BT) {
    __syncthreads();
    load_tile(ks, k + (u64)b * kb + (u64)(head / G) * kh, k0, s, kt);
    load_tile(vs, v + (u64)b * vb + (u64)(head / G) * vh, k0, s, vt);
    __syncthreads();
    float sc[MT][MT], dp[MT][MT];
    dots(qs, ks, sc, tx, ty);
    dots(gs, vs, dp, tx, ty);
    for (int i = 0; i < MT; ++i) {
      const Range r = range[ty * MT + i];
      for (int j = 0; j < MT; ++j) {
        const u32 key = k0 + tx + 16 * j;
//cap         sc[i][j] = bent(sc[i][j]);
        const float p = key >= r.lo && key < r.hi ? expf(sc[i][j] * SCALE - l[i]) : 0.f;
        ps[(ty * MT + i) * PS + tx + 16 * j] = p * (dp[i][j] - d[i]) * SCALE;
//cap         ps[(ty * MT + i) * PS + tx + 16 * j] *= slope(sc[i][j]);
      }
    }
    __syncthreads();
    accumulate(ps, ks, acc, tx, ty);
  }
  for (int i = 0; i < MT; ++i) {
    const u32 r = first + ty * MT + i;
    if (r < t)
      for (int c = 0; c < NC; ++c)
        if (tx + 16 * c < D) st(dq + (u64)b * ob + (u64)r * ot + (u64)head * oh + tx + 16 * c, acc[i][c]);
  }
}
extern "C" __global__ void __launch_bounds__(256) grad_kv(ARGS, DK* dk, DV* dv, u32 ab, u32 at, u32 ah, u32 bb, u32 bt, u32 bh) {
  extern __shared__ float4 memory[];
  float* ks = (float*)memory;
  float* vs = ks + BT * DS;
  float* qs = vs + BT * DS;
  float* gs = qs + BT * DS;
  float* ps = gs + BT * DS;
  __shared__ Range range[BT];
  __shared__ u32 lo, hi;
  const u32 b = blockIdx.z, kv = blockIdx.y, first = blockIdx.x * BT, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  load_tile(ks, k + (u64)b * kb + (u64)kv * kh, first, s, kt);
  load_tile(vs, v + (u64)b * vb + (u64)kv * vh, first, s, vt);
  float ak[MT][NC] = {}, av[MT][NC] = {};
  for (u32 q0 = 0; q0 < t; q0 += BT) {
    ranges(range, &lo, &hi, pos, starts, b, t, q0, s);
    if (hi <= first || lo >= first + BT) continue;
    for (u32 head = kv * G; head < (kv + 1) * G; ++head) {
      __syncthreads();
      load_tile(qs, q + (u64)b * qb + (u64)head * qh, q0, t, qt);
      load_tile(gs, go + (u64)b * gb + (u64)head * gh, q0, t, gt);
      __syncthreads();
      float p[MT][MT], d[MT][MT];
//cap       float w[MT][MT];
      dots(ks, qs, p, tx, ty);
      for (int j = 0; j < MT; ++j) {
        const u32 i = q0 + tx + 16 * j;
        const Range r = range[tx + 16 * j];
        const float l = i < t ? lse[((u64)b * h + head) * t + i] : 0.f;
        for (int i2 = 0; i2 < MT; ++i2) {
          const u32 key = first + ty * MT + i2;
//cap           p[i2][j] = bent(p[i2][j]);
//cap           w[i2][j] = slope(p[i2][j]);
          p[i2][j] = key >= r.lo && key < r.hi ? expf(p[i2][j] * SCALE - l) : 0.f;
          ps[(ty * MT + i2) * PS + tx + 16 * j] = p[i2][j];
        }
      }
      __syncthreads();
      accumulate(ps, gs, av, tx, ty);
      dots(vs, gs, d, tx, ty);
      __syncthreads();
      for (int j = 0; j < MT; ++j) {
        const u32 i = q0 + tx + 16 * j;
        const float e = i < t ? delta_[((u64)b * h + head) * t + i] : 0.f;
        for (int i2 = 0; i2 < MT; ++i2) ps[(ty * MT + i2) * PS + tx + 16 * j] = p[i2][j] * (d[i2][j] - e) * SCALE;
//cap         for (int i2 = 0; i2 < MT; ++i2) ps[(ty * MT + i2) * PS + tx + 16 * j] *= w[i2][j];
      }
      __syncthreads();
      accumulate(ps, qs, ak, tx, ty);
    }
  }
  for (int i = 0; i < MT; ++i) {
    const u32 r = first + ty * MT + i;
    if (r < s)
      for (int c = 0; c < NC; ++c) {
        const u32 e = tx + 16 * c;
        if (e >= D) continue;
        if (dk) st(dk + (u64)b * ab + (u64)r * at + (u64)kv * ah + e, ak[i][c]);
        if (dv) st(dv + (u64)b * bb + (u64)r * bt + (u64)kv * bh + e, av[i][c]);
      }
  }
}
