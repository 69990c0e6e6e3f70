// A linear for M <= 8 rows in one launch: the first blocks make h = x Aᵀ, one block a rank; the others make every output
// with SPLIT warps, whose sum runs over k and, when h is there, on over the adapter's tail. Bound by reading the weights once.
// Constants: M, K, strides of rows XS, YS, HS, OUTPUTS, RANKS; W is the type of the weights.
template <class T> struct Pack { static const int N = 4; };
template <> struct Pack<bf16> { static const int N = 8; };
template <> struct Pack<f16> { static const int N = 8; };
DEV void unpack(const float* p, float* v) {
  const float4 q = *(const float4*)p;
  v[0] = q.x; v[1] = q.y; v[2] = q.z; v[3] = q.w;
}
DEV void unpack(const bf16* p, float* v) {
  const uint4 q = *(const uint4*)p;
  const u32 w[4] = {q.x, q.y, q.z, q.w};
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = __uint_as_float(w[i] << 16);
    v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
  }
}
DEV void unpack(const f16* p, float* v) {
  const uint4 q = *(const uint4*)p;
  const f16* h = (const f16*)&q;
  for (int i = 0; i < 8; ++i) v[i] = ld(h + i);
}
// What one of `lanes` threads has of w · x, for all rows.
template <class T> DEV void dot(const T* w, const float* x, float* acc, u32 lane, u32 lanes) {
  const int N = Pack<T>::N;
  if (K % N == 0 && XS % 4 == 0 && (((u64)w | (u64)x) & 15) == 0) {
#pragma unroll 4
    for (u32 i = lane * N; i < K; i += lanes * N) {
      float a[N], b[N];
      unpack(w + i, a);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        for (int e = 0; e < N; e += 4) unpack(x + (u64)m * XS + i + e, b + e);
        for (int e = 0; e < N; ++e) acc[m] += a[e] * b[e];
      }
    }
  } else {
    for (u32 i = lane; i < K; i += lanes) {
      const float a = ld(w + i);
      for (int m = 0; m < M; ++m) acc[m] += a * x[(u64)m * XS + i];
    }
  }
}
// Each lane's part of s h · b: the sum goes on over the ranks.
template <int R> DEV void tail(const float* b, const float* h, float s, float* acc, u32 lane, u32 lanes) {
  for (u32 r = lane; r < R; r += lanes) {
    const float v = s * b[r];
    for (int m = 0; m < M; ++m) acc[m] += v * *(const volatile float*)(h + (u64)m * HS + r);
  }
}
#if RANKS > 0
// Rows of h that are ready, and blocks that are done; both 0 between launches, which come one after another.
__device__ u32 ready, done;
// Row `o` of h = x Aᵀ, by the whole block.
DEV void down(u32 o, const float* x, float* h PARAMS) {
  const u32 lane = threadIdx.x, lanes = 256;
  float acc[M] = {};
  PICK_DOWN
  for (int m = 0; m < M; ++m) {
    const float v = block_sum(acc[m]);
    if (threadIdx.x == 0) h[(u64)m * HS + o] = v;
  }
  if (threadIdx.x == 0) { __threadfence(); atomicAdd(&ready, 1u); }
}
// The first RANKS blocks make h and wait for nothing; blocks start in the order of their numbers, so those that wait
// for h always get it.
DEV void await() {
  if (threadIdx.x == 0) {
    while (*(volatile u32*)&ready < RANKS) {}
    __threadfence();
  }
  __syncthreads();
}
DEV void finish() {
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd(&done, 1u) == gridDim.x - 1) { ready = 0; done = 0; __threadfence(); }
}
#define AWAIT await()
#define FINISH finish()
#else
#define AWAIT
#define FINISH
#endif
extern "C" __global__ void __launch_bounds__(256) up(const float* x, float* y, float* h PARAMS) {
#if RANKS > 0
  if (blockIdx.x < RANKS) { down(blockIdx.x, x, h NAMES); finish(); return; }
#endif
  const u32 block = blockIdx.x - RANKS;
  const u32 warp = threadIdx.x >> 5, o = block * (8 / SPLIT) + warp / SPLIT;
  const u32 lane = threadIdx.x & (32 * SPLIT - 1), lanes = 32 * SPLIT;
  float acc[M] = {}, add = 0.f;
  PICK_UP
  AWAIT;
  PICK_TAIL
  float mine = 0.f;
#if SPLIT > 1
  __shared__ float part[8][M];
  for (int m = 0; m < M; ++m) {
    const float v = warp_sum(acc[m]);
    if ((threadIdx.x & 31) == 0) part[warp][m] = v;
  }
  __syncthreads();
  if (lane < M)
    for (int i = 0; i < SPLIT; ++i) mine += part[warp / SPLIT * SPLIT + i][lane];
#else
  for (int m = 0; m < M; ++m) {
    const float v = warp_sum(acc[m]);
    if (lane == m) mine = v;
  }
#endif
  if (lane < M && o < OUTPUTS) {
    PAST
    y[(u64)lane * YS + o] = mine + add;
  }
  FINISH;
}
