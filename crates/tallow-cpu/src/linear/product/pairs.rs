//! The loops around the product over pairs of bf16: as those of f32, with `x` rounded on the way.
//! Invariant: a sum runs over pairs in order, in even pieces of a length that depends on `k` alone; one
//! row and many give the same bits.
//! Absent on purpose: widening. Weights are packed as pairs only where they can be multiplied as such.

use std::ops::Range;

use super::{Piece, Product, Tails};
use crate::linear::Segment;
use crate::tile::{Head, NR, PairStrip, PairTile, Pairs, narrow, run_pair_strip, run_pairs};

/// What a rounded row is longer than its piece, in pairs: rows then do not fight for cache lines.
const APART: usize = 8;
/// Floats in front of the rounded rows that say which they are.
const KEY: usize = 8;

/// Which rows of `x` the scratch holds.
#[derive(Clone, Copy, PartialEq)]
#[repr(C)]
struct Key {
    x: *const f32,
    terms: usize,
    m: usize,
}

const _: () = assert!(size_of::<Key>() <= KEY * size_of::<f32>());

/// Makes a scratch hold no rounded rows. Each call begins so, for its `x` may lie where the last one's did.
pub(in crate::linear) fn forget(scratch: &mut [f32]) {
    scratch[..KEY].fill(0.0);
}

impl<E> Product<E> {
    /// The same with its panels seen as pairs.
    pub(super) fn as_pairs(&self) -> Product<Pairs> {
        Product {
            panels: self.panels.cast(),
            isa: self.isa,
            m: self.m,
            k: self.k,
            n: self.n,
            x: self.x,
            x_row: self.x_row,
            y: self.y,
            y_row: self.y_row,
            onto: self.onto,
            scratch: self.scratch,
            head: self.head,
            shares: self.shares,
            descending: self.descending,
        }
    }
}

impl Product<Pairs> {
    fn pairs(&self) -> usize {
        self.k.div_ceil(2)
    }

    /// Computes the panels of a range.
    ///
    /// # Safety
    /// As for [`Product::run`].
    pub(super) unsafe fn run_pairs(&self, panels: Range<usize>, tails: &Tails<'_>) {
        // Twice as many terms as of f32 in the same room.
        for (piece, tails) in self.pieces(self.pairs(), tails) {
            // SAFETY: pairs `from..from + len` are part of the sums; the caller's promise.
            unsafe {
                let x = self.rounded(&piece);
                match (self.m, tails) {
                    (1, Tails::None | Tails::Packed { .. }) => {
                        self.strip_of_pairs(panels.clone(), &piece, x, tails);
                    }
                    _ => self.tiles_of_pairs(panels.clone(), &piece, x, tails),
                }
            }
        }
    }

    /// The rows of `x` in pairs of bf16, `len + APART` apart, in scratch: rounded unless they are there.
    ///
    /// # Safety
    /// As for [`Product::run`].
    unsafe fn rounded(&self, piece: &Piece) -> *const u32 {
        let key = Key {
            x: self.x.wrapping_add(2 * piece.from),
            terms: (self.k - 2 * piece.from).min(2 * piece.len),
            m: self.m,
        };
        let at = self.scratch.wrapping_add(KEY).cast::<u32>();
        // SAFETY: the scratch has `copy_len(k)` floats, `MAX_ROWS (min(k, PIECE) + 16)`: enough for the
        // key and `m` rows of `len + APART`, for `len` is at most `PIECE` and at most `k`.
        unsafe {
            let held = self.scratch.cast::<Key>();
            if held.read_unaligned() != key {
                for i in 0..self.m {
                    let row = key.x.wrapping_add(i * self.x_row);
                    narrow(self.isa, row, key.terms, at.add(i * (piece.len + APART)));
                }
                held.write_unaligned(key);
            }
        }
        at
    }

    /// # Safety
    /// As for [`Product::run`], for the pairs of `piece`, which are at `x`.
    unsafe fn tiles_of_pairs(
        &self,
        panels: Range<usize>,
        piece: &Piece,
        x: *const u32,
        tails: &Tails<'_>,
    ) {
        let (shares, first) = self.shares;
        let x_row = piece.len + APART;
        for (p, next) in self.in_order(panels) {
            let next = next.map(|p| self.pair_panel(p, piece));
            for segment in shares.cut(first, self.m) {
                let tail = tails.of(segment, p);
                let row = segment.start;
                // Each row asks for its part of the next panel, two cache lines a pair.
                let line = |row: usize| row * 2 * piece.len / self.m;
                let tile = PairTile {
                    m: segment.end - row,
                    pairs: piece.len,
                    x: x.wrapping_add(row * x_row),
                    x_row,
                    x_col: 1,
                    panel: self.pair_panel(p, piece),
                    y: self.y.wrapping_add(row * self.y_row + p * NR),
                    y_row: self.y_row,
                    cols: (self.n - p * NR).min(NR),
                    onto: piece.onto.from(row, p * NR),
                    ahead: next.map_or(std::ptr::null(), |at| at.wrapping_add(line(row) * NR)),
                    ahead_lines: next.map_or(0, |_| line(segment.end) - line(row)),
                };
                // SAFETY: the caller's promise.
                unsafe { run_pairs(self.isa, &tile, &tail) };
            }
        }
    }

    /// Where the pairs of `piece` begin in a panel.
    fn pair_panel(&self, p: usize, piece: &Piece) -> *const Pairs {
        let at = (p * self.pairs() + piece.from) * 2 * NR;
        self.panels.wrapping_add(at)
    }

    /// One row.
    ///
    /// # Safety
    /// As for [`Product::tiles_of_pairs`]; `m` is 1.
    unsafe fn strip_of_pairs(
        &self,
        panels: Range<usize>,
        piece: &Piece,
        x: *const u32,
        tails: &Tails<'_>,
    ) {
        let first = panels.start * NR;
        let row = Segment {
            share: 0,
            start: 0,
            end: 1,
        };
        let tail = tails.of(row, panels.start);
        let strip = PairStrip {
            pairs: piece.len,
            x,
            panels: self.pair_panel(panels.start, piece),
            panel_len: self.pairs() * 2 * NR,
            tail_x: tail.x,
            tail_k: tail.k,
            tail: tail.panel,
            head: Head {
                a: match self.head.a.is_null() {
                    true => std::ptr::null(),
                    false => self.head.a.wrapping_add(2 * piece.from * self.head.r),
                },
                accumulate: piece.from > 0,
                ..self.head
            },
            wide: self.x.wrapping_add(2 * piece.from),
            k: (self.k - 2 * piece.from).min(2 * piece.len),
            y: self.y.wrapping_add(first),
            columns: self.n.min(panels.end * NR) - first,
            onto: piece.onto.from(0, first).at,
        };
        // SAFETY: the caller's promise; packed tails are as the strip wants them.
        unsafe { run_pair_strip(self.isa, &strip) };
    }
}
