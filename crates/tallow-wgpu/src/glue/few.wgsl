// Linears over few rows. `_I` stands for the number of a block; parts named so are put in
// once for each, and picked by column. Dense along the sum. Bound by reading the weights once.
// == few_held
// each ROW
var<private> acc_ROW: f32;
var<private> squares_ROW: f32;
// each TURN
var<private> into_TURN_ROW: f32;
// end TURN
// end ROW
var<workgroup> own: array<f32, max(TURNS, 1u) * ROWS * (WG / G)>;
// == few_block
// Partial sums of column `j` for every row, and of squares where a norm stands in front; with a_I also of this group's
// columns of h. Eight elements are what one load brings of 16-bit weights; a thread has those of all STEPs under way.
fn dots_I(j: u32, lane: u32, g: u32) {
  let w0 = j * WC_I;
  if (in4_w_I(w0) && in4_x(a.x0) && (ROWS == 1u || in4_x(a.x0 + a.xr)) && in4_nw(0u) && in4_a_I(0u) && a.k % 4u == 0u) {
    for (var i = lane * 8u; i < WHOLE; i += G * 8u * STEPS) {
      // each STEP
      let w_STEP = get4_w_I(w0 + min(i + STEPu * G * 8u, LAST));
      let v_STEP = get4_w_I(w0 + min(i + STEPu * G * 8u, LAST) + 4u);
      // end STEP
      // each STEP
      eight_I(i + STEPu * G * 8u, w_STEP, v_STEP, g);
      // end STEP
    }
  } else {
    for (var i = lane * 8u; i < WHOLE; i += G * 8u) { slow_eight_I(i, ld4_w_I(w0 + i), ld4_w_I(w0 + i + 4u), g); }
  }
  let i = WHOLE + lane;
  if (i < a.k) {
    var w = ld_w_I(w0 + i);
    if (HAS_nw) { w *= ld_nw(i); }
    // each ROW
    let x_ROW = ld_x(a.x0 + ROWu * a.xr + i);
    acc_ROW += w * x_ROW;
    if (HAS_nw) { squares_ROW += x_ROW * x_ROW; }
    // end ROW
    // each TURN
    var u_TURN = ld_a_I(a_row_I(TURNu, g) + i);
    if (HAS_nw) { u_TURN *= ld_nw(i); }
    // each ROW
    into_TURN_ROW += u_TURN * x_ROW;
    // end ROW
    // end TURN
  }
}
// Where column g + c WG / G of A begins; those past the end are the last one once more.
fn a_row_I(c: u32, g: u32) -> u32 { return min(g + c * (WG / G), max(RANK_I, 1u) - 1u) * a.k; }
// What is added to column `j` of `row`.
fn added_I(j: u32, row: u32) -> f32 {
  var v = 0.0;
  for (var r = 0u; r < RANK_I; r++) { v += H_OF * ld_b_I((FIRST_I + j) * RANK_I + r); }
  v *= SCALE_I;
  if (HAS_bias_I) { v += ld_bias_I(FIRST_I + j); }
  return v;
}
// == few_eight
// Elements `i..i + 8` of every row, as zeros past the end, with those of a weight, `wi` and `vi`.
fn eight_I(i: u32, wi: vec4<f32>, vi: vec4<f32>, g: u32) {
  let at = min(i, LAST);
  var w = wi;
  var v = vi;
  var nw = vec4<f32>(1.0);
  var nv = nw;
  if (HAS_nw) {
    nw = ld4_nw(at);
    nv = ld4_nw(at + 4u);
    w *= nw;
    v *= nv;
  }
  // each ROW
  let x_ROW = select(vec4<f32>(), ld4_x(a.x0 + ROWu * a.xr + at), i < WHOLE);
  let y_ROW = select(vec4<f32>(), ld4_x(a.x0 + ROWu * a.xr + at + 4u), i < WHOLE);
  acc_ROW += dot(w, x_ROW) + dot(v, y_ROW);
  if (HAS_nw) { squares_ROW += dot(x_ROW, x_ROW) + dot(y_ROW, y_ROW); }
  // end ROW
  // each TURN
  let u_TURN = ld4_a_I(a_row_I(TURNu, g) + at) * nw;
  let z_TURN = ld4_a_I(a_row_I(TURNu, g) + at + 4u) * nv;
  // each ROW
  into_TURN_ROW += dot(u_TURN, x_ROW) + dot(z_TURN, y_ROW);
  // end ROW
  // end TURN
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
    // each ROW
    acc_ROW = 0.0;
    squares_ROW = 0.0;
    // each TURN
    into_TURN_ROW = 0.0;
    // end TURN
    // end ROW
    DOTS
    var mine = 0.0;
    // each ROW
    let sum_of_ROW = sum_of(G, acc_ROW, id);
    var by_ROW = 1.0;
    if (HAS_nw) { by_ROW = inverseSqrt(sum_of(G, squares_ROW, id) / f32(a.k) + a.eps); }
    if (lane == ROWu) { mine = sum_of_ROW * by_ROW; }
    // end ROW
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
    // each ROW
    // each TURN
    let s_TURN_ROW = sum_of(G, into_TURN_ROW, id);
    if (lane == 0u) { own[(ROWu * TURNS + TURNu) * (WG / G) + g] = s_TURN_ROW * by_ROW; }
    // end TURN
    // end ROW
    workgroupBarrier();
