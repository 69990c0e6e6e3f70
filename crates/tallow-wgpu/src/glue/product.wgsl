// y[row, col] (+)= alpha sum_i x[row, i] w[col, i] + scale sum_r h[row, r] b[col, r] + bias[col] + past[row, col], for
// matrices of any strides: the low-rank part runs on in the same accumulators. Sums in f32.
// A workgroup of 256 makes 64 x 64 of the result, a thread 4 x 4 of it. The text put in says where each matrix begins:
// x0, w0, y0. XK, WK, BK: are x, w, b dense along the sum? Then neighbouring threads run along it.
var<workgroup> xs: array<vec4<f32>, 256>;
var<workgroup> ws: array<vec4<f32>, 256>;

// Four rows of x from `r` on at `k`.
fn four_x(x0: u32, r: u32, k: u32) -> vec4<f32> {
  var v = vec4<f32>(0.0);
  if (k < a.k) {
    let at = x0 + k * a.xi;
    if (r + 3u < a.m) {
      if (!XK && DENSE_x) { return ld4_x(at + r); }
      return vec4<f32>(ld_x(at + r * a.xr), ld_x(at + (r + 1u) * a.xr), ld_x(at + (r + 2u) * a.xr), ld_x(at + (r + 3u) * a.xr));
    }
    if (r < a.m) { v.x = ld_x(at + r * a.xr); }
    if (r + 1u < a.m) { v.y = ld_x(at + (r + 1u) * a.xr); }
    if (r + 2u < a.m) { v.z = ld_x(at + (r + 2u) * a.xr); }
  }
  return v;
}
fn four_w(w0: u32, c: u32, k: u32) -> vec4<f32> {
  var v = vec4<f32>(0.0);
  if (k < a.k) {
    let at = w0 + k * a.wi;
    if (c + 3u < a.n) {
      if (!WK && DENSE_w) { return ld4_w(at + c); }
      return vec4<f32>(ld_w(at + c * a.wc), ld_w(at + (c + 1u) * a.wc), ld_w(at + (c + 2u) * a.wc), ld_w(at + (c + 3u) * a.wc));
    }
    if (c < a.n) { v.x = ld_w(at + c * a.wc); }
    if (c + 1u < a.n) { v.y = ld_w(at + (c + 1u) * a.wc); }
    if (c + 2u < a.n) { v.z = ld_w(at + (c + 2u) * a.wc); }
  }
  return v;
}
fn four_h(r: u32, k: u32) -> vec4<f32> {
  var v = vec4<f32>(0.0);
  if (k < RANK) {
    let at = a.h0 + k;
    if (r < a.m) { v.x = ld_h(at + r * a.hr); }
    if (r + 1u < a.m) { v.y = ld_h(at + (r + 1u) * a.hr); }
    if (r + 2u < a.m) { v.z = ld_h(at + (r + 2u) * a.hr); }
    if (r + 3u < a.m) { v.w = ld_h(at + (r + 3u) * a.hr); }
  }
  return v;
}
fn four_b(c: u32, k: u32) -> vec4<f32> {
  var v = vec4<f32>(0.0);
  if (k < RANK) {
    let at = a.b0 + k * a.bi;
    if (c < a.n) { v.x = ld_b(at + c * a.bc); }
    if (c + 1u < a.n) { v.y = ld_b(at + (c + 1u) * a.bc); }
    if (c + 2u < a.n) { v.z = ld_b(at + (c + 2u) * a.bc); }
    if (c + 3u < a.n) { v.w = ld_b(at + (c + 3u) * a.bc); }
  }
  return v * a.scale;
}

var<private> acc: array<vec4<f32>, 4>;
fn multiply(tx: u32, ty: u32) {
  workgroupBarrier();
  for (var s = 0u; s < 16u; s++) {
    let p = xs[s * 16u + ty];
    let q = ws[s * 16u + tx];
    acc[0] += p.x * q;
    acc[1] += p.y * q;
    acc[2] += p.z * q;
    acc[3] += p.w * q;
  }
  workgroupBarrier();
}

@compute @workgroup_size(WG) fn product(id: Id) {
  let z = id.w.z;
  FIND
  let row0 = id.w.y * 64u;
  let col0 = id.w.x * 64u;
  let slow = id.t / 16u;
  let fast = id.t % 16u;
  // Which four rows and which place of the sum this thread brings.
  let xg = select(fast, slow, XK);
  let xk = select(slow, fast, XK);
  let wg = select(fast, slow, WK);
  let wk = select(slow, fast, WK);
  for (var k0 = 0u; k0 < a.k; k0 += 16u) {
    xs[xk * 16u + xg] = four_x(x0, row0 + xg * 4u, k0 + xk);
    ws[wk * 16u + wg] = four_w(w0, col0 + wg * 4u, k0 + wk);
    multiply(fast, slow);
  }
  for (var i = 0u; i < 4u; i++) { acc[i] *= a.alpha; }
  if (RANK > 0u) {
    for (var k0 = 0u; k0 < RANK; k0 += 16u) {
      xs[fast * 16u + slow] = four_h(row0 + slow * 4u, k0 + fast);
      let bg = select(fast, slow, BK);
      let bk = select(slow, fast, BK);
      ws[bk * 16u + bg] = four_b(col0 + bg * 4u, k0 + bk);
      multiply(fast, slow);
    }
  }
  for (var i = 0u; i < 4u; i++) {
    let row = row0 + slow * 4u + i;
    for (var j = 0u; j < 4u; j++) {
      let col = col0 + fast * 4u + j;
      if (row < a.m && col < a.n) {
        var v = acc[i][j];
        if (HAS_bias) { v += ld_bias(a.bias0 + col); }
        if (HAS_past) { v += ld_past(a.past0 + row * a.pastr + col); }
        let at = y0 + row * a.yr + col * a.yc;
        if (ADD) { v += ld_y(at); }
        st_y(at, v);
      }
    }
  }
}
