// The parts of one query that attention_decode.wgsl left, each weighed by its largest score. One workgroup a query.
// Of 64 parts.
var<workgroup> weights: array<f32, 64>;
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
  m = max_all(m, id);
  var mine = 0.0;
  // each CHUNK
  var x_CHUNK = 0.0;
  // end CHUNK
  for (var p0 = 0u; p0 < a.splits; p0 += 64u) {
    let p = p0 + lane;
    var weight = 0.0;
    if (p >= first && p < last) {
      let at = (base + p * ROWS) * 2u;
      weight = exp_of(max(ld_stats(at) - m, -100.0));
      mine += weight * ld_stats(at + 1u);
    }
    workgroupBarrier();
    weights[lane] = weight;
    workgroupBarrier();
    if (!LIVE_o) { continue; }
    let to = min(p0 + 64u, last);
    let from_part = max(p0, first);
    // each CHUNK
    // Four loads under way at once.
    for (var p = from_part; p < to; p += 4u) {
      let c = min(lane + CHUNKu * 64u, D - 1u);
      let x0 = ld_part((base + p * ROWS) * D + c);
      let x1 = ld_part((base + min(p + 1u, to - 1u) * ROWS) * D + c);
      let x2 = ld_part((base + min(p + 2u, to - 1u) * ROWS) * D + c);
      let x3 = ld_part((base + min(p + 3u, to - 1u) * ROWS) * D + c);
      x_CHUNK += weights[p % 64u] * x0;
      if (p + 1u < to) { x_CHUNK += weights[(p + 1u) % 64u] * x1; }
      if (p + 2u < to) { x_CHUNK += weights[(p + 2u) % 64u] * x2; }
      if (p + 3u < to) { x_CHUNK += weights[(p + 3u) % 64u] * x3; }
    }
    // end CHUNK
  }
  let sum = sum_all(mine, id);
  let scale = select(0.0, 1.0 / max(sum, 1e-30), sum > 0.0);
  let to = w.z * a.ob + w.x * a.ot + w.y * a.oh + lane;
  // each CHUNK
  if (lane + CHUNKu * 64u < D) { st_o(to + CHUNKu * 64u, x_CHUNK * scale); }
  // end CHUNK
  if (LIVE_lse && lane == 0u) {
    st_lse((w.z * a.hk * G + w.y) * T + w.x, select(0.0, log_of(max(sum, 1e-30)) + m, sum > 0.0));
  }
}
