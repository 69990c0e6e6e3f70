//! One row times many panels: what decoding a token does.
//! Invariant: the bits are those of the tile product; only the order in which columns are worked on
//! differs, so that several chains of multiply-adds run at once.
//! Absent on purpose: more than one row. Two rows already keep the multipliers busy.

use super::{Element, NR};
use crate::simd::{Isa, Kernel, Vector, prefetch};

/// `y[j] (+)= sum_l x[l] * panel[l, j]`, then the terms of the tail, over any number of columns.
/// Panels are packed and padded, `[columns / 32][stride][32]`.
#[derive(Clone, Copy, Debug)]
pub struct Strip<E = f32> {
    /// Terms.
    pub k: usize,
    /// `[k]`
    pub x: *const f32,
    /// Element `(l, j)` is at `panels + j / 32 * panel_len + l * 32 + j % 32`.
    pub panels: *const E,
    /// Distance between panels, at least `32 k`.
    pub panel_len: usize,
    /// More terms after those, `tail_k` of them: `[tail_k]`.
    pub tail_x: *const f32,
    /// How many; 0 for none.
    pub tail_k: usize,
    /// Panels for those terms, `32 tail_k` apart.
    pub tail: *const f32,
    /// `[columns]`
    pub y: *mut f32,
    /// How many columns count. No other element of `y` is touched.
    pub columns: usize,
    /// Adds to `y` instead of setting it.
    pub accumulate: bool,
}

/// Computes `strip`.
///
/// # Safety
/// The machine has `isa`. All elements that [`Strip`] names are readable, in whole panels (`y`:
/// writable, and readable when accumulating), and `y` overlaps nothing that is read.
pub unsafe fn run_strip<E: Element>(isa: Isa, strip: &Strip<E>) {
    // SAFETY: the caller's promise.
    unsafe { isa.dispatch(Columns(strip)) }
}

struct Columns<'a, E>(&'a Strip<E>);

impl<E: Element> Kernel for Columns<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn call<V: Vector>(self) {
        let panels = self.0.columns.div_ceil(NR);
        let mut p = 0;
        // SAFETY: panels below `panels` are in the strip.
        unsafe {
            if V::LANES == 16 {
                while p + 4 <= panels {
                    self.group::<V, 4>(p);
                    p += 4;
                }
            }
            if V::LANES >= 8 {
                while p + 2 <= panels {
                    self.group::<V, 2>(p);
                    p += 2;
                }
            }
            while p < panels {
                self.group::<V, 1>(p);
                p += 1;
            }
        }
    }
}

impl<E: Element> Columns<'_, E> {
    /// Panels `p..p + P`.
    ///
    /// # Safety
    /// They are in the strip; the machine has the instructions of `V`.
    #[inline(always)]
    unsafe fn group<V: Vector, const P: usize>(&self, p: usize) {
        let s = self.0;
        let vectors = NR / V::LANES;
        // SAFETY: the caller's promise; terms stay below `k` and `tail_k`.
        unsafe {
            let tail = s.tail.wrapping_add(p * s.tail_k * NR);
            let lines = P * s.tail_k * NR / 16;
            let mut sums = [[V::zero(); 8]; P];
            let panels = s.panels.add(p * s.panel_len);
            for l in 0..s.k {
                let a = V::splat(*s.x.add(l));
                // The tail is too short for the machine to see it coming.
                if l < lines {
                    prefetch(tail.wrapping_add(l * 16));
                }
                for (q, row) in sums.iter_mut().enumerate() {
                    let at = panels.add(q * s.panel_len + l * NR);
                    for j in 0..vectors / 2 {
                        let (lo, hi) = E::pair::<V>(at, j * V::LANES);
                        row[j] = a.mul_add(lo, row[j]);
                        row[j + vectors / 2] = a.mul_add(hi, row[j + vectors / 2]);
                    }
                }
            }
            for l in 0..s.tail_k {
                let a = V::splat(*s.tail_x.add(l));
                for (q, row) in sums.iter_mut().enumerate() {
                    let at = tail.add((q * s.tail_k + l) * NR);
                    for (j, sum) in row.iter_mut().enumerate().take(vectors) {
                        *sum = a.mul_add(V::load(at.add(j * V::LANES)), *sum);
                    }
                }
            }
            for (q, row) in sums.iter().enumerate() {
                let first = (p + q) * NR;
                let cols = (s.columns - first).min(NR);
                let masks = super::masks::<V>(cols);
                for (j, sum) in row.iter().enumerate().take(vectors) {
                    let at = s.y.wrapping_add(first + j * V::LANES);
                    super::put(*sum, at, s.accumulate, cols < NR, masks[j]);
                }
            }
        }
    }
}
