// (cos, sin) of an angle in radians to about one part in 2^23, at any size that f32 tells apart. WGSL promises 2^-11,
// and only within half a turn; so the angle is cut down to an eighth of a turn in whole numbers, where no compiler
// may reorder, and the rest is a polynomial.
fn high_word(x: u32, y: u32) -> u32 {
  let xl = x & 0xffffu;
  let xh = x >> 16u;
  let yl = y & 0xffffu;
  let yh = y >> 16u;
  let middle = xh * yl + ((xl * yl) >> 16u);
  let other = xl * yh + (middle & 0xffffu);
  return xh * yh + (middle >> 16u) + (other >> 16u);
}
// The part of |x| / 2 pi behind the point, in units of 2^-32. The angle is m 2^e; 1 / 2 pi has 96 bits here.
fn turns(bits: u32) -> u32 {
  let m = (bits & 0x7fffffu) | 0x800000u;
  let e = i32((bits >> 23u) & 0xffu) - 150;
  let low = m * 0x9391054Au;
  let p1 = low + high_word(m, 0x7F09D5F4u);
  let carry = select(0u, 1u, p1 < low);
  let top = m * 0x28BE60DBu;
  let add = high_word(m, 0x9391054Au) + carry;
  let p2 = top + add;
  let p3 = high_word(m, 0x28BE60DBu) + select(0u, 1u, p2 < top);
  if (e == 0) { return p2; }
  if (e < 0) { return (p2 >> u32(min(-e, 31))) | (p3 << u32(32 - min(-e, 31))); }
  if (e < 32) { return (p2 << u32(e)) | (p1 >> u32(32 - e)); }
  // One step of such a number is many turns.
  return 0u;
}
fn turn(x: f32) -> vec2<f32> {
  var r = abs(x);
  var quarter = 0u;
  if (r > 0.785) {
    let f = turns(bitcast<u32>(r));
    quarter = (f + 0x20000000u) >> 30u;
    r = f32(bitcast<i32>(f - (quarter << 30u))) * 1.4629180792671596e-9;
  }
  let q = r * r;
  let s = r + r * q * (-1.6666654611e-1 + q * (8.3321608736e-3 - q * 1.9515295891e-4));
  let c = 1.0 - 0.5 * q + q * q * (4.166664568298827e-2 + q * (-1.388731625493765e-3 + q * 2.443315711809948e-5));
  var y = vec2(c, s);
  if ((quarter & 1u) != 0u) { y = vec2(-s, c); }
  if ((quarter & 2u) != 0u) { y = -y; }
  if (x < 0.0) { y.y = -y.y; }
  return y;
}
