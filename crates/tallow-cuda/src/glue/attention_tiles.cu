// Tiles of BT rows in f32, for the attention kernels without tensor cores: a thread makes MT x MT scores.
#define DS (DP + 4)
#define D4 ((D + 3) / 4 * 4)
#define MT (BT / 16)
#define PS (BT + 4)
// Rows first.. of a head into a tile, zeros past the end and past D.
template <class T> DEV void load_tile(float* tile, const T* head, u32 first, u32 limit, u32 stride) {
  for (u32 e = threadIdx.x; e < BT * DP; e += blockDim.x) {
    const u32 r = e / DP, c = e % DP;
    tile[r * DS + c] = first + r < limit && c < D ? ld(head + (u64)(first + r) * stride + c) : 0.f;
  }
}
// out[i][j] = row (ty * MT + i) of a · row (tx + 16 j) of b.
DEV void dots(const float* a, const float* b, float out[MT][MT], u32 tx, u32 ty) {
  for (int i = 0; i < MT; ++i)
    for (int j = 0; j < MT; ++j) out[i][j] = 0.f;
#pragma unroll 4
  for (int c = 0; c < D4; c += 4) {
    float4 p[MT], q[MT];
#pragma unroll
    for (int i = 0; i < MT; ++i) p[i] = *(const float4*)&a[(ty * MT + i) * DS + c];
#pragma unroll
    for (int j = 0; j < MT; ++j) q[j] = *(const float4*)&b[(tx + 16 * j) * DS + c];
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int j = 0; j < MT; ++j)
        out[i][j] += p[i].x * q[j].x + p[i].y * q[j].y + p[i].z * q[j].z + p[i].w * q[j].w;
  }
}
// acc[i][c] += sum over k of p[ty * MT + i][k] * tile[k][tx + 16 c].
DEV void accumulate(const float* p, const float* tile, float acc[MT][NC], u32 tx, u32 ty) {
#pragma unroll 2
  for (int k = 0; k < BT; k += 4) {
    float4 w[MT];
#pragma unroll
    for (int i = 0; i < MT; ++i) w[i] = *(const float4*)&p[(ty * MT + i) * PS + k];
#pragma unroll
    for (int c = 0; c < NC; ++c) {
      const float* v = tile + k * DS + tx + 16 * c;
      const float v0 = v[0], v1 = v[DS], v2 = v[2 * DS], v3 = v[3 * DS];
#pragma unroll
      for (int i = 0; i < MT; ++i) acc[i][c] += w[i].x * v0 + w[i].y * v1 + w[i].z * v2 + w[i].w * v3;
    }
  }
}
DEV float half_warp_sum(float v) {
  for (int o = 8; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}
DEV float half_warp_max(float v) {
  for (int o = 8; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, o));
  return v;
}
// What the queries first.. of a batch row see, one by one and together.
DEV void ranges(Range* each, u32* lo, u32* hi, const u32* pos, const u32* starts, u32 b, u32 t, u32 first, u32 s) {
  __syncthreads();
  if (threadIdx.x == 0) { *lo = ~0u; *hi = 0; }
  __syncthreads();
  if (threadIdx.x < BT) {
    const u32 i = first + threadIdx.x;
    const Range r = i < t ? seen(pos, starts, b * t + i, s) : Range{0, 0};
    each[threadIdx.x] = r;
    if (r.hi > r.lo) { atomicMin(lo, r.lo); atomicMax(hi, r.hi); }
  }
  __syncthreads();
}
