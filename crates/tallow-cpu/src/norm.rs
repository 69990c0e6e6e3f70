//! RMS norm: `y = x * rsqrt(mean(x²) + eps) * w`, with a residual sum in front, and its gradient.
//! Invariant: a row is read whole before it is written, so `y` may lie where `x` does; the gradient
//! of `w` is summed over blocks of rows that do not depend on the threads.
//! Absent on purpose: LayerNorm, and saved statistics: backward makes them again from `x`.

use std::ops::Range;

use crate::exec::{CHAINS, Exec, RowKernel, chains, spans};
use crate::simd::{Vector, prefetch};

/// Rows whose part of `dw` is summed in one go.
const DW_ROWS: usize = 32;

/// Rows of a strided matrix: row `i` starts at `ptr + i * ld`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<P = *const f32> {
    /// First element.
    pub ptr: P,
    /// Distance between rows, in elements.
    pub ld: usize,
}

impl Rows<*const f32> {
    #[inline(always)]
    pub(crate) fn at(&self, i: usize) -> *const f32 {
        self.ptr.wrapping_add(i * self.ld)
    }
}

impl Rows<*mut f32> {
    /// The same rows, to be read.
    #[inline(always)]
    pub(crate) fn read(self) -> Rows {
        Rows {
            ptr: self.ptr.cast_const(),
            ld: self.ld,
        }
    }

    #[inline(always)]
    pub(crate) fn at(&self, i: usize) -> *mut f32 {
        self.ptr.wrapping_add(i * self.ld)
    }
}

/// Asks memory for rows some way ahead. A machine sees a run of addresses only as far as the end of a page, and rows of a
/// strided matrix are short runs.
#[derive(Clone, Copy)]
pub(crate) struct Ahead(usize);

impl Ahead {
    /// How far ahead, in elements at least.
    const ELEMS: usize = 768;

    /// For rows of `c` elements.
    #[inline(always)]
    pub(crate) fn new(c: usize) -> Self {
        Self(Self::ELEMS.div_ceil(c.max(1)))
    }

    /// Asks for element `l` of a row ahead of row `i`. It need not exist.
    #[inline(always)]
    pub(crate) fn ask(self, rows: Rows, i: usize, l: usize) {
        prefetch(rows.at(i + self.0).wrapping_add(l));
    }
}

/// Arguments of RMS norm. All matrices are `[rows, c]`.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub c: usize,
    /// Added to the mean of squares.
    pub eps: f32,
    /// Input.
    pub x: Rows,
    /// If given, `sum = x + other` is written and normed in place of `x`.
    pub residual: Option<Residual>,
    /// Weight `[c]`.
    pub w: *const f32,
    /// Output.
    pub y: Rows<*mut f32>,
}

/// A residual sum in front of a norm.
#[derive(Clone, Copy, Debug)]
pub struct Residual {
    /// What is added to `x`.
    pub other: Rows,
    /// Where the sum goes, or null. May lie where `x` or `other` does.
    pub sum: Rows<*mut f32>,
}

impl RmsNorm {
    /// Computes `y` (and the sum).
    ///
    /// # Safety
    /// Matrices cover `rows` rows of `c`; outputs overlap no input of another row; the machine has
    /// `exec.isa`.
    pub unsafe fn run(&self, exec: Exec<'_>) {
        // SAFETY: the caller's promise.
        unsafe { exec.over(self.rows, self.c / 8 + 10, self) }
    }
}

// SAFETY: rows are independent.
unsafe impl RowKernel for RmsNorm {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, _worker: usize) {
        let ahead = Ahead::new(self.c);
        for i in rows {
            // SAFETY: row `i` is within the matrices.
            unsafe {
                let mut x = self.x.at(i);
                if let Some(residual) = &self.residual {
                    let other = residual.other.at(i);
                    let sum = if residual.sum.ptr.is_null() {
                        self.y.at(i)
                    } else {
                        residual.sum.at(i)
                    };
                    spans!(V, self.c, l, s => {
                        ahead.ask(residual.other, i, l);
                        s.store(s.load(x.add(l)).add(s.load(other.add(l))), sum.add(l));
                    });
                    x = sum;
                }
                let r = V::splat(inverse_rms::<V>(x, self.c, self.eps));
                let y = self.y.at(i);
                spans!(V, self.c, l, s => {
                    ahead.ask(self.x, i, l);
                    ahead.ask(self.y.read(), i, l);
                    s.store(s.load(x.add(l)).mul(r).mul(s.load(self.w.add(l))), y.add(l));
                });
            }
        }
    }
}

/// `1 / sqrt(mean(x²) + eps)`.
///
/// # Safety
/// The machine has the instructions; `x` has `c` elements.
#[inline(always)]
unsafe fn inverse_rms<V: Vector>(x: *const f32, c: usize, eps: f32) -> f32 {
    // SAFETY: the caller's promise.
    let sum = unsafe { dot::<V>(x, x, c) };
    1.0 / (sum / c as f32 + eps).sqrt()
}

