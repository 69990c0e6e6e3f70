//! Tests of the norm against loops in f64, and of their gradient against finite differences.
//! Invariant: rows are strided with poisoned gaps; every instruction set; 1 to 3 threads.
//! Absent on purpose: speed.

use super::*;
use crate::pool::Pool;
use crate::simd::Isa;
use crate::testing::{Rng, close};

const EPS: f32 = 1e-5;

fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn rows(x: &[f32], ld: usize) -> Rows {
    let ptr = x.as_ptr();
    Rows { ptr, ld }
}

fn rows_mut(x: &mut [f32], ld: usize) -> Rows<*mut f32> {
    let ptr = x.as_mut_ptr();
    Rows { ptr, ld }
}

fn reference(x: &[f64], w: &[f64]) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let r = 1.0 / (mean + f64::from(EPS)).sqrt();
    x.iter().zip(w).map(|(x, w)| x * r * w).collect()
}

/// `dx` with the magnitude of all that is summed in it, and the row's part of `dw`.
fn reference_back(x: &[f64], w: &[f64], dy: &[f64]) -> (Vec<(f64, f64)>, Vec<f64>) {
    let c = x.len() as f64;
    let mean = x.iter().map(|x| x * x).sum::<f64>() / c;
    let r = 1.0 / (mean + f64::from(EPS)).sqrt();
    let terms = || (0..x.len()).map(|i| dy[i] * w[i] * x[i]);
    let (dot, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
    let back = |i: usize, dot: f64| x[i] * r * r * r * dot / c;
    let dx = (0..x.len()).map(|i| {
        let g = r * dy[i] * w[i];
        (g - back(i, dot), g.abs() + back(i, size).abs())
    });
    let dw = (0..x.len()).map(|i| dy[i] * x[i] * r);
    (dx.collect(), dw.collect())
}

const SIZES: [(usize, usize); 10] = [
    (1, 1),
    (2, 2),
    (3, 3),
    (5, 5),
    (7, 7),
    (13, 13),
    (31, 31),
    (127, 32),
    (33, 127),
    (70, 300),
];

#[test]
fn forward_with_and_without_a_residual() {
    let mut rng = Rng::fresh();
    for (n, c) in SIZES {
        let ld = c + 3;
        let (x, other, w) = (rng.vec(n * ld), rng.vec(n * ld), rng.vec(c));
        for isa in Isa::available() {
            for (residual, keep) in [(false, false), (true, true), (true, false)] {
                let mut first = None;
                for threads in 1..=3 {
                    let pool = Pool::new(threads);
                    let mut y = vec![f32::NAN; n * ld];
                    let mut sum = vec![f32::NAN; n * ld];
                    let mut to = rows_mut(&mut sum, ld);
                    if !keep {
                        to.ptr = std::ptr::null_mut();
                    }
                    let args = RmsNorm {
                        rows: n,
                        c,
                        eps: EPS,
                        x: rows(&x, ld),
                        residual: residual.then(|| Residual {
                            other: rows(&other, ld),
                            sum: to,
                        }),
                        w: w.as_ptr(),
                        y: rows_mut(&mut y, ld),
                    };
                    // SAFETY: all buffers hold `n` rows.
                    unsafe { args.run(Exec { isa, pool: &pool }) };
                    for i in 0..n {
                        let at = i * ld..i * ld + c;
                        let mut row = x[at.clone()].to_vec();
                        if residual {
                            for (r, o) in row.iter_mut().zip(&other[at.clone()]) {
                                *r += o;
                            }
                        }
                        if keep {
                            assert_eq!(sum[at.clone()], row);
                        }
                        let want = reference(&f64s(&row), &f64s(&w));
                        for (y, want) in y[at.clone()].iter().zip(want) {
                            close(*y, &[want]).unwrap();
                        }
                        assert!(y[at.end..at.end + 3].iter().all(|y| y.is_nan()));
                        assert!(sum[at.end..at.end + 3].iter().all(|y| y.is_nan()));
                    }
                    let all = (bits(&y), bits(&sum));
                    assert_eq!(*first.get_or_insert(all.clone()), all);
                }
            }
        }
    }
}

#[test]
fn backward_with_and_without_dw_and_residual() {
    let mut rng = Rng::fresh();
    for (n, c) in SIZES {
        let ld = c + 1;
        let [x, dy, past] = [0; 3].map(|_| rng.vec(n * ld));
        let w = rng.vec(c);
        for isa in Isa::available() {
            for extra in [false, true] {
                let mut first = None;
                for threads in 1..=3 {
                    let pool = Pool::new(threads);
                    let mut dx = vec![f32::NAN; n * ld];
                    let mut dw = vec![f32::NAN; c];
                    let mut ws = vec![f32::NAN; RmsNormBackward::workspace_elems(n, c)];
                    let mut args = RmsNormBackward {
                        rows: n,
                        c,
                        eps: EPS,
                        x: rows(&x, ld),
                        w: w.as_ptr(),
                        dy: rows(&dy, ld),
                        residual: extra.then(|| rows(&past, ld)),
                        dx: rows_mut(&mut dx, ld),
                        dw: dw.as_mut_ptr(),
                        workspace: ws.as_mut_ptr(),
                    };
                    let exec = Exec { isa, pool: &pool };
                    // SAFETY: all buffers hold `n` rows.
                    unsafe { args.run(exec) };
                    let mut dw_terms = vec![Vec::new(); c];
                    for i in 0..n {
                        let at = i * ld..i * ld + c;
                        let row = f64s(&x[at.clone()]);
                        let (want, part) = reference_back(&row, &f64s(&w), &f64s(&dy[at.clone()]));
                        for k in 0..c {
                            let g = if extra {
                                f64::from(past[at.start + k])
                            } else {
                                0.0
                            };
                            let (want, size) = want[k];
                            let off = (f64::from(dx[at.start + k]) - want - g).abs();
                            let bound = f64::from(f32::EPSILON) * 8.0 * (size + g.abs());
                            assert!(off <= bound, "{n}x{c}: {off:e} {bound:e}");
                            dw_terms[k].push(part[k]);
                        }
                        assert!(dx[at.end].is_nan());
                    }
                    for k in 0..c {
                        close(dw[k], &dw_terms[k]).unwrap();
                    }
                    let all = (bits(&dx), bits(&dw));
                    assert_eq!(*first.get_or_insert(all.clone()), all);
                    // Without dw: the same dx, no scratch.
                    (args.dw, args.workspace) = (std::ptr::null_mut(), std::ptr::null_mut());
                    // SAFETY: as above.
                    unsafe { args.run(exec) };
                    assert_eq!(bits(&dx), all.0);
                }
            }
        }
    }
}

#[test]
fn the_reference_gradient_agrees_with_finite_differences() {
    let mut rng = Rng::fresh();
    let [x, w, dy] = [0; 3].map(|_| f64s(&rng.vec(7)));
    let loss =
        |x: &[f64], w: &[f64]| -> f64 { reference(x, w).iter().zip(&dy).map(|(y, g)| y * g).sum() };
    let (dx, dw) = reference_back(&x, &w, &dy);
    for i in 0..7 {
        let moved = |by: f64, v: &[f64]| {
            let mut v = v.to_vec();
            v[i] += by;
            v
        };
        let h = 1e-5;
        let slope = (loss(&moved(h, &x), &w) - loss(&moved(-h, &x), &w)) / (2.0 * h);
        assert!((slope - dx[i].0).abs() < 1e-7);
        let slope = (loss(&x, &moved(h, &w)) - loss(&x, &moved(-h, &w))) / (2.0 * h);
        assert!((slope - dw[i]).abs() < 1e-7);
    }
}
