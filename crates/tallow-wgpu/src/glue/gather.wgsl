// Rows of a table by number, one thread an element, from `rows` rows of it. A number past the end of the whole table reads
// zeros.
@compute @workgroup_size(WG)
fn gather(id: Id) {
  let i = group(id) * WG + id.t;
  if (i >= a.n) { return; }
  let row = i / a.c;
  let col = i % a.c;
  let from_row = ld_ids(row);
  var x = ZERO;
  if (from_row >= a.first && from_row - a.first < a.rows) {
    x = ld_table((from_row - a.first) * a.xs + col);
  } else if (a.first > 0u || from_row < a.v) {
    // Of another piece.
    return;
  }
  st_y(row * a.ys + col, x);
}
