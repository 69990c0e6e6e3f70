// The largest of what the parts of a row left in found [n, parts, 2].
@compute @workgroup_size(WG)
fn top_join(id: Id) {
  var mine = vec2(0u, 0xffffffffu);
  for (var i = id.t; i < a.parts_of_row; i += WG) {
    let at = (id.w.x * a.parts_of_row + i) * 2u;
    let other = vec2(ld_found(at), ld_found(at + 1u));
    if (other.x > mine.x || (other.x == mine.x && other.y < mine.y)) { mine = other; }
  }
  let all = best(mine, id.t);
  if (id.t == 0u) { result(id.w.x, a.c, all); }
}
