//! A block of 32 queries that share a key head: which keys it sees, and its rows as lanes.
//! Invariant: lanes without a query, or whose query sees nothing, hold zeros and see nothing.
//! Absent on purpose: arithmetic on scores.

use std::ops::Range;

use super::{Heads, Queries, Shape};
use crate::exec::spans;
use crate::lanes::{LANES, Row};
use crate::simd::{Isa, LINE_ELEMS, Vector, prefetch_far};
use crate::tile::{self, NR, Next, Rows, Tile};

/// The 32 lanes: row `first + i` of `[t, group]`, flattened.
pub(super) struct Block<'a> {
    pub(super) shape: &'a Shape,
    /// Batch row.
    pub(super) b: usize,
    /// Key head.
    pub(super) kv: usize,
    /// Lanes in use.
    pub(super) n: usize,
    /// Token and head of each.
    places: [(usize, usize); LANES],
    /// First key that each lane sees, and one past its last, as numbers to compare with.
    pub(super) lo: Row,
    pub(super) hi: Row,
    /// Keys that some lane sees.
    pub(super) any: Range<usize>,
    /// Keys that every lane sees.
    pub(super) all: Range<usize>,
}

impl<'a> Block<'a> {
    /// Block `index` of key head `bk = b * hk + kv`.
    ///
    /// # Safety
    /// `queries` covers `[b, t]`.
    pub(super) unsafe fn new(shape: &'a Shape, queries: &Queries, bk: usize, index: usize) -> Self {
        let (first, group) = (index * LANES, shape.group());
        let n = LANES.min(shape.t * group - first);
        let mut block = Block {
            shape,
            b: bk / shape.hk,
            kv: bk % shape.hk,
            n,
            places: [(0, 0); LANES],
            lo: Row::splat(0.0),
            hi: Row::splat(0.0),
            any: 0..0,
            all: 0..usize::MAX,
        };
        let mut any = (usize::MAX, 0);
        let (mut token, mut head) = (first / group, first % group);
        let (mut lo, mut hi) = (0, 0);
        for i in 0..n {
            if i == 0 || head == 0 {
                // SAFETY: `token < t`.
                (lo, hi) = unsafe { queries.visible(shape, block.b * shape.t + token) };
                block.all = block.all.start.max(lo)..block.all.end.min(hi);
                if lo < hi {
                    any = (any.0.min(lo), any.1.max(hi));
                }
            }
            // Positions within a sequence are far below 2^24: exact.
            block.lo.0[i] = lo as f32;
            block.hi.0[i] = hi as f32;
            block.places[i] = (token, block.kv * group + head);
            head += 1;
            if head == group {
                (token, head) = (token + 1, 0);
            }
        }
        if n < LANES {
            block.all = 0..0;
        }
        if any.0 < any.1 {
            block.any = any.0..any.1;
        }
        block
    }

    /// Token and head of lane `i`, which is in use.
    #[inline(always)]
    pub(super) fn place(&self, i: usize) -> (usize, usize) {
        self.places[i]
    }

    /// Asks memory for about the rows of `view` that the next block of this key head will use.
    #[inline(always)]
    pub(super) fn ask_next(&self, view: &Heads) {
        let ahead = LANES / self.shape.group();
        for (token, head) in self.places {
            let row = view.at(self.b, token + ahead, head);
            for l in (0..self.shape.d).step_by(LINE_ELEMS) {
                prefetch_far(row.wrapping_add(l));
            }
        }
    }

    /// Does lane `i` see anything?
    #[inline(always)]
    pub(super) fn sees(&self, i: usize) -> bool {
        i < self.n && self.lo.0[i] < self.hi.0[i]
    }

    /// Chunks of `size` keys that hold all keys some lane sees. Their borders are multiples of
    /// `size`, so that they do not depend on the block.
    pub(super) fn chunks(&self, size: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let any = self.any.clone();
        (any.start / size..any.end.div_ceil(size))
            .map(move |c| (c * size).max(any.start)..((c + 1) * size).min(any.end))
    }

    /// Copies the lanes' rows, times `factor`, to `rows: [32, padded d]`; zero elsewhere.
    ///
    /// # Safety
    /// The machine has the instructions; `src` is a view of `[b, t, h, d]`.
    #[inline(always)]
    pub(super) unsafe fn gather<V: Vector>(&self, src: &Heads, factor: f32, rows: *mut f32) {
        let (d, padded) = (self.shape.d, self.shape.padded_d());
        for i in 0..LANES {
            // SAFETY: lane `i` is a row of the view; `rows` has 32 rows.
            unsafe {
                let to = rows.add(i * padded);
                if !self.sees(i) {
                    to.write_bytes(0, padded);
                    continue;
                }
                let (token, head) = self.place(i);
                let from = src.at(self.b, token, head);
                let factor = V::splat(factor);
                spans!(V, d, l, s => { s.store(s.load(from.add(l)).mul(factor), to.add(l)) });
                if d < padded {
                    to.add(d).write_bytes(0, padded - d);
                }
            }
        }
    }

