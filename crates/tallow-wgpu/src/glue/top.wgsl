// The largest of a part of a row: a workgroup for PART values. Bound by reading the row once.
@compute @workgroup_size(WG)
fn top(id: Id) {
  let first = id.w.x * PART;
  var mine = vec2(0u, 0xffffffffu);
  for (var i = first + id.t; i < min(first + PART, a.c); i += WG) {
    let key = key_of(ld_x(id.w.y * a.xs + i));
    if (key > mine.x || (key == mine.x && i < mine.y)) { mine = vec2(key, i); }
  }
  let found = best(mine, id.t);
  if (id.t == 0u) {
    LEAVE
  }
}
