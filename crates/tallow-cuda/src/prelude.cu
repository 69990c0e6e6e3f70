// What every kernel begins with: names of types, loads and stores that convert, reductions over a block.
// No header is included: NVRTC then needs no include path.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct bf16 { u16 bits; };
struct f16 { u16 bits; };
#define inff __int_as_float(0x7f800000)
#define NaNf __int_as_float(0x7fffffff)
#define DEV __device__ __forceinline__

DEV float ld(const float* p) { return *p; }
DEV float ld(const bf16* p) { return __uint_as_float((u32)p->bits << 16); }
DEV float ld(const f16* p) { float v; asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(p->bits)); return v; }
DEV float ld(const int* p) { return (float)*p; }
DEV float ld(const u32* p) { return (float)*p; }
DEV float ld(const u8* p) { return (float)*p; }
DEV double ldd(const int* p) { return (double)*p; }
DEV double ldd(const u32* p) { return (double)*p; }
template <class T> DEV double ldd(const T* p) { return (double)ld(p); }

DEV u16 to_bf16(float v) { u16 b; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(v)); return b; }
DEV void st(float* p, float v) { *p = v; }
DEV void st(bf16* p, float v) { p->bits = to_bf16(v); }
DEV void st(f16* p, float v) { u16 b; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(v)); p->bits = b; }
DEV void st(int* p, float v) { *p = __float2int_rz(v); }
DEV void st(u32* p, float v) { *p = __float2uint_rz(v); }
DEV void st(u8* p, float v) { *p = (u8)__float2uint_rz(fminf(v, 255.f)); }
DEV void st(int* p, double v) { *p = __double2int_rz(v); }
DEV void st(u32* p, double v) { *p = __double2uint_rz(v); }
DEV void st(u8* p, double v) { *p = (u8)__double2uint_rz(fmin(v, 255.0)); }
DEV void st(float* p, double v) { *p = (float)v; }
DEV void st(bf16* p, double v) { st(p, (float)v); }
DEV void st(f16* p, double v) { st(p, (float)v); }

// Four or eight neighbours at once; their address is a multiple of as many elements, or of 16 bytes where that is less.
DEV float as_f32(u32 bits) { return __uint_as_float(bits); }
DEV u32 pack2(float lo, float hi) { u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r; }
DEV float4 ld4(const float* p) { return *(const float4*)p; }
DEV float4 ld4(const bf16* p) {
  const uint2 w = *(const uint2*)p;
  return make_float4(as_f32(w.x << 16), as_f32(w.x & 0xffff0000u), as_f32(w.y << 16), as_f32(w.y & 0xffff0000u));
}
DEV void ld8(const float* p, float* v) {
  const float4 a = ld4(p), b = ld4(p + 4);
  v[0] = a.x; v[1] = a.y; v[2] = a.z; v[3] = a.w; v[4] = b.x; v[5] = b.y; v[6] = b.z; v[7] = b.w;
}
DEV void ld8(const bf16* p, float* v) {
  const uint4 q = *(const uint4*)p;
  const u32 w[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) { v[2 * i] = as_f32(w[i] << 16); v[2 * i + 1] = as_f32(w[i] & 0xffff0000u); }
}
DEV void st4(float* p, float4 v) { *(float4*)p = v; }
DEV void st4(bf16* p, float4 v) { *(uint2*)p = make_uint2(pack2(v.x, v.y), pack2(v.z, v.w)); }
template <class T> DEV bool aligned4(const T* p) { return ((u64)p & (4 * sizeof(T) - 1)) == 0; }
DEV uint4 halves8(const bf16* p) { return *(const uint4*)p; }
DEV uint4 halves8(const float* p) {
  const float4 a = *(const float4*)p, b = *(const float4*)(p + 4);
  return make_uint4(pack2(a.x, a.y), pack2(a.z, a.w), pack2(b.x, b.y), pack2(b.z, b.w));
}

// Exact where the values are, fast where they are rounded anyway.
DEV float exp_of(const float*, float x) { return expf(x); }
DEV float exp_of(const bf16*, float x) { return __expf(x); }
DEV float ratio(const float*, float a, float b) { return a / b; }
DEV float ratio(const bf16*, float a, float b) { return __fdividef(a, b); }

// First in a kernel that may be launched early: lets the next launch begin, then waits for the one before to be done.
// What lies in front of it may only read what no launch of the plan writes.
#if __CUDA_ARCH__ >= 900
DEV void next_may_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEV void wait_for_last() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
DEV void next_may_begin() {}
DEV void wait_for_last() {}
#endif
#define GRID_WAIT next_may_begin(); wait_for_last()

DEV float warp_sum(float v) {
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}
DEV float warp_max(float v) {
  for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, o));
  return v;
}
// The sum over a block of whole warps, in every thread; always in the same order.
DEV float block_sum(float v) {
  __shared__ float part[33];
  v = warp_sum(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = threadIdx.x < (blockDim.x >> 5) ? part[threadIdx.x] : 0.f;
    v = warp_sum(v);
    if (threadIdx.x == 0) part[32] = v;
  }
  __syncthreads();
  return part[32];
}
DEV float block_max(float v) {
  __shared__ float part[33];
  v = warp_max(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = threadIdx.x < (blockDim.x >> 5) ? part[threadIdx.x] : -inff;
    v = warp_max(v);
    if (threadIdx.x == 0) part[32] = v;
  }
  __syncthreads();
  return part[32];
}
