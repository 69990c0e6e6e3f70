// y[row, o] = alpha sum_i x[row, i] w[o, i] + what a linear adds, for products with few rows or columns: G threads share
// the sum of R x C results, so that a small result still makes many workgroups. `_I` stands for the number of a way: a w
// of its own, with its own columns of x and y. With nw (then R is 1), x is rms_norm(x) nw. Bound by reading x once and w once for R rows.
// == skinny_way
fn dots_I(x0: u32, w0: u32, row: u32, j0: u32, lane: u32) {
  ROWS
  SUM
}
fn end_I(y0: u32, row: u32, j: u32, sum: f32) {
  if (row >= a.m || j >= N_I) { return; }
  let r = select(row, j, SWAP);
  let c = select(j, row, SWAP);
  var v = SCALE_I * sum;
  for (var i = 0u; i < RANK; i++) { v += a.scale * ld_h(a.h0 + r * a.hr + i) * ld_b(a.b0 + i * a.bi + c * a.bc); }
  if (HAS_bias) { v += ld_bias(a.bias0 + c); }
  if (HAS_past) { v += ld_past(a.past0 + r * a.pastr + c); }
  let at = y0 + r * a.yr + (OUT_I + c) * a.yc;
  if (ADD) { v += ld_y(at); }
  st_y(at, v);
}
// == skinny_four
// Four columns of w that lie side by side at `at`; `left` of them are there.
fn four_w_I(at: u32, left: u32) -> vec4<f32> {
  if (left >= 4u) { return ld4_w_I(at); }
  var v = vec4<f32>(0.0);
  if (left > 0u) { v.x = ld_w_I(at); }
  if (left > 1u) { v.y = ld_w_I(at + 1u); }
  if (left > 2u) { v.z = ld_w_I(at + 2u); }
  return v;
}
// == skinny
@compute @workgroup_size(WG) fn skinny(id: Id) {
  let z = id.w.z;
  FIND
  let q = group(id) * (WG / G) + id.t / G;
  let row = q / BLOCKS * R;
  let o = q % BLOCKS;
  let lane = id.t % G;
  DOTS
  // Each group's R C sums of G parts: T threads for each.
  SHARE
  workgroupBarrier();
  let e = lane / T;
  let p = lane % T;
  let first = e * (WG + T) + id.t - lane + p;
  var v = 0.0;
  for (var s = 0u; s < R * C; s++) { v += parted[first + s * T]; }
  v = sum_of(T, v, id);
  if (HAS_nw) { v *= inverseSqrt(sum_of(G, squares, id) / f32(a.xk) + a.eps); }
  if (p != 0u) { return; }
  ENDED
}
