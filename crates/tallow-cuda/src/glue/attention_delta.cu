// rowsum(do o) of every query: what the gradient of softmax subtracts. LANES lanes take a query, eight elements at a time.
template <class T> DEV bool in_eights(const T* p, u32 a, u32 b, u32 c) { return ((D | a | b | c) & 7) == 0 && ((u64)p & 15) == 0; }
extern "C" __global__ void __launch_bounds__(128) delta(const TO* o, const TG* go, float* out, u32 t, u32 h, u32 rows,
    u32 ob, u32 ot, u32 oh, u32 gb, u32 gt, u32 gh) {
  GRID_WAIT;
  const u32 r = blockIdx.x * (128 / LANES) + threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const u32 head = r % h, i = r / h % t, b = r / h / t;
  float s = 0.f;
  if (r < rows) {
    const TO* x = o + (u64)b * ob + (u64)i * ot + (u64)head * oh;
    const TG* y = go + (u64)b * gb + (u64)i * gt + (u64)head * gh;
    if (in_eights(o, ob, ot, oh) && in_eights(go, gb, gt, gh)) {
      for (u32 c = lane * 8; c < D; c += LANES * 8) {
        float v[8], w[8];
        ld8(x + c, v);
        ld8(y + c, w);
#pragma unroll
        for (int e = 0; e < 8; ++e) s += v[e] * w[e];
      }
    } else {
      for (u32 c = lane; c < D; c += LANES) s += ld(x + c) * ld(y + c);
    }
  }
#pragma unroll
  for (int d = LANES / 2; d; d /= 2) s += __shfl_xor_sync(~0u, s, d);
  if (r < rows && lane == 0) out[((u64)b * h + head) * t + i] = s;
}
