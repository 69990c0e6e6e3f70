// hyper: lr, beta1, beta2, eps, weight decay, 1 - beta1^t, sqrt(1 - beta2^t), gradient scale. One thread an element;
// results lie where operands do. Bound by bandwidth.
@compute @workgroup_size(WG)
fn adamw(id: Id) {
  let i = group(id) * WG + id.t;
  if (i >= a.n) { return; }
  let lr = ld_hyper(0u);
  let b1 = ld_hyper(1u);
  let b2 = ld_hyper(2u);
  let g = ld_g(i) * ld_hyper(7u);
  let m = ld_m(i) * b1 + g * (1.0 - b1);
  let v = ld_v(i) * b2 + g * g * (1.0 - b2);
  let p = ld_p(i) * (1.0 - lr * ld_hyper(4u)) - m / (sqrt(v) / ld_hyper(6u) + ld_hyper(3u)) * (lr / ld_hyper(5u));
  st_p2(i, p);
  st_m2(i, m);
  st_v2(i, v);
}
