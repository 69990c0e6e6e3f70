// The sum of `count` matrices [rows, c] that lie one after the other, in order; one thread an element.
@compute @workgroup_size(WG)
fn sum_parts(id: Id) {
  let i = group(id) * WG + id.t;
  if (i >= a.n) { return; }
  var s = ld_part(i);
  for (var p = 1u; p < a.count; p++) { s += ld_part(p * a.n + i); }
  st_y(a.y_first + i / a.c * a.ys + i % a.c, s);
}
