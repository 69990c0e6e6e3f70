// nll = logsumexp(l) - l[target] and dl = softmax(l) - onehot(target), one block a row. A target at or past `v` is not
// counted: both are 0. L, G: types of l and dl, which
// may lie in place of l where they are the same.
// Bound by reading the logits twice and writing the gradient once.
// Eight at a time; FAST where the rows lie so.
DEV void write(float* p, const float* v) { st4(p, make_float4(v[0], v[1], v[2], v[3])); st4(p + 4, make_float4(v[4], v[5], v[6], v[7])); }
DEV void write(bf16* p, const float* v) {
  *(uint4*)p = make_uint4(pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7]));
}
DEV void row(const L* l, u32 target, float* nll, G* dl, u32 v, bool fast) {
  const u32 wide = fast ? v / 8 * 8 : 0;
  float m = -inff, s = 0.f;
  for (u32 i = threadIdx.x * 8; i < wide; i += blockDim.x * 8) {
    float x[8], top = -inff;
    ld8(l + i, x);
#pragma unroll
    for (int e = 0; e < 8; ++e) top = fmaxf(top, x[e]);
    if (top > m) { s *= exp_of(l, m - top); m = top; }
    const float shift = m == -inff ? 0.f : m;
#pragma unroll
    for (int e = 0; e < 8; ++e) s += exp_of(l, x[e] - shift);
  }
  for (u32 i = wide + threadIdx.x; i < v; i += blockDim.x) {
    const float x = ld(l + i);
    if (x > m) { s = s * exp_of(l, m - x) + 1.f; m = x; } else s += exp_of(l, x - m);
  }
  const float top = block_max(m);
  s = block_sum(m == -inff ? 0.f : s * exp_of(l, m - top));
  const bool counted = target < v;
  if (threadIdx.x == 0 && nll) *nll = counted ? logf(s) - (ld(l + target) - top) : 0.f;
  if (!dl) return;
  // The target's logit was read above, before any thread writes.
  __syncthreads();
  const float scale = counted ? 1.f / s : 0.f;
  for (u32 i = threadIdx.x * 8; i < wide; i += blockDim.x * 8) {
    float x[8];
    ld8(l + i, x);
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = counted ? exp_of(l, x[e] - top) * scale - (i + e == target ? 1.f : 0.f) : 0.f;
    write(dl + i, x);
  }
  for (u32 i = wide + threadIdx.x; i < v; i += blockDim.x)
    st(dl + i, counted ? exp_of(l, ld(l + i) - top) * scale - (i == target ? 1.f : 0.f) : 0.f);
}
extern "C" __global__ void __launch_bounds__(512) cross_entropy(const L* l, const u32* target, float* nll, G* dl, u32 v, u32 ls, u32 ds, u32 first) {
  const u32 r = blockIdx.x;
  const bool fast = ((ls | ds) & 7) == 0 && (((u64)l | (u64)dl) & 15) == 0;
  row(l + (u64)r * ls, target[first + r], nll ? nll + first + r : nll, dl ? dl + (u64)r * ds : dl, v, fast);
}
