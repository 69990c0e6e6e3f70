// Composites whose elements stand alone, over rows [rows, c] with a row stride for each operand.
// One thread an element, walking on by the size of the grid. Bound by bandwidth.
#define KERNEL_swiglu 1
#define KERNEL_swiglu_grad 2
#define KERNEL_adamw 3
#define KERNEL_dropout 4
#define KERNEL_rope 5
#define EACH for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
#define ROW const u32 row = i / c, col = i - row * c

#if KERNEL == KERNEL_swiglu
// y = g sigmoid(g) u. X: type of g and u, Y: of y.
DEV float silu(float a) { return ratio((const X*)0, a, 1.f + exp_of((const X*)0, -a)); }
extern "C" __global__ void swiglu(const X* g, const X* u, Y* y, u32 n, u32 c, u32 gs, u32 us, u32 ys) {
  if (((c | gs | us | ys) & 3) == 0 && aligned4(g) && aligned4(u) && aligned4(y)) {
    const u32 q = c / 4;
#pragma unroll 2
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n / 4; i += gridDim.x * blockDim.x) {
      const u32 row = i / q, col = (i - row * q) * 4;
      const float4 a = ld4(g + (u64)row * gs + col), b = ld4(u + (u64)row * us + col);
      st4(y + (u64)row * ys + col, make_float4(silu(a.x) * b.x, silu(a.y) * b.y, silu(a.z) * b.z, silu(a.w) * b.w));
    }
    return;
  }
  EACH {
    ROW;
    st(y + (u64)row * ys + col, silu(ld(g + (u64)row * gs + col)) * ld(u + (u64)row * us + col));
  }
}
#elif KERNEL == KERNEL_swiglu_grad
// With s = sigmoid(g): dg = dy u s (1 + g (1 - s)), du = dy g s. A result nobody wants is null.
// X: type of g and u, D: of dy, Y: of dg and du.
DEV float2 grads(float a, float b, float d) {
  const float s = ratio((const X*)0, 1.f, 1.f + exp_of((const X*)0, -a));
  return make_float2(d * b * (s * (1.f + a * (1.f - s))), d * (a * s));
}
extern "C" __global__ void swiglu_grad(const X* g, const X* u, const D* dy, Y* dg, Y* du,
    u32 n, u32 c, u32 gs, u32 us, u32 ds, u32 dgs, u32 dus) {
  if (((c | gs | us | ds | dgs | dus) & 3) == 0 && aligned4(g) && aligned4(u) && aligned4(dy) && aligned4(dg) && aligned4(du)) {
    const u32 q = c / 4;
#pragma unroll 2
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n / 4; i += gridDim.x * blockDim.x) {
      const u32 row = i / q, col = (i - row * q) * 4;
      const float4 a = ld4(g + (u64)row * gs + col), b = ld4(u + (u64)row * us + col), d = ld4(dy + (u64)row * ds + col);
      const float2 x = grads(a.x, b.x, d.x), y = grads(a.y, b.y, d.y), z = grads(a.z, b.z, d.z), w = grads(a.w, b.w, d.w);
      if (dg) st4(dg + (u64)row * dgs + col, make_float4(x.x, y.x, z.x, w.x));
      if (du) st4(du + (u64)row * dus + col, make_float4(x.y, y.y, z.y, w.y));
    }
    return;
  }
  EACH {
    ROW;
    const float2 v = grads(ld(g + (u64)row * gs + col), ld(u + (u64)row * us + col), ld(dy + (u64)row * ds + col));
    if (dg) st(dg + (u64)row * dgs + col, v.x);
    if (du) st(du + (u64)row * dus + col, v.y);
  }
}
#elif KERNEL == KERNEL_adamw
// hyper: lr, beta1, beta2, eps, weight decay, 1 - beta1^t, sqrt(1 - beta2^t), gradient scale. All dense.
extern "C" __global__ void adamw(const float* p, const float* g, const float* m, const float* v, const float* h,
    float* p2, float* m2, float* v2, u32 n, u32 c, u32, u32, u32) {
  const float lr = h[0], b1 = h[1], b2 = h[2], eps = h[3], wd = h[4], bc1 = h[5], rbc2 = h[6], scale = h[7];
  const float step = lr / bc1, keep = 1.f - lr * wd;
  EACH {
    const float d = g[i] * scale;
    const float a = m[i] * b1 + d * (1.f - b1), b = v[i] * b2 + d * d * (1.f - b2);
    p2[i] = p[i] * keep - a / (sqrtf(b) / rbc2 + eps) * step;
    m2[i] = a;
    v2[i] = b;
  }
}
#elif KERNEL == KERNEL_dropout
extern "C" __global__ void dropout(const X* x, const u32* seed, Y* y, u32 n, u32 c, u32 xs, u32 ys, u32 id, float keep) {
  const float up = 1.f / keep;
  EACH {
    ROW;
    const float v = ld(x + (u64)row * xs + col) * up;
    st(y + (u64)row * ys + col, uniform(seed[0], seed[1], id, i) < keep ? v : 0.f);
  }
}
#elif KERNEL == KERNEL_rope
// Element i of a head turns with element i + half by pos * inv_freq[i]. A thread turns it in SPAN heads: the angle is the same.
extern "C" __global__ void rope(const X* x, const u32* pos, const float* f, Y* y, u32 n, u32 t, u32 h,
    u32 half, u32 xb, u32 xt, u32 xh, u32 yb, u32 yt, u32 yh, float sign) {
  const u32 spans = (h + SPAN - 1) / SPAN;
  EACH {
    const u32 e = i % half, r = i / half, first = r % spans * SPAN, token = r / spans, b = token / t, j = token % t;
    const float angle = (float)pos[token] * f[e];
    float si, co;
    sincosf(angle, &si, &co);
    si *= sign;
    const X* p = x + (u64)b * xb + (u64)j * xt + (u64)first * xh + e;
    Y* q = y + (u64)b * yb + (u64)j * yt + (u64)first * yh + e;
#pragma unroll
    for (u32 k = 0; k < SPAN; ++k) {
      if (first + k >= h) break;
      const float lo = ld(p + (u64)k * xh), hi = ld(p + (u64)k * xh + half);
      st(q + (u64)k * yh, lo * co - hi * si);
      st(q + (u64)k * yh + half, hi * co + lo * si);
    }
  }
}
#endif
