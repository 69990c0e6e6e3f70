// Zeros in all rows, one thread an element.
@compute @workgroup_size(WG)
fn clear(id: Id) {
  let i = group(id) * WG + id.t;
  if (i < a.n) { st_y(i / a.c * a.ys + i % a.c, ZERO); }
}
