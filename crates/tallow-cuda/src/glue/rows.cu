// One block a row of `c` elements; a row stride for each operand and result. Sums in f32 over a block in one order.
// Bound by bandwidth: a row is read again from the cache nearest to the block.
#define KERNEL_rms_norm_f32 1
#define KERNEL_add_rms_norm_f32 2
#define KERNEL_layer_norm_f32 3
#define KERNEL_softmax_f32 4
#define KERNEL_softmax_grad_f32 5
#define KERNEL_rms_norm_grad_f32 6
#define ROW(p, stride) p += (u64)blockIdx.x * stride
#define EACH for (u32 i = threadIdx.x; i < c; i += blockDim.x)

#if KERNEL == KERNEL_rms_norm_f32
extern "C" __global__ void rms_norm_f32(const float* x, const float* w, float* y, u32 c, u32 xs, u32 ys, float eps) {
  ROW(x, xs); ROW(y, ys);
  float s = 0.f;
  EACH s += x[i] * x[i];
  const float r = rsqrtf(block_sum(s) / c + eps);
  EACH y[i] = x[i] * r * w[i];
}
#elif KERNEL == KERNEL_add_rms_norm_f32
// s = a + b, y = rms_norm(s) w. Either result may be null.
extern "C" __global__ void add_rms_norm_f32(const float* a, const float* b, const float* w, float* sum, float* y,
    u32 c, u32 as, u32 bs, u32 ss, u32 ys, float eps) {
  ROW(a, as); ROW(b, bs);
  float s = 0.f;
  EACH { const float v = a[i] + b[i]; s += v * v; }
  const float r = rsqrtf(block_sum(s) / c + eps);
  // A result may lie where an operand does: both are read before either is written.
  EACH {
    const float v = a[i] + b[i];
    if (sum) sum[(u64)blockIdx.x * ss + i] = v;
    if (y) y[(u64)blockIdx.x * ys + i] = v * r * w[i];
  }
}
#elif KERNEL == KERNEL_layer_norm_f32
extern "C" __global__ void layer_norm_f32(const float* x, const float* w, const float* b, float* y, u32 c, u32 xs, u32 ys, float eps) {
  ROW(x, xs); ROW(y, ys);
  float s = 0.f;
  EACH s += x[i];
  const float mean = block_sum(s) / c;
  s = 0.f;
  EACH { const float d = x[i] - mean; s += d * d; }
  const float r = rsqrtf(block_sum(s) / c + eps);
  EACH y[i] = (x[i] - mean) * r * w[i] + b[i];
}
#elif KERNEL == KERNEL_softmax_f32
extern "C" __global__ void softmax_f32(const float* x, float* y, u32 c, u32 xs, u32 ys) {
  ROW(x, xs); ROW(y, ys);
  float m = -inff;
  EACH m = fmaxf(m, x[i]);
  m = block_max(m);
  float s = 0.f;
  EACH s += expf(x[i] - m);
  s = block_sum(s);
  EACH y[i] = expf(x[i] - m) / s;
}
#elif KERNEL == KERNEL_softmax_grad_f32
extern "C" __global__ void softmax_grad_f32(const float* y, const float* dy, float* dx, u32 c, u32 ys, u32 ds, u32 xs) {
  ROW(y, ys); ROW(dy, ds); ROW(dx, xs);
  float s = 0.f;
  EACH s += y[i] * dy[i];
  s = block_sum(s);
  EACH dx[i] = y[i] * (dy[i] - s);
}
#else
// With r = rsqrt(mean(x²) + eps), g = dy w: dx = r g - x r³ mean(x g), plus a gradient past the norm.
extern "C" __global__ void rms_norm_grad_f32(const float* x, const float* w, const float* dy, const float* past, float* dx,
    u32 c, u32 xs, u32 ds, u32 ps, u32 os, float eps) {
  ROW(x, xs); ROW(dy, ds); ROW(dx, os);
  if (past) ROW(past, ps);
  float s = 0.f, d = 0.f;
  EACH { const float v = x[i]; s += v * v; d += v * dy[i] * w[i]; }
  const float r = rsqrtf(block_sum(s) / c + eps);
  const float k = block_sum(d) / c * r * r;
  EACH {
    const float v = (dy[i] * w[i] - x[i] * k) * r;
    dx[i] = past ? v + past[i] : v;
  }
}
extern "C" __global__ void inverse_rms(const float* x, float* inverse, u32 c, u32 xs, float eps) {
  ROW(x, xs);
  float s = 0.f;
  EACH s += x[i] * x[i];
  s = block_sum(s);
  if (threadIdx.x == 0) inverse[blockIdx.x] = rsqrtf(s / c + eps);
}
// dw = sum over rows of dy x r: chunks of 64 rows side by side, then joined in order.
extern "C" __global__ void weight_parts(const float* x, const float* dy, const float* inverse, float* part, u32 rows, u32 c, u32 xs, u32 ds) {
  const u32 col = blockIdx.x * 128 + threadIdx.x, last = min(rows, (blockIdx.y + 1) * 64);
  if (col >= c) return;
  float s = 0.f;
  for (u32 r = blockIdx.y * 64; r < last; ++r) s += dy[(u64)r * ds + col] * (x[(u64)r * xs + col] * inverse[r]);
  part[(u64)blockIdx.y * c + col] = s;
}
extern "C" __global__ void weight_join(const float* part, float* dw, u32 chunks, u32 c) {
  const u32 col = blockIdx.x * 128 + threadIdx.x;
  if (col >= c) return;
  float s = 0.f;
  for (u32 i = 0; i < chunks; ++i) s += part[(u64)i * c + col];
  dw[col] = s;
}
#endif
