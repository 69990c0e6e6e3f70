// Sums of rows with one number: the workgroup of the first row with a number adds up all rows with it, in order.
@compute @workgroup_size(WG)
fn scatter(id: Id) {
  let k = group(id);
  if (k >= a.n) { return; }
  let to_row = ld_ids(k);
  // Rows of another piece of the result; below `first` the difference is large.
  if (to_row - a.first >= a.rows) { return; }
  var before = 0.0;
  for (var i = id.t; i < k; i += WG) {
    if (ld_ids(i) == to_row) { before = 1.0; }
  }
  if (max_all(before, id) > 0.0) { return; }
  for (var col = id.t; col < a.c; col += WG) {
    var sum = ld_x(k * a.xs + col);
    for (var i = k + 1u; i < a.n; i++) {
      if (ld_ids(i) == to_row) { sum += ld_x(i * a.xs + col); }
    }
    st_y((to_row - a.first) * a.ys + col, sum);
  }
}
