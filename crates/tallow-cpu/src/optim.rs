//! AdamW over flat slices, as PyTorch computes it.
//! Invariant: elements are independent; one pass reads and writes each array once.
//! Absent on purpose: schedules, clipping (a factor of the gradient arrives in the numbers) and
//! parameter groups (a call each).

use std::ops::Range;

use crate::exec::{Exec, RowKernel, spans};
use crate::simd::Vector;

/// Elements a task works on at a time.
const BLOCK: usize = 1024;

/// Arguments of one AdamW step.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Elements of each array.
    pub n: usize,
    /// Parameters, updated.
    pub p: *mut f32,
    /// Gradients.
    pub g: *const f32,
    /// First moments, updated.
    pub m: *mut f32,
    /// Second moments, updated.
    pub v: *mut f32,
    /// The step's numbers, read when run: `[lr, beta1, beta2, eps, weight_decay, 1 - beta1^t,
    /// sqrt(1 - beta2^t), factor of the gradient]`.
    pub numbers: *const [f32; 8],
}

impl AdamW {
    /// Updates `p`, `m`, `v`.
    ///
    /// # Safety
    /// The arrays hold `n` elements and do not overlap; the machine has `exec.isa`.
    pub unsafe fn run(&self, exec: Exec<'_>) {
        // SAFETY: the caller's promise.
        unsafe { exec.over(self.n.div_ceil(BLOCK), BLOCK / 3, self) }
    }
}

// SAFETY: blocks of elements are independent.
unsafe impl RowKernel for AdamW {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, _worker: usize) {
        let (start, end) = (rows.start * BLOCK, (rows.end * BLOCK).min(self.n));
        // SAFETY: elements `start..end` are within the arrays.
        unsafe {
            let [lr, beta1, beta2, eps, decay, bc1, sqrt_bc2, factor] = *self.numbers;
            let keep = V::splat(1.0 - lr * decay);
            let step = V::splat(-(lr / bc1));
            let (rest1, rest2) = (V::splat(1.0 - beta1), V::splat(1.0 - beta2));
            let (beta2, eps) = (V::splat(beta2), V::splat(eps));
            let (sqrt_bc2, factor) = (V::splat(sqrt_bc2), V::splat(factor));
            let (p, g) = (self.p.add(start), self.g.add(start));
            let (m, v) = (self.m.add(start), self.v.add(start));
            spans!(V, end - start, i, s => {
                let grad = s.load(g.add(i)).mul(factor);
                let m0 = s.load(m.add(i));
                let m1 = grad.sub(m0).mul_add(rest1, m0);
                let v1 = s.load(v.add(i)).mul(beta2).add(grad.mul(grad).mul(rest2));
                let denominator = v1.sqrt().div(sqrt_bc2).add(eps);
                let p0 = s.load(p.add(i)).mul(keep);
                s.store(step.mul(m1.div(denominator)).add(p0), p.add(i));
                s.store(m1, m.add(i));
                s.store(v1, v.add(i));
            });
        }
    }
}

#[cfg(test)]
mod tests;
