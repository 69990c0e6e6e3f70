// Philox4x32-10: element `index` of the draw `id` under a seed, as every device draws it.
fn mul_high(x: u32, y: u32) -> u32 {
  let xl = x & 0xffffu;
  let xh = x >> 16u;
  let yl = y & 0xffffu;
  let yh = y >> 16u;
  let m = xh * yl + ((xl * yl) >> 16u);
  let n = xl * yh + (m & 0xffffu);
  return xh * yh + (m >> 16u) + (n >> 16u);
}
fn between_0_and_1(seed0: u32, seed1: u32, id: u32, index: u32) -> f32 {
  var c = vec4<u32>(index / 4u, 0u, id, 0u);
  var k = vec2<u32>(seed0, seed1);
  for (var round = 0u; round < 10u; round++) {
    c = vec4<u32>(mul_high(0xCD9E8D57u, c.z) ^ c.y ^ k.x, 0xCD9E8D57u * c.z,
                  mul_high(0xD2511F53u, c.x) ^ c.w ^ k.y, 0xD2511F53u * c.x);
    k += vec2<u32>(0x9E3779B9u, 0xBB67AE85u);
  }
  return f32(c[index & 3u] >> 8u) * (1.0 / 16777216.0);
}
