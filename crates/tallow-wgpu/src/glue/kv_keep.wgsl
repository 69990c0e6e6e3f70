// The old cache; not launched where the new one is in its place.
@compute @workgroup_size(WG)
fn keep(id: Id) {
  let i = group(id) * WG + id.t;
  if (i < a.n) { st_y(i, ld_x(i)); }
}
