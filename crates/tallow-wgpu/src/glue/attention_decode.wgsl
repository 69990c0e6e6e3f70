// == four
// Four elements of NAME from column `c` of a head on: zeros past D.
fn four_NAME(at: u32, c: u32) -> vec4<f32> {
  if (c + 4u <= D) { return ld4_NAME(at + c); }
  var x = vec4<f32>();
  if (c < D) { x.x = ld_NAME(at + c); }
  if (c + 1u < D) { x.y = ld_NAME(at + c + 1u); }
  if (c + 2u < D) { x.z = ld_NAME(at + c + 2u); }
  return x;
}
// == decode
// attention_decode_f32: few queries over many keys. A workgroup of 64 for 64 keys of a key head and all its queries: a
// thread makes the scores of one key, then of four columns and a row the sum over the values. Row r is query r % T of
// head r / T. What it leaves for attention_join.wgsl:
// part [b, hk, splits, ROWS, D], stats [b, hk, splits, ROWS, 2]: largest score, sum of exp.
// Bound by reading keys and values once.
// 32 columns of the keys, then of the values.
var<workgroup> tile: array<vec4<f32>, 576>;
var<workgroup> qs: array<vec4<f32>, 128>;
var<workgroup> ps: array<f32, 1024>;
var<workgroup> four: array<f32, 64>;
var<workgroup> range: array<vec2<u32>, 16>;
var<workgroup> together: array<vec2<u32>, 1>;
@compute @workgroup_size(WG)
fn decode(id: Id) {
  let w = id.w;
  let lane = id.t;
  let k0 = w.x * 64u;
  let base = ((w.z * a.hk + w.y) * a.splits + w.x) * ROWS;
  if (lane < T) {
    let i = w.z * T + lane;
    range[lane] = seen(ld_pos(i), u32(ld_starts(i)), a.s);
  }
  workgroupBarrier();
  if (lane == 0u) {
    var all = vec2(0xffffffffu, 0u);
    for (var i = 0u; i < T; i++) {
      let r = range[i];
      if (r.y > r.x) { all = vec2(min(all.x, r.x), max(all.y, r.y)); }
    }
    together[0] = all;
  }
  let all = workgroupUniformLoad(&together)[0];
  if (all.y <= k0 || all.x >= k0 + 64u) {
    if (lane < ROWS) {
      st_stats((base + lane) * 2u, LOW);
      st_stats((base + lane) * 2u + 1u, 0.0);
    }
    return;
  }
  for (var r = 0u; r < ROWS; r++) { ps[r * 64u + lane] = 0.0; }
  // Rows whose fours lie in one piece each are read eight at once.
  let k_at = w.z * a.kb + w.y * a.kh + k0 * a.kt;
  let v_at = w.z * a.vb + w.y * a.vh + k0 * a.vt;
  let straight_k = D % 4u == 0u && a.kt % 4u == 0u && in4_k(k_at);
  let straight_v = D % 4u == 0u && a.vt % 4u == 0u && in4_v(v_at);
  for (var column = 0u; column < D; column += 32u) {
    workgroupBarrier();
    let c = column + lane % 8u * 4u;
    if (straight_k) {
      // each STEP
      let k_STEP = get4_k(k_at + min(lane / 8u + STEPu * 8u, a.s - 1u - k0) * a.kt + min(c, max(D, 4u) - 4u));
      // end STEP
      // each STEP
      tile[(lane / 8u + STEPu * 8u) * 9u + lane % 8u] = select(vec4<f32>(), k_STEP, k0 + lane / 8u + STEPu * 8u < a.s && c < D);
      // end STEP
    } else {
      for (var r = lane / 8u; r < 64u; r += 8u) {
        var x = vec4<f32>();
        if (k0 + r < a.s) { x = four_k(k_at + r * a.kt, c); }
        tile[r * 9u + lane % 8u] = x;
      }
    }
    for (var r = lane / 8u; r < ROWS; r += 8u) {
      qs[r * 8u + lane % 8u] = four_q(w.z * a.qb + r % T * a.qt + (w.y * G + r / T) * a.qh, c);
    }
    workgroupBarrier();
    let x0 = mat4x4<f32>(tile[lane * 9u], tile[lane * 9u + 1u], tile[lane * 9u + 2u], tile[lane * 9u + 3u]);
    let x1 = mat4x4<f32>(tile[lane * 9u + 4u], tile[lane * 9u + 5u], tile[lane * 9u + 6u], tile[lane * 9u + 7u]);
    for (var r = 0u; r < ROWS; r++) {
      var s = dot(x0[0], qs[r * 8u]) + dot(x0[1], qs[r * 8u + 1u]) + dot(x0[2], qs[r * 8u + 2u]) + dot(x0[3], qs[r * 8u + 3u]);
      s += dot(x1[0], qs[r * 8u + 4u]) + dot(x1[1], qs[r * 8u + 5u]) + dot(x1[2], qs[r * 8u + 6u]) + dot(x1[3], qs[r * 8u + 7u]);
      ps[r * 64u + lane] += s;
    }
  }
  for (var r = 0u; r < ROWS; r++) {
    let see = range[r % T];
    let key = k0 + lane;
//cap     ps[r * 64u + lane] = bent(ps[r * 64u + lane]);
    ps[r * 64u + lane] = select(LOW, ps[r * 64u + lane] * SCALE, key >= see.x && key < see.y);
  }
  workgroupBarrier();
  // Four threads a row: first the largest score, then the sum.
  let mine = lane / 4u;
  var m = LOW;
  if (mine < ROWS) {
    for (var i = lane % 4u; i < 64u; i += 4u) { m = max(m, ps[mine * 64u + i]); }
  }
  four[lane] = m;
  workgroupBarrier();
  let at = mine * 4u;
  m = max(max(four[at], four[at + 1u]), max(four[at + 2u], four[at + 3u]));
  var sum = 0.0;
  if (mine < ROWS) {
    for (var i = lane % 4u; i < 64u; i += 4u) {
      let x = ps[mine * 64u + i];
      let e = select(0.0, exp_of(x - m), x > LOW);
      ps[mine * 64u + i] = e;
      sum += e;
    }
  }
  workgroupBarrier();
  four[lane] = sum;
  workgroupBarrier();
  if (lane % 4u == 0u && mine < ROWS) {
    st_stats((base + mine) * 2u, m);
    st_stats((base + mine) * 2u + 1u, (four[lane] + four[lane + 1u]) + (four[lane + 2u] + four[lane + 3u]));
  }
  let from_key = max(k0, all.x) - k0;
  let to_key = min(k0 + 64u, all.y) - k0;
  for (var column = 0u; column < D; column += 32u) {
    workgroupBarrier();
    // What nobody sees may be anything.
    let c = column + lane % 8u * 4u;
    if (straight_v) {
      // each STEP
      let v_STEP = get4_v(v_at + clamp(lane / 8u + STEPu * 8u, from_key, to_key - 1u) * a.vt + min(c, max(D, 4u) - 4u));
      let seen_STEP = lane / 8u + STEPu * 8u >= from_key && lane / 8u + STEPu * 8u < to_key && c < D;
      // end STEP
      // each STEP
      tile[(lane / 8u + STEPu * 8u) * 9u + lane % 8u] = select(vec4<f32>(), v_STEP, seen_STEP);
      // end STEP
    } else {
      for (var r = lane / 8u; r < 64u; r += 8u) {
        var x = vec4<f32>();
        if (r >= from_key && r < to_key) { x = four_v(v_at + r * a.vt, c); }
        tile[r * 9u + lane % 8u] = x;
      }
    }
    workgroupBarrier();
    for (var i = lane; i < ROWS * 8u; i += 64u) {
      let r = i / 8u;
      let q = i % 8u;
      var y = vec4<f32>();
      for (var key = 0u; key < 64u; key += 8u) {
        // each STEP
        y += ps[r * 64u + key + STEPu] * tile[(key + STEPu) * 9u + q];
        // end STEP
      }
      let j = column + q * 4u;
      let to = (base + r) * D + j;
      if (j < D) { st_part(to, y.x); }
      if (j + 1u < D) { st_part(to + 1u, y.y); }
      if (j + 2u < D) { st_part(to + 2u, y.z); }
      if (j + 3u < D) { st_part(to + 3u, y.w); }
    }
  }
}
