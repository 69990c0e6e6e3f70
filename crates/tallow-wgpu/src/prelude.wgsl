// What every kernel may use. Each thread gets an `Id`; `WG` is the number of threads of a workgroup.
// Largest finite number: WGSL knows no infinity, and a compiler may assume that there is none.
const HUGE: f32 = 3.40282347e38;

// 16-bit floats, two to a word, and bytes, four to a word.
fn bf16_of(word: u32, half: u32) -> f32 {
  return bitcast<f32>(select(word << 16u, word & 0xffff0000u, half != 0u));
}
fn bf16x4(w: vec2<u32>) -> vec4<f32> {
  return bitcast<vec4<f32>>(vec4<u32>(w.x << 16u, w.x & 0xffff0000u, w.y << 16u, w.y & 0xffff0000u));
}
// Rounds to nearest, ties to even; a NaN stays one.
fn bf16_bits(v: f32) -> u32 {
  let b = bitcast<u32>(v);
  let rounded = (b + 0x7fffu + ((b >> 16u) & 1u)) >> 16u;
  return select(rounded, (b >> 16u) | 0x40u, (b & 0x7fffffffu) > 0x7f800000u);
}
fn f16_of(word: u32, half: u32) -> f32 {
  let both = unpack2x16float(word);
  return select(both.x, both.y, half != 0u);
}
fn f16x4(w: vec2<u32>) -> vec4<f32> {
  return vec4<f32>(unpack2x16float(w.x), unpack2x16float(w.y));
}
fn f16_bits(v: f32) -> u32 {
  return pack2x16float(vec2<f32>(v, 0.0)) & 0xffffu;
}
fn u8_of(word: u32, byte: u32) -> u32 {
  return (word >> (byte * 8u)) & 0xffu;
}

// A float by its bits, also one that WGSL cannot write: not a constant, so no compiler looks into it.
var<private> no_bits: u32 = 0u;
fn bits(b: u32) -> f32 { return bitcast<f32>(b | no_bits); }
