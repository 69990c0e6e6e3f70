// c[m, n] = alpha sum_k a[m, k] b[k, n] for matrices of any strides and any float type; sums in f32.
// A block makes 64 x 64 of the result, a thread 4 x 4 of it. For what the library does not take; bound by shared memory.
extern "C" __global__ void __launch_bounds__(256) matmul(const A* a, const B* b, C* c, u32 m, u32 n, u32 k,
    u32 ar, u32 ac, u32 br, u32 bc, u32 cr, u32 cc, u32 n0, u32 n1, u32 n2,
    u32 a0, u32 a1, u32 a2, u32 b0, u32 b1, u32 b2, u32 c0, u32 c1, u32 c2, float alpha) {
  __shared__ float x[16][68], w[16][68];
  u32 z = blockIdx.z;
  const u32 i2 = z % n2; z /= n2;
  const u32 i1 = z % n1; z /= n1;
  a += (u64)z * a0 + (u64)i1 * a1 + (u64)i2 * a2;
  b += (u64)z * b0 + (u64)i1 * b1 + (u64)i2 * b2;
  c += (u64)z * c0 + (u64)i1 * c1 + (u64)i2 * c2;
  const u32 row0 = blockIdx.y * 64, col0 = blockIdx.x * 64, t = threadIdx.x, tx = t % 16, ty = t / 16;
  float acc[4][4] = {};
  for (u32 k0 = 0; k0 < k; k0 += 16) {
    __syncthreads();
    for (u32 e = t; e < 1024; e += 256) {
      // Threads run along whichever axis is dense.
      const u32 r = ac == 1 ? e / 16 : e % 64, s = ac == 1 ? e % 16 : e / 64;
      x[s][r] = row0 + r < m && k0 + s < k ? ld(a + (u64)(row0 + r) * ar + (u64)(k0 + s) * ac) : 0.f;
      const u32 d = bc == 1 ? e % 64 : e / 16, u = bc == 1 ? e / 64 : e % 16;
      w[u][d] = col0 + d < n && k0 + u < k ? ld(b + (u64)(k0 + u) * br + (u64)(col0 + d) * bc) : 0.f;
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < 16; ++s) {
      float p[4], q[4];
      for (int i = 0; i < 4; ++i) { p[i] = x[s][ty * 4 + i]; q[i] = w[s][tx * 4 + i]; }
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) acc[i][j] += p[i] * q[j];
    }
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      const u32 r = row0 + ty * 4 + i, s = col0 + tx * 4 + j;
      if (r < m && s < n) st(c + (u64)r * cr + (u64)s * cc, alpha * acc[i][j]);
    }
}
