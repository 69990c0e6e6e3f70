// Of one token of each row: queries and keys rotated, keys and values written to their caches. A thread takes a pair of
// elements of a head, or one element of the values. Bound by bandwidth.
@compute @workgroup_size(WG)
fn heads(id: Id) {
  let i = group(id) * WG + id.t;
  if (i >= a.n) { return; }
  let row = i / EACH;
  let e = i % EACH;
  let p = ld_pos(row);
  let slot = (row * a.s + p) * KEYS * HALF * 2u;
  if (e < TURNED * HALF) {
    let h = e / HALF;
    let c = e % HALF;
    let y = turn(f32(p) * ld_f(c));
    let low = ld_x(row * a.xb + h * a.xh + c);
    let up = ld_x(row * a.xb + h * a.xh + c + HALF);
    let first = low * y.x - up * y.y;
    let second = up * y.x + low * y.y;
    let at = row * a.qb + h * a.qh + c;
    st_q(at, first);
    st_q(at + HALF, second);
    if (h + KEYS >= TURNED && p < a.s) {
      let to = slot + (h + KEYS - TURNED) * HALF * 2u + c;
      st_kc(to, first);
      st_kc(to + HALF, second);
    }
    return;
  }
  let c = e - TURNED * HALF;
  if (p < a.s) { st_vc(slot + c, ld_v(row * a.vb + c / (HALF * 2u) * a.vh + c % (HALF * 2u))); }
}
