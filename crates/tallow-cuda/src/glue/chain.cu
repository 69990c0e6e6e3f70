// A token's way through a model as one launch: linears of one row with what stands around them, attention, the likeliest
// token. Each processor has one block, each block a part of every step, and all wait for each other between two steps.
// Weights wait for nobody: every warp copies its next SLOTS pieces of them into shared memory while others are computed,
// past the ends of steps. So memory is busy all the time. Bound by reading the weights once, and by the waits.
// Constants: WARPS of a block, SLOTS of a warp, SLOT bytes, RANKS most ranks of a step.
#define THREADS (WARPS * 32)
#define SPLITS 32
#define TILE 32
#define ACCS 4
struct Phase {
  u64 w[3];
  const float* bias[3];
  const float* up[3];
  const float* down[3];
  const float* x; float* y; const float* past; const float* norm;
  const float* hp; float* np; const float* nw; const float* freq;
  float* kc; float* vc; float* part; float2* stats;
  // 0: two outputs side by side; 1: silu(gate) * up; 2: rotated heads and the cache; 3: attention; 4: the likeliest.
  u32 kind, k, units, outputs, pieces, piece, end0, end1;
  u32 rank[3], r0[3];
  float scale[3];
  u32 ranks, count, next, nk, nend0, nend1;
  u32 half, queries, keys, slots;
  float eps, factor;
  u32 window, joined, top, most, pad;
};
#define PHASE_WORDS ((u32)(sizeof(Phase) / 4))
// What of a step the copies need, and this block's part of it.
struct Stream { u64 w[3]; u32 k, units, outputs, piece, end0, end1, half, first, tasks; u16 kind, pieces; };
struct Fetch { u32 phase, task, issued, used; };
struct Top { float v; u32 at, bad, none; };
#if __CUDA_ARCH__ >= 900
DEV u32 shared_at(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEV void bar_init(u64* bar) { asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared_at(bar)) : "memory"); }
DEV void bar_expect(u64* bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_at(bar)), "r"(bytes) : "memory");
}
DEV void bar_wait(u64* bar, u32 parity) {
  asm volatile("{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra AGAIN;\nDONE:\n}"
    :: "r"(shared_at(bar)), "r"(parity) : "memory");
}
DEV void copy(void* to, u64 from, u32 bytes, u64* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
    :: "r"(shared_at(to)), "l"(from), "r"(bytes), "r"(shared_at(bar)) : "memory");
}
DEV u32 arrived(const u32* p) { u32 v; asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v; }
DEV void arrive(u32* p) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(p) : "memory"); }
DEV void fetch(const float* p) { asm volatile("prefetch.global.L2 [%0];" :: "l"(p)); }
DEV float dot8(uint4 q, float4 a, float4 b) {
  return as_f32(q.x << 16) * a.x + as_f32(q.x & 0xffff0000u) * a.y + as_f32(q.y << 16) * a.z + as_f32(q.y & 0xffff0000u) * a.w
       + as_f32(q.z << 16) * b.x + as_f32(q.z & 0xffff0000u) * b.y + as_f32(q.w << 16) * b.z + as_f32(q.w & 0xffff0000u) * b.w;
}
DEV float4 cg4(const float* p) { return __ldcg((const float4*)p); }
// Which of three parts `o` lies in, and where that begins.
DEV u32 part_of(u32 o, u32 end0, u32 end1, u32& start) {
  const u32 i = (o >= end0) + (o >= end1);
  start = i == 0 ? 0 : i == 1 ? end0 : end1;
  return i;
}
DEV void outputs_of(const Stream& z, u32 unit, u32& oa, u32& ob) {
  if (z.kind == 0) { oa = 2 * unit; ob = oa + 1; }
  else if (z.kind == 1) { oa = unit; ob = unit + z.units; }
  else { oa = unit / z.half * 2 * z.half + unit % z.half; ob = oa + z.half; }
}
// This warp's next piece of weights, if there is one, into the slot that it used last.
DEV void issue(Fetch& f, const Stream* streams, u32 count, char* mine, u64* full) {
  const u32 warp = threadIdx.x >> 5;
  while (f.phase < count && f.task >= streams[f.phase].tasks) { ++f.phase; f.task = warp; }
  if (f.phase == count) return;
  const Stream& z = streams[f.phase];
  const u32 slot = f.issued % SLOTS;
  if ((threadIdx.x & 31) == 0) {
    const u32 u = z.pieces == 1 ? f.task : f.task / z.pieces, c = (f.task - u * z.pieces) * z.piece;
    const u32 bytes = min(z.k / 8 - c, z.piece) * 16;
    u32 oa, ob, start;
    outputs_of(z, z.first + u, oa, ob);
    const bool two = ob < z.outputs;
    char* to = mine + slot * SLOT;
    bar_expect(full + slot, two ? 2 * bytes : bytes);
    u32 i = part_of(oa, z.end0, z.end1, start);
    copy(to, z.w[i] + ((u64)(oa - start) * z.k + c * 8) * 2, bytes, full + slot);
    if (two) {
      i = part_of(ob, z.end0, z.end1, start);
      copy(to + SLOT / 2, z.w[i] + ((u64)(ob - start) * z.k + c * 8) * 2, bytes, full + slot);
    }
  }
  ++f.issued;
  f.task += WARPS;
}
// Element q of row o of s B, and where the h that it is multiplied with lies; nowhere past the rank: nothing may be
// multiplied there, for h may be infinite.
#define NOWHERE (~0u)
DEV float tail(const Phase& d, u32 o, u32 q, u32& at) {
  u32 start;
  const u32 i = part_of(o, d.end0, d.end1, start);
  at = NOWHERE;
  if (q >= d.rank[i]) return 0.f;
  at = d.r0[i] + q;
  return d.scale[i] * d.up[i][(u64)(o - start) * d.rank[i] + q];
}
// A row of all A of the next linear.
DEV const float* down_row(const Phase& d, u32 q) {
  u32 start;
  const u32 i = part_of(q, d.nend0, d.nend1, start);
  return d.down[i] + (u64)(q - start) * d.nk;
}
DEV float bias_of(const Phase& d, u32 o) {
  u32 start;
  const u32 i = part_of(o, d.end0, d.end1, start);
  return d.bias[i] ? d.bias[i][o - start] : 0.f;
}
// The keys that a query at p sees, and in how many parts.
struct Keys { u32 lo, n, splits; };
DEV Keys keys_of(const Phase& d, u32 p) {
  Keys s = {0, 0, 0};
  if (p >= d.slots) return s;
  s.lo = d.window && p + 1 > d.window ? p + 1 - d.window : 0;
  s.n = p + 1 - s.lo;
  const u32 room = max(1u, gridDim.x / d.keys), most = max(8u, min((u32)SPLITS, (s.n + 63) / 64));
  s.splits = min((s.n + TILE - 1) / TILE, min(room, most));
  return s;
}
DEV void better(Top& t, float v, u32 at) {
  if (v > t.v || (v == t.v && at < t.at)) { t.v = v; t.at = at; }
}
DEV void warp_top(Top& t) {
  for (int o = 16; o; o >>= 1) {
    better(t, __shfl_xor_sync(~0u, t.v, o), __shfl_xor_sync(~0u, t.at, o));
    t.bad |= __shfl_xor_sync(~0u, t.bad, o);
  }
}
// Everything a block keeps over all steps.
struct Block {
  u32 warp, lane, p, f, base, count;
  u32* bar;
  const Stream* streams;
  char* mine;
  u64* full;
  float4* work;
  float* sums;
  float* hs;
  Top* tops;
  DEV void wait() const {
    if (threadIdx.x == 0 && f > 0)
      while ((int)(arrived(bar) - (base + f * gridDim.x)) < 0) {}
    __syncthreads();
  }
};
// Row x from the parts that attention left behind, and its h.
DEV void join(const Phase& d, const Block& b, float* wg) {
  const Keys s = keys_of(d, b.p);
  const u32 dim = 2 * d.half;
  for (u32 head = b.warp; head < d.queries; head += WARPS) {
    float2 st = make_float2(-inff, 0.f);
    if (b.lane < s.splits) st = __ldcg(d.stats + head * SPLITS + b.lane);
    const float m = warp_max(st.x), w = st.y > 0.f ? expf(st.x - m) : 0.f, sum = warp_sum(w * st.y);
    wg[head * SPLITS + b.lane] = sum > 0.f ? w / sum : 0.f;
  }
  __syncthreads();
  for (u32 at = threadIdx.x; at < d.k / 4; at += THREADS) {
    const u32 head = at * 4 / dim, c = at * 4 - head * dim;
    const float* from = d.part + (u64)head * SPLITS * dim + c;
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
    for (u32 i = 0; i < s.splits; ++i) {
      const float4 q = cg4(from + i * dim);
      const float w = wg[head * SPLITS + i];
      v.x += w * q.x; v.y += w * q.y; v.z += w * q.z; v.w += w * q.w;
    }
    b.work[(at & 1) * (d.k / 8) + at / 2] = v;
  }
  for (u32 q = b.warp; q < d.ranks; q += WARPS) {
    float h = 0.f;
    for (u32 i = b.lane; i < d.queries * s.splits; i += 32) {
      const u32 head = i / s.splits, at = head * SPLITS + i - head * s.splits;
      h += wg[at] * __ldcg(d.hp + (u64)q * d.queries * SPLITS + at);
    }
    h = warp_sum(h);
    if (b.lane == 0) b.hs[q] = h;
  }
}
DEV void linear(const Phase& d, const Block& b, Fetch& fetch) {
  const Stream& z = b.streams[b.f];
  const u32 n = z.pieces == 1 ? z.tasks : z.tasks / z.pieces, tid = threadIdx.x, lane = b.lane;
  float2* red = (float2*)(b.work + d.k / 4);
  float* made = (float*)(red + z.tasks);
  const u32 values = d.kind == 1 ? n : 2 * n, v0 = d.kind == 1 ? z.first : 2 * z.first;
  // What never changes is asked for before the wait: the tails of this warp's first two sums, what is added to this
  // thread's outputs, the norm's weights, and what the next h makes of the outputs.
  float ta[2] = {0.f, 0.f}, tb[2] = {0.f, 0.f};
  u32 qa[2] = {NOWHERE, NOWHERE}, qb[2] = {NOWHERE, NOWHERE};
  if (d.ranks)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const u32 t = b.warp + j * WARPS, u = z.pieces == 1 ? t : t / z.pieces;
      u32 oa, ob;
      if (t >= z.tasks || u * z.pieces != t) continue;
      outputs_of(z, z.first + u, oa, ob);
      ta[j] = tail(d, oa, lane, qa[j]);
      if (ob < d.outputs) tb[j] = tail(d, ob, lane, qb[j]);
    }
  u32 oa = 0, ob = 0;
  float ca = 0.f, cb = 0.f, co = 1.f, si = 0.f;
  if (tid < n) {
    outputs_of(z, z.first + tid, oa, ob);
    ca = bias_of(d, oa);
    if (ob < d.outputs) cb = bias_of(d, ob);
    if (d.kind == 2) {
      const float angle = (float)b.p * d.freq[oa % (2 * d.half)];
      co = cosf(angle);
      si = sinf(angle);
    }
  }
  float4 n0 = make_float4(1.f, 1.f, 1.f, 1.f), n1 = n0;
  if (d.norm && tid < d.k / 4) n0 = *(const float4*)(d.norm + tid * 4);
  if (d.norm && tid + THREADS < d.k / 4) n1 = *(const float4*)(d.norm + (tid + THREADS) * 4);
  float w0 = 0.f, w1 = 0.f;
  if (b.warp < d.next) {
    const float* row = down_row(d, b.warp);
    if (lane < values && v0 + lane < d.nk) w0 = row[v0 + lane] * (d.nw ? d.nw[v0 + lane] : 1.f);
    if (lane + 32 < values && v0 + lane + 32 < d.nk) w1 = row[v0 + lane + 32] * (d.nw ? d.nw[v0 + lane + 32] : 1.f);
  }
  b.wait();
  if (d.past && tid < n) {
    ca += __ldcg(d.past + oa);
    if (ob < d.outputs) cb += __ldcg(d.past + ob);
  }
  if (d.joined) join(d, b, made + 2 * n);
  else {
    float part[5];
#pragma unroll
    for (u32 i = 0; i < 5; ++i)
      part[i] = b.warp < d.ranks && lane + 32 * i < d.count ? __ldcg(d.hp + (u64)b.warp * d.count + lane + 32 * i) : 0.f;
    float s = 0.f;
    for (u32 at = tid; at < d.k / 4; at += 2 * THREADS) {
      const bool more = at + THREADS < d.k / 4;
      float4 v = cg4(d.x + at * 4), w = make_float4(0.f, 0.f, 0.f, 0.f);
      if (more) w = cg4(d.x + (at + THREADS) * 4);
      s += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w + w.x * w.x + w.y * w.y + w.z * w.z + w.w * w.w;
      if (d.norm) {
        if (at != tid) {
          n0 = *(const float4*)(d.norm + at * 4);
          if (more) n1 = *(const float4*)(d.norm + (at + THREADS) * 4);
        }
        v.x *= n0.x; v.y *= n0.y; v.z *= n0.z; v.w *= n0.w;
        w.x *= n1.x; w.y *= n1.y; w.z *= n1.z; w.w *= n1.w;
      }
      b.work[(at & 1) * (d.k / 8) + at / 2] = v;
      if (more) b.work[((at + THREADS) & 1) * (d.k / 8) + (at + THREADS) / 2] = w;
    }
    if (d.norm) {
      s = warp_sum(s);
      if (lane == 0) b.sums[b.warp] = s;
    }
    for (u32 q = b.warp; q < d.ranks; q += WARPS) {
      float h = 0.f;
      if (q == b.warp) h = part[0] + part[1] + part[2] + part[3] + part[4];
      for (u32 at = q == b.warp ? lane + 160 : lane; at < d.count; at += 32) h += __ldcg(d.hp + (u64)q * d.count + at);
      h = warp_sum(h);
      if (lane == 0) b.hs[q] = h;
    }
  }
  __syncthreads();
  u32 j = 0;
  for (u32 t = b.warp; t < z.tasks; t += WARPS, ++j) {
    const u32 slot = fetch.used % SLOTS, u = z.pieces == 1 ? t : t / z.pieces, c0 = (t - u * z.pieces) * z.piece;
    const u32 groups = min(d.k / 8 - c0, z.piece);
    const uint4* wa = (const uint4*)(b.mine + slot * SLOT);
    const uint4* wb = (const uint4*)(b.mine + slot * SLOT + SLOT / 2);
    const float4* lo = b.work + c0;
    const float4* hi = lo + d.k / 8;
    float sa = 0.f, sb = 0.f;
    if (d.ranks && c0 == 0) {
      if (j < 2) {
        if ((j ? qa[1] : qa[0]) != NOWHERE) sa = (j ? ta[1] : ta[0]) * b.hs[j ? qa[1] : qa[0]];
        if ((j ? qb[1] : qb[0]) != NOWHERE) sb = (j ? tb[1] : tb[0]) * b.hs[j ? qb[1] : qb[0]];
      }
      u32 o, p, at;
      outputs_of(z, z.first + u, o, p);
      for (u32 q = j < 2 ? lane + 32 : lane; q < d.most; q += 32) {
        float v = tail(d, o, q, at);
        if (at != NOWHERE) sa += v * b.hs[at];
        if (p >= d.outputs) continue;
        v = tail(d, p, q, at);
        if (at != NOWHERE) sb += v * b.hs[at];
      }
    }
    bar_wait(b.full + slot, fetch.used / SLOTS & 1);
    for (u32 c = lane; c < groups; c += 64) {
      const float4 l = lo[c], h = hi[c];
      sa += dot8(wa[c], l, h);
      sb += dot8(wb[c], l, h);
      if (c + 32 < groups) {
        const float4 l2 = lo[c + 32], h2 = hi[c + 32];
        sa += dot8(wa[c + 32], l2, h2);
        sb += dot8(wb[c + 32], l2, h2);
      }
    }
    __syncwarp();
    ++fetch.used;
    issue(fetch, b.streams, b.count, b.mine, b.full);
    sa = warp_sum(sa);
    sb = warp_sum(sb);
    if (lane == 0) red[t] = make_float2(sa, sb);
  }
  __syncthreads();
  float r = 1.f;
  if (d.norm) {
    float s = 0.f;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) s += b.sums[i];
    r = rsqrtf(s / d.k + d.eps);
  }
  Top top = {-inff, d.outputs, 0, 0};
  for (u32 i = tid; i < n; i += THREADS) {
    const u32 unit = z.first + i;
    if (i != tid) {
      outputs_of(z, unit, oa, ob);
      ca = bias_of(d, oa) + (d.past ? __ldcg(d.past + oa) : 0.f);
      cb = ob < d.outputs ? bias_of(d, ob) + (d.past ? __ldcg(d.past + ob) : 0.f) : 0.f;
      if (d.kind == 2) {
        const float angle = (float)b.p * d.freq[oa % (2 * d.half)];
        co = cosf(angle);
        si = sinf(angle);
      }
    }
    float sa = 0.f, sb = 0.f;
    for (u32 k = 0; k < z.pieces; ++k) { const float2 v = red[i * z.pieces + k]; sa += v.x; sb += v.y; }
    float va = sa * r + ca, vb = sb * r + cb;
    if (d.kind == 0) {
      d.y[oa] = va;
      if (ob < d.outputs) d.y[ob] = vb; else vb = 0.f;
      made[2 * i] = va;
      made[2 * i + 1] = vb;
      if (d.top) {
        top.bad |= va != va || (ob < d.outputs && vb != vb);
        better(top, va, oa);
        if (ob < d.outputs) better(top, vb, ob);
      }
    } else if (d.kind == 1) {
      va = va / (1.f + expf(-va)) * vb;
      d.y[unit] = va;
      made[i] = va;
    } else {
      const u32 head = oa / (2 * d.half), e = oa % (2 * d.half);
      if (head < d.queries + d.keys) {
        const float x = va * co - vb * si, y = vb * co + va * si;
        va = x;
        vb = y;
        d.y[oa] = va;
        d.y[ob] = vb;
      }
      if (head >= d.queries && b.p < d.slots) {
        float* to = (head < d.queries + d.keys ? d.kc : d.vc) + ((u64)b.p * d.keys + (head - d.queries) % d.keys) * 2 * d.half;
        to[e] = va;
        to[e + d.half] = vb;
      }
    }
  }
  if (d.next) {
    __syncthreads();
    for (u32 q = b.warp; q < d.next; q += WARPS) {
      float h = 0.f;
      u32 v = lane;
      if (q == b.warp) {
        if (v < values) h += w0 * made[v];
        if (v + 32 < values) h += w1 * made[v + 32];
        v += 64;
      }
      const float* row = down_row(d, q);
      for (; v < values; v += 32)
        if (v0 + v < d.nk) h += row[v0 + v] * (d.nw ? d.nw[v0 + v] : 1.f) * made[v];
      h = warp_sum(h);
      if (lane == 0) d.np[(u64)q * gridDim.x + blockIdx.x] = h;
    }
  }
  if (d.top) {
    warp_top(top);
    if (lane == 0) b.tops[b.warp] = top;
    __syncthreads();
    if (b.warp == 0) {
      top = lane < WARPS ? b.tops[lane] : Top{-inff, d.outputs, 0, 0};
      warp_top(top);
      if (lane == 0) ((Top*)d.np)[blockIdx.x] = top;
    }
  }
}
// One block for a part of the keys of a key head, with all its queries; parts of the next h as parts of the result.
DEV void attention(const Phase& d, const Block& b) {
  const u32 dim = 2 * d.half, g = d.queries / d.keys, stride = dim + 4, tid = threadIdx.x;
  const Keys s = keys_of(d, b.p);
  float* ks = (float*)b.work;
  float* vs = ks + TILE * stride;
  float* qs = vs + TILE * stride;
  float* ps = qs + g * stride;
  float* made = ps + g * TILE;
  float* ms = made + g * dim;
  float* ls = ms + g;
  float* fs = ls + g;
  const u32 items = d.keys * s.splits;
  if (blockIdx.x < items)
    for (u32 i = tid * 32; i < d.next * g * dim; i += THREADS * 32)
      fetch(down_row(d, i / (g * dim)) + blockIdx.x % d.keys * g * dim + i % (g * dim));
  b.wait();
  for (u32 item = blockIdx.x; item < items; item += gridDim.x) {
    const u32 kv = item % d.keys, split = item / d.keys;
    const u32 from = s.lo + s.n * split / s.splits, to = s.lo + s.n * (split + 1) / s.splits;
    __syncthreads();
    for (u32 e = tid; e < g * dim / 4; e += THREADS) {
      const u32 r = e * 4 / dim, c = e * 4 - r * dim;
      *(float4*)(qs + r * stride + c) = cg4(d.x + (u64)(kv * g + r) * dim + c);
    }
    if (tid < g) { ms[tid] = -inff; ls[tid] = 0.f; }
    float acc[ACCS] = {};
    for (u32 k0 = from; k0 < to; k0 += TILE) {
      if (k0 != from) __syncthreads();
      for (u32 e = tid; e < TILE * dim / 4; e += THREADS) {
        const u32 r = e * 4 / dim, c = e * 4 - r * dim;
        float4 x = make_float4(0.f, 0.f, 0.f, 0.f), y = x;
        if (k0 + r < to) {
          const u64 at = ((u64)(k0 + r) * d.keys + kv) * dim + c;
          x = cg4(d.kc + at);
          y = cg4(d.vc + at);
        }
        *(float4*)(ks + r * stride + c) = x;
        *(float4*)(vs + r * stride + c) = y;
      }
      __syncthreads();
      for (u32 r = b.warp; r < g; r += WARPS) {
        float v = 0.f;
#pragma unroll 4
        for (u32 c = 0; c < dim; c += 4) {
          const float4 x = *(const float4*)(qs + r * stride + c), y = *(const float4*)(ks + b.lane * stride + c);
          v += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
        }
        const float score = k0 + b.lane < to ? v * d.factor : -inff, old = ms[r], m = fmaxf(old, warp_max(score));
        const float zero = m == -inff ? 0.f : m, e = expf(score - zero), f = expf(old - zero), sum = warp_sum(e);
        ps[r * TILE + b.lane] = e;
        if (b.lane == 0) { fs[r] = f; ls[r] = ls[r] * f + sum; ms[r] = m; }
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < ACCS; ++j) {
        const u32 e = tid + j * THREADS;
        if (e >= g * dim) break;
        const u32 r = e / dim, c = e - r * dim;
        float v = acc[j] * fs[r];
#pragma unroll 8
        for (u32 i = 0; i < TILE; ++i) v += ps[r * TILE + i] * vs[i * stride + c];
        acc[j] = v;
      }
    }
#pragma unroll
    for (int j = 0; j < ACCS; ++j) {
      const u32 e = tid + j * THREADS;
      if (e >= g * dim) break;
      const u32 r = e / dim, c = e - r * dim;
      d.part[((u64)(kv * g + r) * SPLITS + split) * dim + c] = acc[j];
      made[e] = acc[j];
    }
    if (tid < g) d.stats[(kv * g + tid) * SPLITS + split] = make_float2(ms[tid], ls[tid]);
    if (d.next) {
      __syncthreads();
      for (u32 i = b.warp; i < d.next * g; i += WARPS) {
        const u32 q = i / g, r = i - q * g;
        const float* row = down_row(d, q) + (kv * g + r) * dim;
        float h = 0.f;
        for (u32 c = b.lane; c < dim; c += 32) h += row[c] * made[r * dim + c];
        h = warp_sum(h);
        if (b.lane == 0) d.np[((u64)q * d.queries + kv * g + r) * SPLITS + split] = h;
      }
    }
  }
}
DEV void likeliest(const Phase& d, const Block& b) {
  b.wait();
  if (blockIdx.x > 0 || b.warp > 0) return;
  Top top = {-inff, d.outputs, 0, 0};
  for (u32 i = b.lane; i < gridDim.x; i += 32) {
    const uint4 q = __ldcg((const uint4*)d.x + i);
    better(top, as_f32(q.x), q.y);
    top.bad |= q.z;
  }
  warp_top(top);
  if (b.lane == 0) { d.y[0] = (float)(top.bad ? d.outputs : top.at); d.y[1] = top.v; }
}
// bar: arrivals since ever, those before this launch, blocks that are done.
extern "C" __global__ void __launch_bounds__(THREADS, 1) chain(const Phase* phases, u32 count, u32* bar, const u32* pos) {
  extern __shared__ uint4 memory[];
  __shared__ u64 full[WARPS * SLOTS];
  __shared__ Phase desc[2];
  __shared__ float sums[WARPS], hs[RANKS];
  __shared__ Top tops[WARPS];
  Stream* streams = (Stream*)((char*)memory + WARPS * SLOTS * SLOT);
  Block b;
  b.warp = threadIdx.x >> 5;
  b.lane = threadIdx.x & 31;
  b.p = pos ? *pos : 0;
  b.base = ((volatile u32*)bar)[1];
  b.count = count;
  b.bar = bar;
  b.streams = streams;
  b.mine = (char*)memory + b.warp * SLOTS * SLOT;
  b.full = full + b.warp * SLOTS;
  b.work = (float4*)(streams + count);
  b.sums = sums;
  b.hs = hs;
  b.tops = tops;
  if (b.lane < SLOTS) bar_init(b.full + b.lane);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  for (u32 i = threadIdx.x; i < count; i += THREADS) {
    const Phase& d = phases[i];
    Stream z;
    for (int k = 0; k < 3; ++k) z.w[k] = d.w[k];
    const u32 units = d.kind < 3 ? d.units : 0, end = (u32)((u64)(blockIdx.x + 1) * units / gridDim.x);
    z.k = d.k; z.units = d.units; z.outputs = d.outputs; z.piece = d.piece; z.end0 = d.end0; z.end1 = d.end1; z.half = d.half;
    z.first = (u32)((u64)blockIdx.x * units / gridDim.x);
    z.pieces = (u16)d.pieces;
    z.kind = (u16)d.kind;
    z.tasks = (end - z.first) * d.pieces;
    streams[i] = z;
  }
  if (threadIdx.x < PHASE_WORDS) ((u32*)desc)[threadIdx.x] = ((const u32*)phases)[threadIdx.x];
  __syncthreads();
  Fetch f = {0, b.warp, 0, 0};
  for (int i = 0; i < SLOTS; ++i) issue(f, streams, count, b.mine, b.full);
  for (b.f = 0; b.f < count; ++b.f) {
    const Phase& d = desc[b.f & 1];
    u32 word = 0;
    const bool carries = b.f + 1 < count && threadIdx.x < PHASE_WORDS;
    if (carries) word = ((const u32*)(phases + b.f + 1))[threadIdx.x];
    if (d.kind < 3) linear(d, b, f);
    else if (d.kind == 3) attention(d, b);
    else likeliest(d, b);
    if (carries) ((u32*)(desc + (b.f + 1 & 1)))[threadIdx.x] = word;
    __syncthreads();
    if (threadIdx.x == 0 && b.f + 1 < count) arrive(bar);
  }
  if (threadIdx.x == 0 && atomicAdd(bar + 2, 1u) == gridDim.x - 1) {
    bar[2] = 0;
    bar[1] = b.base + (count - 1) * gridDim.x;
  }
}
#else
extern "C" __global__ void chain(const Phase*, u32, u32*, const u32*) {}
#endif
