//! Cross entropy where the processor multiplies pairs of bf16: both products in the frozen weights' own pairs.
//! Invariant: as the parent's; logits, their softmax and its sum are f32, what is multiplied is rounded to bf16.
//! Absent on purpose: weights that train; they are f32 and read where they lie.
//!
//! The logits take the weights as the forward product has them, pairs along `c`; the gradient takes them as the
//! backward product has them, pairs of classes.

use std::ops::Range;

use super::{Chunks, PIECE};
use crate::lanes::{LANES, transpose};
use crate::tile::{Element, NR, PairTile, Pairs, Rows, Tail, interleave, narrow, run_pairs};

/// Frozen weights `[v, c]` in pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairWeights {
    /// `[v / 32][c / 2][32][2]`: pairs along `c`, as packed for the forward product.
    pub forward: *const Pairs,
    /// `[c / 32][v / 2][32][2]`: pairs of classes, as packed for the backward product; null without a gradient.
    pub backward: *const Pairs,
}

/// Floats in which the exponentials of a piece are kept as pairs of classes.
pub(super) const PAIR_ELEMS: usize = PIECE / 2 * LANES;

impl Chunks<'_> {
    /// `rows` as lanes in pairs along `c`: `[c / 2][32][2]`, those that are not there as zeros.
    ///
    /// # Safety
    /// As for [`Chunks::chunk`]; `scratch` and `lanes` have `32 * c` elements, `c` rounded up to 32.
    pub(super) unsafe fn lanes_of_pairs(&self, rows: &[u32], scratch: *mut f32, lanes: *mut f32) {
        let (a, pairs) = (self.args, self.args.c.div_ceil(2));
        // Whole blocks for the transposition; not more than the rows in f32 would take.
        let padded = pairs.next_multiple_of(4);
        for i in 0..LANES {
            // SAFETY: row `i < 32` of `padded` pairs is in the scratch.
            unsafe {
                let to = scratch.add(i * padded).cast::<u32>();
                let filled = match rows.get(i) {
                    Some(row) => {
                        narrow(self.isa, a.x.at(*row as usize), a.c, to);
                        pairs
                    }
                    None => 0,
                };
                to.add(filled).write_bytes(0, padded - filled);
            }
        }
        // SAFETY: as above; a pair is as large as a float, and only moved.
        unsafe { transpose(scratch, padded, lanes) };
    }

    /// Logits `[classes, 32]`.
    ///
    /// # Safety
    /// As for [`Chunks::pieces`]; `lanes` is from [`Chunks::lanes_of_pairs`].
    pub(super) unsafe fn logits_of_pairs(
        &self,
        w: PairWeights,
        classes: &Range<usize>,
        lanes: *const f32,
        logits: *mut f32,
        cols: usize,
    ) {
        let pairs = self.args.c.div_ceil(2);
        for first in classes.clone().step_by(NR) {
            let tile = PairTile {
                m: NR.min(classes.end - first),
                pairs,
                x: w.forward.wrapping_add(first * 2 * pairs).cast(),
                x_row: 1,
                x_col: NR,
                panel: lanes.cast(),
                y: logits.wrapping_add((first - classes.start) * LANES),
                y_row: LANES,
                cols,
                onto: Rows::<*const f32>::NONE,
                // The next classes.
                ahead: w.forward.wrapping_add((first + NR) * 2 * pairs),
                ahead_lines: 2 * pairs,
            };
            // SAFETY: up to 32 classes from `first` on are a panel of weights and rows of `logits`.
            unsafe { run_pairs(self.isa, &tile, &Tail::NONE) };
        }
    }

    /// `gradient: [rows, padded c] += eᵀ W` over some classes.
    ///
    /// # Safety
    /// As for [`Chunks::pieces`]; `e` is `[classes, 32]`, `pairs` has [`PAIR_ELEMS`] elements.
    pub(super) unsafe fn add_pairs(
        &self,
        w: PairWeights,
        classes: &Range<usize>,
        e: *const f32,
        rows: usize,
        (pairs, gradient): (*mut u32, *mut f32),
    ) {
        let a = self.args;
        // SAFETY: the caller's promise.
        unsafe { interleave(self.isa, e, classes.len(), pairs) };
        let len = Pairs::rows(a.v) * NR;
        for col in (0..a.c).step_by(NR) {
            let panel = w.backward.wrapping_add(col / NR * len + classes.start * NR);
            let tile = PairTile {
                m: rows,
                pairs: classes.len().div_ceil(2),
                x: pairs,
                x_row: 1,
                x_col: LANES,
                panel,
                y: gradient.wrapping_add(col),
                y_row: a.c.next_multiple_of(NR),
                cols: NR.min(a.c - col),
                onto: Rows::old(
                    gradient.wrapping_add(col),
                    a.c.next_multiple_of(NR),
                    classes.start > 0,
                ),
                // The next classes.
                ahead: panel.wrapping_add(classes.len() * NR),
                ahead_lines: classes.len(),
            };
            // SAFETY: the classes are rows of the panel, `rows` at most 32.
            unsafe { run_pairs(self.isa, &tile, &Tail::NONE) };
        }
    }
}

/// Element `(class, column)` of the weights.
///
/// # Safety
/// It is one of `[v, c]`.
pub(super) unsafe fn weight(w: PairWeights, c: usize, class: usize, column: usize) -> f32 {
    let panel = class / NR * Pairs::rows(c) * NR;
    // SAFETY: the caller's promise.
    unsafe {
        let at = w.forward.add(panel + Pairs::index(column, class % NR));
        (*at).0.to_f32()
    }
}
