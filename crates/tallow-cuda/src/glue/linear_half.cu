// Around the bf16 products of a linear with many rows.
// `narrow`: rows of f32 to bf16 with another pitch. `tail`: h into the columns behind them, zeros after it.
// `small`: the adapter's matrices to bf16, where the products read them; generated for each linear.
// Each is bound by the bytes it moves.
extern "C" __global__ void __launch_bounds__(256) narrow(const float* x, u16* y, u32 m, u32 c, u32 xs, u32 pitch) {
  const bool wide = ((c | xs | pitch) & 3) == 0 && (((u64)x & 15) | ((u64)y & 7)) == 0;
  if (wide) {
    const u32 q = c / 4, n = m * q;
    for (u32 i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256) {
      const u32 r = i / q, k = (i - r * q) * 4;
      const float4 v = *(const float4*)(x + (u64)r * xs + k);
      const uint2 w = {(u32)to_bf16(v.x) | (u32)to_bf16(v.y) << 16, (u32)to_bf16(v.z) | (u32)to_bf16(v.w) << 16};
      *(uint2*)(y + (u64)r * pitch + k) = w;
    }
  } else {
    for (u32 i = blockIdx.x * 256 + threadIdx.x; i < m * c; i += gridDim.x * 256) {
      const u32 r = i / c, k = i - r * c;
      y[(u64)r * pitch + k] = to_bf16(x[(u64)r * xs + k]);
    }
  }
}
extern "C" __global__ void __launch_bounds__(256) tail(const float* h, u16* y, u32 m, u32 rank, u32 width, u32 hs, u32 pitch) {
  for (u32 i = blockIdx.x * 256 + threadIdx.x; i < m * width; i += gridDim.x * 256) {
    const u32 r = i / width, k = i - r * width;
    y[(u64)r * pitch + k] = k < rank ? to_bf16(h[(u64)r * hs + k]) : 0;
  }
}
#ifdef SMALL
extern "C" __global__ void __launch_bounds__(256) small(u16* out PARAMS) {
  u32 e = blockIdx.x * 256 + threadIdx.x;
  BODY
}
#endif
