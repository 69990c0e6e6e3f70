// Linears over few rows, and the way into an adapter. `_I` stands for the number of a block; parts named so are put in
// once for each, and picked by column. Dense along the sum. Bound by reading the weights once.
// == few_block
// Partial sums of column `j` for every row.
fn dots_I(j: u32, lane: u32) {
  let w0 = j * WC_I;
  let whole = a.k & ~3u;
  for (var i = lane * 4u; i < whole; i += G * 4u) {
    let w = ld4_w_I(w0 + i);
    for (var r = 0u; r < ROWS; r++) { acc[r] += dot(w, ld4_x(a.x0 + r * a.xr + i)); }
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
// == down_block
fn dot_I(x0: u32, r: u32, lane: u32) -> f32 {
  var v = 0.0;
  if (WI_I == 1u) {
    let whole = K_I & ~3u;
    for (var i = lane * 4u; i < whole; i += G * 4u) { v += dot(ld4_x(x0 + i), ld4_w_I(r * WC_I + i)); }
    for (var i = whole + lane; i < K_I; i += G) { v += ld_x(x0 + i) * ld_w_I(r * WC_I + i); }
  } else {
    for (var i = lane; i < K_I; i += G) { v += ld_x(x0 + i) * ld_w_I(r * WC_I + i * WI_I); }
  }
  return SCALE_I * v;
}
// == down
// h[row, r] = scale sum_i x[row, i] w[r, i] for all blocks: G threads for each of m x RANK results.
@compute @workgroup_size(WG) fn down(id: Id) {
  let pair = group(id) * (WG / G) + id.t / G;
  let row = pair / RANK;
  let o = pair % RANK;
  let lane = id.t % G;
  let x0 = a.x0 + row * a.xr;
  var v = 0.0;
  if (row < a.m) {
    DOT
  }
  v = sum_of(G, v, id);
  if (lane == 0u && row < a.m) { st_h(row * a.hr + o, v); }
}
