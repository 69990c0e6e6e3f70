// dx = softmax(l) w - w[target] for rows [rows, c]: the sum of `count` parts of the product, in order, and then the target's
// row, which would drown what is small if it were among them. One thread an element. The weight comes in pieces of `piece`
// rows from `piece0` on; FIRST: this is the first of them.
@compute @workgroup_size(WG)
fn join_loss(id: Id) {
  let i = group(id) * WG + id.t;
  if (i >= a.n) { return; }
  let r = i / a.c;
  let col = i % a.c;
  let at = (a.first + r) * a.ys + col;
  let goal = ld_goal(a.first + r);
  let here = goal >= a.piece0 && goal - a.piece0 < a.piece;
  var s = 0.0;
  if (FIRST) {
    s = ld_part(i);
    for (var p = 1u; p < a.count; p++) { s += ld_part(p * a.n + i); }
  } else if (here) {
    s = ld_y(at);
  } else {
    return;
  }
  if (here) { s -= ld_w((goal - a.piece0) * a.wr + col * a.wc); }
  st_y(at, s);
}
