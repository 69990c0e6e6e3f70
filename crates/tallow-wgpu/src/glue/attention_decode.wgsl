// attention_decode_f32: few queries over many keys. A workgroup of 64 for 64 keys of a key head and all its queries: a
// thread makes the scores of one key, then sums of columns. Row r is query r % T of head r / T. What it leaves for
// attention_join.wgsl: part [b, hk, splits, ROWS, D], stats [b, hk, splits, ROWS, 2]: largest score, sum of exp.
// Bound by reading keys and values once.
var<workgroup> keys: array<vec4<f32>, 576>;
var<workgroup> qs: array<vec4<f32>, 128>;
var<workgroup> ps: array<f32, 1024>;
var<workgroup> four: array<f32, 64>;
var<workgroup> range: array<vec2<u32>, 16>;
var<workgroup> together: array<vec2<u32>, 1>;
// Four elements of k from column `c` of a head on: zeros past D.
fn four_k(at: u32, c: u32) -> vec4<f32> {
  if (c + 4u <= D) { return ld4_k(at + c); }
  var x = vec4<f32>();
  if (c < D) { x.x = ld_k(at + c); }
  if (c + 1u < D) { x.y = ld_k(at + c + 1u); }
  if (c + 2u < D) { x.z = ld_k(at + c + 2u); }
  return x;
}
fn four_q(at: u32, c: u32) -> vec4<f32> {
  if (c + 4u <= D) { return ld4_q(at + c); }
  var x = vec4<f32>();
  if (c < D) { x.x = ld_q(at + c); }
  if (c + 1u < D) { x.y = ld_q(at + c + 1u); }
  if (c + 2u < D) { x.z = ld_q(at + c + 2u); }
  return x;
}
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
  for (var column = 0u; column < D; column += 32u) {
    workgroupBarrier();
    let c = column + lane % 8u * 4u;
    for (var r = lane / 8u; r < 64u; r += 8u) {
      var x = vec4<f32>();
      if (k0 + r < a.s) { x = four_k(w.z * a.kb + w.y * a.kh + (k0 + r) * a.kt, c); }
      keys[r * 9u + lane % 8u] = x;
    }
    for (var r = lane / 8u; r < ROWS; r += 8u) {
      qs[r * 8u + lane % 8u] = four_q(w.z * a.qb + r % T * a.qt + (w.y * G + r / T) * a.qh, c);
    }
    workgroupBarrier();
    let x0 = mat4x4<f32>(keys[lane * 9u], keys[lane * 9u + 1u], keys[lane * 9u + 2u], keys[lane * 9u + 3u]);
    let x1 = mat4x4<f32>(keys[lane * 9u + 4u], keys[lane * 9u + 5u], keys[lane * 9u + 6u], keys[lane * 9u + 7u]);
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
  for (var c = lane; c < D; c += 64u) {
    let v_at = w.z * a.vb + w.y * a.vh + k0 * a.vt + c;
    // each ROW
    var acc_ROW = 0.0;
    // end
    for (var i = from_key; i < to_key; i++) {
      let x = ld_v(v_at + i * a.vt);
      // each ROW
      acc_ROW += ps[ROWu * 64u + i] * x;
      // end
    }
    // each ROW
    st_part((base + ROWu) * D + c, acc_ROW);
    // end
  }
}
