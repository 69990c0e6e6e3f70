// With s = sigmoid(g): dg = dy u s (1 + g (1 - s)), du = dy g s. One thread an element. Bound by bandwidth.
@compute @workgroup_size(WG)
fn swiglu_grad(id: Id) {
  let i = group(id) * WG + id.t;
  if (i >= a.n) { return; }
  let row = i / a.c;
  let col = i % a.c;
  let x = ld_g(row * a.gs + col);
  let u = ld_u(row * a.us + col);
  let d = ld_dy(row * a.ds + col);
  let s = 1.0 / (1.0 + exp_of(min(-x, 80.0)));
  st_dg(row * a.dgs + col, d * u * (s * (1.0 + x * (1.0 - s))));
  st_du(row * a.dus + col, d * (x * s));
}
