//! Some rows times some panels of one matrix: the loops around the tile product.
//! Invariant: a sum runs over `k` in order, in even pieces of a length that depends on `k` alone.
//! Absent on purpose: threads, adapters as such (a tail is given), bias and residual.

use std::ops::Range;

use super::{Rows, Segment, Shares, split::MAX_ROWS};
use crate::simd::Isa;
use crate::tile::{Element, Head, MR, NR, Next, Strip, Tail, Tile, run_strip, run_with_tail};

/// The longest piece of a sum: a panel's piece and that of [`MAX_ROWS`] rows fit the second-level
/// cache, and rounding errors grow slower than in one chain.
pub(super) const PIECE: usize = 1024;

/// Rows this many bytes apart fall on the same lines of a first-level cache.
const CONFLICT_BYTES: usize = 4096;
/// What a copied row is longer than its piece, so that the copies do not.
const APART: usize = 16;

mod pairs;
pub(super) use pairs::forget;

/// Floats of scratch that [`Product::run`] may use, for sums of `k` terms.
pub(super) fn copy_len(k: usize) -> usize {
    MAX_ROWS * (k.min(PIECE) + APART)
}

/// `y[i, j] (+)= sum_l x[i, l] * w[l, j]`, `i < m <= MAX_ROWS`, `j < n`, with the tail's terms.
pub(super) struct Product<E> {
    pub(super) isa: Isa,
    pub(super) m: usize,
    pub(super) k: usize,
    pub(super) n: usize,
    pub(super) x: *const f32,
    pub(super) x_row: usize,
    /// Packed: panel `p` at `p * 32 * k`.
    pub(super) panels: *const E,
    pub(super) y: *mut f32,
    pub(super) y_row: usize,
    /// What is added to the sums: a matrix like `y`, `y` itself, or nothing.
    pub(super) onto: Rows<*const f32>,
    /// `copy_len(k)` floats.
    pub(super) scratch: *mut f32,
    /// For one row with a packed tail: its `x` is made on the way.
    pub(super) head: Head,
    /// Whose tail each row has, counted from this row on.
    pub(super) shares: (Shares, usize),
    /// The last panel first: for a worker whose next task is the one before this (see [`crate::pool`]), so that the panel it
    /// asks memory for ahead is the one it will use.
    pub(super) descending: bool,
}

/// The tail of the panels of a product.
pub(super) enum Tails<'a> {
    /// There is none.
    None,
    /// Packed and padded as by `pack_tail`: `k` terms, `x` with rows `k` apart; one for all rows.
    Packed {
        k: usize,
        x: *const f32,
        panels: *const f32,
    },
    /// Each panel's of some rows is asked for when it is used; padded. Its `x` begins with those rows.
    Each(&'a dyn Fn(Segment, usize) -> Tail),
}

impl Tails<'_> {
    fn of(&self, rows: Segment, p: usize) -> Tail {
        match *self {
            Tails::None => Tail::NONE,
            Tails::Packed { k, x, panels } => {
                let panel = panels.wrapping_add(p * NR * k);
                Tail {
                    k,
                    x,
                    x_row: k,
                    x_col: 1,
                    panel,
                    panel_row: NR,
                }
            }
            Tails::Each(tail) => tail(rows, p),
        }
    }
}

impl<E: Element> Product<E> {
    /// Computes the panels of a range.
    ///
    /// # Safety
    /// The machine has `isa`; what the fields and tails name is readable, `y` writable, and `y` and
    /// the scratch overlap nothing else.
    pub(super) unsafe fn run(&self, panels: Range<usize>, tails: &Tails<'_>) {
        if E::DOTS {
            // SAFETY: the caller's promise; only panels of `Pairs` are to be multiplied as they are.
            return unsafe { self.as_pairs().run_pairs(panels, tails) };
        }
        for (piece, tails) in self.pieces(self.k, tails) {
            // SAFETY: terms `from..from + len` are part of the sums; the caller's promise.
            unsafe {
                match (self.m, tails) {
                    (1, Tails::None | Tails::Packed { .. }) => {
                        self.strip(panels.clone(), &piece, tails);
                    }
                    _ => self.tiles(panels.clone(), &piece, tails),
                }
            }
        }
    }

