// What the gradients need of each query, made once: rows [b, h, t, 4] = lse, rowsum(do o), and the keys it sees.
// Eight threads a row.
@compute @workgroup_size(WG)
fn grad_rows(id: Id) {
  let lane = id.t;
  let r = group(id) * 8u + lane / 8u;
  let n = a.b * a.h * a.t;
  let i = r % a.t;
  let head = r / a.t % a.h;
  let b = r / a.t / a.h;
  var s = 0.0;
  if (r < n) {
    let x = b * a.ob + i * a.ot + head * a.oh;
    let y = b * a.gb + i * a.gt + head * a.gh;
    for (var c = lane % 8u; c < D; c += 8u) { s += ld_o(x + c) * ld_g(y + c); }
  }
  s = sum_of(8u, s, id);
  if (lane % 8u == 0u && r < n) {
    let see = seen(ld_pos(b * a.t + i), u32(ld_starts(b * a.t + i)), a.s);
    st_rows(r * 4u, bitcast<u32>(ld_lse(r)));
    st_rows(r * 4u + 1u, bitcast<u32>(s));
    st_rows(r * 4u + 2u, see.x);
    st_rows(r * 4u + 3u, see.y);
  }
}
