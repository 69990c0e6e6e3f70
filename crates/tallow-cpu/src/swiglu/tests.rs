//! Tests of SwiGLU against f64 and finite differences.
//! Invariant: strided rows with poisoned gaps; every instruction set; 1 to 3 threads.
//! Absent on purpose: speed.

use super::*;
use crate::pool::Pool;
use crate::simd::Isa;
use crate::testing::Rng;

fn silu(g: f64) -> f64 {
    g / (1.0 + (-g).exp())
}

fn slope(g: f64) -> f64 {
    let s = 1.0 / (1.0 + (-g).exp());
    s * (1.0 + g * (1.0 - s))
}

/// A few ulps of the result and of `size`.
fn near(got: f32, want: f64, size: f64) {
    let bound = f64::from(f32::EPSILON) * 6.0 * (want.abs() + size) + 1e-37;
    assert!(
        (f64::from(got) - want).abs() <= bound,
        "want {want}, got {got}"
    );
}

#[test]
fn forward_and_backward() {
    let mut rng = Rng::fresh();
    for (n, c) in [
        (1, 1),
        (2, 3),
        (5, 7),
        (13, 31),
        (3, 32),
        (31, 33),
        (40, 127),
    ] {
        let ld = c + 2;
        let g: Vec<f32> = rng.vec(n * ld).iter().map(|g| g * 12.0).collect();
        let [u, dy] = [0; 2].map(|_| rng.vec(n * ld));
        for isa in Isa::available() {
            let mut first = None;
            for threads in 1..=3 {
                let pool = Pool::new(threads);
                let exec = Exec { isa, pool: &pool };
                let view = |x: &[f32]| Rows {
                    ptr: x.as_ptr(),
                    ld,
                };
                let mut out = [0; 3].map(|_| vec![f32::NAN; n * ld]);
                let [y, dg, du] = out.each_mut().map(|x| Rows {
                    ptr: x.as_mut_ptr(),
                    ld,
                });
                let (rows, g_view, u_view) = (n, view(&g), view(&u));
                let forward = SwiGlu {
                    rows,
                    c,
                    g: g_view,
                    u: u_view,
                    y,
                };
                let dy_view = view(&dy);
                let backward = SwiGluBackward {
                    rows,
                    c,
                    g: g_view,
                    u: u_view,
                    dy: dy_view,
                    dg,
                    du,
                };
                // SAFETY: all buffers hold `n` rows.
                unsafe {
                    forward.run(exec);
                    backward.run(exec);
                }
                for at in 0..n * ld {
                    if at % ld >= c {
                        assert!(out.iter().all(|x| x[at].is_nan()));
                        continue;
                    }
                    let [g, u, dy] = [&g, &u, &dy].map(|x| f64::from(x[at]));
                    near(out[0][at], silu(g) * u, 0.0);
                    near(out[1][at], dy * u * slope(g), (dy * u).abs() * 0.1);
                    near(out[2][at], dy * silu(g), 0.0);
                }
                let bits = out.map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
                assert_eq!(*first.get_or_insert(bits.clone()), bits);
            }
        }
    }
}

#[test]
fn the_reference_slope_agrees_with_finite_differences() {
    for i in -40..40 {
        let g = f64::from(i) * 0.3;
        let difference = (silu(g + 1e-5) - silu(g - 1e-5)) / 2e-5;
        assert!((difference - slope(g)).abs() < 1e-8);
    }
}
