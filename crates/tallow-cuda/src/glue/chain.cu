// A token's way through a model as one launch: linears of one row with what stands around them, attention, the likeliest
// token. Each processor has one block, each block a part of every step. No block waits for another as such: what a step
// leaves behind is read again until it is there. A word of zeros is not there; a zero is left behind as -0. Two sets
// of words take turns, a launch each, and while one is in use the other is set to zeros.
// Weights wait for nobody: they are copied into shared memory SLOTS pieces ahead for each warp, past the ends of steps, so
// that memory is busy all the time. What else never changes is asked for before the wait and used behind it.
// Of a block's warps the first WARPS compute, one copies weights, and one brings what the next step is. Bound by reading
// the weights once, and by the way of a value from one block to the others.
// Constants: WARPS that compute, SLOTS of a warp, SLOT bytes, STEPS room for steps, RANKS most ranks of one,
// HALF pairs of elements of a head.
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
  const float* hp; float* np; const float* nw;
  float* kc; float* vc; float* part; float* stats;
  // Where the outputs are left for the next steps.
  float* z;
  // 0: two outputs side by side; 1: silu(gate) * up; 2: rotated heads and the cache; 3: attention; 4: the likeliest.
  u32 kind, k, units, outputs, pieces, piece, end0, end1;
  u32 rank[3], r0[3];
  float scale[3];
  u32 ranks, count, next, nk, nend0, nend1;
  u32 half, queries, keys, slots;
  float eps, factor;
  u32 window, joined, top, most, fresh;
};
// `fresh`: which of these an earlier step of the launch left behind.
#define FRESH_X 1
#define FRESH_PAST 2
#define FRESH_H 4
#define PHASE_WORDS ((u32)(sizeof(Phase) / 4))
// What of a step the copies need, and this block's part of it. `by_*`: for divisions.
struct Stream { u64 w[3]; u32 k, outputs, end0, end1, half, by_half, by_pieces, first; u16 tasks, n, pieces, piece, kind, none; u32 pad; };
struct Top { float v; u32 at, bad, none; };
#if __CUDA_ARCH__ >= 900
DEV u32 shared_at(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEV void bar_init(u64* bar) { asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared_at(bar)) : "memory"); }
DEV void bar_expect(u64* bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_at(bar)), "r"(bytes) : "memory");
}
DEV void bar_arrive(u64* bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_at(bar)) : "memory"); }
DEV bool bar_passed(u64* bar, u32 parity) {
  u32 ok;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
    : "=r"(ok) : "r"(shared_at(bar)), "r"(parity) : "memory");
  return ok;
}
DEV void bar_wait(u64* bar, u32 parity) {
  asm volatile("{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra AGAIN;\nDONE:\n}"
    :: "r"(shared_at(bar)), "r"(parity) : "memory");
}
// Weights are read once a token: they leave the cache to others.
DEV void copy(void* to, u64 from, u32 bytes, u64* bar) {
  u64 once;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
    :: "r"(shared_at(to)), "l"(from), "r"(bytes), "r"(shared_at(bar)), "l"(once) : "memory");
}
// Words that are read until they are there, and words left behind.
DEV uint4 look4(const float* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
DEV u32 look(const float* p) { u32 v; asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v; }
DEV float4 until4(uint4 v, const float* p) {
  while (!(v.x && v.y && v.z && v.w)) v = look4(p);
  return make_float4(as_f32(v.x), as_f32(v.y), as_f32(v.z), as_f32(v.w));
}
DEV float until(u32 v, const float* p) {
  while (!v) v = look(p);
  return as_f32(v);
}
DEV float4 there4(const float* p) { return until4(look4(p), p); }
DEV float there(const float* p) { return until(look(p), p); }
DEV u32 filled(float v) { const u32 w = __float_as_uint(v); return w ? w : 0x80000000u; }
DEV void leave(float* p, float v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(p), "r"(filled(v)) : "memory"); }
DEV void leave2(float* p, float a, float b) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" :: "l"(p), "r"(filled(a)), "r"(filled(b)) : "memory");
}
// The warps that compute; with the one that brings steps, when this block is done with the step before and the next but
// one may be overwritten; and when it is done, which nobody but that warp waits for.
DEV void sync() { asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory"); }
DEV void ready() { asm volatile("bar.sync 2, %0;" :: "n"(THREADS + 32) : "memory"); }
DEV void done() { asm volatile("bar.arrive 3, %0;" :: "n"(THREADS + 32) : "memory"); }
DEV void all_done() { asm volatile("bar.sync 3, %0;" :: "n"(THREADS + 32) : "memory"); }
DEV float dot8(uint4 q, float4 a, float4 b) {
  return (as_f32(q.x << 16) * a.x + as_f32(q.x & 0xffff0000u) * a.y + as_f32(q.y << 16) * a.z + as_f32(q.y & 0xffff0000u) * a.w)
       + (as_f32(q.z << 16) * b.x + as_f32(q.z & 0xffff0000u) * b.y + as_f32(q.w << 16) * b.z + as_f32(q.w & 0xffff0000u) * b.w);
}
DEV void fetch(const float* p) { asm volatile("prefetch.global.L1 [%0];" :: "l"(p)); }
DEV float4 cg4(const float* p) { return __ldcg((const float4*)p); }
DEV float half_sum(float v) {
  for (int o = 8; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}
// n / d for n d < 2³², by = over(d); d > 1.
DEV u32 over(u32 d) { return ~0u / d + 1; }
DEV u32 divide(u32 n, u32 d, u32 by) { return d == 1 ? n : __umulhi(n, by); }
// Which of three parts `o` lies in, and where that begins.
DEV u32 part_of(u32 o, u32 end0, u32 end1, u32& start) {
  const u32 i = (o >= end0) + (o >= end1);
  start = i == 0 ? 0 : i == 1 ? end0 : end1;
  return i;
}
template <int KIND> DEV void outputs_of(const Stream& z, u32 unit, u32& oa, u32& ob) {
  const u32 kind = KIND < 0 ? z.kind : KIND;
  if (kind == 0) { oa = 2 * unit; ob = oa + 1; }
  else if (kind == 1) { oa = unit; ob = unit + z.outputs / 2; }
  else { oa = unit + divide(unit, z.half, z.by_half) * z.half; ob = oa + z.half; }
}
// Element q of row o of B, and where the h that it is multiplied with lies; nowhere past the rank: nothing may be
// multiplied there, for h may be infinite.
#define NOWHERE (~0u)
DEV float tail(const Phase& d, u32 o, u32 q, u32& at) {
  u32 start;
  const u32 i = part_of(o, d.end0, d.end1, start);
  at = NOWHERE;
  if (q >= d.rank[i]) return 0.f;
  at = d.r0[i] + q;
  return d.up[i][(o - start) * d.rank[i] + q];
}
// A row of all A of the next linear.
DEV const float* down_row(const Phase& d, u32 q) {
  u32 start;
  const u32 i = part_of(q, d.nend0, d.nend1, start);
  return d.down[i] + (u64)(q - start) * d.nk;
}
// The scale of the adapter that rank q belongs to.
DEV float scale_of(const Phase& d, u32 q) { return d.scale[(q >= d.r0[1]) + (q >= d.r0[2])]; }
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
// What a block keeps over all steps: the copies of every warp and whether they are there, or free; the parts of the steps;
// room for one step at a time.
extern __shared__ uint4 memory[];
#define RING ((char*)memory)
#define STREAMS ((Stream*)(RING + WARPS * SLOTS * SLOT))
#define TILES ((float4*)(STREAMS + STEPS))
#define WORK ((float4*)((char*)TILES + TILE_BYTES))
__shared__ u64 full[WARPS * SLOTS], empty[WARPS * SLOTS];
__shared__ Phase desc[2];
__shared__ float sums[WARPS], hs[RANKS], inverse;
__shared__ Top tops[WARPS];
// Cosine and sine for each pair of elements of a head.
__shared__ float2 turn[HALF];
__shared__ u32 position;
struct Block { u32 warp, lane, used; };
// Where of this launch's set: `p` is in the first.
__shared__ u64 set;
template <class T> DEV T* left(T* p) { return (T*)((char*)p + set); }
// Row x from the parts that attention left behind, and its h.
DEV void join(const Phase& d, const Block& b, float* wg) {
  const Keys s = keys_of(d, position);
  const u32 dim = 2 * d.half, quarter = over(dim / 4), k4 = d.k / 4, hw = threadIdx.x / 16, l16 = b.lane & 15;
  const u32 by_splits = over(max(2u, s.splits)), first = divide(threadIdx.x, dim / 4, quarter);
  const float* part = left(d.part);
  const float* stats = left(d.stats);
  const float* hp = left(d.hp);
  const u32 each = d.queries * s.splits;
  ready();
  // The first parts are on their way while their weights are made.
  const float* from = part + (u64)first * SPLITS * dim + (threadIdx.x - first * (dim / 4)) * 4;
  uint4 q[3] = {};
  auto ask = [&](u32 i0) {
#pragma unroll
    for (u32 i = 0; i < 3; ++i)
      if (i0 + i < s.splits) q[i] = look4(from + (i0 + i) * dim);
  };
  if (threadIdx.x < k4) ask(0);
  for (u32 head = b.warp; head < d.queries; head += WARPS) {
    float2 st = make_float2(-inff, 0.f);
    if (b.lane < s.splits) {
      const float* p = stats + (head * SPLITS + b.lane) * 2;
      const u32 m = look(p), l = look(p + 1);
      st = make_float2(until(m, p), until(l, p + 1));
    }
    const float m = warp_max(st.x), w = st.y > 0.f ? expf(st.x - m) : 0.f, sum = warp_sum(w * st.y);
    wg[head * SPLITS + b.lane] = sum > 0.f ? w / sum : 0.f;
  }
  sync();
  for (u32 at = threadIdx.x; at < k4; at += THREADS) {
    const u32 head = divide(at, dim / 4, quarter);
    from = part + (u64)head * SPLITS * dim + (at - head * (dim / 4)) * 4;
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    auto add = [&](float4 x, float w) { v.x += w * x.x; v.y += w * x.y; v.z += w * x.z; v.w += w * x.w; };
#pragma unroll 1
    for (u32 i0 = 0; i0 < s.splits; i0 += 3) {
      if (i0 || at != threadIdx.x) ask(i0);
#pragma unroll
      for (u32 i = 0; i < 3; ++i)
        if (i0 + i < s.splits) add(until4(q[i], from + (i0 + i) * dim), wg[head * SPLITS + i0 + i]);
    }
    WORK[(at & 1) * (d.k / 8) + at / 2] = v;
  }
  for (u32 r = hw; r - (b.lane >> 4) < d.ranks; r += THREADS / 16) {
    float sum = 0.f;
    for (u32 e = l16; e < each; e += 16) {
      const u32 head = divide(e, s.splits, by_splits), at = head * SPLITS + e - head * s.splits;
      if (r < d.ranks) sum += wg[at] * there(hp + r * d.queries * SPLITS + at);
    }
    sum = half_sum(sum);
    if (l16 == 0 && r < d.ranks) hs[r] = scale_of(d, r) * sum;
  }
}
// Row x as it lies, times the norm's weights, the sum of its squares by warp, and h from its parts.
DEV void take(const Phase& d, const Block& b) {
  const u32 tid = threadIdx.x, k4 = d.k / 4, k8 = d.k / 8, count = d.count, ranks = d.ranks;
  const bool fresh = d.fresh & FRESH_X;
  const float* x = fresh ? left(d.x) : d.x;
  const float* norm = d.norm;
  const float* hp = d.fresh & FRESH_H ? left(d.hp) : nullptr;
  float4 n0 = make_float4(1.f, 1.f, 1.f, 1.f);
  if (norm && tid < k4) n0 = *(const float4*)(norm + tid * 4);
  uint4 x0 = {}, part = {};
  const u32 p4 = b.lane * 4;
  if (tid < k4) x0 = look4(x + tid * 4);
  if (hp && b.warp < ranks && p4 < count) part = look4(hp + b.warp * count + p4);
  ready();
  float s = 0.f;
  for (u32 at = tid; at < k4; at += 2 * THREADS) {
    const bool more = at + THREADS < k4;
    uint4 q = x0, q1 = {};
    if (at != tid) q = look4(x + at * 4);
    if (more) q1 = look4(x + (at + THREADS) * 4);
    float4 w = make_float4(0.f, 0.f, 0.f, 0.f);
    float4 v = fresh ? until4(q, x + at * 4) : make_float4(as_f32(q.x), as_f32(q.y), as_f32(q.z), as_f32(q.w));
    if (more) w = fresh ? until4(q1, x + (at + THREADS) * 4) : make_float4(as_f32(q1.x), as_f32(q1.y), as_f32(q1.z), as_f32(q1.w));
    if (norm) {
      const float4 n1 = more ? *(const float4*)(norm + (at + THREADS) * 4) : w;
      if (at != tid) n0 = *(const float4*)(norm + at * 4);
      s += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w + w.x * w.x + w.y * w.y + w.z * w.z + w.w * w.w;
      v.x *= n0.x; v.y *= n0.y; v.z *= n0.z; v.w *= n0.w;
      w.x *= n1.x; w.y *= n1.y; w.z *= n1.z; w.w *= n1.w;
    }
    WORK[(at & 1) * k8 + at / 2] = v;
    if (more) WORK[((at + THREADS) & 1) * k8 + (at + THREADS) / 2] = w;
  }
  if (norm) {
    s = warp_sum(s);
    if (b.lane == 0) sums[b.warp] = s;
  }
  for (u32 q = b.warp; q < ranks; q += WARPS) {
    float h = 0.f;
    if (hp) {
      for (u32 at = p4; at < count; at += 128) {
        const float* p = hp + q * count + at;
        const float4 v = until4(q == b.warp && at == p4 ? part : look4(p), p);
        h += (v.x + v.y) + (v.z + v.w);
      }
    } else if (b.lane == 0) h = __ldcg(d.hp + q);
    h = warp_sum(h);
    if (b.lane == 0) hs[q] = scale_of(d, q) * h;
  }
}
// What stands behind the sums of a unit's two outputs.
struct Behind { float ca, cb, pa, pb; };
template <int KIND> DEV Behind behind(const Phase& d, const Stream& z, const Block& b, u32 unit) {
  Behind o = {};
  u32 oa, ob;
  outputs_of<KIND>(z, unit, oa, ob);
  o.ca = bias_of(d, oa);
  if (ob < d.outputs) o.cb = bias_of(d, ob);
  return o;
}
template <int KIND> DEV void past_of(const Phase& d, u32 unit, Behind& o) {
  if (KIND || !d.past) return;
  const bool two = 2 * unit + 1 < d.outputs;
  if (d.fresh & FRESH_PAST) {
    const float* p = left(d.past) + 2 * unit;
    const u32 pa = look(p), pb = two ? look(p + 1) : 1;
    o.pa = until(pa, p);
    if (two) o.pb = until(pb, p + 1);
  } else {
    o.pa = __ldcg(d.past + 2 * unit);
    if (two) o.pb = __ldcg(d.past + 2 * unit + 1);
  }
}
template <int KIND, bool JOINED> DEV void linear(const Phase& d, const Stream& z, Block& b) {
  const u32 n = z.n, tasks = z.tasks, tid = threadIdx.x, lane = b.lane, hw = tid / 16, l16 = tid & 15;
  float2* red = (float2*)(WORK + d.k / 4);
  float* made = (float*)(red + tasks);
  const u32 values = KIND == 1 ? n : 2 * n, v0 = KIND == 1 ? z.first : 2 * z.first;
  // What never changes: the tails of this warp's first two sums, what is added to this thread's outputs, and what the
  // next h makes of the outputs.
  float ta[2], tb[2];
  u32 qa[2] = {NOWHERE, NOWHERE}, qb[2] = {NOWHERE, NOWHERE};
  if (d.ranks)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const u32 t = b.warp + j * WARPS, u = divide(t, z.pieces, z.by_pieces);
      u32 oa, ob;
      if (t >= tasks || u * z.pieces != t) continue;
      outputs_of<KIND>(z, z.first + u, oa, ob);
      ta[j] = tail(d, oa, lane, qa[j]);
      if (ob < d.outputs) tb[j] = tail(d, ob, lane, qb[j]);
    }
  Behind o = {};
  if (tid < n) o = behind<KIND>(d, z, b, z.first + tid);
  float wd[3] = {0.f, 0.f, 0.f}, wn[3] = {1.f, 1.f, 1.f};
  if (hw < d.next) {
    const float* row = down_row(d, hw);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const u32 v = l16 + 16 * i;
      if (v >= values || v0 + v >= d.nk) continue;
      wd[i] = row[v0 + v];
      if (d.nw) wn[i] = d.nw[v0 + v];
    }
  }
  if (JOINED) join(d, b, made + 2 * n); else take(d, b);
  if (tid < n) past_of<KIND>(d, z.first + tid, o);
  sync();
  // The last warp has the least to do.
  if (!JOINED && d.norm && b.warp == WARPS - 1) {
    const float s = warp_sum(lane < WARPS ? sums[lane] : 0.f);
    if (lane == 0) inverse = rsqrtf(s / d.k + d.eps);
  }
  u32 j = 0;
  for (u32 t = b.warp; t < tasks; t += WARPS, ++j) {
    const u32 slot = b.used % SLOTS, u = divide(t, z.pieces, z.by_pieces), c0 = (t - u * z.pieces) * z.piece;
    const u32 groups = min(d.k / 8 - c0, (u32)z.piece);
    const uint4* wa = (const uint4*)(RING + (b.warp * SLOTS + slot) * SLOT);
    const uint4* wb = (const uint4*)(RING + (b.warp * SLOTS + slot) * SLOT + SLOT / 2);
    const float4* lo = WORK + c0;
    const float4* hi = lo + d.k / 8;
    float sa = 0.f, sb = 0.f;
    if (d.ranks && c0 == 0) {
      if (j == 0) {
        if (qa[0] != NOWHERE) sa = ta[0] * hs[qa[0]];
        if (qb[0] != NOWHERE) sb = tb[0] * hs[qb[0]];
      } else if (j == 1) {
        if (qa[1] != NOWHERE) sa = ta[1] * hs[qa[1]];
        if (qb[1] != NOWHERE) sb = tb[1] * hs[qb[1]];
      }
      if (j > 1 || d.most > 32) {
        u32 oa, ob, at;
        outputs_of<KIND>(z, z.first + u, oa, ob);
        for (u32 q = j < 2 ? lane + 32 : lane; q < d.most; q += 32) {
          float v = tail(d, oa, q, at);
          if (at != NOWHERE) sa += v * hs[at];
          if (ob >= d.outputs) continue;
          v = tail(d, ob, q, at);
          if (at != NOWHERE) sb += v * hs[at];
        }
      }
    }
    bar_wait(full + b.warp * SLOTS + slot, b.used / SLOTS & 1);
    u32 c = lane;
#pragma unroll 1
    for (; c + 32 < groups; c += 64) {
      const uint4 q0 = wa[c], q1 = wb[c], q2 = wa[c + 32], q3 = wb[c + 32];
      const float4 l = lo[c], h = hi[c], l2 = lo[c + 32], h2 = hi[c + 32];
      sa += dot8(q0, l, h);
      sb += dot8(q1, l, h);
      sa += dot8(q2, l2, h2);
      sb += dot8(q3, l2, h2);
    }
    if (c < groups) {
      const float4 l = lo[c], h = hi[c];
      sa += dot8(wa[c], l, h);
      sb += dot8(wb[c], l, h);
    }
    __syncwarp();
    if (lane == 0) bar_arrive(empty + b.warp * SLOTS + slot);
    ++b.used;
    sa = warp_sum(sa);
    sb = warp_sum(sb);
    if (lane == 0) red[t] = make_float2(sa, sb);
  }
  sync();
  const float r = !JOINED && d.norm ? inverse : 1.f;
  Top top = {-inff, d.outputs, 0, 0};
  float* next = d.z ? left(d.z) : nullptr;
  for (u32 i = tid; i < n; i += THREADS) {
    const u32 unit = z.first + i;
    if (i != tid) {
      o = behind<KIND>(d, z, b, unit);
      past_of<KIND>(d, unit, o);
    }
    u32 oa, ob;
    outputs_of<KIND>(z, unit, oa, ob);
    float sa = 0.f, sb = 0.f;
    const float2* from = red + i * z.pieces;
#pragma unroll 4
    for (u32 k = 0; k < z.pieces; ++k) { const float2 v = from[k]; sa += v.x; sb += v.y; }
    float va = sa * r + o.ca + o.pa, vb = sb * r + o.cb + o.pb;
    if (KIND == 0) {
      if (ob >= d.outputs) vb = 0.f;
      if (next) leave2(next + oa, va, vb);
      d.y[oa] = va;
      if (ob < d.outputs) d.y[ob] = vb;
      if (d.next) { made[2 * i] = va; made[2 * i + 1] = vb; }
      if (d.top) {
        top.bad |= va != va || (ob < d.outputs && vb != vb);
        better(top, va, oa);
        if (ob < d.outputs) better(top, vb, ob);
      }
    } else if (KIND == 1) {
      va = va / (1.f + expf(-va)) * vb;
      if (next) leave(next + unit, va);
      d.y[unit] = va;
      made[i] = va;
    } else {
      const u32 head = divide(unit, z.half, z.by_half), e = unit - head * z.half;
      if (head < d.queries + d.keys) {
        const float2 t = turn[e];
        const float x = va * t.x - vb * t.y, y = vb * t.x + va * t.y;
        va = x;
        vb = y;
      }
      if (next) {
        leave(next + oa, va);
        leave(next + ob, vb);
      }
      if (head < d.queries + d.keys) {
        d.y[oa] = va;
        d.y[ob] = vb;
      }
      if (head >= d.queries && position < d.slots) {
        const bool key = head < d.queries + d.keys;
        float* to = (key ? d.kc : d.vc) + ((u64)position * d.keys + head - d.queries - (key ? 0 : d.keys)) * 2 * d.half;
        to[e] = va;
        to[e + d.half] = vb;
      }
    }
  }
  if (d.next) {
    sync();
    for (u32 q = hw; q - (lane >> 4) < d.next; q += THREADS / 16) {
      float h = 0.f;
      const bool mine = q == hw;
      if (mine)
#pragma unroll
        for (int i = 0; i < 3; ++i)
          if (l16 + 16 * i < values) h += wd[i] * wn[i] * made[l16 + 16 * i];
      if (q < d.next) {
        const float* row = down_row(d, q);
        
#pragma unroll 1
        for (u32 v = mine ? l16 + 48 : l16; v < values; v += 16)
          if (v0 + v < d.nk) h += row[v0 + v] * (d.nw ? d.nw[v0 + v] : 1.f) * made[v];
      }
      h = half_sum(h);
      if (l16 == 0 && q < d.next) leave(left(d.np) + q * gridDim.x + blockIdx.x, h);
    }
  }
  if (d.top) {
    warp_top(top);
    if (lane == 0) tops[b.warp] = top;
    sync();
    if (b.warp == 0) {
      top = lane < WARPS ? tops[lane] : Top{-inff, d.outputs, 0, 0};
      warp_top(top);
      float* to = left(d.np) + 4 * blockIdx.x;
      if (lane == 0) {
        leave2(to, top.v, as_f32(top.at + 1));
        leave2(to + 2, top.bad ? 1.f : 2.f, 1.f);
      }
    }
  }
}
// One block for a part of the keys of a key head, with all its queries; parts of the next h as parts of the result.
DEV void attention(const Phase& d, Block& b) {
  const u32 dim = 2 * d.half, g = d.queries / d.keys, stride = dim + 4, tid = threadIdx.x, hw = tid / 16, l16 = tid & 15;
  const u32 row4 = dim / 4, by_row4 = over(row4), by_dim = over(dim), by_g = over(max(2u, g));
  const Keys s = keys_of(d, position);
  float* ks = (float*)TILES;
  float* vs = ks + TILE * stride;
  float* qs = (float*)WORK;
  float* ps = qs + g * stride;
  float* made = ps + g * TILE;
  float* ms = made + g * dim;
  float* ls = ms + g;
  float* fs = ls + g;
  const u32 items = d.keys * s.splits, next = d.next;
  // Of this token queries, key and value lie where the step before left them.
  const float* q = left(d.x);
  const float* own = q + d.queries * dim;
  u32 item = blockIdx.x;
  // Keys before this token's lie there since before the launch: those of the first tile are on their way before the wait.
  u32 kv = item % d.keys, split = item / d.keys, from = 0, to = 0;
  if (item < items) { from = s.lo + s.n * split / s.splits; to = s.lo + s.n * (split + 1) / s.splits; }
  auto load = [&](u32 k0, u32 r, u32 c) {
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f), y = x;
    if (k0 + r < to) {
      const u64 at = ((u64)(k0 + r) * d.keys + kv) * dim + c;
      if (k0 + r == position) {
        const float* p = own + kv * dim + c;
        const float* p2 = p + d.keys * dim;
        const uint4 a = look4(p), e = look4(p2);
        x = until4(a, p);
        y = until4(e, p2);
      } else {
        x = cg4(d.kc + at);
        y = cg4(d.vc + at);
      }
    }
    *(float4*)(ks + r * stride + c) = x;
    *(float4*)(vs + r * stride + c) = y;
  };
  if (item < items) {
    for (u32 i = tid; i < next * g * dim / 32; i += THREADS) {
      const u32 e = i * 32, rank = e / (g * dim);
      fetch(down_row(d, rank) + kv * g * dim + e - rank * g * dim);
    }
  }
  ready();
  for (; item < items; item += gridDim.x) {
    const bool first = item == blockIdx.x;
    if (!first) {
      kv = item % d.keys;
      split = item / d.keys;
      from = s.lo + s.n * split / s.splits;
      to = s.lo + s.n * (split + 1) / s.splits;
      sync();
    }
    for (u32 e = tid; e < g * row4; e += THREADS) {
      const u32 r = divide(e, row4, by_row4), c = (e - r * row4) * 4;
      *(float4*)(qs + r * stride + c) = there4(q + (kv * g + r) * dim + c);
    }
    if (tid < g) { ms[tid] = -inff; ls[tid] = 0.f; }
    float acc[ACCS] = {};
    for (u32 k0 = from; k0 < to; k0 += TILE) {
      if (k0 != from) sync();
      // Of the first tile only this token's key is missing.
      const bool there = first && k0 == from;
      const u32 r0 = there && position >= k0 ? position - k0 : 0, rows = there ? (position >= k0 && position < k0 + TILE ? 1 : 0) : TILE;
      for (u32 e = tid; e < rows * row4; e += THREADS) {
        const u32 r = divide(e, row4, by_row4);
        load(k0, r0 + r, (e - r * row4) * 4);
      }
      sync();
      for (u32 r = b.warp; r < g; r += WARPS) {
        float v = 0.f, v2 = 0.f;
#pragma unroll 4
        for (u32 c = 0; c < dim; c += 4) {
          const float4 x = *(const float4*)(qs + r * stride + c), y = *(const float4*)(ks + b.lane * stride + c);
          v += x.x * y.x + x.y * y.y;
          v2 += x.z * y.z + x.w * y.w;
        }
        const float score = k0 + b.lane < to ? (v + v2) * d.factor : -inff, old = ms[r], m = fmaxf(old, warp_max(score));
        const float zero = m == -inff ? 0.f : m, e = expf(score - zero), f = expf(old - zero), sum = warp_sum(e);
        ps[r * TILE + b.lane] = e;
        if (b.lane == 0) { fs[r] = f; ls[r] = ls[r] * f + sum; ms[r] = m; }
      }
      sync();
#pragma unroll
      for (int j = 0; j < ACCS; ++j) {
        const u32 e = tid + j * THREADS;
        if (e >= g * dim) break;
        const u32 r = divide(e, dim, by_dim), c = e - r * dim;
        float v = acc[j] * fs[r], v2 = 0.f;
#pragma unroll 4
        for (u32 i = 0; i < TILE; i += 2) {
          v += ps[r * TILE + i] * vs[i * stride + c];
          v2 += ps[r * TILE + i + 1] * vs[(i + 1) * stride + c];
        }
        acc[j] = v + v2;
      }
    }
#pragma unroll
    for (int j = 0; j < ACCS; ++j) {
      const u32 e = tid + j * THREADS;
      if (e >= g * dim) break;
      const u32 r = divide(e, dim, by_dim), c = e - r * dim;
      leave(left(d.part) + ((kv * g + r) * SPLITS + split) * dim + c, acc[j]);
      made[e] = acc[j];
    }
    if (tid < g) leave2(left(d.stats) + ((kv * g + tid) * SPLITS + split) * 2, ms[tid], ls[tid]);
    if (next) {
      sync();
      for (u32 i = hw; i - (b.lane >> 4) < next * g; i += THREADS / 16) {
        const u32 rank = divide(i, g, by_g), r = i - rank * g;
        float h = 0.f;
        if (i < next * g) {
          const float* row = down_row(d, rank) + (kv * g + r) * dim;
          for (u32 c = l16; c < dim; c += 16) h += row[c] * made[r * dim + c];
        }
        h = half_sum(h);
        if (l16 == 0 && i < next * g) leave(left(d.np) + (rank * d.queries + kv * g + r) * SPLITS + split, h);
      }
    }
  }
}
DEV void likeliest(const Phase& d, const Block& b) {
  ready();
  if (blockIdx.x > 0 || b.warp > 0) return;
  Top top = {-inff, d.outputs, 0, 0};
  for (u32 i = b.lane; i < gridDim.x; i += 32) {
    const float4 q = there4(left(d.x) + 4 * i);
    better(top, q.x, __float_as_uint(q.y) - 1);
    top.bad |= q.z == 1.f;
  }
  warp_top(top);
  if (b.lane == 0) { d.y[0] = (float)(top.bad ? d.outputs : top.at); d.y[1] = top.v; }
}
// Copies all weights of this block, a lane for each warp that computes.
DEV void feed(u32 count) {
  const u32 lane = threadIdx.x & 31;
  u32 phase = 0, task = lane, issued = 0;
  for (;;) {
    while (phase < count && task >= STREAMS[phase].tasks) { ++phase; task = lane; }
    const bool more = lane < WARPS && phase < count;
    if (!__any_sync(~0u, more)) return;
    const u32 slot = issued % SLOTS, at = lane * SLOTS + slot;
    if (more && (issued < SLOTS || bar_passed(empty + at, (issued / SLOTS - 1) & 1))) {
      const Stream& z = STREAMS[phase];
      const u32 u = divide(task, z.pieces, z.by_pieces), c = (task - u * z.pieces) * z.piece;
      const u32 bytes = min(z.k / 8 - c, (u32)z.piece) * 16;
      u32 oa, ob, start;
      outputs_of<-1>(z, z.first + u, oa, ob);
      const bool two = ob < z.outputs;
      char* to = RING + at * SLOT;
      bar_expect(full + at, two ? 2 * bytes : bytes);
      u32 i = part_of(oa, z.end0, z.end1, start);
      copy(to, z.w[i] + ((u64)(oa - start) * z.k + c * 8) * 2, bytes, full + at);
      if (two) {
        i = part_of(ob, z.end0, z.end1, start);
        copy(to + SLOT / 2, z.w[i] + ((u64)(ob - start) * z.k + c * 8) * 2, bytes, full + at);
      }
      ++issued;
      task += WARPS;
    }
    __syncwarp();
  }
}
// The first keys and values that this block's attention reads: all but this token's lie there since before the launch.
// Not by the engine that copies weights: they would wait behind all of those.
DEV void ahead(const Phase& d) {
  const Keys s = keys_of(d, position);
  const u32 lane = threadIdx.x & 31, dim = 2 * d.half, row4 = dim / 4, stride = dim + 4, item = blockIdx.x;
  if (item >= d.keys * s.splits) return;
  const u32 kv = item % d.keys, split = item / d.keys, from = s.lo + s.n * split / s.splits, to = s.lo + s.n * (split + 1) / s.splits;
  const u32 by_row4 = over(row4);
#pragma unroll 4
  for (u32 e = lane; e < TILE * row4; e += 32) {
    const u32 r = divide(e, row4, by_row4), c = (e - r * row4) * 4, row = from + r;
    if (row == position) continue;
    const u64 at = ((u64)min(row, position) * d.keys + kv) * dim + c;
    float* k = (float*)TILES + r * stride + c;
    const u32 bytes = row < to ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared_at(k)), "l"(d.kc + at), "r"(bytes) : "memory");
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared_at(k + TILE * stride)), "l"(d.vc + at), "r"(bytes) : "memory");
  }
}
// Brings what the next step is while this one is computed, and sets the words of the other set to zeros.
DEV void bring(const Phase* phases, u32 count, uint4* other, u32 words4) {
  const u32 lane = threadIdx.x & 31, blocks = gridDim.x * count;
  for (u32 f = 0; f < count; ++f) {
    u32 words[(PHASE_WORDS + 31) / 32];
    if (f + 1 < count)
#pragma unroll
      for (u32 i = 0; i < (PHASE_WORDS + 31) / 32; ++i)
        if (lane + 32 * i < PHASE_WORDS) words[i] = ((const u32*)(phases + f + 1))[lane + 32 * i];
    if (f > 0) all_done();
    if (f + 1 < count)
#pragma unroll
      for (u32 i = 0; i < (PHASE_WORDS + 31) / 32; ++i)
        if (lane + 32 * i < PHASE_WORDS) ((u32*)(desc + (f + 1 & 1)))[lane + 32 * i] = words[i];
    asm volatile("cp.async.wait_all;" ::: "memory");
    ready();
    if (f + 1 < count && desc[f + 1 & 1].kind == 3) ahead(desc[f + 1 & 1]);
    for (u32 i = (f * gridDim.x + blockIdx.x) * 32 + lane; i < words4; i += blocks * 32) other[i] = make_uint4(0, 0, 0, 0);
  }
  all_done();
}
extern "C" __global__ void __launch_bounds__(THREADS + 64, 1) chain(const Phase* phases, u32 count, u32* turns, char* sets, u64 set_bytes, const u32* pos, const float* freq) {
  Block b;
  b.warp = threadIdx.x >> 5;
  b.lane = threadIdx.x & 31;
  if (threadIdx.x == 0) position = pos ? *pos : 0;
  b.used = 0;
  // turns: launches so far, blocks of this one that are done.
  const u32 turn_now = ((volatile u32*)turns)[0];
  if (threadIdx.x == 0) set = turn_now & 1 ? set_bytes : 0;
  if (threadIdx.x < WARPS * SLOTS) { bar_init(full + threadIdx.x); bar_init(empty + threadIdx.x); }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  for (u32 i = threadIdx.x; i < count; i += THREADS + 64) {
    const Phase& d = phases[i];
    Stream z = {};
    for (int k = 0; k < 3; ++k) z.w[k] = d.w[k];
    const u32 units = d.kind < 3 ? d.units : 0, end = (u32)((u64)(blockIdx.x + 1) * units / gridDim.x);
    z.k = d.k; z.outputs = d.outputs; z.end0 = d.end0; z.end1 = d.end1; z.half = d.half;
    z.by_half = over(max(2u, d.half)); z.by_pieces = over(max(2u, d.pieces));
    z.first = (u32)((u64)blockIdx.x * units / gridDim.x);
    z.n = (u16)(end - z.first);
    z.pieces = (u16)d.pieces; z.piece = (u16)d.piece; z.kind = (u16)d.kind;
    z.tasks = (u16)((end - z.first) * d.pieces);
    STREAMS[i] = z;
  }
  for (u32 i = threadIdx.x; freq && i < HALF; i += THREADS + 64) {
    const float angle = (float)(pos ? *pos : 0) * freq[i];
    turn[i] = make_float2(cosf(angle), sinf(angle));
  }
  if (threadIdx.x < PHASE_WORDS) ((u32*)desc)[threadIdx.x] = ((const u32*)phases)[threadIdx.x];
  __syncthreads();
  if (b.warp == WARPS) { feed(count); return; }
  if (b.warp == WARPS + 1) {
    bring(phases, count, (uint4*)(sets + (set_bytes - set)), (u32)(set_bytes / 16));
    if (b.lane == 0 && atomicAdd(turns + 1, 1u) == gridDim.x - 1) {
      turns[1] = 0;
      turns[0] = turn_now + 1;
    }
    return;
  }
  for (u32 f = 0; f < count; ++f) {
    const Phase& d = desc[f & 1];
    if (d.kind == 0 && d.joined) linear<0, true>(d, STREAMS[f], b);
    else if (d.kind == 0) linear<0, false>(d, STREAMS[f], b);
    else if (d.kind == 1) linear<1, false>(d, STREAMS[f], b);
    else if (d.kind == 2) linear<2, false>(d, STREAMS[f], b);
    else if (d.kind == 3) attention(d, b);
    else likeliest(d, b);
    done();
  }
}
#else
extern "C" __global__ void chain(const Phase*, u32, u32*, char*, u64, const u32*, const float*) {}
#endif