/// `sum a b`, in four vectors side by side.
///
/// # Safety
/// The machine has the instructions; both have `n` elements.
#[inline(always)]
pub(crate) unsafe fn dot<V: Vector>(a: *const f32, b: *const f32, n: usize) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [V::zero(); CHAINS];
        chains!(V, n, l, chain, s => {
            sums[chain] = s.load(a.add(l)).mul_add(s.load(b.add(l)), sums[chain]);
        });
        let [a, b, c, d] = sums;
        a.add(b).add(c.add(d)).sum()
    }
}

/// Arguments of the gradient of RMS norm. All matrices are `[rows, c]`.
#[derive(Clone, Copy, Debug)]
pub struct RmsNormBackward {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub c: usize,
    /// Added to the mean of squares.
    pub eps: f32,
    /// What was normed (the sum, where there was a residual).
    pub x: Rows,
    /// Weight `[c]`.
    pub w: *const f32,
    /// Gradient of `y`.
    pub dy: Rows,
    /// If given, added to `dx`: the gradient that reaches `x` past the norm.
    pub residual: Option<Rows>,
    /// Gradient of `x`. May lie where `dy` or the residual does.
    pub dx: Rows<*mut f32>,
    /// Gradient of `w`, `[c]`, or null.
    pub dw: *mut f32,
    /// Scratch of [`RmsNormBackward::workspace_elems`]; may be null if `dw` is.
    pub workspace: *mut f32,
}

impl RmsNormBackward {
    /// Scratch elements; none without `dw`.
    #[must_use]
    pub fn workspace_elems(rows: usize, c: usize) -> usize {
        rows.div_ceil(DW_ROWS) * c
    }

    /// Computes `dx` (and `dw`).
    ///
    /// # Safety
    /// As for [`RmsNorm::run`].
    pub unsafe fn run(&self, exec: Exec<'_>) {
        let block_ns = DW_ROWS.min(self.rows) * (self.c / 4 + 10);
        // SAFETY: the caller's promise.
        unsafe {
            exec.over(self.rows.div_ceil(DW_ROWS), block_ns, self);
            if !self.dw.is_null() {
                exec.over(
                    self.c,
                    self.rows.div_ceil(DW_ROWS) / 8 + 1,
                    &SumBlocks(self),
                );
            }
        }
    }

    /// # Safety
    /// As for [`RmsNorm::run`]; `dw` is null or the sums of this block, `[c]`.
    #[inline(always)]
    unsafe fn row<V: Vector>(&self, i: usize, dw: *mut f32) {
        let (x, dy, dx, c) = (self.x.at(i), self.dy.at(i), self.dx.at(i), self.c);
        let ahead = Ahead::new(c);
        // SAFETY: row `i` is within the matrices.
        unsafe {
            let r = inverse_rms::<V>(x, c, self.eps);
            let mut sum = V::zero();
            spans!(V, c, l, s => {
                ahead.ask(self.x, i, l);
                ahead.ask(self.dy, i, l);
                let g = s.load(dy.add(l)).mul(s.load(self.w.add(l)));
                sum = g.mul_add(s.load(x.add(l)), sum);
            });
            // d/dx of x r: r g - x r³ mean(g x).
            let back = V::splat(-(r * r * r * (sum.sum() / c as f32)));
            let r = V::splat(r);
            spans!(V, c, l, s => {
                ahead.ask(self.dx.read(), i, l);
                let (x, dy) = (s.load(x.add(l)), s.load(dy.add(l)));
                if !dw.is_null() {
                    s.store(dy.mul(x).mul_add(r, s.load(dw.add(l))), dw.add(l));
                }
                let mut g = dy.mul(s.load(self.w.add(l))).mul_add(r, x.mul(back));
                if let Some(residual) = &self.residual {
                    ahead.ask(*residual, i, l);
                    g = g.add(s.load(residual.at(i).add(l)));
                }
                s.store(g, dx.add(l));
            });
        }
    }
}

// SAFETY: a row of the kernel is a block of rows, with sums of its own.
unsafe impl RowKernel for RmsNormBackward {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, blocks: Range<usize>, _worker: usize) {
        for block in blocks {
            let mut dw = std::ptr::null_mut();
            if !self.dw.is_null() {
                // SAFETY: the workspace has `c` elements a block.
                unsafe {
                    dw = self.workspace.add(block * self.c);
                    dw.write_bytes(0, self.c);
                }
            }
            for i in block * DW_ROWS..((block + 1) * DW_ROWS).min(self.rows) {
                // SAFETY: the caller's promise.
                unsafe { self.row::<V>(i, dw) }
            }
        }
    }
}

/// Adds the blocks' parts of `dw`, in order.
struct SumBlocks<'a>(&'a RmsNormBackward);

// SAFETY: columns are independent.
unsafe impl RowKernel for SumBlocks<'_> {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, cols: Range<usize>, _worker: usize) {
        let a = self.0;
        // SAFETY: the workspace holds `blocks` rows of `c`.
        unsafe {
            spans!(V, cols.len(), l, s => {
                let at = cols.start + l;
                let mut sum = V::zero();
                for block in 0..a.rows.div_ceil(DW_ROWS) {
                    sum = sum.add(s.load(a.workspace.add(block * a.c + at)));
                }
                s.store(sum, a.dw.add(at));
            });
        }
    }
}

#[cfg(test)]
mod tests;
