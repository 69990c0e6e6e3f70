// attention_tiles_f32: a workgroup of 64 for 32 queries of a head, tiles of 32 keys, softmax as it goes.
// q [b, t, h, D], k, v [b, s, hk, D] with strides; o like q; lse [b, h, t]. Scores are made over 32 columns at a time,
// so that any D fits 16 KiB of workgroup memory. Bound by arithmetic.
var<workgroup> range: array<vec2<u32>, 32>;
var<workgroup> row_parts: array<f32, 256>;
@compute @workgroup_size(WG)
fn attention(id: Id) {
  let w = id.w;
  let lane = id.t;
  let tx = lane % 8u;
  let ty = lane / 8u;
  let first = w.x * 32u;
  let q_at = w.z * a.qb + w.y * a.qh;
  let k_at = w.z * a.kb + w.y / G * a.kh;
  let v_at = w.z * a.vb + w.y / G * a.vh;
  var mine = vec2(0u, 0u);
  if (lane < 32u) {
    if (first + lane < a.t) {
      let i = w.z * a.t + first + lane;
      mine = seen(ld_pos(i), u32(ld_starts(i)), a.s);
    }
    range[lane] = mine;
  }
  let all = together(lane, mine);
  var top = vec4<f32>(LOW);
  var sum = vec4<f32>();
  // each CHUNK
  var acc_CHUNK = mat4x4<f32>();
  // end CHUNK
  for (var k0 = select(0u, all.x / 32u * 32u, all.y > 0u); k0 < all.y; k0 += 32u) {
    var s = mat4x4<f32>();
    for (var c = 0u; c < D; c += 32u) {
      workgroupBarrier();
      load_q_ta(lane, q_at, a.qt, first, a.t, c);
      load_k_tb(lane, k_at, a.kt, k0, a.s, c);
      workgroupBarrier();
      s = dots(tx, ty, s);
    }
    let keys = vec4(k0 + tx * 4u) + vec4(0u, 1u, 2u, 3u);
    for (var i = 0u; i < 4u; i++) {
      let r = range[ty * 4u + i];
//cap       s[i] = bent4(s[i]);
      s[i] = select(vec4(LOW), s[i] * SCALE, (keys >= vec4(r.x)) & (keys < vec4(r.y)));
      row_parts[(ty * 4u + i) * 8u + tx] = max(max(s[i].x, s[i].y), max(s[i].z, s[i].w));
    }
    workgroupBarrier();
    var keep = vec4<f32>();
    for (var i = 0u; i < 4u; i++) {
      let at = (ty * 4u + i) * 8u;
      var m = top[i];
      for (var j = 0u; j < 8u; j++) { m = max(m, row_parts[at + j]); }
      let r = range[ty * 4u + i];
      let e = select(vec4<f32>(), exp(s[i] - m), (keys >= vec4(r.x)) & (keys < vec4(r.y)));
      keep[i] = exp_of(max(top[i] - m, -100.0));
      sum[i] = sum[i] * keep[i] + (e.x + e.y) + (e.z + e.w);
      top[i] = m;
      tp[row(ty * 4u + i) + tx] = e;
    }
    // each CHUNK
    acc_CHUNK = mat4x4<f32>(acc_CHUNK[0] * keep.x, acc_CHUNK[1] * keep.y, acc_CHUNK[2] * keep.z, acc_CHUNK[3] * keep.w);
    workgroupBarrier();
    load_v_tb(lane, v_at, a.vt, k0, a.s, CHUNKu * 32u);
    workgroupBarrier();
    acc_CHUNK = accumulate(tx, ty, acc_CHUNK);
    // end CHUNK
  }
  for (var i = 0u; i < 4u; i++) { row_parts[(ty * 4u + i) * 8u + tx] = sum[i]; }
  workgroupBarrier();
  var scale = vec4<f32>();
  for (var i = 0u; i < 4u; i++) {
    let r = ty * 4u + i;
    var all_keys = 0.0;
    for (var j = 0u; j < 8u; j++) { all_keys += row_parts[r * 8u + j]; }
    let real = all_keys > 0.0;
    if (real) { scale[i] = 1.0 / all_keys; }
    if (LIVE_lse && tx == 0u && first + r < a.t) {
      st_lse((w.z * a.h + w.y) * a.t + first + r, select(0.0, log_of(max(all_keys, 1e-30)) + top[i], real));
    }
  }
  // each CHUNK
  if (LIVE_o) {
    let made = mat4x4<f32>(acc_CHUNK[0] * scale.x, acc_CHUNK[1] * scale.y, acc_CHUNK[2] * scale.z, acc_CHUNK[3] * scale.w);
    store_o(w.z * a.ob + w.y * a.oh, a.ot, first + ty * 4u, a.t, CHUNKu * 32u + tx * 4u, made);
  }
  // end CHUNK
}
