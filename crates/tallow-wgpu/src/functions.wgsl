// Functions where an adapter may be rough (WGSL allows `sin` an error of 2^-11): as in Cephes, to one or two units in
// the last place. `sin_of` and `cos_of` up to a few thousand radians.
fn exp_of(x: f32) -> f32 {
  let n = floor(1.44269504 * x + 0.5);
  let r = (x - n * 0.693359375) + n * 2.12194440e-4;
  let p = (((((1.9875691500e-4 * r + 1.3981999507e-3) * r + 8.3334519073e-3) * r + 4.1665795894e-2) * r
    + 1.6666665459e-1) * r + 5.0000001201e-1) * r * r + r + 1.0;
  // 2^n in two factors, each a normal number.
  let e = i32(clamp(n, -250.0, 250.0));
  let half = e / 2;
  let y = p * bitcast<f32>(u32(half + 127) << 23u) * bitcast<f32>(u32(e - half + 127) << 23u);
  return select(select(y, bits(0x7f800000u), x > 88.8), 0.0, x < -104.0);
}
fn log_of(x: f32) -> f32 {
  let tiny = x < 1.17549435e-38;
  let b = bitcast<u32>(select(x, x * 8388608.0, tiny));
  let e = bitcast<i32>(b - 0x3f3504f3u) >> 23u;
  let f = bitcast<f32>(b - (bitcast<u32>(e) << 23u)) - 1.0;
  let n = f32(e) - select(0.0, 23.0, tiny);
  let z = f * f;
  let p = ((((((((7.0376836292e-2 * f - 1.1514610310e-1) * f + 1.1676998740e-1) * f - 1.2420140846e-1) * f
    + 1.4249322787e-1) * f - 1.6668057665e-1) * f + 2.0000714765e-1) * f - 2.4999993993e-1) * f + 3.3333331174e-1) * f * z;
  let y = (f + ((p - n * 2.12194440e-4) - 0.5 * z)) + n * 0.693359375;
  // Of 0, of less, and of infinity and NaN.
  let low = select(bits(0x7fc00000u), bits(0xff800000u), x == 0.0);
  return select(select(low, y, x > 0.0), x, (b & 0x7f800000u) == 0x7f800000u && x > 0.0);
}
// Radians less the nearest multiple of a quarter turn, and which one.
fn quarter(x: f32) -> vec2<f32> {
  let n = floor(x * 0.636619772 + 0.5);
  return vec2<f32>(((x - n * 1.5703125) - n * 4.837512969970703125e-4) - n * 7.549789948768648e-8, n);
}
fn wave(y: f32, quarters: i32) -> f32 {
  let z = y * y;
  let s = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * y + y;
  let c = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0;
  let v = select(s, c, (quarters & 1) != 0);
  return select(v, -v, (quarters & 2) != 0);
}
fn sin_of(x: f32) -> f32 { let q = quarter(x); return wave(q.x, i32(q.y)); }
fn cos_of(x: f32) -> f32 { let q = quarter(x); return wave(q.x, i32(q.y) + 1); }
fn sigmoid_of(x: f32) -> f32 { return 1.0 / (1.0 + exp_of(-x)); }
// As in Cephes: a polynomial near 0, where 1 - 2 / (e^2x + 1) cancels.
fn tanh_of(x: f32) -> f32 {
  let z = x * x;
  let p = ((((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    - 3.33332819422e-1) * z * x + x;
  let far = sign(x) * (1.0 - 2.0 / (exp_of(2.0 * min(abs(x), 20.0)) + 1.0));
  return select(far, p, abs(x) < 0.625);
}
