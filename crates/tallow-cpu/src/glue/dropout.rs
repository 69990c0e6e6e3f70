//! Dropout: `y = x / keep` where a uniform number is below `keep`, else 0. The kernel, and how a spec becomes one.
//! Invariant: the numbers are those of `random` under the same seed and id, made in registers and never stored;
//! an element is read before it is written, so `y` may lie where `x` does.
//! Absent on purpose: strides. The planner makes other operands dense.

use std::ops::Range;

use tallow_core::{
    kernel::{KernelSpec, Operand},
    op,
    types::DType,
};

use super::Offer;
use crate::exec::{Exec, RowKernel};
use crate::philox::{BLOCK, numbers};
use crate::simd::Vector;

/// `dropout_philox_f32` for dense operands.
pub(super) fn offer(op: &op::Dropout, spec: &KernelSpec) -> Option<Offer> {
    let y = spec.outputs[0].as_ref()?;
    let fits = |o: &Operand| o.is_dense() && o.dtype == DType::F32;
    if !fits(&spec.inputs[0]) || !fits(y) || !spec.inputs[1].is_dense() {
        return None;
    }
    let (n, id, keep) = (y.layout.shape.numel(), op.id, op.keep.get());
    Some(Offer::new("dropout_philox_f32", move |io| {
        let job = Dropout {
            n,
            id,
            keep,
            x: io.read(0),
            seed: io.read(1),
            y: io.write(0),
        };
        // SAFETY: the plan's spans hold the `n` elements and the seed; the planner lets `y` lie only
        // exactly where `x` does, or apart from it.
        unsafe { job.run(io.exec) };
    }))
}

/// Arguments of dropout over `n` elements.
struct Dropout {
    n: usize,
    /// Identity of the draw.
    id: u32,
    /// Probability that an element stays.
    keep: f32,
    x: *const f32,
    /// Key, read when run.
    seed: *const [u32; 2],
    y: *mut f32,
}

impl Dropout {
    /// Computes `y`.
    ///
    /// # Safety
    /// `x` and `y` hold `n` elements and are equal or disjoint; the machine has `exec.isa`.
    unsafe fn run(&self, exec: Exec<'_>) {
        // SAFETY: the caller's promise.
        unsafe { exec.over(self.n.div_ceil(BLOCK), BLOCK, self) }
    }
}

// SAFETY: elements are independent.
unsafe impl RowKernel for Dropout {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, _worker: usize) {
        // SAFETY: the caller's promise.
        let seed = unsafe { *self.seed };
        let scale = 1.0 / self.keep;
        for block in rows {
            let drawn = numbers(block, self.id, seed);
            let first = block * BLOCK;
            let n = (self.n - first).min(BLOCK);
            for (i, number) in drawn.iter().enumerate().take(n) {
                // SAFETY: `first + i < self.n`.
                unsafe {
                    let x = *self.x.add(first + i) * scale;
                    *self.y.add(first + i) = if *number < self.keep { x } else { 0.0 };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::Pool;
    use crate::simd::Isa;
    use tallow_core::philox;

    #[test]
    fn elements_stay_where_the_draw_says_so_on_any_number_of_threads() {
        let (seed, id, keep) = ([3, 9], 5, 0.7);
        for n in [1, 63, 64, 65, 1000] {
            let x: Vec<f32> = (0..n).map(|i| i as f32 - 7.5).collect();
            let stays = |i: usize| philox::uniform(seed, id, i) < keep;
            let want = |i: usize| if stays(i) { x[i] * (1.0 / keep) } else { 0.0 };
            let want: Vec<f32> = (0..n).map(want).collect();
            for isa in Isa::available() {
                for threads in 1..=3 {
                    let pool = Pool::new(threads);
                    // In place, and behind it a cell that must stay.
                    let mut y = x.clone();
                    y.push(f32::NAN);
                    let job = Dropout {
                        n,
                        id,
                        keep,
                        x: y.as_ptr(),
                        seed: &raw const seed,
                        y: y.as_mut_ptr(),
                    };
                    // SAFETY: `y` holds `n` elements; `isa` is available.
                    unsafe { job.run(Exec { pool: &pool, isa }) };
                    assert_eq!(y[..n], want, "{n} elements, {isa:?}, {threads} threads");
                    assert!(y[n].is_nan());
                }
            }
        }
    }
}
