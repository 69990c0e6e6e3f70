//! Sums and maxima along an axis, softmax and its gradient, the index of the largest element.
//! Invariant: a long sum is a sum of short sums, so its error grows with neither's length alone.
//! A maximum skips NaN, as [`f32::max`] does.
//! Absent on purpose: other dtypes than f32.

use std::ops::Range;

use crate::exec::{CHAINS, Exec, RowKernel, chains, spans};
use crate::norm::Rows;
use crate::simd::Vector;
use crate::vecmath::exp_nonpos;

/// Elements whose sum is made in one go.
const PIECE: usize = 1024;
/// The same where elements of a sum are rows apart: one chain of additions.
const COLUMN_PIECE: usize = 64;

/// What a reduction computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Sum.
    Sum,
    /// Maximum.
    Max,
}

/// Arguments of a reduction of the middle axis of `[outer, axis, inner]`.
#[derive(Clone, Copy, Debug)]
pub struct Reduce {
    /// What.
    pub reduction: Reduction,
    /// Extents.
    pub shape: [usize; 3],
    /// Input; distances between elements along each axis; the innermost must be 1 unless its
    /// extent is.
    pub x: *const f32,
    /// Strides of the input, in elements.
    pub x_strides: [usize; 2],
    /// Output `[outer, inner]`, dense.
    pub y: *mut f32,
}

impl Reduce {
    /// Computes `y`. The sum of no elements is 0, their maximum minus infinity.
    ///
    /// # Safety
    /// Input and output cover what they are said to and do not overlap; the machine has `exec.isa`.
    pub unsafe fn run(&self, exec: Exec<'_>) {
        let [outer, axis, inner] = self.shape;
        // SAFETY: the caller's promise.
        unsafe {
            if inner == 1 || outer > 1 {
                exec.over(outer, axis * inner / 8 + 5, self);
            } else {
                exec.over(inner, axis / 8 + 1, &Columns(self));
            }
        }
    }

    /// Reduces columns `cols` of slice `o`.
    ///
    /// # Safety
    /// They are within the shape.
    #[inline(always)]
    unsafe fn columns<V: Vector>(&self, o: usize, cols: Range<usize>) {
        let [_, axis, inner] = self.shape;
        let [outer_step, step] = self.x_strides;
        // SAFETY: the caller's promise.
        unsafe {
            let x = self.x.add(o * outer_step + cols.start);
            let y = self.y.add(o * inner + cols.start);
            spans!(V, cols.len(), l, s => {
                let mut result = V::splat(self.start());
                for piece in (0..axis).step_by(COLUMN_PIECE) {
                    let mut part = V::splat(self.start());
                    for i in piece..axis.min(piece + COLUMN_PIECE) {
                        part = self.join(part, s.load(x.add(i * step + l)));
                    }
                    result = self.join(result, part);
                }
                s.store(result, y.add(l));
            });
        }
    }

    fn start(&self) -> f32 {
        match self.reduction {
            Reduction::Sum => 0.0,
            Reduction::Max => f32::NEG_INFINITY,
        }
    }

    /// `b` joins the result so far.
    ///
    /// # Safety
    /// The machine has the instructions.
    #[inline(always)]
    unsafe fn join<V: Vector>(&self, a: V, b: V) -> V {
        // SAFETY: the caller's promise.
        unsafe {
            match self.reduction {
                Reduction::Sum => a.add(b),
                // `b` may be NaN, `a` is not.
                Reduction::Max => b.max(a),
            }
        }
    }
}

