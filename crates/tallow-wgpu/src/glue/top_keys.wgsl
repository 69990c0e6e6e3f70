// Floats as whole numbers of the same order: WGSL says nothing of NaN and infinities, but all of bits. A NaN is the
// largest; zeros are equal.
fn key_of(bits: u32) -> u32 {
  if ((bits & 0x7fffffffu) > 0x7f800000u) { return 0xffffffffu; }
  if (bits == 0x80000000u) { return bits; }
  return bits ^ select(0x80000000u, 0xffffffffu, bits >= 0x80000000u);
}
fn bits_of(key: u32) -> u32 {
  return key ^ select(0xffffffffu, 0x80000000u, key >= 0x80000000u);
}
var<workgroup> tops: array<vec2<u32>, WG>;
// Of all threads' (key, place) the largest key, of equals the first place; in thread 0.
fn best(mine: vec2<u32>, lane: u32) -> vec2<u32> {
  tops[lane] = mine;
  workgroupBarrier();
  for (var o = WG / 2u; o > 0u; o /= 2u) {
    if (lane < o) {
      let x = tops[lane];
      let y = tops[lane + o];
      if (y.x > x.x || (y.x == x.x && y.y < x.y)) { tops[lane] = y; }
    }
    workgroupBarrier();
  }
  return tops[0];
}
// The result of row `r` of `c` values: place (with a NaN `c`) and value.
fn result(r: u32, c: u32, found: vec2<u32>) {
  let place = select(found.y, c, found.x == 0xffffffffu);
  st_y(r * a.ys, bitcast<u32>(f32(place)));
  st_y(r * a.ys + 1u, bits_of(found.x));
}
