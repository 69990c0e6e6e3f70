// Rows by number. One thread an element (gather), one block a row (the others).
#define KERNEL_gather 1
#define KERNEL_scatter 2
#define KERNEL_kv 3

#if KERNEL == KERNEL_gather
extern "C" __global__ void gather(const X* table, const u32* ids, Y* y, u32 n, u32 c, u32 v, u32 xs, u32 ys) {
  for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    const u32 row = i / c, col = i - row * c, id = ids[row];
    st(y + (u64)row * ys + col, id < v ? ld(table + (u64)id * xs + col) : 0.f);
  }
}
#elif KERNEL == KERNEL_scatter
extern "C" __global__ void clear(Y* y, u32 n, u32 c, u32 ys) {
  for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) st(y + (u64)(i / c) * ys + i % c, 0.f);
}
// The block of the first row with an id adds up all rows with that id, in order.
extern "C" __global__ void scatter(const u32* ids, const X* x, Y* y, u32 n, u32 c, u32 v, u32 xs, u32 ys) {
  const u32 k = blockIdx.x, id = ids[k];
  if (id >= v) return;
  int before = 0;
  for (u32 i = threadIdx.x; i < k; i += blockDim.x) before |= ids[i] == id;
  if (__syncthreads_or(before)) return;
  for (u32 col = threadIdx.x; col < c; col += blockDim.x) {
    float sum = ld(x + (u64)k * xs + col);
    for (u32 i = k + 1; i < n; ++i)
      if (ids[i] == id) sum += ld(x + (u64)i * xs + col);
    st(y + (u64)id * ys + col, sum);
  }
}
#else
// The old cache; not launched where the new one is in its place.
extern "C" __global__ void keep(const Y* old, Y* cache, u32 n) {
  for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) cache[i] = old[i];
}
// One block a token. Of equal positions the last wins.
extern "C" __global__ void kv(const X* x, const u32* pos, Y* cache, u32 s, u32 t, u32 h, u32 d, u32 xb, u32 xt, u32 xh) {
  const u32 b = blockIdx.x / t, i = blockIdx.x % t, p = pos[blockIdx.x];
  if (p >= s) return;
  int later = 0;
  for (u32 j = i + 1 + threadIdx.x; j < t; j += blockDim.x) later |= pos[b * t + j] == p;
  if (__syncthreads_or(later)) return;
  for (u32 e = threadIdx.x; e < h * d; e += blockDim.x)
    st(cache + ((u64)b * s + p) * h * d + e, ld(x + (u64)b * xb + (u64)i * xt + (u64)(e / d) * xh + e % d));
}
#endif
