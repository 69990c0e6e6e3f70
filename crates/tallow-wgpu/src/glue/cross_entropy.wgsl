// nll = logsumexp(l) - l[target] and dl = softmax(l) - onehot(target), one workgroup a row of V logits. A target at or
// past V is not counted: both are 0. dl may lie in place of l; not HOT: dl = softmax(l). Bound by reading the logits twice and writing once.
@compute @workgroup_size(WG)
fn cross_entropy(id: Id) {
  let r = group(id);
  if (r >= a.n) { return; }
  let goal = ld_goal(a.first + r);
  let counted = goal < a.v;
  var m = -1e30;
  var s = 0.0;
  for (var i = id.t; i < a.v; i += WG) {
    let x = ld_l(r * a.ls + i);
    let e = exp_of(max(-abs(x - m), -100.0));
    s = select(s + e, s * e + 1.0, x > m);
    m = max(m, x);
  }
  let top = max_all(m, id);
  s = sum_all(s * exp_of(max(m - top, -100.0)), id);
  if (id.t == 0u) {
    var loss = 0.0;
    if (counted) { loss = log_of(s) - (ld_l(r * a.ls + goal) - top); }
    st_nll(a.first + r, loss);
  }
  if (!LIVE_dl) { return; }
  // The target's logit is read above, before any thread writes.
  storageBarrier();
  workgroupBarrier();
  let scale = select(0.0, 1.0 / s, counted);
  for (var i = id.t; i < a.v; i += WG) {
    let p = exp_of(max(ld_l(r * a.ls + i) - top, -100.0)) * scale;
    st_dl(r * a.ds + i, select(p, p - 1.0, HOT && counted && i == goal));
  }
}
