//! Rotary positions: pairs `(i, i + d/2)` of a head turn by `pos * inv_freq[i]`.
//! Invariant: the angle is the f32 product, as in transformers; its sine and cosine are exact to
//! f32 at any position. The gradient is the same rotation the other way.
//! Absent on purpose: interleaved pairs, and how `inv_freq` comes about.

use std::ops::Range;

use crate::attention::Heads;
use crate::exec::{Exec, RowKernel, spans};
use crate::simd::Vector;
use crate::vecmath::{self, WIDE};

/// Which way to turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// As in the model.
    Forward,
    /// Back: the gradient.
    Back,
}

/// Arguments of the rotation.
#[derive(Clone, Copy, Debug)]
pub struct Rope {
    /// Batch rows.
    pub b: usize,
    /// Tokens a batch row.
    pub t: usize,
    /// Heads.
    pub h: usize,
    /// Elements of a head, even.
    pub d: usize,
    /// Input `[b, t, h, d]`.
    pub x: Heads,
    /// Positions `[b, t]`.
    pub pos: *const u32,
    /// Radians a position, `[d / 2]`.
    pub inv_freq: *const f32,
    /// Direction.
    pub turn: Turn,
    /// Output `[b, t, h, d]`. May lie where the input does.
    pub y: Heads<*mut f32>,
    /// Scratch of [`Rope::workspace_elems`].
    pub workspace: *mut f32,
}

impl Rope {
    /// Scratch elements that `threads` workers need.
    #[must_use]
    pub fn workspace_elems(d: usize, threads: usize) -> usize {
        threads * d
    }

    /// Computes `y`.
    ///
    /// # Safety
    /// Views and pointers cover what they are said to; `y` is `x` or does not overlap it; the
    /// machine has `exec.isa`.
    pub unsafe fn run(&self, exec: Exec<'_>) {
        let token_ns = self.d + self.h * (self.d / 8 + 4);
        // SAFETY: the caller's promise.
        unsafe { exec.over(self.b * self.t, token_ns, self) }
    }
}

// SAFETY: tokens are independent; scratch is the worker's own.
unsafe impl RowKernel for Rope {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, worker: usize) {
        let half = self.d / 2;
        for row in rows {
            let (b, i) = (row / self.t, row % self.t);
            // SAFETY: token `(b, i)` is within the views; the scratch holds `d` elements a worker.
            unsafe {
                let cos = self.workspace.add(worker * self.d);
                let sin = cos.add(half);
                self.angles(*self.pos.add(row), cos, sin);
                for h in 0..self.h {
                    let (x, y) = (self.x.at(b, i, h), self.y.at(b, i, h));
                    spans!(V, half, l, s => {
                        let (c, n) = (s.load(cos.add(l)), s.load(sin.add(l)));
                        let (first, second) = (s.load(x.add(l)), s.load(x.add(half + l)));
                        let minus = V::zero().sub(second);
                        s.store(minus.mul_add(n, first.mul(c)), y.add(l));
                        s.store(first.mul_add(n, second.mul(c)), y.add(half + l));
                    });
                }
            }
        }
    }
}

impl Rope {
    /// Cosines and sines of one position.
    ///
    /// # Safety
    /// All three arrays hold `d / 2` elements.
    #[inline(always)]
    unsafe fn angles(&self, pos: u32, cos: *mut f32, sin: *mut f32) {
        let sign = match self.turn {
            Turn::Forward => 1.0,
            Turn::Back => -1.0,
        };
        let half = self.d / 2;
        for first in (0..half).step_by(WIDE) {
            let n = WIDE.min(half - first);
            // SAFETY: elements `first..first + n` are below `d / 2`.
            unsafe {
                let mut angles = [0.0; WIDE];
                for (l, angle) in angles.iter_mut().enumerate().take(n) {
                    *angle = pos as f32 * *self.inv_freq.add(first + l);
                }
                let (s, c) = vecmath::sin_cos(&angles);
                for l in 0..n {
                    *cos.add(first + l) = c[l];
                    *sin.add(first + l) = s[l] * sign;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
