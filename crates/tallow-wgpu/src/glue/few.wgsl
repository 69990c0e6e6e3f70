// Linears over few rows. `_I` stands for the number of a block; parts named so are put in
// once for each, and picked by column. Dense along the sum. Bound by reading the weights once.
// == few_block
// Partial sums of column `j` for every row.
fn dots_I(j: u32, lane: u32) {
  let w0 = j * WC_I;
  // Eight at once: of 16-bit weights they are what one load brings.
  let whole = a.k & ~7u;
  for (var i = lane * 8u; i < whole; i += G * 8u) {
    let w = ld4_w_I(w0 + i);
    let v = ld4_w_I(w0 + i + 4u);
    for (var r = 0u; r < ROWS; r++) {
      let x = a.x0 + r * a.xr + i;
      acc[r] += dot(w, ld4_x(x)) + dot(v, ld4_x(x + 4u));
    }
  }
  let i = whole + lane;
  if (i < a.k) {
    let w = ld_w_I(w0 + i);
    for (var r = 0u; r < ROWS; r++) { acc[r] += w * ld_x(a.x0 + r * a.xr + i); }
  }
}
// What is added to column `j` of `row`.
fn added_I(j: u32, row: u32) -> f32 {
  var v = 0.0;
  for (var r = 0u; r < RANK_I; r++) { v += ld_h(row * a.hr + R0_I + r) * ld_b_I((FIRST_I + j) * RANK_I + r); }
  v *= SCALE_I;
  if (HAS_bias_I) { v += ld_bias_I(FIRST_I + j); }
  return v;
}
// == few
// y[row, o] = sum_i x[row, i] w[o, i] + scale sum_r h[row, r] b[o, r] + bias[o] + past[row, o] for ROWS rows and all
// blocks: G threads share the sum of one column over all rows.
@compute @workgroup_size(WG) fn few(id: Id) {
  let o = group(id) * (WG / G) + id.t / G;
  let lane = id.t % G;
  DOTS
  var mine = 0.0;
  for (var r = 0u; r < ROWS; r++) {
    let s = sum_of(G, acc[r], id);
    if (lane == r) { mine = s; }
  }
  // Thread `lane` ends row `lane`.
  if (lane >= ROWS || o >= OUTPUTS) { return; }
  ADDED
  if (HAS_past) { mine += ld_past(a.past0 + lane * a.pastr + o); }
  st_y(a.y0 + lane * a.yr + o, mine);
}
