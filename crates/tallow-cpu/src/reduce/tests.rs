//! Tests of reductions and softmax against f64.
//! Invariant: every instruction set, 1 to 3 threads, strided inputs, poisoned outputs.
//! Absent on purpose: speed.

use super::*;
use crate::pool::Pool;
use crate::simd::Isa;
use crate::testing::{Rng, close};

const SIZES: [usize; 10] = [1, 2, 3, 5, 7, 13, 31, 32, 33, 127];

/// Runs `f` with every instruction set and thread count; it returns bits, which must agree.
fn everywhere(mut f: impl FnMut(Exec<'_>) -> Vec<u32>) {
    for isa in Isa::available() {
        let mut first = None;
        for threads in 1..=3 {
            let pool = Pool::new(threads);
            let bits = f(Exec { isa, pool: &pool });
            assert_eq!(*first.get_or_insert(bits.clone()), bits, "{}", isa.name());
        }
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn sums_and_maxima_of_any_axis() {
    let mut rng = Rng::fresh();
    let shapes = SIZES
        .iter()
        .flat_map(|n| [[3, *n, 1], [1, *n, 7], [2, 5, *n], [*n, 3, 2]])
        .chain([[2, 5000, 1], [1, 3000, 33], [40, 700, 1], [1, 70, 900]]);
    for shape in shapes {
        let [outer, axis, inner] = shape;
        // Gaps between rows; where the innermost extent is 1, also between elements.
        for x_strides in [
            [axis * inner + 3, inner],
            [axis * (inner + 2) + 1, inner + 2],
        ] {
            let x = rng.vec(outer * x_strides[0]);
            for reduction in [Reduction::Sum, Reduction::Max] {
                everywhere(|exec| {
                    let mut y = vec![f32::NAN; outer * inner];
                    let args = Reduce {
                        reduction,
                        shape,
                        x: x.as_ptr(),
                        x_strides,
                        y: y.as_mut_ptr(),
                    };
                    // SAFETY: both buffers are as long as the shape says.
                    unsafe { args.run(exec) };
                    for (k, y) in y.iter().enumerate() {
                        let at = k / inner * x_strides[0] + k % inner;
                        let terms: Vec<f64> = (0..axis)
                            .map(|i| f64::from(x[at + i * x_strides[1]]))
                            .collect();
                        match reduction {
                            Reduction::Sum => close(*y, &terms).unwrap(),
                            Reduction::Max => {
                                assert_eq!(
                                    f64::from(*y),
                                    terms.into_iter().fold(f64::MIN, f64::max)
                                );
                            }
                        }
                    }
                    bits(&y)
                });
            }
        }
    }
}

#[test]
fn a_long_sum_of_equal_terms_is_exact_to_an_ulp() {
    // One chain of additions in f32 would stop growing at 2^24 tenths.
    let x = vec![0.1f32; 3 << 20];
    everywhere(|exec| {
        let mut y = [f32::NAN];
        let args = Reduce {
            reduction: Reduction::Sum,
            shape: [1, x.len(), 1],
            x: x.as_ptr(),
            x_strides: [0, 1],
            y: y.as_mut_ptr(),
        };
        // SAFETY: the input has that many elements.
        unsafe { args.run(exec) };
        let want = f64::from(0.1f32) * x.len() as f64;
        assert!(
            (f64::from(y[0]) / want - 1.0).abs() < 1e-5,
            "{} {want}",
            y[0]
        );
        bits(&y)
    });
}

#[test]
fn softmax_and_its_gradient() {
    let mut rng = Rng::fresh();
    for c in SIZES.into_iter().chain([1500]) {
        let (rows, ld) = (9, c + 3);
        let x: Vec<f32> = rng.vec(rows * ld).iter().map(|x| x * 20.0).collect();
        let dy = rng.vec(rows * ld);
        everywhere(|exec| {
            let (mut y, mut dx) = (vec![f32::NAN; rows * ld], vec![f32::NAN; rows * ld]);
            let view = |x: &[f32]| Rows {
                ptr: x.as_ptr(),
                ld,
            };
            let forward = Softmax {
                rows,
                c,
                x: view(&x),
                y: Rows {
                    ptr: y.as_mut_ptr(),
                    ld,
                },
            };
            // SAFETY: all buffers hold `rows` rows.
            unsafe { forward.run(exec) };
            let backward = SoftmaxBackward {
                rows,
                c,
                y: view(&y),
                dy: view(&dy),
                dx: Rows {
                    ptr: dx.as_mut_ptr(),
                    ld,
                },
            };
            // SAFETY: as above.
            unsafe { backward.run(exec) };
            for i in 0..rows {
                let row = i * ld..i * ld + c;
                let logits: Vec<f64> = x[row.clone()].iter().map(|x| f64::from(*x)).collect();
                let max = logits.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
                let p: Vec<f64> = logits.iter().map(|x| (x - max).exp() / sum).collect();
                let dy: Vec<f64> = dy[row.clone()].iter().map(|x| f64::from(*x)).collect();
                let dot: f64 = p.iter().zip(&dy).map(|(p, d)| p * d).sum();
                let size: f64 = p.iter().zip(&dy).map(|(p, d)| p * d.abs()).sum();
                for l in 0..c {
                    let (got, back) = (f64::from(y[row.start + l]), f64::from(dx[row.start + l]));
                    // The difference of logits up to 40 is off by eps times that.
                    let eps = f64::from(f32::EPSILON) * 48.0;
                    assert!((got - p[l]).abs() <= eps * p[l] + 1e-37, "{got} {}", p[l]);
                    let bound = 2.0 * eps * p[l] * (dy[l].abs() + size) + 1e-37;
                    assert!((back - p[l] * (dy[l] - dot)).abs() <= bound);
                }
                assert!(y[row.end..row.end + 3].iter().all(|y| y.is_nan()));
                assert!(dx[row.end..row.end + 3].iter().all(|y| y.is_nan()));
            }
            bits(&y).into_iter().chain(bits(&dx)).collect()
        });
    }
}

#[test]
fn the_lowest_index_of_the_largest_wins() {
    let mut rng = Rng::fresh();
    for c in SIZES {
        let rows = 5;
        // Few different values: ties everywhere.
        let x: Vec<f32> = (0..rows * c).map(|_| (rng.next_u64() % 4) as f32).collect();
        everywhere(|exec| {
            let mut y = vec![u32::MAX; rows];
            let args = ArgMax {
                rows,
                c,
                x: Rows {
                    ptr: x.as_ptr(),
                    ld: c,
                },
                y: y.as_mut_ptr(),
            };
            // SAFETY: both buffers hold `rows` rows.
            unsafe { args.run(exec) };
            for (i, y) in y.iter().enumerate() {
                let row = &x[i * c..(i + 1) * c];
                let max = row.iter().copied().fold(f32::MIN, f32::max);
                assert_eq!(row.iter().position(|x| *x == max), Some(*y as usize));
            }
            y
        });
    }
}
