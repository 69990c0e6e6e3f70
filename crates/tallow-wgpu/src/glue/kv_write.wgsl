// New rows of a cache, one workgroup a token. Of equal positions the last wins; those past the end are not written.
@compute @workgroup_size(WG)
fn kv_write(id: Id) {
  let token = group(id);
  if (token >= a.n) { return; }
  let b = token / a.t;
  let i = token % a.t;
  let p = ld_pos(token);
  if (p >= a.s) { return; }
  var later = 0.0;
  for (var j = i + 1u + id.t; j < a.t; j += WG) {
    if (ld_pos(b * a.t + j) == p) { later = 1.0; }
  }
  if (max_all(later, id) > 0.0) { return; }
  for (var e = id.t; e < a.h * a.d; e += WG) {
    st_y((b * a.s + p) * a.h * a.d + e, ld_x(b * a.xb + i * a.xt + e / a.d * a.xh + e % a.d));
  }
}
