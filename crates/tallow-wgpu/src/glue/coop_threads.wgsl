// Units for a GPU without, to test what is around them: each thread of a subgroup makes its share of a matrix's elements
// from where the factors lie in shared memory.
const SHARE: u32 = SIDE * SIDE / LANES;
struct Sums { v: array<f32, SHARE> }
fn load_sums(at: u32, lane: u32) -> Sums {
  var m: Sums;
  for (var i = 0u; i < SHARE; i++) { m.v[i] = OUT[at + lane + i * LANES]; }
  return m;
}
fn multiply_add(x: u32, w: u32, c: Sums, lane: u32) -> Sums {
  var m = c;
  for (var i = 0u; i < SHARE; i++) {
    let e = lane + i * LANES;
    for (var k = 0u; k < SIDE + (a.k >> 31u); k++) { m.v[i] += f32(xs[x + e / SIDE * ROW + k]) * f32(ws[w + e % SIDE * ROW + k]); }
  }
  return m;
}
fn put_sums(c: Sums, at: u32, lane: u32) {
  var m = c;
  for (var i = 0u; i < SHARE; i++) {
    let e = lane + i * LANES;
    OUT[at + e / SIDE * OUT_ROW + e % SIDE] = m.v[i];
  }
}
