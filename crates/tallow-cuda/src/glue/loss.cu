// nll = logsumexp(l) - l[target] and dl = softmax(l) - onehot(target), one block a row. A target at or past `v` is not
// counted: both are 0. G is the type of dl, which may lie in place of l where it is float.
// Bound by reading the logits twice and writing the gradient once.
DEV void row(const float* l, u32 target, float* nll, G* dl, u32 v) {
  float m = -inff, s = 0.f;
  for (u32 i = threadIdx.x; i < v; i += blockDim.x) {
    const float x = l[i];
    if (x > m) { s = s * expf(m - x) + 1.f; m = x; } else s += expf(x - m);
  }
  const float top = block_max(m);
  s = block_sum(m == -inff ? 0.f : s * expf(m - top));
  const bool counted = target < v;
  if (threadIdx.x == 0 && nll) *nll = counted ? logf(s) - (l[target] - top) : 0.f;
  if (!dl) return;
  // The target's logit was read above, before any thread writes.
  __syncthreads();
  const float scale = 1.f / s;
  for (u32 i = threadIdx.x; i < v; i += blockDim.x)
    st(dl + i, counted ? expf(l[i] - top) * scale - (i == target ? 1.f : 0.f) : 0.f);
}
extern "C" __global__ void __launch_bounds__(512) cross_entropy(const float* l, const u32* target, float* nll, G* dl, u32 v, u32 ls, u32 ds, u32 first) {
  const u32 r = blockIdx.x;
  row(l + (u64)r * ls, target[first + r], nll ? nll + first + r : nll, dl ? dl + (u64)r * ds : dl, v);
}
