//! The tile product and the product of one row where a processor multiplies pairs of bf16 (`vdpbf16ps`).
//! Invariant: as for the tile: an output element is one chain, here of pairs in the order of `k`, then
//! of the tail's f32 terms, then one addition of the old value. One row and many give the same bits.
//! Absent on purpose: a substitute for other processors. They widen bf16 panels to f32 instead.
//!
//! `x` is rounded to bf16 (to nearest, ties to even; below the normal numbers to zero) by [`narrow`].
//! The instruction adds both products of a pair to an f32 sum, and flushes what is below the normal
//! numbers to zero. 12 rows by 32 columns reach its peak: 24 sums hide its latency of six cycles.

use half::bf16;

use super::{Element, Head, NR, Rows, Tail};
use crate::simd::{Isa, Vector};

/// An element of a panel `[k / 2][32][2]`: terms `2 l` and `2 l + 1` of a column are neighbours. An odd
/// last term is beside a zero. Always packed and padded.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(transparent)]
pub struct Pairs(pub bf16);

// SAFETY: nothing is read.
unsafe impl Element for Pairs {
    const PAIRED: bool = true;
    const DOTS: bool = true;

    fn index(l: usize, j: usize) -> usize {
        (l / 2 * NR + j) * 2 + l % 2
    }
    fn rows(k: usize) -> usize {
        k.next_multiple_of(2)
    }
    unsafe fn pair<V: Vector>(_: *const Self, _: usize) -> (V, V) {
        unreachable!("bug in tallow: pairs of bf16 are not widened")
    }
    unsafe fn load<V: Vector, const MASK: bool>(_: *const Self, _: usize, _: V::Mask) -> V {
        unreachable!("bug in tallow: pairs of bf16 are not widened")
    }
}

/// One tile product: `y[i, j] (+)= sum_l x[i, l] * panel[l, j]`, then the tail.
#[derive(Clone, Copy, Debug)]
pub struct PairTile {
    /// Rows of `x` and `y`.
    pub m: usize,
    /// Pairs in the sums.
    pub pairs: usize,
    /// Pairs of bf16 (see [`narrow`]): pair `l` of row `i` is at `x + i * x_row + l * x_col`.
    pub x: *const u32,
    /// Distance between rows of `x`, in pairs.
    pub x_row: usize,
    /// Distance between the pairs of a row of `x`: 1 where [`narrow`] made them.
    pub x_col: usize,
    /// `[pairs][32][2]`
    pub panel: *const Pairs,
    /// Element `(i, j)` is at `y + i * y_row + j`.
    pub y: *mut f32,
    /// Distance between rows of `y`.
    pub y_row: usize,
    /// Columns that count, 1 to 32. No other column of `y` is touched.
    pub cols: usize,
    /// What is added to the sums: a matrix like `y`, `y` itself, or nothing.
    pub onto: Rows<*const f32>,
    /// What is read next, to be asked for on the way: its first cache line.
    pub ahead: *const Pairs,
    /// How many lines; those beyond a line for each pair and 12 rows are not asked for.
    pub ahead_lines: usize,
}

/// One row times many panels: `y[j] (+)= sum_l x[l] * panel[l, j]`, then the tail.
#[derive(Clone, Copy, Debug)]
pub struct PairStrip {
    /// Pairs in the sums.
    pub pairs: usize,
    /// `[pairs]`
    pub x: *const u32,
    /// Panels `[pairs][32][2]`, `panel_len` elements apart.
    pub panels: *const Pairs,
    /// Distance between panels.
    pub panel_len: usize,
    /// More terms, in f32: `[tail_k]`.
    pub tail_x: *const f32,
    /// How many; 0 for none.
    pub tail_k: usize,
    /// Panels for those terms, `32 tail_k` apart, padded.
    pub tail: *const f32,
    /// Where the factors of the tail come from, if they are made on the way.
    pub head: Head,
    /// For the head: the terms of `x` as they were, `[k]`.
    pub wide: *const f32,
    /// For the head: how many, `2 pairs` or one less.
    pub k: usize,
    /// `[columns]`
    pub y: *mut f32,
    /// How many columns count. No other element of `y` is touched.
    pub columns: usize,
    /// What is added to the sums: as many elements, `y` itself, or null for nothing.
    pub onto: *const f32,
}

#[cfg(target_arch = "x86_64")]
mod x86;

/// Rounds `n` elements of `x` to pairs of bf16; an odd last one is beside a zero.
///
/// # Safety
/// The machine has [`Isa::Avx512Bf16`]; `n` floats are readable at `x`, and `n / 2` pairs, rounded up,
/// writable at `to`.
pub unsafe fn narrow(isa: Isa, x: *const f32, n: usize, to: *mut u32) {
    check(isa);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise.
    unsafe {
        x86::narrow(x, n, to);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (x, n, to);
}

/// Rounds `x: [n, 32]` to pairs of rows: `[n / 2][32]`; an odd last row is beside zeros.
///
/// # Safety
/// The machine has [`Isa::Avx512Bf16`]; the elements are readable and the pairs writable.
pub unsafe fn interleave(isa: Isa, x: *const f32, n: usize, to: *mut u32) {
    check(isa);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise.
    unsafe {
        x86::interleave(x, n, to);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (x, n, to);
}

/// Computes `tile` with the terms of `tail` in the same sums.
///
/// # Safety
/// The machine has [`Isa::Avx512Bf16`]. The elements that `tile` and `tail` name are readable, in whole
/// panels (`y`: writable, and readable when accumulating), and `y` overlaps nothing that is read.
pub unsafe fn run_pairs(isa: Isa, tile: &PairTile, tail: &Tail) {
    check(isa);
    debug_assert!((1..=NR).contains(&tile.cols));
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise.
    unsafe {
        x86::tile(tile, tail);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (tile, tail);
}

/// Computes `strip`. A head has at most [`super::head_limit`] terms.
///
/// # Safety
/// As for [`run_pairs`], for the elements that [`PairStrip`] names.
pub unsafe fn run_pair_strip(isa: Isa, strip: &PairStrip) {
    check(isa);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise.
    unsafe {
        x86::strip(strip);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = strip;
}

fn check(isa: Isa) {
    assert!(
        isa == Isa::Avx512Bf16,
        "bug in tallow: pairs of bf16 on {}",
        isa.name()
    );
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
