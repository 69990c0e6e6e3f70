// What a large product leaves out, added to its result in one pass: bias, residual, and the low-rank part from rows
// of h [m, RANK], for the m rows from `first` on. A block takes 16 rows and 128 columns, a thread one column: its coefficients are read once.
// Bound by reading and writing the result once.
#define TILE 16
extern "C" __global__ void __launch_bounds__(128, 6) low_rank(float* y, const float* hidden, u32 first, u32 m, u32 ys, u32 hs,
    const float* past, u32 ps PARAMS) {
  __shared__ float h[TILE][RANK + 1];
  y += (u64)first * ys;
  past = past ? past + (u64)first * ps : past;
  const u32 o = blockIdx.x * 128 + threadIdx.x, row0 = blockIdx.y * TILE;
  for (u32 e = threadIdx.x; e < TILE * RANK; e += 128) {
    const u32 r = e / (RANK > 0 ? RANK : 1), q = e % (RANK > 0 ? RANK : 1);
    h[r][q] = row0 + r < m ? hidden[(u64)(row0 + r) * hs + q] : 0.f;
  }
  __syncthreads();
  if (o >= OUTPUTS) return;
  float acc[TILE] = {};
  BODY
#pragma unroll
  for (int e = 0; e < TILE; ++e) {
    const u32 r = row0 + e;
    if (r < m) {
      float* p = y + (u64)r * ys + o;
      *p += acc[e] + (past ? past[(u64)r * ps + o] : 0.f);
    }
  }
}
