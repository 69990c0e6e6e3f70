//! Exponential and its kin, for vectors; logarithm, sine and cosine, for loops over lanes.
//! Invariant: within 2 ulp of the exact value (tanh, sigmoid: 4; [`exp_nonpos`] says its own), NaN in
//! gives NaN out, and the same bits for an element wherever in a row it stands.
//! Absent on purpose: lookup tables and the C library, whose results differ between machines.

use crate::simd::Vector;

const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 in two parts; the first has few enough bits for `n * LN2_HI` to be exact.
const LN2_HI: f32 = 0.693_359_4;
const LN2_LO: f32 = -2.121_944_4e-4;
/// The linear term of `2^f` in a polynomial of five: three ulp below ln 2.
const SLOPE: f32 = f32::from_bits(std::f32::consts::LN_2.to_bits() - 3);
/// Below this, `e^x` is no longer a normal number.
const EXP_NORMAL: f32 = -87.336_54;

/// `e^r` for `|r| <= ln 2 / 2`, with the integer `n` of `x = n ln 2 + r`.
///
/// # Safety
/// The machine has the instructions of `V`.
#[inline(always)]
unsafe fn reduced_exp<V: Vector>(x: V) -> (V, V) {
    // SAFETY: the caller's promise.
    unsafe {
        let n = x.mul(V::splat(LOG2_E)).round();
        let minus = V::zero().sub(n);
        let r = minus.mul_add(V::splat(LN2_LO), minus.mul_add(V::splat(LN2_HI), x));
        let p = V::splat(1.987_569_2e-4);
        let p = p.mul_add(r, V::splat(1.398_199_9e-3));
        let p = p.mul_add(r, V::splat(8.333_452e-3));
        let p = p.mul_add(r, V::splat(4.166_579_6e-2));
        let p = p.mul_add(r, V::splat(1.666_666_5e-1));
        let p = p.mul_add(r, V::splat(0.5));
        let p = p.mul_add(r.mul(r), r);
        (p.add(V::splat(1.0)), n)
    }
}

/// `e^x`, subnormal results and overflow to infinity included.
///
/// # Safety
/// The machine has the instructions of `V`.
#[inline(always)]
pub unsafe fn exp<V: Vector>(x: V) -> V {
    // SAFETY: the caller's promise. The bounds come first: `max` and `min` keep a NaN on the right.
    unsafe {
        let x = V::splat(90.0).min(V::splat(-105.0).max(x));
        let (p, n) = reduced_exp(x);
        // n reaches from -152 to 130.
        p.scale2(n)
    }
}

/// `e^x` for `x <= 0`, zero where the result would not be a normal number. For softmax.
///
/// `x` is a difference there, off by up to half an ulp. This adds about as much, and 3 ulp: one constant
/// for log2 e, and five terms of `2^f`.
///
/// # Safety
/// The machine has the instructions of `V`.
#[inline(always)]
pub unsafe fn exp_nonpos<V: Vector>(x: V) -> V {
    // SAFETY: the caller's promise. A NaN is not below the bound and is carried through.
    unsafe {
        let bound = V::splat(EXP_NORMAL);
        let near = bound.max(x);
        let n = near.mul(V::splat(LOG2_E)).round();
        let f = near.mul_add(V::splat(LOG2_E), V::zero().sub(n));
        let p = V::splat(1.326_472_5e-3);
        let p = p.mul_add(f, V::splat(9.671_515e-3));
        let p = p.mul_add(f, V::splat(5.550_734e-2));
        let p = p.mul_add(f, V::splat(2.402_224_2e-1));
        let p = p.mul_add(f, V::splat(SLOPE));
        let p = p.mul_add(f, V::splat(1.0));
        // n reaches from -126 to 0.
        let e = match V::LANES {
            16 => p.scale2(n),
            _ => p.mul(n.exp2i()),
        };
        x.lt_select(bound, V::zero(), e)
    }
}

/// `1 / (1 + e^-x)`.
///
/// # Safety
/// The machine has the instructions of `V`.
#[inline(always)]
pub unsafe fn sigmoid<V: Vector>(x: V) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        let one = V::splat(1.0);
        one.div(one.add(exp(V::zero().sub(x))))
    }
}

/// Hyperbolic tangent.
///
/// # Safety
/// The machine has the instructions of `V`.
#[inline(always)]
pub unsafe fn tanh<V: Vector>(x: V) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        let a = x.max(V::zero().sub(x));
        // Near zero a polynomial, for the quotient would cancel.
        let z = x.mul(x);
        let p = V::splat(-5.704_988_7e-3);
        let p = p.mul_add(z, V::splat(2.063_909e-2));
        let p = p.mul_add(z, V::splat(-5.373_971_5e-2));
        let p = p.mul_add(z, V::splat(1.333_144_2e-1));
        let p = p.mul_add(z, V::splat(-3.333_328e-1));
        let near = p.mul(z).mul_add(x, x);
        let one = V::splat(1.0);
        let far = one.sub(V::splat(2.0).div(exp(a.add(a)).add(one)));
        let far = x.lt_select(V::zero(), V::zero().sub(far), far);
        // A NaN fails the comparison and takes `far`, which is NaN.
        a.lt_select(V::splat(0.625), near, far)
    }
}

