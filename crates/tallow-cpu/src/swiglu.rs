//! `y = silu(g) * u`, `silu(g) = g / (1 + e^-g)`, and its gradient.
//! Invariant: an element is read before it is written, so outputs may lie where inputs do.
//! Absent on purpose: other gates.

use std::ops::Range;

use crate::exec::{Exec, RowKernel, spans};
use crate::norm::{Ahead, Rows};
use crate::simd::Vector;
use crate::vecmath::sigmoid;

/// Arguments of SwiGLU. All matrices are `[rows, c]`.
#[derive(Clone, Copy, Debug)]
pub struct SwiGlu {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub c: usize,
    /// Gate.
    pub g: Rows,
    /// What is gated.
    pub u: Rows,
    /// Output.
    pub y: Rows<*mut f32>,
}

impl SwiGlu {
    /// Computes `y`.
    ///
    /// # Safety
    /// Matrices cover `rows` rows of `c`; `y` overlaps no other element of an input; the machine
    /// has `exec.isa`.
    pub unsafe fn run(&self, exec: Exec<'_>) {
        // SAFETY: the caller's promise.
        unsafe { exec.over(self.rows, self.c / 3 + 5, self) }
    }
}

// SAFETY: rows are independent.
unsafe impl RowKernel for SwiGlu {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, _worker: usize) {
        for i in rows {
            let (g, u, y) = (self.g.at(i), self.u.at(i), self.y.at(i));
            let ahead = Ahead::new(self.c);
            // SAFETY: row `i` is within the matrices.
            unsafe {
                spans!(V, self.c, l, s => {
                    ahead.ask(self.g, i, l);
                    ahead.ask(self.u, i, l);
                    ahead.ask(self.y.read(), i, l);
                    let g = s.load(g.add(l));
                    s.store(g.mul(sigmoid(g)).mul(s.load(u.add(l))), y.add(l));
                });
            }
        }
    }
}

/// Arguments of the gradient of SwiGLU. All matrices are `[rows, c]`.
#[derive(Clone, Copy, Debug)]
pub struct SwiGluBackward {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub c: usize,
    /// Gate.
    pub g: Rows,
    /// What was gated.
    pub u: Rows,
    /// Gradient of the output.
    pub dy: Rows,
    /// Gradient of the gate. May lie where an input does.
    pub dg: Rows<*mut f32>,
    /// Gradient of what was gated. May lie where an input does.
    pub du: Rows<*mut f32>,
}

impl SwiGluBackward {
    /// Computes `dg` and `du`.
    ///
    /// # Safety
    /// As for [`SwiGlu::run`]; `dg` and `du` do not overlap.
    pub unsafe fn run(&self, exec: Exec<'_>) {
        // SAFETY: the caller's promise.
        unsafe { exec.over(self.rows, self.c / 2 + 5, self) }
    }
}

// SAFETY: rows are independent.
unsafe impl RowKernel for SwiGluBackward {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, _worker: usize) {
        for i in rows {
            let (g, u, dy) = (self.g.at(i), self.u.at(i), self.dy.at(i));
            let (dg, du) = (self.dg.at(i), self.du.at(i));
            let (ahead, all) = (
                Ahead::new(self.c),
                [self.g, self.u, self.dy, self.dg.read(), self.du.read()],
            );
            // SAFETY: row `i` is within the matrices.
            unsafe {
                spans!(V, self.c, l, s => {
                    for rows in all {
                        ahead.ask(rows, i, l);
                    }
                    let (g, u) = (s.load(g.add(l)), s.load(u.add(l)));
                    let dy = s.load(dy.add(l));
                    let sig = sigmoid(g);
                    // silu' = sig (1 + g (1 - sig))
                    let rest = V::splat(1.0).sub(sig);
                    let slope = sig.mul(g.mul_add(rest, V::splat(1.0)));
                    s.store(dy.mul(u).mul(slope), dg.add(l));
                    s.store(dy.mul(g.mul(sig)), du.add(l));
                });
            }
        }
    }
}

#[cfg(test)]
mod tests;
