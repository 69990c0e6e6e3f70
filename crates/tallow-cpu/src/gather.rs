//! Moving data: rows of a table by id and back, strided copies and conversions, fills, counting.
//! Invariant: every conversion rounds to nearest even; sums go in the order of ids' places.
//! Absent on purpose: arithmetic, but for the sum of scattered rows.

use std::ops::Range;

use tallow_core::types::DType;

use crate::exec::{Exec, RowKernel, spans};
use crate::norm::Rows;
use crate::simd::Vector;

mod copy;

pub use copy::{Copy, MAX_RANK};

/// Calls a macro's arm with the Rust type of a dtype.
macro_rules! with_type {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $T = f32;
                $body
            }
            DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            DType::F16 => {
                type $T = half::f16;
                $body
            }
            DType::I32 => {
                type $T = i32;
                $body
            }
            DType::U32 => {
                type $T = u32;
                $body
            }
            DType::U8 => {
                type $T = u8;
                $body
            }
        }
    };
}
pub(crate) use with_type;

/// A stored number. All conversions are exact or round to nearest even; integers saturate and
/// drop fractions.
pub(crate) trait Number: Clone + std::marker::Copy {
    /// Exact in f64, whatever the type.
    fn wide(self) -> f64;
    /// From f64.
    fn narrow(x: f64) -> Self;
    /// As f32: rounds large integers.
    fn to_f32(self) -> f32;
    /// From f32.
    fn from_f32(x: f32) -> Self;
}

macro_rules! plain_numbers {
    ($($T:ty)*) => {$(
        impl Number for $T {
            #[inline(always)]
            fn wide(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn narrow(x: f64) -> Self {
                x as $T
            }
            #[inline(always)]
            fn to_f32(self) -> f32 {
                self as f32
            }
            #[inline(always)]
            fn from_f32(x: f32) -> Self {
                x as $T
            }
        }
    )*};
}
plain_numbers!(f32 i32 u32 u8);

/// The nearest f32 whose last bit is set, unless `x` is an f32: rounding that again to fewer bits
/// gives what rounding `x` would have given.
fn round_to_odd(x: f64) -> f32 {
    let near = x as f32;
    if f64::from(near) == x || !near.is_finite() {
        return near;
    }
    let away = f64::from(near).abs() > x.abs();
    f32::from_bits((near.to_bits() - u32::from(away)) | 1)
}

macro_rules! half_numbers {
    ($($T:ty)*) => {$(
        impl Number for $T {
            #[inline(always)]
            fn wide(self) -> f64 {
                self.to_f64()
            }
            #[inline(always)]
            fn narrow(x: f64) -> Self {
                <$T>::from_f32(round_to_odd(x))
            }
            #[inline(always)]
            fn to_f32(self) -> f32 {
                <$T>::to_f32(self)
            }
            #[inline(always)]
            fn from_f32(x: f32) -> Self {
                <$T>::from_f32(x)
            }
        }
    )*};
}
half_numbers!(half::bf16 half::f16);

/// Arguments of a gather: row `i` of `y` is row `ids[i]` of the table, zero for an id at or past `v`.
#[derive(Clone, std::marker::Copy, Debug)]
pub struct Gather {
    /// Ids.
    pub n: usize,
    /// Rows of the table.
    pub v: usize,
    /// Columns.
    pub c: usize,
    /// First element of the table.
    pub table: *const u8,
    /// Its element type.
    pub from: DType,
    /// Distance between its rows, in elements.
    pub table_ld: usize,
    /// `[n]`
    pub ids: *const u32,
    /// First element of the output `[n, c]`.
    pub y: *mut u8,
    /// Its element type.
    pub to: DType,
    /// Distance between its rows, in elements.
    pub y_ld: usize,
}

impl Gather {
    /// Computes `y`.
    ///
    /// # Safety
    /// Table, ids and output cover what they are said to and do not overlap; the machine has
    /// `exec.isa`.
    pub unsafe fn run(&self, exec: Exec<'_>) {
        // SAFETY: the caller's promise.
        unsafe { exec.over(self.n, self.c / 8 + 20, self) }
    }
}

// SAFETY: rows of the output are independent.
unsafe impl RowKernel for Gather {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, _worker: usize) {
        for i in rows {
            // SAFETY: `i < n`; the id is checked against the table.
            unsafe {
                let id = *self.ids.add(i) as usize;
                let to = self.y.add(i * self.y_ld * self.to.bytes());
                if id >= self.v {
                    to.write_bytes(0, self.c * self.to.bytes());
                    continue;
                }
                let from = self.table.add(id * self.table_ld * self.from.bytes());
                copy::run_of(from, self.from, 1, to, self.to, 1, self.c);
            }
        }
    }
}

/// Arguments of the gradient of a gather: row `ids[i]` of `y` is the sum of those rows of `x`.
#[derive(Clone, std::marker::Copy, Debug)]
pub struct ScatterAdd {
    /// Rows of `x`.
    pub n: usize,
    /// Rows of `y`.
    pub v: usize,
    /// Columns.
    pub c: usize,
    /// `[n]`; an id at or past `v` is left out.
    pub ids: *const u32,
    /// `[n, c]`
    pub x: Rows,
    /// `[v, c]`, all of it written.
    pub y: Rows<*mut f32>,
}

impl ScatterAdd {
    /// Computes `y`.
    ///
    /// # Safety
    /// As for [`Gather::run`].
    pub unsafe fn run(&self, exec: Exec<'_>) {
        let col_ns = (self.n + self.v) / 8 + 1;
        // SAFETY: the caller's promise.
        unsafe { exec.over(self.c, col_ns, self) }
    }
}

// SAFETY: columns are independent, and each adds in the order of `i`.
unsafe impl RowKernel for ScatterAdd {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, cols: Range<usize>, _worker: usize) {
        // SAFETY: columns `cols` of rows below `v` and `n`.
        unsafe {
            for row in 0..self.v {
                self.y.at(row).add(cols.start).write_bytes(0, cols.len());
            }
            for i in 0..self.n {
                let id = *self.ids.add(i) as usize;
                if id < self.v {
                    let from = self.x.at(i).add(cols.start);
                    let to = self.y.at(id).add(cols.start);
                    spans!(V, cols.len(), l, s => {
                        s.store(s.load(to.add(l)).add(s.load(from.add(l))), to.add(l));
                    });
                }
            }
        }
    }
}

/// Writes the number `value` to `n` elements of type `dtype` from `y` on.
///
/// # Safety
/// They are writable.
pub unsafe fn fill(y: *mut u8, dtype: DType, n: usize, value: f32) {
    with_type!(dtype, T => {
        let value = <T as Number>::from_f32(value);
        for i in 0..n {
            // SAFETY: the caller's promise.
            unsafe { y.cast::<T>().add(i).write_unaligned(value) };
        }
    });
}

/// Writes the index along an axis, as f32, to the dense view `[outer, axis, inner]` at `y`.
///
/// # Safety
/// It is writable.
pub unsafe fn iota(y: *mut f32, [outer, axis, inner]: [usize; 3]) {
    for row in 0..outer * axis {
        for i in 0..inner {
            // SAFETY: the caller's promise.
            unsafe { *y.add(row * inner + i) = (row % axis) as f32 };
        }
    }
}

#[cfg(test)]
mod tests;
