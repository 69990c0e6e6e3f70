// y = x / keep where a uniform number below KEEP is drawn, else 0. One thread an element. UP = 1 / KEEP.
@compute @workgroup_size(WG)
fn dropout(id: Id) {
  let i = group(id) * WG + id.t;
  if (i >= a.n) { return; }
  let row = i / a.c;
  let col = i % a.c;
  let x = ld_x(row * a.xs + col) * UP;
  st_y(row * a.ys + col, select(0.0, x, between_0_and_1(ld_seed(0u), ld_seed(1u), a.draw, i) < KEEP));
}
