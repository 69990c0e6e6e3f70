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
// y = g sigmoid(g) u
#define WIDE(...) ((((__VA_ARGS__) & 3) == 0))
DEV float silu(float a) { return a / (1.f + expf(-a)); }
extern "C" __global__ void swiglu_f32(const float* g, const float* u, float* y, u32 n, u32 c, u32 gs, u32 us, u32 ys) {
  if (WIDE(c | gs | us | ys) && (((u64)g | (u64)u | (u64)y) & 15) == 0) {
    const u32 q = c / 4;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n / 4; i += gridDim.x * blockDim.x) {
      const u32 row = i / q, col = (i - row * q) * 4;
      const float4 a = *(const float4*)(g + (u64)row * gs + col), b = *(const float4*)(u + (u64)row * us + col);
      *(float4*)(y + (u64)row * ys + col) = make_float4(silu(a.x) * b.x, silu(a.y) * b.y, silu(a.z) * b.z, silu(a.w) * b.w);
    }
    return;
  }
  EACH {
    ROW;
    const float a = g[(u64)row * gs + col];
    y[(u64)row * ys + col] = a / (1.f + expf(-a)) * u[(u64)row * us + col];
  }
}
#elif KERNEL == KERNEL_swiglu_grad
// With s = sigmoid(g): dg = dy u s (1 + g (1 - s)), du = dy g s. A result nobody wants is null.
extern "C" __global__ void swiglu_grad_f32(const float* g, const float* u, const float* dy, float* dg, float* du,
    u32 n, u32 c, u32 gs, u32 us, u32 ds, u32 dgs, u32 dus) {
  if (((c | gs | us | ds | dgs | dus) & 3) == 0 && (((u64)g | (u64)u | (u64)dy | (u64)dg | (u64)du) & 15) == 0) {
    const u32 q = c / 4;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n / 4; i += gridDim.x * blockDim.x) {
      const u32 row = i / q, col = (i - row * q) * 4;
      const float4 va = *(const float4*)(g + (u64)row * gs + col), vb = *(const float4*)(u + (u64)row * us + col);
      const float4 vd = *(const float4*)(dy + (u64)row * ds + col);
      const float a[4] = {va.x, va.y, va.z, va.w}, b[4] = {vb.x, vb.y, vb.z, vb.w}, d[4] = {vd.x, vd.y, vd.z, vd.w};
      float p[4], r[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float s = 1.f / (1.f + expf(-a[e]));
        p[e] = d[e] * b[e] * (s * (1.f + a[e] * (1.f - s)));
        r[e] = d[e] * (a[e] * s);
      }
      if (dg) *(float4*)(dg + (u64)row * dgs + col) = make_float4(p[0], p[1], p[2], p[3]);
      if (du) *(float4*)(du + (u64)row * dus + col) = make_float4(r[0], r[1], r[2], r[3]);
    }
    return;
  }
  EACH {
    ROW;
    const float a = g[(u64)row * gs + col], b = u[(u64)row * us + col], d = dy[(u64)row * ds + col];
    const float s = 1.f / (1.f + expf(-a));
    if (dg) dg[(u64)row * dgs + col] = d * b * (s * (1.f + a * (1.f - s)));
    if (du) du[(u64)row * dus + col] = d * (a * s);
  }
}
#elif KERNEL == KERNEL_adamw
// hyper: lr, beta1, beta2, eps, weight decay, 1 - beta1^t, sqrt(1 - beta2^t), gradient scale. All dense.
extern "C" __global__ void adamw_f32(const float* p, const float* g, const float* m, const float* v, const float* h,
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
extern "C" __global__ void dropout_f32(const float* x, const u32* seed, float* y, u32 n, u32 c, u32 xs, u32 ys, u32 id, float keep) {
  const float up = 1.f / keep;
  EACH {
    ROW;
    const float v = x[(u64)row * xs + col] * up;
    y[(u64)row * ys + col] = uniform(seed[0], seed[1], id, i) < keep ? v : 0.f;
  }
}
#elif KERNEL == KERNEL_rope
// Element i of a head turns with element i + half by pos * inv_freq[i].
extern "C" __global__ void rope_f32(const float* x, const u32* pos, const float* f, float* y, u32 n, u32 t, u32 h,
    u32 half, u32 xb, u32 xt, u32 xh, u32 yb, u32 yt, u32 yh, float sign) {
  EACH {
    const u32 e = i % half, r = i / half, head = r % h, token = r / h, b = token / t, j = token % t;
    const float angle = (float)pos[token] * f[e];
    const float co = cosf(angle), si = sign * sinf(angle);
    const float* p = x + (u64)b * xb + (u64)j * xt + (u64)head * xh + e;
    float* q = y + (u64)b * yb + (u64)j * yt + (u64)head * yh + e;
    const float lo = p[0], hi = p[half];
    q[0] = lo * co - hi * si;
    q[half] = hi * co + lo * si;
  }
}
#endif