// SAFETY: outer slices are independent.
unsafe impl RowKernel for Reduce {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, _worker: usize) {
        let [_, axis, inner] = self.shape;
        for o in rows {
            // SAFETY: the caller's promise.
            unsafe {
                if inner > 1 {
                    self.columns::<V>(o, 0..inner);
                    continue;
                }
                let x = self.x.add(o * self.x_strides[0]);
                let y = self.y.add(o);
                *y = match (self.reduction, self.x_strides[1]) {
                    (Reduction::Sum, 1) => sum::<V>(x, axis),
                    (Reduction::Max, 1) => largest::<V>(x, axis),
                    (Reduction::Sum, step) => {
                        (0..axis).map(|i| f64::from(*x.add(i * step))).sum::<f64>() as f32
                    }
                    (Reduction::Max, step) => {
                        let terms = (0..axis).map(|i| *x.add(i * step));
                        terms.fold(f32::NEG_INFINITY, f32::max)
                    }
                };
            }
        }
    }
}

/// The one slice of a reduction, by columns.
struct Columns<'a>(&'a Reduce);

// SAFETY: columns are independent.
unsafe impl RowKernel for Columns<'_> {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, cols: Range<usize>, _worker: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.0.columns::<V>(0, cols) }
    }
}

/// Sum of `n` dense elements: vectors over pieces, pieces in f64.
///
/// # Safety
/// The machine has the instructions; they are readable.
#[inline(always)]
pub(crate) unsafe fn sum<V: Vector>(x: *const f32, n: usize) -> f32 {
    let mut total = 0.0;
    for piece in (0..n).step_by(PIECE) {
        // SAFETY: the caller's promise.
        unsafe {
            let x = x.add(piece);
            let mut sums = Sums::<V>::new();
            chains!(V, PIECE.min(n - piece), l, chain, s => {
                sums.0[chain] = sums.0[chain].add(s.load(x.add(l)));
            });
            total += sums.total();
        }
    }
    total as f32
}

/// Sums side by side, so that none waits for the one before.
struct Sums<V>([V; CHAINS]);

impl<V: Vector> Sums<V> {
    /// # Safety
    /// The machine has the instructions.
    #[inline(always)]
    unsafe fn new() -> Self {
        // SAFETY: the caller's promise.
        Self([unsafe { V::zero() }; CHAINS])
    }

    /// # Safety
    /// As for [`Sums::new`].
    #[inline(always)]
    unsafe fn total(self) -> f64 {
        let [a, b, c, d] = self.0;
        // SAFETY: the caller's promise.
        f64::from(unsafe { a.add(b).add(c.add(d)).sum() })
    }
}

/// The largest of `n` dense elements.
///
/// # Safety
/// The machine has the instructions; they are readable.
#[inline(always)]
unsafe fn largest<V: Vector>(x: *const f32, n: usize) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let whole = n - n % V::LANES;
        let mut most = [V::splat(f32::NEG_INFINITY); CHAINS];
        chains!(V, whole, l, chain, s => {
            most[chain] = s.load(x.add(l)).max(most[chain]);
        });
        let [a, b, c, d] = most;
        let most = a.max(b).max(c.max(d));
        (whole..n)
            .map(|i| *x.add(i))
            .fold(most.max_lane(), f32::max)
    }
}

/// Arguments of softmax over the rows of `[rows, c]`.
#[derive(Clone, Copy, Debug)]
pub struct Softmax {
    /// Rows.
    pub rows: usize,
    /// Columns, at least 1.
    pub c: usize,
    /// Input.
    pub x: Rows,
    /// Output. May lie where the input does.
    pub y: Rows<*mut f32>,
}

impl Softmax {
    /// Computes `y`.
    ///
    /// # Safety
    /// Matrices cover `rows` rows of `c`; `y` overlaps no other row of `x`; the machine has
    /// `exec.isa`.
    pub unsafe fn run(&self, exec: Exec<'_>) {
        // SAFETY: the caller's promise.
        unsafe { exec.over(self.rows, self.c / 3 + 10, self) }
    }
}

