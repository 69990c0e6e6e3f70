//! Tests of the vector functions against f64, in units of the last place.
//! Invariant: every instruction set of this machine is tried.
//! Absent on purpose: exhaustive sweeps; a few hundred thousand points a function suffice.

use super::*;
use crate::simd::{Isa, Kernel};

#[derive(Clone, Copy)]
enum Function {
    Exp,
    ExpNonPos,
    Sigmoid,
    Tanh,
}

struct Map<'a> {
    f: Function,
    x: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for Map<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn call<V: Vector>(self) {
        for (x, y) in self
            .x
            .chunks_exact(V::LANES)
            .zip(self.y.chunks_exact_mut(V::LANES))
        {
            // SAFETY: dispatched; both chunks hold `LANES` elements.
            unsafe {
                let v = V::load(x.as_ptr());
                let r = match self.f {
                    Function::Exp => exp(v),
                    Function::ExpNonPos => exp_nonpos(v),
                    Function::Sigmoid => sigmoid(v),
                    Function::Tanh => tanh(v),
                };
                r.store(y.as_mut_ptr());
            }
        }
    }
}

fn map(isa: Isa, f: Function, x: &[f32]) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len()];
    // SAFETY: `isa` is available.
    unsafe { isa.dispatch(Map { f, x, y: &mut y }) };
    y
}

/// Distance in units of the last place of the exact value.
fn ulps(got: f32, want: f64) -> f64 {
    if got == want as f32 || (got.is_nan() && want.is_nan()) {
        return 0.0;
    }
    let w = (want as f32).abs().max(f32::MIN_POSITIVE);
    let ulp = f64::from(f32::from_bits(w.to_bits() + 1)) - f64::from(w);
    (f64::from(got) - want).abs() / ulp
}

/// Evenly spaced points, a multiple of 16 of them.
fn points(lo: f32, hi: f32) -> Vec<f32> {
    let n = 1 << 18;
    (0..n)
        .map(|i| lo + (hi - lo) * (i as f32 + 0.37) / n as f32)
        .collect()
}

fn worst(x: &[f32], y: &[f32], want: impl Fn(f64) -> f64) -> f64 {
    x.iter()
        .zip(y)
        .map(|(x, y)| ulps(*y, want(f64::from(*x))))
        .fold(0.0, f64::max)
}

#[test]
fn exp_family_is_within_its_bounds() {
    type Case = (Function, f32, f32, fn(f64) -> f64, f64);
    let cases: [Case; 6] = [
        (Function::Exp, -87.3, 88.7, f64::exp, 2.0),
        (Function::Exp, -1.0, 1.0, f64::exp, 2.0),
        (
            Function::Sigmoid,
            -87.0,
            30.0,
            |x| 1.0 / (1.0 + (-x).exp()),
            4.0,
        ),
        (Function::Tanh, -10.0, 10.0, f64::tanh, 4.0),
        (Function::Tanh, -0.7, 0.7, f64::tanh, 4.0),
        (Function::Tanh, -1e-3, 1e-3, f64::tanh, 4.0),
    ];
    for isa in Isa::available() {
        for (f, lo, hi, want, bound) in cases {
            let x = points(lo, hi);
            let got = worst(&x, &map(isa, f, &x), want);
            assert!(got <= bound, "{} {lo}..{hi}: {got} ulp", isa.name());
        }
    }
}

#[test]
fn exp_nonpos_is_off_as_much_as_a_rounded_difference_is() {
    for isa in Isa::available() {
        for (lo, hi) in [(-87.3, 0.0), (-1.0, 0.0), (-1e-3, 0.0)] {
            let x = points(lo, hi);
            for (x, y) in x.iter().zip(map(isa, Function::ExpNonPos, &x)) {
                let got = ulps(y, f64::from(*x).exp());
                // Half an ulp of x is half to one of the result for each unit of x. Without fused
                // multiply-adds the product with log2 e costs that; with them a quarter of it.
                let fused = !matches!(isa, Isa::Portable);
                let bound = 3.0 + x.abs() * if fused { 0.25 } else { 1.25 };
                assert!(
                    got <= f64::from(bound),
                    "{} exp({x}): {got} ulp",
                    isa.name()
                );
            }
        }
    }
}

#[test]
fn exp_family_at_the_edges() {
    let inf = f32::INFINITY;
    let mut x = vec![
        0.0,
        -0.0,
        inf,
        -inf,
        f32::NAN,
        89.0,
        1e30,
        -1e30,
        -104.5,
        -100.0,
        -90.0,
    ];
    x.resize(16, 0.0);
    for isa in Isa::available() {
        for (x, y) in x.iter().zip(map(isa, Function::Exp, &x)) {
            let want = f64::from(*x).exp();
            // Subnormals: half a unit of the smallest one per rounding.
            let near = (f64::from(y) - want).abs() <= 3e-45 || ulps(y, want) <= 2.0;
            assert!(near, "{} exp({x}) = {y}", isa.name());
        }
        let nonpos: Vec<f32> = x.iter().map(|x| if *x > 0.0 { 0.0 } else { *x }).collect();
        let y = map(isa, Function::ExpNonPos, &nonpos);
        assert_eq!((y[0], y[3], y[7], y[10]), (1.0, 0.0, 0.0, 0.0));
        assert!(y[4].is_nan());
        let y = map(isa, Function::Sigmoid, &x);
        assert_eq!((y[0], y[2], y[3]), (0.5, 1.0, 0.0));
        assert!(y[4].is_nan());
        let y = map(isa, Function::Tanh, &x);
        assert_eq!((y[0], y[2], y[3], y[7]), (0.0, 1.0, -1.0, -1.0));
        assert!(y[4].is_nan());
    }
}

#[test]
fn log_is_within_two_ulps() {
    for (lo, hi) in [(0.5, 2.0), (1e-6, 1e3), (1e-38, 1e-36), (1e20, 1e38)] {
        let x = points(lo, hi);
        let y: Vec<f32> = x.iter().map(|x| log_lane(*x)).collect();
        let got = worst(&x, &y, f64::ln);
        assert!(got <= 2.0, "{lo}..{hi}: {got} ulp");
    }
    let inf = f32::INFINITY;
    assert_eq!(
        (log_lane(0.0), log_lane(inf), log_lane(1.0)),
        (-inf, inf, 0.0)
    );
    assert!(log_lane(-1.0).is_nan() && log_lane(f32::NAN).is_nan());
    assert!(ulps(log_lane(1e-42), f64::from(1e-42f32).ln()) <= 2.0);
}

#[test]
fn sine_and_cosine_stay_exact_far_from_zero() {
    for (lo, hi) in [(-4.0, 4.0), (0.0, 1e4), (-1e6, 1e6), (9e7, 1e8)] {
        let x = points(lo, hi);
        let (s, c): (Vec<f32>, Vec<f32>) = x.iter().map(|x| sin_cos_lane(*x)).unzip();
        let got = worst(&x, &s, f64::sin).max(worst(&x, &c, f64::cos));
        assert!(got <= 2.0, "{lo}..{hi}: {got} ulp");
    }
    let mut x = [0.5; WIDE];
    (x[3], x[7]) = (f32::INFINITY, 1e20);
    let (s, c) = sin_cos(&x);
    assert!(s[3].is_nan() && c[3].is_nan());
    assert!((f64::from(c[7]) - f64::from(1e20f32).cos()).abs() < 1e-6);
    assert_eq!((s[0], c[15]), sin_cos_lane(0.5));
}
