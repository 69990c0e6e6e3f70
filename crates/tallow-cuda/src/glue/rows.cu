// One block a row of `c` elements; a row stride for each operand and result. Sums in f32 over a block in one order.
// Bound by bandwidth: a row is read again from the cache nearest to the block.
// ROWS: there are so many rows that a warp takes one, eight a block: no row waits for the warps of another.
#define KERNEL_rms_norm 1
#define KERNEL_add_rms_norm_f32 2
#define KERNEL_layer_norm_f32 3
#define KERNEL_softmax_f32 4
#define KERNEL_softmax_grad_f32 5
#define KERNEL_rms_norm_grad 6
#define KERNEL_top_f32 7
#ifdef ROWS
#define AT (blockIdx.x * 8 + (threadIdx.x >> 5))
#define LANE (threadIdx.x & 31)
#define LANES 32u
#define SUM warp_sum
#define PAST_END (AT >= ROWS)
#else
#define AT blockIdx.x
#define LANE threadIdx.x
#define LANES blockDim.x
#define SUM block_sum
#define PAST_END false
#endif
#define ROW(p, stride) p += (u64)AT * stride
#define EACH for (u32 i = LANE; i < c; i += LANES)
#define EACH4 _Pragma("unroll 4") for (u32 i = LANE * 4; i < c; i += LANES * 4)

#if KERNEL == KERNEL_rms_norm
// X, Y: types of operand and result.
extern "C" __global__ void rms_norm(const X* x, const float* w, Y* y, u32 c, u32 xs, u32 ys, float eps) {
  if (PAST_END) return;
  const bool wide = ((c | xs | ys) & 3) == 0 && aligned4(x) && aligned4(w) && aligned4(y);
  ROW(x, xs); ROW(y, ys);
  float s = 0.f;
  if (wide) {
    EACH4 { const float4 v = ld4(x + i); s += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }
    const float r = rsqrtf(SUM(s) / c + eps);
    EACH4 {
      const float4 v = ld4(x + i), k = ld4(w + i);
      st4(y + i, make_float4(v.x * r * k.x, v.y * r * k.y, v.z * r * k.z, v.w * r * k.w));
    }
    return;
  }
  EACH { const float v = ld(x + i); s += v * v; }
  const float r = rsqrtf(SUM(s) / c + eps);
  EACH st(y + i, ld(x + i) * r * w[i]);
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
#elif KERNEL == KERNEL_top_f32
// y = [index of the largest of c values, the first of equals; that value]. With a NaN the index is c.
DEV void better(float& v, u32& at, float w, u32 other) {
  if (w > v || (w == v && other < at)) { v = w; at = other; }
}
extern "C" __global__ void __launch_bounds__(1024) top_f32(const float* x, float* y, u32 c, u32 xs, u32 ys) {
  __shared__ float values[32];
  __shared__ u32 places[32];
  GRID_WAIT;
  ROW(x, xs); ROW(y, ys);
  float v = -inff;
  u32 at = c;
  int bad = 0;
  const bool wide = ((u64)x & 15) == 0;
  for (u32 i = threadIdx.x * 4; i < c; i += blockDim.x * 4) {
    float w[4];
    if (wide && i + 4 <= c) {
      const float4 q = *(const float4*)(x + i);
      w[0] = q.x; w[1] = q.y; w[2] = q.z; w[3] = q.w;
    } else
      for (u32 e = 0; e < 4; ++e) w[e] = i + e < c ? x[i + e] : -inff;
    for (u32 e = 0; e < 4; ++e) {
      bad |= w[e] != w[e];
      if (i + e < c) better(v, at, w[e], i + e);
    }
  }
  bad = __syncthreads_or(bad);
  for (int o = 16; o; o >>= 1) better(v, at, __shfl_xor_sync(~0u, v, o), __shfl_xor_sync(~0u, at, o));
  if ((threadIdx.x & 31) == 0) { values[threadIdx.x >> 5] = v; places[threadIdx.x >> 5] = at; }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  v = values[threadIdx.x];
  at = places[threadIdx.x];
  for (int o = 16; o; o >>= 1) better(v, at, __shfl_xor_sync(~0u, v, o), __shfl_xor_sync(~0u, at, o));
  if (threadIdx.x == 0) { y[0] = bad ? (float)c : (float)at; y[1] = v; }
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
// X, D, R, Y: types of x, dy, past, dx.
extern "C" __global__ void rms_norm_grad(const X* x, const float* w, const D* dy, const R* past, Y* dx,
    u32 c, u32 xs, u32 ds, u32 ps, u32 os, float eps) {
  if (PAST_END) return;
  const bool wide = ((c | xs | ds | ps | os) & 3) == 0 && aligned4(x) && aligned4(w) && aligned4(dy) && aligned4(past) && aligned4(dx);
  ROW(x, xs); ROW(dy, ds); ROW(dx, os);
  if (past) ROW(past, ps);
  float s = 0.f, d = 0.f;
  if (wide) {
    EACH4 {
      const float4 v = ld4(x + i), g = ld4(dy + i), k = ld4(w + i);
      s += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
      d += v.x * g.x * k.x + v.y * g.y * k.y + v.z * g.z * k.z + v.w * g.w * k.w;
    }
    const float r = rsqrtf(SUM(s) / c + eps);
    const float q = SUM(d) / c * r * r;
    EACH4 {
      const float4 v = ld4(x + i), g = ld4(dy + i), k = ld4(w + i);
      float4 p = make_float4(0.f, 0.f, 0.f, 0.f);
      if (past) p = ld4(past + i);
      st4(dx + i, make_float4((g.x * k.x - v.x * q) * r + p.x, (g.y * k.y - v.y * q) * r + p.y,
                              (g.z * k.z - v.z * q) * r + p.z, (g.w * k.w - v.w * q) * r + p.w));
    }
    return;
  }
  EACH { const float v = ld(x + i); s += v * v; d += v * ld(dy + i) * w[i]; }
  const float r = rsqrtf(SUM(s) / c + eps);
  const float k = SUM(d) / c * r * r;
  EACH {
    const float v = (ld(dy + i) * w[i] - ld(x + i) * k) * r;
    st(dx + i, past ? v + ld(past + i) : v);
  }
}
extern "C" __global__ void inverse_rms(const X* x, float* inverse, u32 c, u32 xs, float eps) {
  if (PAST_END) return;
  ROW(x, xs);
  float s = 0.f;
  EACH { const float v = ld(x + i); s += v * v; }
  s = SUM(s);
  if (LANE == 0) inverse[AT] = rsqrtf(s / c + eps);
}
// dw = sum over rows of dy x r: chunks of 64 rows side by side, then joined in order.
extern "C" __global__ void weight_parts(const X* x, const D* dy, const float* inverse, float* part, u32 rows, u32 c, u32 xs, u32 ds) {
  const u32 col = blockIdx.x * 128 + threadIdx.x, last = min(rows, (blockIdx.y + 1) * 64);
  if (col >= c) return;
  float s = 0.f;
  for (u32 r = blockIdx.y * 64; r < last; ++r) s += ld(dy + (u64)r * ds + col) * (ld(x + (u64)r * xs + col) * inverse[r]);
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
