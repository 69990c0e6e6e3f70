// rowsum(do o) of every query, one warp each: what the gradient of softmax subtracts.
extern "C" __global__ void __launch_bounds__(128) delta(const TO* o, const TG* go, float* out, u32 t, u32 h, u32 rows,
    u32 ob, u32 ot, u32 oh, u32 gb, u32 gt, u32 gh) {
  const u32 r = blockIdx.x * 4 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (r >= rows) return;
  const u32 i = r % t, head = r / t % h, b = r / t / h;
  const TO* x = o + (u64)b * ob + (u64)i * ot + (u64)head * oh;
  const TG* y = go + (u64)b * gb + (u64)i * gt + (u64)head * gh;
  float s = 0.f;
  for (u32 c = lane; c < D; c += 32) s += ld(x + c) * ld(y + c);
  s = warp_sum(s);
  if (lane == 0) out[r] = s;
}
