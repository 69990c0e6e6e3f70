// == few
// y[row, col] = sum_i x[row, i] w[col, i] + scale sum_r h[row, r] b[col, r] + bias[col] + past[row, col] for ROWS rows:
// 32 threads share the sum of one column over all rows, so w is read once. Dense along the sum. Bound by reading w.
const G: u32 = 32u;
@compute @workgroup_size(WG) fn few(id: Id) {
  let col = group(id) * (WG / G) + id.t / G;
  let lane = id.t % G;
  var acc: array<f32, ROWS>;
  for (var j = 0u; j < ROWS; j++) { acc[j] = 0.0; }
  if (col < a.n) {
    let w0 = col * a.wc;
    let whole = a.k & ~3u;
    for (var i = lane * 4u; i < whole; i += G * 4u) {
      let w = ld4_w(w0 + i);
      for (var j = 0u; j < ROWS; j++) { acc[j] += dot(w, ld4_x(a.x0 + j * a.xr + i)); }
    }
    let i = whole + lane;
    if (i < a.k) {
      let w = ld_w(w0 + i);
      for (var j = 0u; j < ROWS; j++) { acc[j] += w * ld_x(a.x0 + j * a.xr + i); }
    }
  }
  var mine = 0.0;
  for (var j = 0u; j < ROWS; j++) {
    let s = sum_of(G, acc[j], id);
    if (lane == j) { mine = s; }
  }
  // Thread `lane` ends row `lane`.
  if (lane >= ROWS || col >= a.n) { return; }
  if (RANK > 0u) {
    var t = 0.0;
    for (var r = 0u; r < RANK; r++) { t += ld_h(a.h0 + lane * a.hr + r) * ld_b(col * a.bc + r * a.bi); }
    mine += a.scale * t;
  }
  if (HAS_bias) { mine += ld_bias(col); }
  if (HAS_past) { mine += ld_past(a.past0 + lane * a.pastr + col); }
  st_y(a.y0 + lane * a.yr + col, mine);
}
// == down
// h[row, r] = scale sum_i x[row, i] w[r, i]: G threads for each of m x RANK results.
@compute @workgroup_size(WG) fn down(id: Id) {
  let pair = group(id) * (WG / G) + id.t / G;
  let row = pair / RANK;
  let r = pair % RANK;
  let lane = id.t % G;
  var v = 0.0;
  if (row < a.m) {
    let x0 = a.x0 + row * a.xr;
    if (WK) {
      let whole = a.k & ~3u;
      for (var i = lane * 4u; i < whole; i += G * 4u) { v += dot(ld4_x(x0 + i), ld4_w(r * a.wc + i)); }
      for (var i = whole + lane; i < a.k; i += G) { v += ld_x(x0 + i) * ld_w(r * a.wc + i); }
    } else {
      for (var i = lane; i < a.k; i += G) { v += ld_x(x0 + i) * ld_w(r * a.wc + i * a.wi); }
    }
  }
  v = sum_of(G, v, id);
  if (lane == 0u && row < a.m) { st_h(a.h0 + row * a.hr + r, a.scale * v); }
}
