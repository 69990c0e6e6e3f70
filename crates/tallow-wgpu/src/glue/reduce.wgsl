// y[r] = sum or maximum of COUNT elements of x that lie ALONG apart. Sums in f32.
// `along`: a workgroup makes one result. `across`: a thread makes one result. Bound by bandwidth.
fn join(p: f32, q: f32) -> f32 {
  if (MAX) { return max(p, q); }
  return p + q;
}
@compute @workgroup_size(WG) fn along(id: Id) {
  let r = group(id);
  if (r >= RESULTS) { return; }
  FIND
  var v = select(0.0, -HUGE, MAX);
  for (var k = id.t; k < COUNT; k += WG) { v = join(v, ld_x(ox + k * ALONG)); }
  if (MAX) { v = max_all(v, id); } else { v = sum_all(v, id); }
  if (id.t == 0u) { st_y(a.first + oy, v); }
}
@compute @workgroup_size(WG) fn across(id: Id) {
  let r = group(id) * WG + id.t;
  if (r >= RESULTS) { return; }
  FIND
  var v = ld_x(ox);
  for (var k = 1u; k < COUNT; k++) { v = join(v, ld_x(ox + k * ALONG)); }
  st_y(a.first + oy, v);
}
