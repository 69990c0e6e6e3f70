// Attention on tensor cores: operands in bf16, sums, softmax and results in f32. A block is 4 warps; a warp owns 16 rows
// of a tile of 64 and all its columns, so that sums over a row stay inside four lanes.
// mma m16n8k16: with g = lane / 4, t = lane % 4 a lane holds, of a 16 x 8 result, (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
// Tiles lie in shared memory as rows of DP bf16 and 8 more, so that neighbouring rows use other banks.
#define ROWS 64
#define HS (DP + 8)
#define KT (DP / 16)
#define DT (DP / 8)
#define QN (QB / 8)
DEV void mma(float* c, const u32* a, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Rows first.. of a head as bf16, zeros past the end and past D.
template <int N, class T> DEV void load_half(u16* tile, const T* head, u32 first, u32 limit, u32 stride) {
  if ((D & 7) == 0 && (stride & 7) == 0 && ((u64)head & 15) == 0) {
#pragma unroll 4
    for (u32 e = threadIdx.x; e < N * (DP / 8); e += 128) {
      const u32 r = e / (DP / 8), c = e % (DP / 8) * 8;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (first + r < limit && c < D) v = halves8(head + (u64)(first + r) * stride + c);
      *(uint4*)(tile + r * HS + c) = v;
    }
  } else {
    for (u32 e = threadIdx.x; e < N * DP; e += 128) {
      const u32 r = e / DP, c = e % DP;
      tile[r * HS + c] = first + r < limit && c < D ? to_bf16(ld(head + (u64)(first + r) * stride + c)) : 0;
    }
  }
}
// The warp's 16 rows of a tile as left operands.
DEV void rows_of(const u16* tile, u32 a[KT][4]) {
  const u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const u16* p = tile + ((threadIdx.x >> 5) * 16 + g) * HS + 2 * t;
#pragma unroll
  for (int k = 0; k < KT; ++k) {
    a[k][0] = *(const u32*)(p + k * 16);
    a[k][1] = *(const u32*)(p + 8 * HS + k * 16);
    a[k][2] = *(const u32*)(p + k * 16 + 8);
    a[k][3] = *(const u32*)(p + 8 * HS + k * 16 + 8);
  }
}
// Four 8 x 8 matrices of a tile: `at` is this lane's row of its matrix.
DEV void four(u32* b, u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
    : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(at));
}
DEV void four_turned(u32* b, u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
    : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(at));
}
// out[n] = the warp's rows times the rows n * 8.. of a tile, N of them.
template <int N> DEV void dots(const u32 a[KT][4], const u16* tile, float out[N][4]) {
  const u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const u32 at = (u32)__cvta_generic_to_shared(tile + (lane & 7) * HS + (lane >> 3) * 8);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0.f;
#pragma unroll
    for (int k = 0; k + 1 < KT; k += 2) {
      u32 b[4];
      four(b, at + n * 16 * HS + k * 32);
      mma(out[n], a[k], b[0], b[1]);
      mma(out[n], a[k + 1], b[2], b[3]);
    }
    if (KT % 2) {
      const u16* p = tile + (n * 8 + g) * HS + 2 * t + (KT - 1) * 16;
      mma(out[n], a[KT - 1], *(const u32*)p, *(const u32*)(p + 8));
    }
  }
}
// acc += p [16, N * 8] times the N * 8 rows of a tile.
template <int N> DEV void accumulate(const float p[N][4], const u16* tile, float acc[DT][4]) {
  const u32 lane = threadIdx.x & 31;
#pragma unroll
  for (int k = 0; k < N / 2; ++k) {
    const u32 a[4] = {pack2(p[2 * k][0], p[2 * k][1]), pack2(p[2 * k][2], p[2 * k][3]),
                      pack2(p[2 * k + 1][0], p[2 * k + 1][1]), pack2(p[2 * k + 1][2], p[2 * k + 1][3])};
    const u32 at = (u32)__cvta_generic_to_shared(tile + (k * 16 + (lane & 15)) * HS + (lane >> 4) * 8);
#pragma unroll
    for (int d = 0; d < DT; d += 2) {
      u32 b[4];
      four_turned(b, at + d * 16);
      mma(acc[d], a, b[0], b[1]);
      mma(acc[d + 1], a, b[2], b[3]);
    }
  }
}
DEV float quad_sum(float v) { v += __shfl_xor_sync(~0u, v, 1); return v + __shfl_xor_sync(~0u, v, 2); }
DEV float quad_max(float v) { v = fmaxf(v, __shfl_xor_sync(~0u, v, 1)); return fmaxf(v, __shfl_xor_sync(~0u, v, 2)); }
// What queries first.. of a batch row see, N of them, one by one and together.
template <int N> DEV void ranges_of(Range* each, u32* lo, u32* hi, const u32* pos, const u32* starts, u32 b, u32 t, u32 first, u32 s) {
  __syncthreads();
  if (threadIdx.x == 0) { *lo = ~0u; *hi = 0; }
  __syncthreads();
  if (threadIdx.x < N) {
    const u32 i = first + threadIdx.x;
    const Range r = i < t ? seen(pos, starts, b * t + i, s) : Range{0, 0};
    each[threadIdx.x] = r;
    if (r.hi > r.lo) { atomicMin(lo, r.lo); atomicMax(hi, r.hi); }
  }
  __syncthreads();
}
// Writes the warp's 16 rows of a result: rows first.. below `limit`, each times its scale.
DEV void pair(float* p, float a, float b) { *(float2*)p = make_float2(a, b); }
DEV void pair(bf16* p, float a, float b) { *(u32*)p = pack2(a, b); }
template <class T> DEV void write_rows(T* head, u32 stride, u32 first, u32 limit, const float acc[DT][4], float s0, float s1) {
  const u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, r = first + (threadIdx.x >> 5) * 16 + g;
  if ((D & 1) == 0 && (stride & 1) == 0 && ((u64)head & (2 * sizeof(T) - 1)) == 0) {
#pragma unroll
    for (int d = 0; d < DT; ++d) {
      const u32 c = d * 8 + 2 * t;
      if (r < limit && c < D) pair(head + (u64)r * stride + c, acc[d][0] * s0, acc[d][1] * s0);
      if (r + 8 < limit && c < D) pair(head + (u64)(r + 8) * stride + c, acc[d][2] * s1, acc[d][3] * s1);
    }
    return;
  }
#pragma unroll
  for (int d = 0; d < DT; ++d)
    for (int e = 0; e < 4; ++e) {
      const u32 row = r + (e >> 1) * 8, c = d * 8 + 2 * t + (e & 1);
      if (row < limit && c < D) st(head + (u64)row * stride + c, acc[d][e] * (e >> 1 ? s1 : s0));
    }
}
#ifdef FORWARD
extern "C" __global__ void __launch_bounds__(128, 2) attention(const TQ* q, const TK* k, const TV* v, const u32* pos,
    const u32* starts, TO* o, float* lse, u32 t, u32 h, u32 s, u32 qb, u32 qt, u32 qh, u32 kb, u32 kt, u32 kh,
    u32 vb, u32 vt, u32 vh, u32 ob, u32 ot, u32 oh) {
  extern __shared__ float4 memory[];
  u16* ks = (u16*)memory;
  u16* vs = ks + ROWS * HS;
  __shared__ Range range[ROWS];
  __shared__ u32 lo, hi;
  // The last queries see the most keys: they go first.
  const u32 b = blockIdx.z, head = blockIdx.y, first = (gridDim.x - 1 - blockIdx.x) * ROWS;
  const u32 lane = threadIdx.x & 31, g = lane >> 2, tt = lane & 3, mine = (threadIdx.x >> 5) * 16 + g;
  ranges_of<ROWS>(range, &lo, &hi, pos, starts, b, t, first, s);
  load_half<ROWS>(ks, q + (u64)b * qb + (u64)head * qh, first, t, qt);
  __syncthreads();
  u32 a[KT][4];
  rows_of(ks, a);
  const Range r0 = range[mine], r1 = range[mine + 8];
  const TK* keys = k + (u64)b * kb + (u64)(head / G) * kh;
  const TV* values = v + (u64)b * vb + (u64)(head / G) * vh;
  float acc[DT][4] = {}, m0 = -inff, m1 = -inff, l0 = 0.f, l1 = 0.f;
  for (u32 k0 = hi ? lo / ROWS * ROWS : 0; k0 < hi; k0 += ROWS) {
    __syncthreads();
    load_half<ROWS>(ks, keys, k0, s, kt);
    load_half<ROWS>(vs, values, k0, s, vt);
    __syncthreads();
    float p[8][4];
    dots<8>(a, ks, p);
    float n0 = m0, n1 = m1;
#pragma unroll
    for (int n = 0; n < 8; ++n)
      for (int e = 0; e < 2; ++e) {
        const u32 key = k0 + n * 8 + 2 * tt + e;
        p[n][e] = key >= r0.lo && key < r0.hi ? p[n][e] * SCALE : -inff;
        p[n][e + 2] = key >= r1.lo && key < r1.hi ? p[n][e + 2] * SCALE : -inff;
        n0 = fmaxf(n0, p[n][e]);
        n1 = fmaxf(n1, p[n][e + 2]);
      }
    n0 = quad_max(n0);
    n1 = quad_max(n1);
    const float z0 = n0 == -inff ? 0.f : n0, z1 = n1 == -inff ? 0.f : n1;
    const float f0 = __expf(m0 - z0), f1 = __expf(m1 - z1);
    l0 *= f0;
    l1 *= f1;
#pragma unroll
    for (int n = 0; n < 8; ++n)
      for (int e = 0; e < 2; ++e) {
        p[n][e] = __expf(p[n][e] - z0);
        p[n][e + 2] = __expf(p[n][e + 2] - z1);
        l0 += p[n][e];
        l1 += p[n][e + 2];
      }
    m0 = n0;
    m1 = n1;
#pragma unroll
    for (int d = 0; d < DT; ++d) { acc[d][0] *= f0; acc[d][1] *= f0; acc[d][2] *= f1; acc[d][3] *= f1; }
    accumulate<8>(p, vs, acc);
  }
  l0 = quad_sum(l0);
  l1 = quad_sum(l1);
  if (o) write_rows(o + (u64)b * ob + (u64)head * oh, ot, first, t, acc, l0 > 0.f ? 1.f / l0 : 0.f, l1 > 0.f ? 1.f / l1 : 0.f);
  if (lse && tt == 0) {
    float* to = lse + ((u64)b * h + head) * t;
    if (first + mine < t) to[first + mine] = l0 > 0.f ? logf(l0) + m0 : 0.f;
    if (first + mine + 8 < t) to[first + mine + 8] = l1 > 0.f ? logf(l1) + m1 : 0.f;
  }
}
#else
#define ARGS const TQ* q, const TK* k, const TV* v, const u32* pos, const u32* starts, const float* lse, \
    const TG* go, const float* delta_, u32 t, u32 h, u32 s, u32 qb, u32 qt, u32 qh, u32 kb, u32 kt, u32 kh, \
    u32 vb, u32 vt, u32 vh, u32 gb, u32 gt, u32 gh
