// Linears over few rows. `_I` stands for the number of a block; parts named so are put in
// once for each, and picked by column. Dense along the sum. Bound by reading the weights once.
// == few_block
// Partial sums of column `j` for every row, and of squares where a norm stands in front; with a_I also of this group's
// columns of h.
fn dots_I(j: u32, lane: u32, g: u32) {
  let w0 = j * WC_I;
  // Eight at once: of 16-bit weights they are what one load brings.
  let whole = a.k & ~7u;
  for (var i = lane * 8u; i < whole; i += G * 8u) {
    var w = ld4_w_I(w0 + i);
    var v = ld4_w_I(w0 + i + 4u);
    if (HAS_nw) {
      w *= ld4_nw(i);
      v *= ld4_nw(i + 4u);
    }
    if (HAS_a_I) { into_I(i, g); }
    for (var r = 0u; r < ROWS; r++) {
      let x = a.x0 + r * a.xr + i;
      let p = ld4_x(x);
      let q = ld4_x(x + 4u);
      acc[r] += dot(w, p) + dot(v, q);
      if (HAS_nw) { squares[r] += dot(p, p) + dot(q, q); }
    }
  }
  let i = whole + lane;
  if (i < a.k) {
    var w = ld_w_I(w0 + i);
    if (HAS_nw) { w *= ld_nw(i); }
    if (HAS_a_I) { one_into_I(i, g); }
    for (var r = 0u; r < ROWS; r++) {
      let x = ld_x(a.x0 + r * a.xr + i);
      acc[r] += w * x;
      if (HAS_nw) { squares[r] += x * x; }
    }
  }
}
// Where column g + c WG / G of A begins; those past the end are the last one once more.
fn a_row_I(c: u32, g: u32) -> u32 { return min(g + c * (WG / G), max(RANK_I, 1u) - 1u) * a.k; }
fn into_I(i: u32, g: u32) {
  for (var c = 0u; c < TURNS; c++) {
    let at = a_row_I(c, g) + i;
    var u = ld4_a_I(at);
    var v = ld4_a_I(at + 4u);
    if (HAS_nw) {
      u *= ld4_nw(i);
      v *= ld4_nw(i + 4u);
    }
    for (var r = 0u; r < ROWS; r++) {
      let x = a.x0 + r * a.xr + i;
      into[c * ROWS + r] += dot(u, ld4_x(x)) + dot(v, ld4_x(x + 4u));
    }
  }
}
fn one_into_I(i: u32, g: u32) {
  for (var c = 0u; c < TURNS; c++) {
    var u = ld_a_I(a_row_I(c, g) + i);
    if (HAS_nw) { u *= ld_nw(i); }
    for (var r = 0u; r < ROWS; r++) { into[c * ROWS + r] += u * ld_x(a.x0 + r * a.xr + i); }
  }
}
// What is added to column `j` of `row`.
fn added_I(j: u32, row: u32) -> f32 {
  var v = 0.0;
  for (var r = 0u; r < RANK_I; r++) { v += H_OF * ld_b_I((FIRST_I + j) * RANK_I + r); }
  v *= SCALE_I;
  if (HAS_bias_I) { v += ld_bias_I(FIRST_I + j); }
  return v;
}
// == few
// y[row, o] = sum_i x[row, i] w[o, i] + scale sum_r h[row, r] b[o, r] + bias[o] + past[row, o] for ROWS rows and all
// blocks: G threads share the sum of one column over all rows. With nw, x is rms_norm(x) nw. GATE: the second half of
// the columns is multiplied by silu of the first. OWN: h is not there yet; a workgroup, whose columns are of one block,
// makes it for itself.
@compute @workgroup_size(WG) fn few(id: Id) {
  let column = group(id) * (WG / G) + id.t / G;
  let lane = id.t % G;
  let g = id.t / G;
  var made = 0.0;
  for (var half = 0u; half <= u32(GATE); half++) {
    let o = column + half * OUTPUTS;
    for (var r = 0u; r < ROWS; r++) {
      acc[r] = 0.0;
      squares[r] = 0.0;
    }
    for (var c = 0u; c < TURNS * ROWS; c++) { into[c] = 0.0; }
    DOTS
    var mine = 0.0;
    for (var r = 0u; r < ROWS; r++) {
      var s = sum_of(G, acc[r], id);
      if (HAS_nw) { s *= inverseSqrt(sum_of(G, squares[r], id) / f32(a.k) + a.eps); }
      if (lane == r) { mine = s; }
    }
    OWN
    // Thread `lane` ends row `lane`.
    if (lane < ROWS && column < OUTPUTS) {
      ADDED
    }
    if (half == 0u) { made = mine; } else { made = mine * made / (1.0 + exp_of(min(-made, 80.0))); }
  }
  if (lane >= ROWS || column >= OUTPUTS) { return; }
  if (HAS_past) { made += ld_past(a.past0 + lane * a.pastr + column); }
  st_y(a.y0 + lane * a.yr + column, made);
}
// == few_own
    // The half before has read what it needed.
    if (half > 0u) { workgroupBarrier(); }
    for (var r = 0u; r < ROWS; r++) {
      var by = 1.0;
      if (HAS_nw) { by = inverseSqrt(sum_of(G, squares[r], id) / f32(a.k) + a.eps); }
      for (var c = 0u; c < TURNS; c++) {
        let s = sum_of(G, into[c * ROWS + r], id);
        if (lane == 0u) { own[(r * TURNS + c) * (WG / G) + g] = s * by; }
      }
    }
    workgroupBarrier();
