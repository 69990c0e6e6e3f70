// The high word of a product; WGSL has none of its own.
fn high(x: u32, y: u32) -> u32 {
  let xl = x & 0xffffu;
  let xh = x >> 16u;
  let yl = y & 0xffffu;
  let yh = y >> 16u;
  let low = xl * yl;
  let middle = xh * yl + (low >> 16u);
  let other = xl * yh + (middle & 0xffffu);
  return xh * yh + (middle >> 16u) + (other >> 16u);
}
// Philox4x32-10: element `index` of the draw `draw` under a seed, as every device draws it.
fn uniform_of(seed0: u32, seed1: u32, draw: u32, index: u32) -> f32 {
  var c = vec4(index / 4u, 0u, draw, 0u);
  var k0 = seed0;
  var k1 = seed1;
  for (var i = 0u; i < 10u; i++) {
    let ph = high(0xD2511F53u, c.x);
    let pl = 0xD2511F53u * c.x;
    let qh = high(0xCD9E8D57u, c.z);
    let ql = 0xCD9E8D57u * c.z;
    c = vec4(qh ^ c.y ^ k0, ql, ph ^ c.w ^ k1, pl);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  let lane = index % 4u;
  let word = select(select(c.x, c.y, lane == 1u), select(c.z, c.w, lane == 3u), lane >= 2u);
  return f32(word >> 8u) * (1.0 / 16777216.0);
}
