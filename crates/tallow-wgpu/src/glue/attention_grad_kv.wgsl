// attention_grad_tiles_f32, keys: a workgroup of 64 for 32 keys of a key head, over its queries and heads in order: no
// atomics, equal runs give equal bits. With p = exp(s - lse): dv = pᵀ do, ds = p (do vᵀ - delta), dk = SCALE dsᵀ q.
var<workgroup> stat: array<vec4<u32>, 32>;
// What queries 4 tx.. know, as vectors over them.
fn of_queries(tx: u32, part: u32) -> vec4<u32> {
  return vec4(stat[tx * 4u][part], stat[tx * 4u + 1u][part], stat[tx * 4u + 2u][part], stat[tx * 4u + 3u][part]);
}
@compute @workgroup_size(WG)
fn grad_kv(id: Id) {
  let w = id.w;
  let lane = id.t;
  let tx = lane % 8u;
  let ty = lane / 8u;
  let first = w.x * 32u;
  let k_at = w.z * a.kb + w.y * a.kh;
  let v_at = w.z * a.vb + w.y * a.vh;
  // each CHUNK
  var acck_CHUNK = mat4x4<f32>();
  var accv_CHUNK = mat4x4<f32>();
  // end CHUNK
  for (var q0 = 0u; q0 < a.t; q0 += 32u) {
    var mine = vec2<u32>();
    if (lane < 32u && q0 + lane < a.t) {
      let r = ((w.z * a.h + w.y * G) * a.t + q0 + lane) * 4u;
      mine = vec2(ld_rows(r + 2u), ld_rows(r + 3u));
    }
    let all = together(lane, mine);
    if (all.y <= first || all.x >= first + 32u) { continue; }
    for (var head = w.y * G; head < (w.y + 1u) * G; head++) {
      let q_at = w.z * a.qb + head * a.qh;
      let g_at = w.z * a.gb + head * a.gh;
      var s = mat4x4<f32>();
      var dp = mat4x4<f32>();
      workgroupBarrier();
      if (lane < 32u) {
        var mine = vec4<u32>();
        if (q0 + lane < a.t) {
          let r = ((w.z * a.h + head) * a.t + q0 + lane) * 4u;
          mine = vec4(ld_rows(r), ld_rows(r + 1u), ld_rows(r + 2u), ld_rows(r + 3u));
        }
        stat[lane] = mine;
      }
      for (var c = 0u; c < D; c += 32u) {
        workgroupBarrier();
        load_k_ta(lane, k_at, a.kt, first, a.s, c);
        load_q_tb(lane, q_at, a.qt, q0, a.t, c);
        workgroupBarrier();
        s = dots(tx, ty, s);
        workgroupBarrier();
        load_v_ta(lane, v_at, a.vt, first, a.s, c);
        load_g_tb(lane, g_at, a.gt, q0, a.t, c);
        workgroupBarrier();
        dp = dots(tx, ty, dp);
      }
      let lses = bitcast<vec4<f32>>(of_queries(tx, 0u));
      let deltas = bitcast<vec4<f32>>(of_queries(tx, 1u));
      let from_keys = of_queries(tx, 2u);
      let to_keys = of_queries(tx, 3u);
      for (var i = 0u; i < 4u; i++) {
        let key = vec4(first + ty * 4u + i);
//cap         s[i] = bent4(s[i]);
//cap         let way = slope4(s[i]);
        let p = select(vec4<f32>(), exp(s[i] * SCALE - lses), (key >= from_keys) & (key < to_keys));
        tp[row(ty * 4u + i) + tx] = p;
        s[i] = p * (dp[i] - deltas) * SCALE;
//cap         s[i] *= way;
      }
      // each CHUNK
      workgroupBarrier();
      load_g_tb(lane, g_at, a.gt, q0, a.t, CHUNKu * 32u);
      workgroupBarrier();
      accv_CHUNK = accumulate(tx, ty, accv_CHUNK);
      // end CHUNK
      workgroupBarrier();
      for (var i = 0u; i < 4u; i++) { tp[row(ty * 4u + i) + tx] = s[i]; }
      // each CHUNK
      workgroupBarrier();
      load_q_tb(lane, q_at, a.qt, q0, a.t, CHUNKu * 32u);
      workgroupBarrier();
      acck_CHUNK = accumulate(tx, ty, acck_CHUNK);
      // end CHUNK
    }
  }
  // each CHUNK
  if (LIVE_dk) { store_dk(w.z * a.xb + w.y * a.xh, a.xt, first + ty * 4u, a.s, CHUNKu * 32u + tx * 4u, acck_CHUNK); }
  if (LIVE_dv) { store_dv(w.z * a.yb + w.y * a.yh, a.yt, first + ty * 4u, a.s, CHUNKu * 32u + tx * 4u, accv_CHUNK); }
  // end CHUNK
}
