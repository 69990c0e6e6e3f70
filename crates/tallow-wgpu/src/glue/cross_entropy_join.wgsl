// dx = softmax(l) w - w[target] for rows [rows, c]: the sum of `count` parts of the product, in order, and then the target's
// row, which would drown what is small if it were among them. One thread an element.
@compute @workgroup_size(WG)
fn join_loss(id: Id) {
  let i = group(id) * WG + id.t;
  if (i >= a.n) { return; }
  let r = i / a.c;
  let col = i % a.c;
  var s = ld_part(i);
  for (var p = 1u; p < a.count; p++) { s += ld_part(p * a.n + i); }
  let goal = ld_goal(a.first + r);
  if (goal < a.v) { s -= ld_w(goal * a.wr + col * a.wc); }
  st_y((a.first + r) * a.ys + col, s);
}
