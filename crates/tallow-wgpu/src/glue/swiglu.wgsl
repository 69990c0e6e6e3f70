// y = g sigmoid(g) u over rows of C elements, one thread an element. Bound by bandwidth.
@compute @workgroup_size(WG)
fn swiglu(id: Id) {
  let i = group(id) * WG + id.t;
  if (i >= a.n) { return; }
  let row = i / a.c;
  let col = i % a.c;
  let x = ld_g(row * a.gs + col);
  // No exp of more than 80: what an overflow makes is not said.
  st_y(row * a.ys + col, x / (1.0 + exp_of(min(-x, 80.0))) * ld_u(row * a.us + col));
}