// SAFETY: rows are independent.
unsafe impl RowKernel for Softmax {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, _worker: usize) {
        for i in rows {
            let (x, y) = (self.x.at(i), self.y.at(i));
            // SAFETY: row `i` is within the matrices.
            unsafe {
                let max = V::splat(largest::<V>(x, self.c));
                let inverse = V::splat(1.0 / exponentials::<V>(x, max, y, self.c));
                spans!(V, self.c, l, s => { s.store(s.load(y.add(l)).mul(inverse), y.add(l)) });
            }
        }
    }
}

/// `y = e^(x - max)`. Returns the sum of `y`, made as [`sum`] makes it.
///
/// # Safety
/// The machine has the instructions; both hold `n` elements and are the same or do not overlap.
#[inline(always)]
unsafe fn exponentials<V: Vector>(x: *const f32, max: V, y: *mut f32, n: usize) -> f32 {
    let mut total = 0.0;
    for piece in (0..n).step_by(PIECE) {
        // SAFETY: the caller's promise.
        unsafe {
            let (x, y) = (x.add(piece), y.add(piece));
            let mut sums = Sums::<V>::new();
            chains!(V, PIECE.min(n - piece), l, chain, s => {
                let e = exp_nonpos(s.load(x.add(l)).sub(max));
                s.store(e, y.add(l));
                // Lanes that are not there count for nothing.
                let e = if s.is_whole() { e } else { s.load(y.add(l)) };
                sums.0[chain] = sums.0[chain].add(e);
            });
            total += sums.total();
        }
    }
    total as f32
}

/// Arguments of the gradient of softmax: `dx = y (dy - sum(y dy))`.
#[derive(Clone, Copy, Debug)]
pub struct SoftmaxBackward {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub c: usize,
    /// Softmax's output.
    pub y: Rows,
    /// Gradient of it.
    pub dy: Rows,
    /// Gradient of the input. May lie where `y` or `dy` does.
    pub dx: Rows<*mut f32>,
}

impl SoftmaxBackward {
    /// Computes `dx`.
    ///
    /// # Safety
    /// As for [`Softmax::run`].
    pub unsafe fn run(&self, exec: Exec<'_>) {
        // SAFETY: the caller's promise.
        unsafe { exec.over(self.rows, self.c / 6 + 10, self) }
    }
}

// SAFETY: rows are independent.
unsafe impl RowKernel for SoftmaxBackward {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, _worker: usize) {
        for i in rows {
            let (y, dy, dx) = (self.y.at(i), self.dy.at(i), self.dx.at(i));
            // SAFETY: row `i` is within the matrices.
            unsafe {
                let dot = V::splat(crate::norm::dot::<V>(y, dy, self.c));
                spans!(V, self.c, l, s => {
                    let d = s.load(dy.add(l)).sub(dot);
                    s.store(s.load(y.add(l)).mul(d), dx.add(l));
                });
            }
        }
    }
}

/// Arguments of the index of the largest element of each row of `[rows, c]`.
#[derive(Clone, Copy, Debug)]
pub struct ArgMax {
    /// Rows.
    pub rows: usize,
    /// Columns, at least 1.
    pub c: usize,
    /// Input.
    pub x: Rows,
    /// Output `[rows]`.
    pub y: *mut u32,
}

impl ArgMax {
    /// Computes `y`: the lowest index of the largest element, 0 if all are NaN.
    ///
    /// # Safety
    /// Input and output cover what they are said to; the machine has `exec.isa`.
    pub unsafe fn run(&self, exec: Exec<'_>) {
        // SAFETY: the caller's promise.
        unsafe { exec.over(self.rows, self.c / 6 + 10, self) }
    }
}

// SAFETY: rows are independent.
unsafe impl RowKernel for ArgMax {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, _worker: usize) {
        for i in rows {
            let x = self.x.at(i);
            // SAFETY: row `i` is within the input.
            unsafe {
                let max = largest::<V>(x, self.c);
                let first = (0..self.c).find(|l| *x.add(*l) == max);
                *self.y.add(i) = first.unwrap_or(0) as u32;
            }
        }
    }
}

#[cfg(test)]
mod tests;