    /// Writes the lanes' rows of `rows: [32, padded d]`, times `factor` of the lane, to `dst`.
    ///
    /// # Safety
    /// The machine has the instructions; `dst` is a view of `[b, t, h, d]` nobody else touches.
    #[inline(always)]
    pub(super) unsafe fn scatter<V: Vector>(
        &self,
        rows: *const f32,
        factor: &Row,
        dst: &Heads<*mut f32>,
    ) {
        let (d, padded) = (self.shape.d, self.shape.padded_d());
        for i in 0..self.n {
            let (token, head) = self.place(i);
            let to = dst.at(self.b, token, head);
            // SAFETY: lane `i` is a row of the view.
            unsafe {
                if !self.sees(i) {
                    to.write_bytes(0, d);
                    continue;
                }
                let (from, factor) = (rows.add(i * padded), V::splat(factor.0[i]));
                spans!(V, d, l, s => { s.store(s.load(from.add(l)).mul(factor), to.add(l)) });
            }
        }
    }

    /// `scores[j, lane] = keys[range.start + j] . lane`: `keys` is this block's head of a view of
    /// `[b, s, hk, d]`, `lanes` is `[d, 32]`.
    ///
    /// # Safety
    /// The machine has `isa`; `scores` has `range.len()` rows; `range` is within `s`.
    pub(super) unsafe fn times_keys(
        &self,
        isa: Isa,
        keys: &Heads,
        range: &Range<usize>,
        lanes: *const f32,
        scores: *mut f32,
    ) {
        let tile = Tile {
            m: range.len(),
            k: self.shape.d,
            x: keys.at(self.b, range.start, self.kv),
            x_row: keys.token,
            x_col: 1,
            panel: lanes,
            panel_row: LANES,
            padded: true,
            y: scores,
            y_row: LANES,
            cols: LANES,
            onto: Rows::<*const f32>::NONE,
            next: Next::NONE,
        };
        // SAFETY: the caller's promise; every panel row has 32 lanes.
        unsafe { tile::run(isa, &tile) }
    }

    /// `rows[lane] (+)= sum_j scores[j, lane] values[range.start + j]`, `rows: [32, padded d]`.
    ///
    /// # Safety
    /// As for [`Block::times_keys`]; `rows` is initialised if `accumulate`.
    pub(super) unsafe fn times_values(
        &self,
        isa: Isa,
        values: &Heads,
        range: &Range<usize>,
        scores: *const f32,
        rows: *mut f32,
        accumulate: bool,
    ) {
        let d = self.shape.d;
        for col in (0..d).step_by(NR) {
            let cols = NR.min(d - col);
            // SAFETY: the caller's promise; a panel of fewer than 32 columns is not padded.
            unsafe {
                let tile = Tile {
                    m: self.n,
                    k: range.len(),
                    x: scores,
                    x_row: 1,
                    x_col: LANES,
                    panel: values.at(self.b, range.start, self.kv).add(col),
                    panel_row: values.token,
                    padded: cols == NR,
                    y: rows.add(col),
                    y_row: self.shape.padded_d(),
                    cols,
                    onto: Rows::old(rows.add(col), self.shape.padded_d(), accumulate),
                    next: Next::NONE,
                };
                tile::run(isa, &tile);
            }
        }
    }

    /// `dst[range.start + j] += sum_lane scores[j, lane] rows[lane]`, `rows: [32, padded d]`.
    ///
    /// # Safety
    /// As for [`Block::times_keys`]; nobody else touches those rows of this head of `dst`.
    pub(super) unsafe fn add_to_keys(
        &self,
        isa: Isa,
        dst: &Heads<*mut f32>,
        range: &Range<usize>,
        scores: *const f32,
        rows: *const f32,
    ) {
        let (d, padded) = (self.shape.d, self.shape.padded_d());
        for col in (0..d).step_by(NR) {
            // SAFETY: the caller's promise; `rows` is padded to whole panels.
            unsafe {
                let tile = Tile {
                    m: range.len(),
                    k: self.n,
                    x: scores,
                    x_row: LANES,
                    x_col: 1,
                    panel: rows.add(col),
                    panel_row: padded,
                    padded: true,
                    y: dst.at(self.b, range.start, self.kv).add(col),
                    y_row: dst.token,
                    cols: NR.min(d - col),
                    onto: Rows::old(
                        dst.at(self.b, range.start, self.kv).add(col),
                        dst.token,
                        true,
                    ),
                    next: Next::NONE,
                };
                tile::run(isa, &tile);
            }
        }
    }
}
