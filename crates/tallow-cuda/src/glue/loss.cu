// nll = logsumexp(l) - l[target] and dl = softmax(l) - onehot(target), one block a row; dl may lie in place of l.
// A target at or past `v` is not counted: both are 0. Bound by reading the logits three times, writing them once.
DEV void row(const float* l, u32 target, float* nll, float* dl, u32 v) {
  float m = -inff;
  for (u32 i = threadIdx.x; i < v; i += blockDim.x) m = fmaxf(m, l[i]);
  m = block_max(m);
  float s = 0.f;
  for (u32 i = threadIdx.x; i < v; i += blockDim.x) s += expf(l[i] - m);
  s = block_sum(s);
  const bool counted = target < v;
  if (threadIdx.x == 0 && nll) *nll = counted ? logf(s) - (l[target] - m) : 0.f;
  if (!dl) return;
  // The target's logit was read above, before any thread writes.
  __syncthreads();
  for (u32 i = threadIdx.x; i < v; i += blockDim.x) dl[i] = counted ? expf(l[i] - m) / s - (i == target ? 1.f : 0.f) : 0.f;
}
extern "C" __global__ void __launch_bounds__(512) cross_entropy(const float* l, const u32* target, float* nll, float* dl, u32 v, u32 ls, u32 ds) {
  const u32 r = blockIdx.x;
  row(l + (u64)r * ls, target[r], nll ? nll + r : nll, dl ? dl + (u64)r * ds : dl, v);
}
extern "C" __global__ void __launch_bounds__(512) cross_entropy_chunk(const float* l, const u32* target, float* nll, float* dl, u32 v, u32 ls, u32 ds, u32 first) {
  const u32 r = blockIdx.x;
  row(l + (u64)r * ls, target[first + r], nll + first + r, dl ? dl + (u64)r * ds : dl, v);
}
