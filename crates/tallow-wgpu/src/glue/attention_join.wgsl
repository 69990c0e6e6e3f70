// The parts of one query that attention_decode.wgsl left, each weighed by its largest score. One workgroup a query.
var<workgroup> lane_max: array<f32, 64>;
@compute @workgroup_size(WG)
fn join(id: Id) {
  let w = id.w;
  let lane = id.t;
  // The grid is queries, heads, batch rows.
  let r = w.y % G * T + w.x;
  let base = (w.z * a.hk + w.y / G) * a.splits * ROWS + r;
  let i = w.z * T + w.x;
  let see = seen(ld_pos(i), u32(ld_starts(i)), a.s);
  // Parts of keys that this query does not see have no weight.
  let first = see.x / 64u;
  var last = 0u;
  if (see.y > see.x) { last = min(a.splits, (see.y + 63u) / 64u); }
  var m = LOW;
  for (var p = first + lane; p < last; p += 64u) { m = max(m, ld_stats((base + p * ROWS) * 2u)); }
  lane_max[lane] = m;
  workgroupBarrier();
  for (var j = 0u; j < 64u; j++) { m = max(m, lane_max[j]); }
  var sum = 0.0;
  for (var p = first; p < last; p++) {
    let at = (base + p * ROWS) * 2u;
    sum += exp_of(max(ld_stats(at) - m, -100.0)) * ld_stats(at + 1u);
  }
  let scale = select(0.0, 1.0 / max(sum, 1e-30), sum > 0.0);
  if (LIVE_o) {
    for (var c = lane; c < D; c += 64u) {
      var x = 0.0;
      for (var p = first; p < last; p++) {
        let at = base + p * ROWS;
        x += exp_of(max(ld_stats(at * 2u) - m, -100.0)) * ld_part(at * D + c);
      }
      st_o(w.z * a.ob + w.x * a.ot + w.y * a.oh + c, x * scale);
    }
  }
  if (LIVE_lse && lane == 0u) {
    st_lse((w.z * a.hk * G + w.y) * T + w.x, select(0.0, log_of(max(sum, 1e-30)) + m, sum > 0.0));
  }
}
