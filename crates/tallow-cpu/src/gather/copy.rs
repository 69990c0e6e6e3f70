//! Strided copy of any rank up to six, with conversion.
//! Invariant: a copy without conversion moves bits, NaN payloads included.
//! Absent on purpose: transposition by blocks; a copy that reads columns is slow and correct.

use std::ops::Range;

use tallow_core::types::DType;

use super::{Number, with_type};
use crate::exec::{Exec, RowKernel};
use crate::simd::Vector;

/// The most axes of a copy.
pub const MAX_RANK: usize = 6;

/// Arguments of a copy. Axes not used have extent 1. Strides count elements; 0 repeats (input only).
#[derive(Clone, std::marker::Copy, Debug)]
pub struct Copy {
    /// Extents, outermost first.
    pub shape: [usize; MAX_RANK],
    /// First element of the input.
    pub x: *const u8,
    /// Its type.
    pub from: DType,
    /// Its strides.
    pub x_strides: [usize; MAX_RANK],
    /// First element of the output.
    pub y: *mut u8,
    /// Its type.
    pub to: DType,
    /// Its strides.
    pub y_strides: [usize; MAX_RANK],
}

impl Copy {
    /// Copies.
    ///
    /// # Safety
    /// Both views lie in readable, writable memory and do not overlap; no output element has two
    /// places in the view.
    pub unsafe fn run(&self, exec: Exec<'_>) {
        let copy = self.merged();
        let runs: usize = copy.shape[..MAX_RANK - 1].iter().product();
        let run_ns = copy.shape[MAX_RANK - 1] / 4 + 5;
        // SAFETY: the caller's promise.
        unsafe {
            if runs == 1 {
                exec.over(
                    copy.shape[MAX_RANK - 1].div_ceil(PIECE),
                    PIECE / 4,
                    &Pieces(&copy),
                );
            } else {
                exec.over(runs, run_ns, &Runs(&copy));
            }
        }
    }

    /// The same copy with neighbouring axes merged where both sides allow, runs innermost.
    fn merged(&self) -> Copy {
        let mut copy = Copy {
            shape: [1; MAX_RANK],
            x_strides: [0; MAX_RANK],
            y_strides: [0; MAX_RANK],
            ..*self
        };
        // `at` is the axis under construction, from the innermost outwards.
        let mut at = MAX_RANK;
        for i in (0..MAX_RANK).rev() {
            let n = self.shape[i];
            if n == 1 {
                continue;
            }
            let joins = at < MAX_RANK
                && self.x_strides[i] == copy.x_strides[at] * copy.shape[at]
                && self.y_strides[i] == copy.y_strides[at] * copy.shape[at];
            if joins {
                copy.shape[at] *= n;
            } else {
                at -= 1;
                copy.shape[at] = n;
                copy.x_strides[at] = self.x_strides[i];
                copy.y_strides[at] = self.y_strides[i];
            }
        }
        copy
    }

    /// Offsets of run `row`, in elements of either side.
    fn offsets(&self, mut row: usize) -> (usize, usize) {
        let (mut x, mut y) = (0, 0);
        for i in (0..MAX_RANK - 1).rev() {
            let k = row % self.shape[i];
            row /= self.shape[i];
            x += k * self.x_strides[i];
            y += k * self.y_strides[i];
        }
        (x, y)
    }

    /// # Safety
    /// Elements `from..to` of run `row` are part of both views.
    #[inline(always)]
    unsafe fn part(&self, row: usize, part: Range<usize>) {
        const LAST: usize = MAX_RANK - 1;
        let (x, y) = self.offsets(row);
        let (x_step, y_step) = (self.x_strides[LAST], self.y_strides[LAST]);
        // SAFETY: the caller's promise.
        unsafe {
            run_of(
                self.x.add((x + part.start * x_step) * self.from.bytes()),
                self.from,
                x_step,
                self.y.add((y + part.start * y_step) * self.to.bytes()),
                self.to,
                y_step,
                part.len(),
            );
        }
    }
}

/// Elements of a piece of a single run.
const PIECE: usize = 4096;

/// A copy of many runs.
struct Runs<'a>(&'a Copy);

// SAFETY: runs write different elements.
unsafe impl RowKernel for Runs<'_> {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, _worker: usize) {
        for row in rows {
            // SAFETY: the caller's promise.
            unsafe { self.0.part(row, 0..self.0.shape[MAX_RANK - 1]) }
        }
    }
}

/// A copy of one run.
struct Pieces<'a>(&'a Copy);

// SAFETY: pieces write different elements.
unsafe impl RowKernel for Pieces<'_> {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, _worker: usize) {
        let n = self.0.shape[MAX_RANK - 1];
        // SAFETY: the caller's promise.
        unsafe { self.0.part(0, rows.start * PIECE..n.min(rows.end * PIECE)) }
    }
}

/// Copies `n` elements `x_step` apart to places `y_step` apart, converting where the types differ.
///
/// # Safety
/// They are readable, writable and do not overlap.
#[inline(always)]
pub(super) unsafe fn run_of(
    x: *const u8,
    from: DType,
    x_step: usize,
    y: *mut u8,
    to: DType,
    y_step: usize,
    n: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if from == to {
            match from.bytes() {
                _ if x_step == 1 && y_step == 1 => {
                    std::ptr::copy_nonoverlapping(x, y, n * from.bytes());
                }
                1 => move_run::<u8>(x, x_step, y, y_step, n),
                2 => move_run::<u16>(x, x_step, y, y_step, n),
                _ => move_run::<u32>(x, x_step, y, y_step, n),
            }
            return;
        }
        // Through f32 where that is exact or rounds once; 32-bit integers through f64.
        let whole = |t: DType| matches!(t, DType::I32 | DType::U32);
        with_type!(from, A => with_type!(to, B => {
            let (x, y) = (x.cast::<A>(), y.cast::<B>());
            if whole(from) || whole(to) {
                for i in 0..n {
                    let value = x.add(i * x_step).read_unaligned().wide();
                    y.add(i * y_step).write_unaligned(B::narrow(value));
                }
            } else {
                for i in 0..n {
                    let value = Number::to_f32(x.add(i * x_step).read_unaligned());
                    y.add(i * y_step).write_unaligned(<B as Number>::from_f32(value));
                }
            }
        }));
    }
}

/// # Safety
/// As for [`run_of`].
#[inline(always)]
unsafe fn move_run<T>(x: *const u8, x_step: usize, y: *mut u8, y_step: usize, n: usize) {
    let (x, y) = (x.cast::<T>(), y.cast::<T>());
    for i in 0..n {
        // SAFETY: the caller's promise.
        unsafe {
            y.add(i * y_step)
                .write_unaligned(x.add(i * x_step).read_unaligned())
        };
    }
}