/// Natural logarithm of one lane. Free of branches, so that a loop over it becomes vector code.
#[inline(always)]
#[must_use]
pub fn log_lane(x: f32) -> f32 {
    const SUBNORMAL: f32 = 8_388_608.0;
    let small = x < f32::MIN_POSITIVE;
    let scaled = if small { x * SUBNORMAL } else { x };
    // x = m * 2^e with m in [sqrt(1/2), sqrt(2)).
    let bits = scaled.to_bits().wrapping_sub(0x3f35_04f3);
    let e = ((bits as i32) >> 23) as f32 - if small { 23.0 } else { 0.0 };
    let m = f32::from_bits((bits & 0x007f_ffff).wrapping_add(0x3f35_04f3)) - 1.0;
    let z = m * m;
    let p = 7.037_683_6e-2;
    let p = p * m - 1.151_461e-1;
    let p = p * m + 1.167_699_8e-1;
    let p = p * m - 1.242_014_1e-1;
    let p = p * m + 1.424_932_3e-1;
    let p = p * m - 1.666_805_7e-1;
    let p = p * m + 2.000_071_5e-1;
    let p = p * m - 2.499_999_4e-1;
    let p = p * m + 3.333_333e-1;
    let y = p * m * z + e * LN2_LO - 0.5 * z;
    let y = m + y + e * LN2_HI;
    let y = if x == f32::INFINITY { x } else { y };
    let y = if x == 0.0 { f32::NEG_INFINITY } else { y };
    // Also for a NaN.
    if x >= 0.0 { y } else { f32::NAN }
}

/// Above this magnitude (radians) the reduction below is no longer exact enough.
const SIN_COS_MAX: f32 = 1.0e8;

/// Sine and cosine of one lane of radians, through f64. Free of branches up to 1e8 radians.
#[inline(always)]
fn sin_cos_lane(x: f32) -> (f32, f32) {
    // Adding 1.5 * 2^52 rounds to an integer and leaves it in the low bits.
    const SHIFT: f64 = 6_755_399_441_055_744.0;
    // pi / 2 in three parts, two of them with 26 bits: their products with n are exact.
    const HI: f64 = 1.570_796_310_901_641_8;
    const MID: f64 = 1.589_325_471_229_585_7e-8;
    const LO: f64 = 6.123_233_995_736_766e-17;
    let a = f64::from(x);
    let shifted = a * std::f64::consts::FRAC_2_PI + SHIFT;
    let n = shifted - SHIFT;
    let quadrant = shifted.to_bits();
    let r = ((a - n * HI) - n * MID) - n * LO;
    let z = r * r;
    let s = -2.505_210_838_544_172e-8;
    let s = s * z + 2.755_731_922_398_589e-6;
    let s = s * z - 1.984_126_984_126_984e-4;
    let s = s * z + 8.333_333_333_333_333e-3;
    let s = s * z - 1.666_666_666_666_666_6e-1;
    let sin = r + r * z * s;
    let c = 2.087_675_698_786_81e-9;
    let c = c * z - 2.755_731_922_398_589e-7;
    let c = c * z + 2.480_158_730_158_73e-5;
    let c = c * z - 1.388_888_888_888_889e-3;
    let c = c * z + 4.166_666_666_666_666_4e-2;
    let cos = 1.0 - 0.5 * z + z * z * c;
    let swap = quadrant & 1 == 1;
    let (s, c) = if swap { (cos, sin) } else { (sin, cos) };
    let s = if quadrant & 2 == 2 { -s } else { s };
    let c = if quadrant.wrapping_add(1) & 2 == 2 {
        -c
    } else {
        c
    };
    (s as f32, c as f32)
}

/// Lanes of [`sin_cos`].
pub const WIDE: usize = 16;

/// Sines and cosines of any f32, with a slow path for huge and non-finite ones.
#[inline(always)]
#[must_use]
pub fn sin_cos(x: &[f32; WIDE]) -> ([f32; WIDE], [f32; WIDE]) {
    let (mut sin, mut cos) = ([0.0; WIDE], [0.0; WIDE]);
    let mut near = true;
    for l in 0..WIDE {
        (sin[l], cos[l]) = sin_cos_lane(x[l]);
        near &= x[l].abs() <= SIN_COS_MAX;
    }
    if !near {
        for l in 0..WIDE {
            if x[l].is_nan() || x[l].abs() > SIN_COS_MAX {
                let (s, c) = f64::from(x[l]).sin_cos();
                (sin[l], cos[l]) = (s as f32, c as f32);
            }
        }
    }
    (sin, cos)
}

#[cfg(test)]
mod tests;
