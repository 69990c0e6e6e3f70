// attention_grad_tiles_f32, queries: a workgroup of 64 for 32 queries of a head.
// With p = exp(s - lse): ds = p (do vᵀ - delta), dq = SCALE ds k. `rows`: see attention_grad_rows.wgsl.
var<workgroup> stat: array<vec4<u32>, 32>;
@compute @workgroup_size(WG)
fn grad_q(id: Id) {
  let w = id.w;
  let lane = id.t;
  let tx = lane % 8u;
  let ty = lane / 8u;
  let first = w.x * 32u;
  let q_at = w.z * a.qb + w.y * a.qh;
  let k_at = w.z * a.kb + w.y / G * a.kh;
  let v_at = w.z * a.vb + w.y / G * a.vh;
  let g_at = w.z * a.gb + w.y * a.gh;
  var mine = vec4<u32>();
  if (lane < 32u) {
    if (first + lane < a.t) {
      let r = ((w.z * a.h + w.y) * a.t + first + lane) * 4u;
      mine = vec4(ld_rows(r), ld_rows(r + 1u), ld_rows(r + 2u), ld_rows(r + 3u));
    }
    stat[lane] = mine;
  }
  let all = together(lane, mine.zw);
  // each CHUNK
  var acc_CHUNK = mat4x4<f32>();
  // end CHUNK
  for (var k0 = select(0u, all.x / 32u * 32u, all.y > 0u); k0 < all.y; k0 += 32u) {
    var s = mat4x4<f32>();
    var dp = mat4x4<f32>();
    for (var c = 0u; c < D; c += 32u) {
      workgroupBarrier();
      load_q_ta(lane, q_at, a.qt, first, a.t, c);
      load_k_tb(lane, k_at, a.kt, k0, a.s, c);
      workgroupBarrier();
      s = dots(tx, ty, s);
      workgroupBarrier();
      load_g_ta(lane, g_at, a.gt, first, a.t, c);
      load_v_tb(lane, v_at, a.vt, k0, a.s, c);
      workgroupBarrier();
      dp = dots(tx, ty, dp);
    }
    let keys = vec4(k0 + tx * 4u) + vec4(0u, 1u, 2u, 3u);
    for (var i = 0u; i < 4u; i++) {
      let r = stat[ty * 4u + i];
//cap       s[i] = bent4(s[i]);
      let p = select(vec4<f32>(), exp(s[i] * SCALE - bitcast<f32>(r.x)), (keys >= vec4(r.z)) & (keys < vec4(r.w)));
      tp[row(ty * 4u + i) + tx] = p * (dp[i] - bitcast<f32>(r.y)) * SCALE;
//cap       tp[row(ty * 4u + i) + tx] *= slope4(s[i]);
    }
    // each CHUNK
    workgroupBarrier();
    load_k_tb(lane, k_at, a.kt, k0, a.s, CHUNKu * 32u);
    workgroupBarrier();
    acc_CHUNK = accumulate(tx, ty, acc_CHUNK);
    // end CHUNK
  }
  // each CHUNK
  store_dq(w.z * a.ob + w.y * a.oh, a.ot, first + ty * 4u, a.t, CHUNKu * 32u + tx * 4u, acc_CHUNK);
  // end CHUNK
}
