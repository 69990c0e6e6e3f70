// Rows of a table by number, one thread an element. A number past the end reads zeros.
@compute @workgroup_size(WG)
fn gather(id: Id) {
  let i = group(id) * WG + id.t;
  if (i >= a.n) { return; }
  let row = i / a.c;
  let col = i % a.c;
  let from_row = ld_ids(row);
  var x = ZERO;
  if (from_row < a.v) { x = ld_rows(from_row * a.xs + col); }
  st_y(row * a.ys + col, x);
}