// A block for 64 queries of a head, tiles of QB keys.
extern "C" __global__ void __launch_bounds__(128, 3) grad_q(ARGS, DQ* dq, u32 ob, u32 ot, u32 oh) {
  extern __shared__ float4 memory[];
  u16* xs = (u16*)memory;
  u16* ks = xs + ROWS * HS;
  u16* vs = ks + QB * HS;
  __shared__ Range range[ROWS];
  __shared__ u32 lo, hi;
  const u32 b = blockIdx.z, head = blockIdx.y, first = (gridDim.x - 1 - blockIdx.x) * ROWS;
  const u32 lane = threadIdx.x & 31, g = lane >> 2, tt = lane & 3, mine = (threadIdx.x >> 5) * 16 + g;
  ranges_of<ROWS>(range, &lo, &hi, pos, starts, b, t, first, s);
  u32 aq[KT][4], ag[KT][4];
  load_half<ROWS>(xs, q + (u64)b * qb + (u64)head * qh, first, t, qt);
  __syncthreads();
  rows_of(xs, aq);
  __syncthreads();
  load_half<ROWS>(xs, go + (u64)b * gb + (u64)head * gh, first, t, gt);
  __syncthreads();
  rows_of(xs, ag);
  const Range r0 = range[mine], r1 = range[mine + 8];
  const u64 at = ((u64)b * h + head) * t + first + mine;
  const bool in0 = first + mine < t, in1 = first + mine + 8 < t;
  const float l0 = in0 ? lse[at] : 0.f, l1 = in1 ? lse[at + 8] : 0.f;
  const float e0 = in0 ? delta_[at] : 0.f, e1 = in1 ? delta_[at + 8] : 0.f;
  float acc[DT][4] = {};
  for (u32 k0 = hi ? lo / QB * QB : 0; k0 < hi; k0 += QB) {
    __syncthreads();
    load_half<QB>(ks, k + (u64)b * kb + (u64)(head / G) * kh, k0, s, kt);
    load_half<QB>(vs, v + (u64)b * vb + (u64)(head / G) * vh, k0, s, vt);
    __syncthreads();
    float p[QN][4], d[QN][4];
    dots<QN>(aq, ks, p);
    dots<QN>(ag, vs, d);
#pragma unroll
    for (int n = 0; n < QN; ++n)
      for (int e = 0; e < 2; ++e) {
        const u32 key = k0 + n * 8 + 2 * tt + e;
        const float x = key >= r0.lo && key < r0.hi ? __expf(p[n][e] * SCALE - l0) : 0.f;
        const float y = key >= r1.lo && key < r1.hi ? __expf(p[n][e + 2] * SCALE - l1) : 0.f;
        p[n][e] = x * (d[n][e] - e0) * SCALE;
        p[n][e + 2] = y * (d[n][e + 2] - e1) * SCALE;
      }
    accumulate<QN>(p, ks, acc);
  }
  write_rows(dq + (u64)b * ob + (u64)head * oh, ot, first, t, acc, 1.f, 1.f);
}
// A block for 64 keys of a key head and one of its query heads; `parts` of several heads are joined by `join_kv`.
extern "C" __global__ void __launch_bounds__(128, 2) grad_kv(ARGS, float* parts) {
  extern __shared__ float4 memory[];
  u16* xs = (u16*)memory;
  u16* qs = xs + ROWS * HS;
  u16* gs = qs + QB * HS;
  __shared__ Range range[QB];
  __shared__ float ls[QB], es[QB];
  __shared__ u32 lo, hi;
  const u32 b = blockIdx.z, head = blockIdx.y, kv = head / G, first = blockIdx.x * ROWS;
  const u32 lane = threadIdx.x & 31, g = lane >> 2, tt = lane & 3, mine = first + (threadIdx.x >> 5) * 16 + g;
  u32 ak[KT][4], av[KT][4];
  load_half<ROWS>(xs, k + (u64)b * kb + (u64)kv * kh, first, s, kt);
  __syncthreads();
  rows_of(xs, ak);
  __syncthreads();
  load_half<ROWS>(xs, v + (u64)b * vb + (u64)kv * vh, first, s, vt);
  __syncthreads();
  rows_of(xs, av);
  float dk[DT][4] = {}, dv[DT][4] = {};
  const u64 stat = ((u64)b * h + head) * t;
  for (u32 q0 = 0; q0 < t; q0 += QB) {
    ranges_of<QB>(range, &lo, &hi, pos, starts, b, t, q0, s);
    if (hi <= first || lo >= first + ROWS) continue;
    load_half<QB>(qs, q + (u64)b * qb + (u64)head * qh, q0, t, qt);
    load_half<QB>(gs, go + (u64)b * gb + (u64)head * gh, q0, t, gt);
    if (threadIdx.x < QB) {
      const u32 i = q0 + threadIdx.x;
      ls[threadIdx.x] = i < t ? lse[stat + i] : 0.f;
      es[threadIdx.x] = i < t ? delta_[stat + i] : 0.f;
    }
    __syncthreads();
    float p[QN][4], d[QN][4];
    dots<QN>(ak, qs, p);
    dots<QN>(av, gs, d);
#pragma unroll
    for (int n = 0; n < QN; ++n)
      for (int e = 0; e < 2; ++e) {
        const u32 i = n * 8 + 2 * tt + e;
        const Range r = range[i];
        const float l = ls[i], c = es[i];
        p[n][e] = mine >= r.lo && mine < r.hi ? __expf(p[n][e] * SCALE - l) : 0.f;
        p[n][e + 2] = mine + 8 >= r.lo && mine + 8 < r.hi ? __expf(p[n][e + 2] * SCALE - l) : 0.f;
        d[n][e] = p[n][e] * (d[n][e] - c) * SCALE;
        d[n][e + 2] = p[n][e + 2] * (d[n][e + 2] - c) * SCALE;
      }
    accumulate<QN>(p, gs, dv);
    accumulate<QN>(d, qs, dk);
  }
  // parts [2, b, h, s, D]
  const u64 size = (u64)gridDim.z * h * s * D;
  float* to = parts + ((u64)b * h + head) * s * D;
  write_rows(to, D, first, s, dk, 1.f, 1.f);
  write_rows(to + size, D, first, s, dv, 1.f, 1.f);
}
// Sums the parts of the query heads of a key head, in order. n: elements of one result.
extern "C" __global__ void join_kv(const float* parts, DK* dk, DV* dv, u32 n, u32 s, u32 hk,
    u32 ab, u32 at, u32 ah, u32 bb, u32 bt, u32 bh) {
  const u64 size = (u64)n * G;
  for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    const u32 c = i % D, j = i / D % s, kv = i / D / s % hk, b = i / D / s / hk;
    const float* p = parts + (((u64)b * hk + kv) * G * s + j) * D + c;
    float x = 0.f, y = 0.f;
    for (u32 g = 0; g < G; ++g) { x += p[(u64)g * s * D]; y += p[size + (u64)g * s * D]; }
    if (dk) st(dk + (u64)b * ab + (u64)j * at + (u64)kv * ah + c, x);
    if (dv) st(dv + (u64)b * bb + (u64)j * bt + (u64)kv * bh + c, y);
  }
}
#endif
