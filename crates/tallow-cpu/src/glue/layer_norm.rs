//! Layer norm: `y = (x - mean) * rsqrt(var + eps) * w + b`. The kernel, and how a spec becomes one.
//! Invariant: the variance is that of centred values, so a large mean costs no digits; a row is read
//! before it is written, so `y` may lie where `x` does.
//! Absent on purpose: a gradient kernel. The gradient runs as the decomposition's.

use std::ops::Range;

use tallow_core::{kernel::KernelSpec, op};

use super::{Offer, rows};
use crate::exec::{CHAINS, Exec, RowKernel, chains, spans};
use crate::norm::Rows;
use crate::reduce::sum;
use crate::simd::Vector;

/// `layer_norm_rows_f32` for dense rows at even distances.
pub(super) fn offer(op: &op::LayerNorm, spec: &KernelSpec) -> Option<Offer> {
    let (s, eps) = (rows::strides(spec)?, op.eps.get());
    Some(Offer::new("layer_norm_rows_f32", move |io| {
        let job = LayerNorm {
            rows: s.rows,
            c: s.c,
            eps,
            x: rows::read(io, 0, s.ins[0]),
            w: io.read(1),
            b: io.read(2),
            y: rows::write(io, 0, s.outs[0]),
        };
        // SAFETY: the plan's spans hold these rows, and `y` overlaps nothing that is read.
        unsafe { job.run(io.exec) };
    }))
}

/// Arguments of layer norm. Matrices are `[rows, c]`.
struct LayerNorm {
    rows: usize,
    c: usize,
    /// Added to the variance.
    eps: f32,
    x: Rows,
    /// Weight `[c]`.
    w: *const f32,
    /// Bias `[c]`.
    b: *const f32,
    y: Rows<*mut f32>,
}

impl LayerNorm {
    /// Computes `y`.
    ///
    /// # Safety
    /// Matrices cover `rows` rows of `c`; `y` overlaps no input of another row; the machine has
    /// `exec.isa`.
    unsafe fn run(&self, exec: Exec<'_>) {
        // SAFETY: the caller's promise.
        unsafe { exec.over(self.rows, self.c / 6 + 15, self) }
    }
}

// SAFETY: rows are independent.
unsafe impl RowKernel for LayerNorm {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, _worker: usize) {
        for i in rows {
            let (x, y, c) = (self.x.at(i), self.y.at(i), self.c);
            // SAFETY: row `i` is within the matrices.
            unsafe {
                let mean = sum::<V>(x, c) / c as f32;
                let var = squares::<V>(x, mean, c) / c as f32;
                let mean = V::splat(mean);
                let r = V::splat(1.0 / (var + self.eps).sqrt());
                spans!(V, c, l, s => {
                    let normed = s.load(x.add(l)).sub(mean).mul(r);
                    let scaled = normed.mul_add(s.load(self.w.add(l)), s.load(self.b.add(l)));
                    s.store(scaled, y.add(l));
                });
            }
        }
    }
}

/// `sum (x - mean)²`.
///
/// # Safety
/// The machine has the instructions; `x` has `n` elements.
#[inline(always)]
unsafe fn squares<V: Vector>(x: *const f32, mean: f32, n: usize) -> f32 {
    let whole = n - n % V::LANES;
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [V::zero(); CHAINS];
        chains!(V, whole, l, chain, s => {
            let d = s.load(x.add(l)).sub(V::splat(mean));
            sums[chain] = d.mul_add(d, sums[chain]);
        });
        let [a, b, c, d] = sums;
        let mut sum = a.add(b).add(c.add(d)).sum();
        for l in whole..n {
            sum += (*x.add(l) - mean) * (*x.add(l) - mean);
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::Pool;
    use crate::simd::Isa;
    use crate::testing::Rng;

    const EPS: f32 = 1e-5;

    /// One row in f64: each result with the magnitude of what is summed in it.
    fn reference(x: &[f32], w: &[f32], b: &[f32]) -> Vec<(f64, f64)> {
        let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let size = x.iter().map(|x| x.abs()).sum::<f64>() / n;
        let var = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        let r = 1.0 / (var + f64::from(EPS)).sqrt();
        let one = |((x, w), b): ((&f64, &f32), &f32)| {
            let (w, b) = (f64::from(*w), f64::from(*b));
            (
                (x - mean) * r * w + b,
                (x.abs() + size) * r * w.abs() + b.abs(),
            )
        };
        x.iter().zip(w).zip(b).map(one).collect()
    }

    /// Rows with gaps, of numbers around `level`, on every instruction set with 1 to 3 threads.
    fn check(n: usize, c: usize, level: f32) {
        let (mut rng, ld) = (Rng::fresh(), c + 3);
        let x: Vec<f32> = rng.vec(n * ld).iter().map(|x| x + level).collect();
        let (w, b) = (rng.vec(c), rng.vec(c));
        for isa in Isa::available() {
            let mut first = None;
            for threads in 1..=3 {
                let pool = Pool::new(threads);
                let mut y = vec![f32::NAN; n * ld];
                let ptr = y.as_mut_ptr();
                let job = LayerNorm {
                    rows: n,
                    c,
                    eps: EPS,
                    x: Rows {
                        ptr: x.as_ptr(),
                        ld,
                    },
                    w: w.as_ptr(),
                    b: b.as_ptr(),
                    y: Rows { ptr, ld },
                };
                // SAFETY: both matrices hold `n` rows `ld` apart.
                unsafe { job.run(Exec { isa, pool: &pool }) };
                for (x, y) in x.chunks(ld).zip(y.chunks(ld)) {
                    for (y, (want, size)) in y.iter().zip(reference(&x[..c], &w, &b)) {
                        let off = (f64::from(*y) - want).abs();
                        let bound = 8.0 * f64::from(f32::EPSILON) * size;
                        assert!(off <= bound, "{n}x{c} {}: {off:e} {bound:e}", isa.name());
                    }
                    assert!(y[c..].iter().all(|gap| gap.is_nan()));
                }
                let bits: Vec<u32> = y.iter().map(|y| y.to_bits()).collect();
                assert_eq!(*first.get_or_insert(bits.clone()), bits);
            }
        }
    }

    #[test]
    fn rows_of_every_length_match_f64() {
        for (n, c) in [
            (1, 1),
            (2, 2),
            (3, 5),
            (7, 16),
            (13, 31),
            (127, 32),
            (33, 127),
            (70, 300),
        ] {
            check(n, c, 0.0);
        }
        check(3, 2049, 0.0);
    }

    #[test]
    fn a_large_mean_costs_only_its_own_rounding() {
        check(5, 67, 1000.0);
    }
}
