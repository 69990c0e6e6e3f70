//! Tests of the vector vocabulary: every method on every instruction set of this machine.
//! Invariant: lanes that a method does not name hold a sentinel that must survive.
//! Absent on purpose: speed.

use super::*;

struct Probe;

impl Kernel for Probe {
    type Output = Result<(), String>;

    #[inline(always)]
    unsafe fn call<V: Vector>(self) -> Self::Output {
        let n = V::LANES;
        let a: Vec<f32> = (0..n).map(|i| 0.37 * i as f32 - 1.9).collect();
        let b: Vec<f32> = (0..n).map(|i| 2.1 - 0.41 * i as f32).collect();
        let check = |what: &str, got: V, want: &dyn Fn(usize) -> f32| {
            let mut out = vec![f32::NAN; n];
            // SAFETY: `out` has `LANES` elements.
            unsafe { got.store(out.as_mut_ptr()) };
            for (i, &o) in out.iter().enumerate() {
                let w = want(i);
                if (o - w).abs() > 1e-6 * w.abs() {
                    return Err(format!("{what} lane {i}: want {w}, got {o}"));
                }
            }
            Ok(())
        };
        // SAFETY: dispatched, so the machine has the instructions; buffers hold `LANES` elements.
        unsafe {
            let (x, y) = (V::load(a.as_ptr()), V::load(b.as_ptr()));
            let four = [x, y, x.mul(y), x.sub(y)];
            let each = four.map(|v| v.sum().to_bits());
            if V::sum_each(four).map(f32::to_bits) != each {
                return Err("sum_each: other bits than sum".into());
            }
            check("zero", V::zero(), &|_| 0.0)?;
            check("splat", V::splat(3.0), &|_| 3.0)?;
            check("add", x.add(y), &|i| a[i] + b[i])?;
            check("sub", x.sub(y), &|i| a[i] - b[i])?;
            check("mul", x.mul(y), &|i| a[i] * b[i])?;
            check("div", x.div(y), &|i| a[i] / b[i])?;
            check("mul_add", x.mul_add(y, V::splat(7.0)), &|i| {
                a[i] * b[i] + 7.0
            })?;
            check("max", x.max(y), &|i| a[i].max(b[i]))?;
            check("min", x.min(y), &|i| a[i].min(b[i]))?;
            check("sqrt", x.mul(x).sqrt(), &|i| a[i].abs())?;
            check("round", x.mul(V::splat(5.0)).round(), &|i| {
                (a[i] * 5.0).round_ties_even()
            })?;
            check("exp2i", x.mul(V::splat(20.0)).round().exp2i(), &|i| {
                (a[i] * 20.0).round_ties_even().exp2()
            })?;
            check("scale2", y.scale2(x.mul(V::splat(60.0)).round()), &|i| {
                let n = (a[i] * 60.0).round_ties_even();
                // In two steps: `2^n` alone may not be a number.
                b[i] * (n / 2.0).floor().exp2() * (n - (n / 2.0).floor()).exp2()
            })?;
            check("lt", x.lt_select(y, V::splat(1.0), V::splat(2.0)), &|i| {
                if a[i] < b[i] { 1.0 } else { 2.0 }
            })?;
            let bits: Vec<u16> = a.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
            check("bf16", V::load_bf16(bits.as_ptr()), &|i| {
                f32::from_bits(a[i].to_bits() & 0xffff_0000)
            })?;
            let twice: Vec<u16> = bits.iter().rev().chain(&bits).copied().collect();
            let wide = |i: usize| f32::from_bits(u32::from(twice[i]) << 16);
            let (even, odd) = V::load_bf16_pairs(twice.as_ptr());
            check("bf16 even", even, &|i| wide(2 * i))?;
            check("bf16 odd", odd, &|i| wide(2 * i + 1))?;
            for k in 0..=n {
                let part = V::load_mask(a.as_ptr(), V::mask(k));
                check("load_mask", part, &|i| if i < k { a[i] } else { 0.0 })?;
                let mut out = vec![9.0f32; n];
                x.store_mask(out.as_mut_ptr(), V::mask(k));
                for (i, &o) in out.iter().enumerate() {
                    if o != if i < k { a[i] } else { 9.0 } {
                        return Err(format!("store_mask {k}: lane {i} is {o}"));
                    }
                }
            }
            let sum: f32 = a.iter().sum();
            if (x.sum() - sum).abs() > 1e-5 || x.max_lane() != a[n - 1] {
                return Err(format!("sum: want {sum}, got {}", x.sum()));
            }
        }
        Ok(())
    }
}

#[test]
fn every_method_on_every_isa() {
    for isa in Isa::available() {
        // SAFETY: `isa` is available; the probe asks for nothing else.
        let result = unsafe { isa.dispatch(Probe) };
        assert_eq!(result, Ok(()), "{}", isa.name());
    }
}

#[test]
fn names_round_trip_and_unknown_ones_list_the_valid() {
    for isa in Isa::available() {
        assert_eq!(Isa::named(isa.name()), Ok(isa));
    }
    let error = Isa::named("mmx").expect_err("no such kernels").to_string();
    assert!(
        error.contains("\"mmx\"") && error.contains("portable"),
        "{error}"
    );
    assert_eq!(Isa::available().last(), Some(Isa::Portable));
}
