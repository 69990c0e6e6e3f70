// One workgroup a row of `c` elements; a row stride for each operand and result. Sums in f32, in one order.
// A result may lie where an operand does: an element is read before its place is written, by the same thread.
// Bound by bandwidth: a row is read again from the nearest cache. Only the part between two marks is compiled.

// == rms_norm
@compute @workgroup_size(WG) fn rms_norm(id: Id) {
  let row = group(id);
  if (row >= a.rows) { return; }
  let x0 = row * a.xs;
  var s = 0.0;
  for (var i = id.t; i < a.c; i += WG) { let v = ld_x(x0 + i); s += v * v; }
  let r = inverseSqrt(sum_all(s, id) / f32(a.c) + a.eps);
  for (var i = id.t; i < a.c; i += WG) { st_y(row * a.ys + i, ld_x(x0 + i) * r * ld_w(i)); }
}
// == add_rms_norm
// sum = p + q, y = rms_norm(sum) w. Either result may be wanted by nobody.
@compute @workgroup_size(WG) fn add_rms_norm(id: Id) {
  let row = group(id);
  if (row >= a.rows) { return; }
  let p0 = row * a.ps;
  let q0 = row * a.qs;
  var s = 0.0;
  for (var i = id.t; i < a.c; i += WG) { let v = ld_p(p0 + i) + ld_q(q0 + i); s += v * v; }
  let r = inverseSqrt(sum_all(s, id) / f32(a.c) + a.eps);
  for (var i = id.t; i < a.c; i += WG) {
    let v = ld_p(p0 + i) + ld_q(q0 + i);
    st_sum(row * a.sums + i, v);
    st_y(row * a.ys + i, v * r * ld_w(i));
  }
}
// == layer_norm
@compute @workgroup_size(WG) fn layer_norm(id: Id) {
  let row = group(id);
  if (row >= a.rows) { return; }
  let x0 = row * a.xs;
  var s = 0.0;
  for (var i = id.t; i < a.c; i += WG) { s += ld_x(x0 + i); }
  let mean = sum_all(s, id) / f32(a.c);
  s = 0.0;
  for (var i = id.t; i < a.c; i += WG) { let d = ld_x(x0 + i) - mean; s += d * d; }
  let r = inverseSqrt(sum_all(s, id) / f32(a.c) + a.eps);
  for (var i = id.t; i < a.c; i += WG) {
    st_y(row * a.ys + i, (ld_x(x0 + i) - mean) * r * ld_w(i) + ld_b(i));
  }
}
// == softmax
@compute @workgroup_size(WG) fn softmax(id: Id) {
  let row = group(id);
  if (row >= a.rows) { return; }
  let x0 = row * a.xs;
  var m = -HUGE;
  for (var i = id.t; i < a.c; i += WG) { m = max(m, ld_x(x0 + i)); }
  m = max_all(m, id);
  var s = 0.0;
  for (var i = id.t; i < a.c; i += WG) { s += exp_of(ld_x(x0 + i) - m); }
  s = sum_all(s, id);
  for (var i = id.t; i < a.c; i += WG) { st_y(row * a.ys + i, exp_of(ld_x(x0 + i) - m) / s); }
}
// == softmax_grad
@compute @workgroup_size(WG) fn softmax_grad(id: Id) {
  let row = group(id);
  if (row >= a.rows) { return; }
  let y0 = row * a.ys;
  let d0 = row * a.dys;
  var s = 0.0;
  for (var i = id.t; i < a.c; i += WG) { s += ld_y(y0 + i) * ld_dy(d0 + i); }
  s = sum_all(s, id);
  for (var i = id.t; i < a.c; i += WG) { st_dx(row * a.dxs + i, ld_y(y0 + i) * (ld_dy(d0 + i) - s)); }
}
// == rms_norm_grad
// With r = rsqrt(mean(x²) + eps), g = dy w: dx = r g - x r³ mean(x g), plus a gradient past the norm.
@compute @workgroup_size(WG) fn rms_norm_grad(id: Id) {
  let row = group(id);
  if (row >= a.rows) { return; }
  let x0 = row * a.xs;
  let d0 = row * a.dys;
  var s = 0.0;
  var d = 0.0;
  for (var i = id.t; i < a.c; i += WG) {
    let v = ld_x(x0 + i);
    s += v * v;
    d += v * ld_dy(d0 + i) * ld_w(i);
  }
  let r = inverseSqrt(sum_all(s, id) / f32(a.c) + a.eps);
  let k = sum_all(d, id) / f32(a.c) * r * r;
  for (var i = id.t; i < a.c; i += WG) {
    var v = (ld_dy(d0 + i) * ld_w(i) - ld_x(x0 + i) * k) * r;
    if (HAS_past) { v += ld_past(row * a.pasts + i); }
    st_dx(row * a.dxs + i, v);
  }
}
// == inverse_rms
@compute @workgroup_size(WG) fn inverse_rms(id: Id) {
  let row = group(id);
  if (row >= a.rows) { return; }
  var s = 0.0;
  for (var i = id.t; i < a.c; i += WG) { let v = ld_x(row * a.xs + i); s += v * v; }
  s = sum_all(s, id);
  if (id.t == 0u) { st_inverse(row, inverseSqrt(s / f32(a.c) + a.eps)); }
}
// == weight_parts
// dw = sum over rows of dy x r: chunks of rows side by side, then joined in order.
@compute @workgroup_size(WG) fn weight_parts(id: Id) {
  let col = id.w.x * WG + id.t;
  if (col >= a.c) { return; }
  let last = min(a.rows, (id.w.y + 1u) * CHUNK);
  var s = 0.0;
  for (var r = id.w.y * CHUNK; r < last; r++) {
    s += ld_dy(r * a.dys + col) * (ld_x(r * a.xs + col) * ld_inverse(r));
  }
  st_part(id.w.y * a.c + col, s);
}
// == weight_join
@compute @workgroup_size(WG) fn weight_join(id: Id) {
  let col = id.w.x * WG + id.t;
  if (col >= a.c) { return; }
  var s = 0.0;
  for (var i = 0u; i < a.chunks; i++) { s += ld_part(i * a.c + col); }
  st_dw(col, s);
}
