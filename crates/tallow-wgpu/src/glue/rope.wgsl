// Element e of a head turns with element e + half by pos * inv_freq[e]. A thread turns it in SPAN heads: the angle is the
// same. Bound by bandwidth.
@compute @workgroup_size(WG)
fn rope(id: Id) {
  let i = group(id) * WG + id.t;
  if (i >= a.n) { return; }
  let spans = (a.h + SPAN - 1u) / SPAN;
  let e = i % a.half_d;
  let r = i / a.half_d;
  let token = r / spans;
  let y = turn(f32(ld_pos(token)) * ld_f(e));
  let co = y.x;
  let si = y.y * SIGN;
  let x_at = token / a.t * a.xb + token % a.t * a.xt + e;
  let y_at = token / a.t * a.yb + token % a.t * a.yt + e;
  for (var h = r % spans * SPAN; h < min(a.h, (r % spans + 1u) * SPAN); h++) {
    let low = ld_x(x_at + h * a.xh);
    let up = ld_x(x_at + h * a.xh + a.half_d);
    st_y(y_at + h * a.yh, low * co - up * si);
    st_y(y_at + h * a.yh + a.half_d, up * co + low * si);
  }
}