    /// Sums of `terms` terms in even pieces, the last with the tails.
    fn pieces<'t>(
        &self,
        terms: usize,
        tails: &'t Tails<'t>,
    ) -> impl Iterator<Item = (Piece, &'t Tails<'t>)> + use<'t, E> {
        let pieces = terms.div_ceil(PIECE).max(1);
        let mut from = 0;
        let first = self.onto;
        let rest = Rows::old(self.y, self.y_row, true);
        (0..pieces).map(move |i| {
            let piece = Piece {
                from,
                len: (terms - from).div_ceil(pieces - i),
                onto: if i == 0 { first } else { rest },
            };
            from += piece.len;
            let last = i + 1 == pieces;
            (piece, if last { tails } else { &Tails::None })
        })
    }

    /// The panels of a range in the order they are worked on, each with the one to ask memory for meanwhile. Small weights
    /// too come from afar, for a model has many of them; but with few rows the panel itself is what memory is asked for.
    fn in_order(&self, panels: Range<usize>) -> impl Iterator<Item = (usize, Option<usize>)> {
        let (descending, many) = (self.descending, self.m > 2 * MR);
        (0..panels.len()).map(move |i| {
            let (p, next) = match descending {
                true => (panels.end - 1 - i, (panels.end - 1 - i).checked_sub(1)),
                false => (panels.start + i, Some(panels.start + i + 1)),
            };
            (p, next.filter(|_| many))
        })
    }

    /// # Safety
    /// As for [`Product::run`], for the terms of `piece`.
    unsafe fn tiles(&self, panels: Range<usize>, piece: &Piece, tails: &Tails<'_>) {
        // SAFETY: the caller's promise.
        let (x, x_row) = unsafe { self.near(piece) };
        let (shares, first) = self.shares;
        for (p, next) in self.in_order(panels) {
            let next = next.map_or(std::ptr::null(), |p| self.panel(p, piece));
            for segment in shares.cut(first, self.m) {
                let tail = tails.of(segment, p);
                let row = segment.start;
                let tile = Tile {
                    m: segment.end - row,
                    k: piece.len,
                    x: x.wrapping_add(row * x_row),
                    x_row,
                    x_col: 1,
                    panel: self.panel(p, piece),
                    panel_row: NR,
                    padded: true,
                    y: self.y.wrapping_add(row * self.y_row + p * NR),
                    y_row: self.y_row,
                    cols: (self.n - p * NR).min(NR),
                    onto: piece.onto.from(row, p * NR),
                    next: Next {
                        at: next,
                        row,
                        rows: self.m,
                    },
                };
                // SAFETY: the caller's promise.
                unsafe { run_with_tail(self.isa, &tile, &tail) };
            }
        }
    }

    /// Where the terms of `piece` begin in a panel.
    fn panel(&self, p: usize, piece: &Piece) -> *const E {
        let at = (p * self.k + piece.from) * NR;
        self.panels.wrapping_add(at)
    }

    /// The piece of `x` and its row stride; copied where its rows would fight for a few cache lines.
    ///
    /// # Safety
    /// As for [`Product::tiles`].
    unsafe fn near(&self, piece: &Piece) -> (*const f32, usize) {
        let x = self.x.wrapping_add(piece.from);
        if self.m <= 8 || !(self.x_row * size_of::<f32>()).is_multiple_of(CONFLICT_BYTES) {
            return (x, self.x_row);
        }
        let row = piece.len + APART;
        for i in 0..self.m {
            // SAFETY: `m <= MAX_ROWS` rows of `len + APART` floats fit the scratch.
            unsafe {
                let to = self.scratch.add(i * row);
                std::ptr::copy_nonoverlapping(x.add(i * self.x_row), to, piece.len);
            }
        }
        (self.scratch, row)
    }

    /// One row.
    ///
    /// # Safety
    /// As for [`Product::tiles`]; `m` is 1.
    unsafe fn strip(&self, panels: Range<usize>, piece: &Piece, tails: &Tails<'_>) {
        let first = panels.start * NR;
        let row = Segment {
            share: 0,
            start: 0,
            end: 1,
        };
        let tail = tails.of(row, panels.start);
        let strip = Strip {
            k: piece.len,
            x: self.x.wrapping_add(piece.from),
            panels: self.panels.wrapping_add(first * self.k + piece.from * NR),
            panel_len: self.k * NR,
            tail_x: tail.x,
            tail_k: tail.k,
            tail: tail.panel,
            head: Head {
                a: match self.head.a.is_null() {
                    true => std::ptr::null(),
                    false => self.head.a.wrapping_add(piece.from * self.head.r),
                },
                accumulate: piece.from > 0,
                ..self.head
            },
            y: self.y.wrapping_add(first),
            columns: self.n.min(panels.end * NR) - first,
            onto: piece.onto.from(0, first).at,
        };
        // SAFETY: the caller's promise; packed tails are as the strip wants them.
        unsafe { run_strip(self.isa, &strip) };
    }
}

/// A run of terms of a sum, or of pairs of them.
struct Piece {
    from: usize,
    len: usize,
    onto: Rows<*const f32>,
}
