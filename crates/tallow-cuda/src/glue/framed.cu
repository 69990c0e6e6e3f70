// In front of a product with adapters: y [m, pitch] = [v | h | 0] in bf16 and h [m, R] = v aᵀ in f32, for rows v of K columns
// and a [R, K] in f32, which is rounded to bf16 as v is. SOURCE: what v is.
//   0: x; 1: x / rms(x) * w; 2: silu(x) * up. With PLAIN v is also written to `plain`, for other readers.
// A block takes ROWS rows; its sixteen warps take 32 columns each by turns, on tensor cores, and their sums are joined in
// order. The columns inside such a piece are counted in another order, the same for v and a, so that a lane reads 16 bytes of
// a row at once. What else has to be done before the product (`piece`, PIECES times) is done by blocks of its own past
// `blocks`, or by all of them if there are no such blocks.
// Rows of SHARES equal parts have an `a` and an `h` each; in y their `h` lie side by side, with zeros where a row has none. A
// block's rows are of one part; m counts those of a part.
// Rows that do not lie in whole eights at 16 bytes go another way. XW: registers that eight columns of x take.
#define WARPS 16u
#define STEPS ((K + 511u) / 512u)
#define HALVES (ROWS > 16u ? 4u : ROWS > 8u ? 2u : 1u)
#define GROUPS (ROWS > 16u ? 2u : 1u)
#define NT ((R + 7u) / 8u)
#define TG (NT < 4u ? NT : 4u)
// The norm needs its row twice: it stays in registers where it fits, and so does what is read of a meanwhile.
#define HOLD (SOURCE == 1 && STEPS * HALVES * XW <= 32u)
#define AHEAD (SOURCE == 1 && NT <= 4u && HOLD * STEPS * HALVES * XW + STEPS * TG * 4u + GROUPS * TG * 4u <= 64u)
#if HOLD || AHEAD
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("unroll 2")
#endif
#if HOLD
#define UNROLL_FIRST _Pragma("unroll")
#else
#define UNROLL_FIRST _Pragma("unroll 2")
#endif
DEV void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEV void piece(u32 e PARAMS) {
  BODY
}
DEV const float* row_of_a(u32 o PARAMS) {
  PICK
  return 0;
}
// Eight columns of a row as they lie.
template <class T> struct Eight;
template <> struct Eight<bf16> { uint4 v; };
template <> struct Eight<float> { float4 a, b; };
// From column c on; zeros past the end, and everywhere if the row is not there.
DEV void get(Eight<bf16>& e, const bf16* row, u32 c, bool there) {
  e.v = there && c < K ? *(const uint4*)(row + c) : make_uint4(0, 0, 0, 0);
}
DEV void get(Eight<float>& e, const float* row, u32 c, bool there) {
  e.a = e.b = make_float4(0.f, 0.f, 0.f, 0.f);
  if (there && c < K) { e.a = *(const float4*)(row + c); e.b = *(const float4*)(row + c + 4); }
}
DEV void floats(const Eight<bf16>& e, float* f) {
  const u32 w[4] = {e.v.x, e.v.y, e.v.z, e.v.w};
#pragma unroll
  for (u32 i = 0; i < 4; ++i) { f[2 * i] = as_f32(w[i] << 16); f[2 * i + 1] = as_f32(w[i] & 0xffff0000u); }
}
DEV void floats(const Eight<float>& e, float* f) {
  f[0] = e.a.x; f[1] = e.a.y; f[2] = e.a.z; f[3] = e.a.w; f[4] = e.b.x; f[5] = e.b.y; f[6] = e.b.z; f[7] = e.b.w;
}
DEV uint4 packed(const float* f) {
  return make_uint4(pack2(f[0], f[1]), pack2(f[2], f[3]), pack2(f[4], f[5]), pack2(f[6], f[7]));
}
DEV void put(bf16* row, const float*, uint4 v) { *(uint4*)row = v; }
DEV void put(float* row, const float* f, uint4) {
  *(float4*)row = make_float4(f[0], f[1], f[2], f[3]);
  *(float4*)(row + 4) = make_float4(f[4], f[5], f[6], f[7]);
}
DEV float silu(float a) { return ratio((const X*)0, a, 1.f + exp_of((const X*)0, -a)); }
struct Ends { const X* x; const X* up; const float* w; Y* plain; u16* y; float* h; u32 first, base, m, xs, us, ps, pitch, hs; float eps; };
DEV uint4 eight_of_a(const float* row, u32 c) {
  Eight<float> e;
  get(e, row, c, row != 0);
  float f[8];
  floats(e, f);
  return packed(f);
}
DEV void rows(const Ends& z, float* ws, float* part PARAMS) {
  const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const u32 first = z.first, mine = warp * 32 + t * 8;
  bool in[HALVES];
#pragma unroll
  for (u32 i = 0; i < HALVES; ++i) in[i] = (ROWS >= 8u || g < ROWS) && first + g + 8 * i < z.m;
  const X* x0 = z.x + (u64)(first + g) * z.xs;
#if SOURCE == 1
  float scale[HALVES] = {};
  Eight<X> held[HOLD ? STEPS : 1][HALVES];
  UNROLL_FIRST
  for (u32 s = 0; s < STEPS; ++s)
#pragma unroll
    for (u32 i = 0; i < HALVES; ++i) {
      get(held[HOLD ? s : 0][i], x0 + (u64)(8 * i) * z.xs, mine + s * 512, in[i]);
#if !HOLD
      float f[8];
      floats(held[0][i], f);
#pragma unroll
      for (u32 e = 0; e < 8; ++e) scale[i] += f[e] * f[e];
#endif
    }
#endif
#if AHEAD
  uint4 ahead[STEPS][TG];
#pragma unroll
  for (u32 n = 0; n < TG; ++n) {
    const float* from = n * 8 + g < R ? row_of_a(z.base + n * 8 + g NAMES) : 0;
#pragma unroll
    for (u32 s = 0; s < STEPS; ++s) ahead[s][n] = eight_of_a(from, mine + s * 512);
  }
#endif
#if SOURCE == 1
  for (u32 i = threadIdx.x; i < K; i += 512) ws[i] = z.w[i];
#if HOLD
#pragma unroll
  for (u32 s = 0; s < STEPS; ++s)
#pragma unroll
    for (u32 i = 0; i < HALVES; ++i) {
      float f[8];
      floats(held[s][i], f);
#pragma unroll
      for (u32 e = 0; e < 8; ++e) scale[i] += f[e] * f[e];
    }
#endif
#pragma unroll
  for (u32 i = 0; i < HALVES; ++i) {
    scale[i] += __shfl_xor_sync(~0u, scale[i], 1);
    scale[i] += __shfl_xor_sync(~0u, scale[i], 2);
    if (t == 0) part[(warp * HALVES + i) * 8 + g] = scale[i];
  }
  __syncthreads();
#pragma unroll
  for (u32 i = 0; i < HALVES; ++i) {
    float sum = 0.f;
#pragma unroll
    for (u32 j = 0; j < WARPS; ++j) sum += part[(j * HALVES + i) * 8 + g];
    scale[i] = rsqrtf(sum / K + z.eps);
  }
#endif
  for (u32 tile = 0; tile < NT; tile += TG) {
    float acc[GROUPS][TG][4] = {};
#if !AHEAD
    const float* from[TG];
#pragma unroll
    for (u32 n = 0; n < TG; ++n) from[n] = (tile + n) * 8 + g < R ? row_of_a(z.base + (tile + n) * 8 + g NAMES) : 0;
#endif
    UNROLL
    for (u32 s = 0; s < STEPS; ++s) {
      const u32 c = mine + s * 512;
      if (warp * 32 + s * 512 >= K) continue;
      uint4 v[GROUPS * 2];
      v[1] = make_uint4(0, 0, 0, 0);
#pragma unroll
      for (u32 i = 0; i < HALVES; ++i) {
        const u64 row = first + g + 8 * i;
        Eight<X> e;
#if HOLD
        e = held[s][i];
#else
        get(e, z.x + row * z.xs, c, in[i]);
#endif
        float f[8];
        floats(e, f);
#if SOURCE == 1
#pragma unroll
        for (u32 k = 0; k < 8; ++k) f[k] = c < K ? f[k] * scale[i] * ws[c + k] : 0.f;
#elif SOURCE == 2
        Eight<X> other;
        get(other, z.up + row * z.us, c, in[i]);
        float u[8];
        floats(other, u);
#pragma unroll
        for (u32 k = 0; k < 8; ++k) f[k] = silu(f[k]) * u[k];
#endif
        v[i] = packed(f);
        if (tile == 0 && in[i] && c < K) {
          *(uint4*)(z.y + row * z.pitch + c) = v[i];
#ifdef PLAIN
          put(z.plain + row * z.ps + c, f, v[i]);
#endif
        }
      }
#pragma unroll
      for (u32 n = 0; n < TG; ++n) {
        if (tile + n >= NT) continue;
#if AHEAD
        const uint4 b = ahead[s][n];
#else
        const uint4 b = eight_of_a(from[n], c);
#endif
#pragma unroll
        for (u32 q = 0; q < GROUPS; ++q) {
          mma(acc[q][n], v[2 * q].x, v[2 * q + 1].x, v[2 * q].y, v[2 * q + 1].y, b.x, b.y);
          mma(acc[q][n], v[2 * q].z, v[2 * q + 1].z, v[2 * q].w, v[2 * q + 1].w, b.z, b.w);
        }
      }
    }
#pragma unroll
    for (u32 q = 0; q < GROUPS; ++q) {
      __syncthreads();
#pragma unroll
      for (u32 n = 0; n < TG; ++n)
#pragma unroll
        for (u32 e = 0; e < 4; ++e)
          part[(warp * 16 + g + (e >> 1) * 8) * (TG * 8) + n * 8 + 2 * t + (e & 1)] = acc[q][n][e];
      __syncthreads();
      for (u32 e = threadIdx.x; e < 16 * TG * 8; e += 512) {
        const u32 row = q * 16 + e / (TG * 8), k = tile * 8 + e % (TG * 8);
        if (row >= ROWS || first + row >= z.m || k >= R) continue;
        float sum = 0.f;
#pragma unroll
        for (u32 i = 0; i < WARPS; ++i) sum += part[i * 16 * TG * 8 + e];
        z.h[(u64)(first + row) * z.hs + k] = sum;
        z.y[(u64)(first + row) * z.pitch + K + z.base + k] = to_bf16(sum);
      }
    }
  }
  const u32 rest = z.pitch - K - R;
  for (u32 e = threadIdx.x; e < ROWS * rest; e += 512) {
    const u32 row = first + e / rest, k = e % rest;
    if (row < z.m) z.y[(u64)row * z.pitch + K + (k < z.base ? k : k + R)] = 0;
  }
}
// The same for any extent and address: a warp for each row, and its lanes for each sum.
DEV void any_rows(const Ends& z PARAMS) {
  const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, first = z.first;
  for (u32 i = warp; i < ROWS && first + i < z.m; i += WARPS) {
    const u64 row = first + i;
    const X* x = z.x + row * z.xs;
    u16* y = z.y + row * z.pitch;
#if SOURCE == 1
    float scale = 0.f;
    for (u32 c = lane; c < K; c += 32) { const float v = ld(x + c); scale += v * v; }
    scale = rsqrtf(warp_sum(scale) / K + z.eps);
#endif
    for (u32 c = lane; c < K; c += 32) {
      float v = ld(x + c);
#if SOURCE == 1
      v = v * scale * z.w[c];
#elif SOURCE == 2
      v = silu(v) * ld(z.up + row * z.us + c);
#endif
      y[c] = to_bf16(v);
#ifdef PLAIN
      st(z.plain + row * z.ps + c, v);
#endif
    }
    for (u32 k = 0; k < R; ++k) {
      const float* a = row_of_a(z.base + k NAMES);
      float sum = 0.f;
      for (u32 c = lane; c < K; c += 32) sum += as_f32((u32)y[c] << 16) * as_f32((u32)to_bf16(a[c]) << 16);
      sum = warp_sum(sum);
      if (lane == 0) { z.h[row * z.hs + k] = sum; y[K + z.base + k] = to_bf16(sum); }
    }
    for (u32 k = lane; k < z.pitch - K - R; k += 32) y[K + (k < z.base ? k : k + R)] = 0;
  }
}
extern "C" __global__ void __launch_bounds__(512, 1) framed(const X* x, const X* up, const float* w, Y* plain, u16* y, float* h,
    u32 blocks, u32 m, u32 xs, u32 us, u32 ps, u32 pitch, u32 hs, float eps PARAMS) {
  extern __shared__ float4 weights[];
  __shared__ float part[WARPS * 16 * TG * 8];
  GRID_WAIT;
  if (blockIdx.x < blocks) {
    const u32 each = blocks / SHARES, share = SHARES > 1u ? blockIdx.x / each : 0u;
    HIDDEN_OF
    const u64 r = (u64)share * m;
    const Ends z = {x + r * xs, up + r * us, w, plain + r * ps, y + r * pitch, h, (blockIdx.x - share * each) * ROWS, share * R, m, xs, us, ps, pitch, hs, eps};
    const bool wide = ((K | xs | us | ps) & 7) == 0 && (((u64)x | (u64)up | (u64)plain ALIGNED) & 15) == 0;
    if (wide) rows(z, (float*)weights, part NAMES);
    else any_rows(z NAMES);
    if (gridDim.x > blocks) return;
  }
  // With blocks of their own for it, others have left.
  const u32 from = gridDim.x > blocks ? blocks : 0;
  for (u32 e = (blockIdx.x - from) * 512 + threadIdx.x; e < PIECES; e += (gridDim.x - from) * 512) piece(e NAMES);
}
