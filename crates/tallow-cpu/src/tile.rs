//! The innermost product: rows of `x` times one panel of at most 32 columns, on every instruction set.
//! Invariant: an output element is one chain of fused multiply-adds in the order of `k`, then of the
//! tail, and then (when accumulating) one addition of the old value. The chain depends on the
//! instruction set and `k` alone: not on `m`, the row's place, strides, the panel's padding or threads.
//! Absent on purpose: blocking, packing, threads. Callers choose what stays in cache.

mod pairs;
mod strip;

pub use pairs::{PairStrip, PairTile, Pairs, interleave, narrow, run_pair_strip, run_pairs};
pub use strip::{HEAD_PAD, Head, Strip, head_limit, run_strip};

use half::bf16;

use crate::simd::{Isa, Kernel, Vector, prefetch, prefetch_far};

/// Columns of a panel, the same for every instruction set.
pub const NR: usize = 32;

/// The most rows of one register block. Rows packed for the fast path come in blocks of this.
pub const MR: usize = 12;

/// One tile product: `y[i, j] (+)= sum_l x[i, l] * panel[l, j]`, `i < m`, `j < cols`, then the tail.
/// Strides count elements. `E` is how the panel is stored: `f32`, or `bf16` widened in registers.
#[derive(Clone, Copy, Debug)]
pub struct Tile<E = f32> {
    /// Rows of `x` and `y`.
    pub m: usize,
    /// Length of the sums.
    pub k: usize,
    /// Element `(i, l)` is at `x + i * x_row + l * x_col`.
    pub x: *const f32,
    /// Distance between rows of `x`. Fastest where it is 1 (rows side by side, see [`MR`]).
    pub x_row: usize,
    /// Distance between the terms of a row of `x`.
    pub x_col: usize,
    /// Element `(l, j)` is at `panel + l * panel_row + j`.
    pub panel: *const E,
    /// Distance between rows of the panel: [`NR`] where packed.
    pub panel_row: usize,
    /// All 32 columns of a panel row may be read, though only `cols` of them count. Of the tail's
    /// panel too. Always so for `bf16`.
    pub padded: bool,
    /// Element `(i, j)` is at `y + i * y_row + j`.
    pub y: *mut f32,
    /// Distance between rows of `y`.
    pub y_row: usize,
    /// Columns that count, 1 to 32. No other column of `y` is touched.
    pub cols: usize,
    /// What is added to the sums: a matrix like `y`, `y` itself, or nothing.
    pub onto: Rows<*const f32>,
    /// What to ask memory for on the way.
    pub next: Next<E>,
}

/// A panel that is worked on after this one, `[k, 32]` like it. Each term of each register block asks for a little of it,
/// so that memory is as busy as the multipliers and neither waits for the other.
#[derive(Clone, Copy, Debug)]
pub struct Next<E> {
    /// Its first element; null for nothing.
    pub at: *const E,
    /// The tile's first row among those that ask for a part each.
    pub row: usize,
    /// How many rows ask.
    pub rows: usize,
}

impl<E> Next<E> {
    /// Nothing.
    pub const NONE: Self = Self {
        at: std::ptr::null(),
        row: 0,
        rows: 1,
    };
}

/// More terms for the sums of a tile: `sum_l x[i, l] * panel[l, j]` with an `x` and panel of its own.
/// Its panel is f32, and padded or not as the tile's.
#[derive(Clone, Copy, Debug)]
pub struct Tail {
    /// Terms.
    pub k: usize,
    /// Element `(i, l)` is at `x + i * x_row + l * x_col`.
    pub x: *const f32,
    /// Distance between rows of `x`.
    pub x_row: usize,
    /// Distance between the terms of a row of `x`.
    pub x_col: usize,
    /// Element `(l, j)` is at `panel + l * panel_row + j`.
    pub panel: *const f32,
    /// Distance between rows of the panel.
    pub panel_row: usize,
}

impl Tail {
    /// No terms.
    pub const NONE: Tail = Tail {
        k: 0,
        x: std::ptr::null(),
        x_row: 0,
        x_col: 0,
        panel: std::ptr::null(),
        panel_row: 0,
    };
}

/// A matrix that is added to a result, or that one is written to: rows `row` elements apart. One that is added may be one row for
/// all, with a distance of 0.
#[derive(Clone, Copy, Debug)]
pub struct Rows<P> {
    /// Element `(0, 0)`.
    pub at: P,
    /// Distance between rows.
    pub row: usize,
}

impl Rows<*const f32> {
    /// No matrix.
    pub const NONE: Self = Self {
        at: std::ptr::null(),
        row: 0,
    };

    /// The old values of the matrix `y`, or no matrix.
    pub(crate) fn old(y: *mut f32, row: usize, wanted: bool) -> Self {
        let at = y.cast_const();
        if wanted { Self { at, row } } else { Self::NONE }
    }

    /// The matrix from `row` and `column` on; no matrix if it is none.
    pub(crate) fn from(self, row: usize, column: usize) -> Self {
        let skip = if self.at.is_null() {
            0
        } else {
            row * self.row + column
        };
        Self {
            at: self.at.wrapping_add(skip),
            ..self
        }
    }
}

impl Rows<*mut f32> {
    /// No matrix.
    pub const NONE: Self = Self {
        at: std::ptr::null_mut(),
        row: 0,
    };
}

/// How a panel is stored: `f32`, or `bf16` widened in registers.
///
/// A row of a bf16 panel holds columns 0, 16, 1, 17, … so that one load, a shift and a mask give two
/// vectors of columns, 16 apart. Such a panel is always packed and padded.
///
/// # Safety
/// The methods read exactly the elements that they name.
pub unsafe trait Element: Copy + Send + Sync + 'static {
    /// Columns lie in pairs 16 apart, to be loaded by `pair`; otherwise in order, by `load`.
    const PAIRED: bool;
    /// Rows lie in pairs, multiplied as they are: see [`Pairs`]. What this file does is not for them.
    const DOTS: bool = false;

    /// Where column `j` of 32 lies in a panel row.
    #[must_use]
    fn place(j: usize) -> usize {
        if Self::PAIRED { j % 16 * 2 + j / 16 } else { j }
    }

    /// Where term `l` of column `j` lies in a panel.
    #[must_use]
    fn index(l: usize, j: usize) -> usize {
        l * NR + Self::place(j)
    }

    /// Rows of a panel of `k` terms.
    #[must_use]
    fn rows(k: usize) -> usize {
        k
    }

    /// Columns `j..j + V::LANES` and the same 16 columns later, of the panel row at `p`.
    ///
    /// # Safety
    /// 32 elements are readable, `j + LANES <= 16`, and the machine has the instructions of `V`.
    unsafe fn pair<V: Vector>(p: *const Self, j: usize) -> (V, V);

    /// Columns `j..j + V::LANES`; only those of `mask` if `MASK`. For rows in order.
    ///
    /// # Safety
    /// They are readable, and the machine has the instructions of `V`.
    unsafe fn load<V: Vector, const MASK: bool>(p: *const Self, j: usize, mask: V::Mask) -> V;
}

// SAFETY: the vector's own loads.
unsafe impl Element for f32 {
    const PAIRED: bool = false;

    #[inline(always)]
    unsafe fn pair<V: Vector>(p: *const Self, j: usize) -> (V, V) {
        // SAFETY: the caller's promise.
        unsafe { (V::load(p.add(j)), V::load(p.add(j + 16))) }
    }
    #[inline(always)]
    unsafe fn load<V: Vector, const MASK: bool>(p: *const Self, j: usize, mask: V::Mask) -> V {
        let at = p.wrapping_add(j);
        // SAFETY: the caller's promise.
        unsafe {
            if MASK {
                V::load_mask(at, mask)
            } else {
                V::load(at)
            }
        }
    }
}

// SAFETY: the vector's own load of `2 LANES` elements from `2 j` on.
unsafe impl Element for bf16 {
    const PAIRED: bool = true;

    #[inline(always)]
    unsafe fn pair<V: Vector>(p: *const Self, j: usize) -> (V, V) {
        // SAFETY: the caller's promise; `bf16` is a transparent `u16`.
        unsafe { V::load_bf16_pairs(p.add(2 * j).cast()) }
    }
    #[inline(always)]
    unsafe fn load<V: Vector, const MASK: bool>(p: *const Self, j: usize, _: V::Mask) -> V {
        debug_assert!(false, "bug in tallow: bf16 panels are loaded in pairs");
        // SAFETY: never asked for; still inside the row for what the caller promises.
        unsafe { V::load_bf16(p.add(j).cast()) }
    }
}

/// Computes `tile`.
///
/// # Safety
/// The machine has `isa`. All elements that [`Tile`] names are readable (`y`: writable, and readable
/// when accumulating), and `y` overlaps nothing that is read. `1 <= cols <= 32`.
pub unsafe fn run<E: Element>(isa: Isa, tile: &Tile<E>) {
    // SAFETY: the caller's promise; an empty tail names no elements.
    unsafe { run_with_tail(isa, tile, &Tail::NONE) }
}

/// Computes `tile` with the terms of `tail` in the same sums.
///
/// # Safety
/// As for [`run`], for the elements of `tail` too.
pub unsafe fn run_with_tail<E: Element>(isa: Isa, tile: &Tile<E>, tail: &Tail) {
    debug_assert!((1..=NR).contains(&tile.cols) && !E::DOTS);
    let fast = tile.m == 1 || (tile.x_row == 1 && (tail.k == 0 || tail.x_row == 1));
    let width = if E::PAIRED { NR } else { width(tile.cols) };
    debug_assert!(
        tile.padded || !E::PAIRED,
        "bug in tallow: bf16 panels are padded"
    );
    let mask = !tile.padded && tile.cols < width;
    // Eight columns fill half an AVX-512 vector; two AVX2 ones take the time of one. Same bits.
    let isa = if isa.is_512() && width == 8 {
        Isa::Avx2
    } else {
        isa
    };
    let limit = block_rows(isa, width);
    let blocks = tile.m.div_ceil(limit);
    let mut row = 0;
    for block in 0..blocks {
        // Even blocks: a lone last row would leave the multipliers waiting.
        let rows = (tile.m - row).div_ceil(blocks - block);
        // SAFETY: `rows <= limit <= MR` rows from `row` on are part of the tile.
        unsafe {
            let block = Block { tile, tail, row };
            match (fast, mask) {
                (true, false) => block_of::<E, true, false>(isa, &block, rows, width),
                (false, false) => block_of::<E, false, false>(isa, &block, rows, width),
                (_, true) => block_of::<E, false, true>(isa, &block, rows, width),
            }
        }
        row += rows;
    }
}

/// Columns that a register block works on: 8, 16 or 32.
#[inline(always)]
fn width(cols: usize) -> usize {
    match cols {
        0..=8 => 8,
        9..=16 => 16,
        _ => NR,
    }
}

/// Rows of a register block of `width` columns on `isa`.
fn block_rows(isa: Isa, width: usize) -> usize {
    let rows = match isa {
        Isa::Avx512 | Isa::Avx512Bf16 => MR,
        Isa::Avx2 | Isa::Neon => 3,
        Isa::Portable => 1,
    };
    (rows * NR / width).min(MR)
}

/// One register block: some rows of a tile, from `row` on. It is handed on by reference: a copy made just after it was written
/// waits until all sums of the block before have left the store queue.
struct Block<'a, E> {
    tile: &'a Tile<E>,
    tail: &'a Tail,
    row: usize,
}

/// # Safety
/// As for [`run_with_tail`]; `rows <= block_rows(isa, width)` rows from `block.row` on are in the tile.
unsafe fn block_of<E: Element, const FAST: bool, const MASK: bool>(
    isa: Isa,
    block: &Block<'_, E>,
    rows: usize,
    width: usize,
) {
    macro_rules! by_rows {
        ($width:literal: $($n:literal)*) => {
            match rows {
                // SAFETY: the caller's promise.
                $($n => unsafe { isa.dispatch(Registers::<E, $n, FAST, MASK, $width>(block)) },)*
                _ => unreachable!("bug in tallow: {rows} rows in a register block"),
            }
        };
    }
    match width {
        8 => by_rows!(8: 1 2 3 4 5 6 7 8 9 10 11 12),
        16 => by_rows!(16: 1 2 3 4 5 6 7 8 9 10 11 12),
        _ => by_rows!(32: 1 2 3 4 5 6 7 8 9 10 11 12),
    }
}

/// A register block of `R` rows. `FAST`: rows of `x` side by side. `MASK`: some columns of the panel
/// may not be read. `W`: columns worked on.
struct Registers<'a, E, const R: usize, const FAST: bool, const MASK: bool, const W: usize>(
    &'a Block<'a, E>,
);

/// Vectors a row of 32 columns may need: 8 of 4 lanes.
const MAX_VECTORS: usize = 8;

/// From this many terms on, asking for rows of `y` ahead costs next to nothing.
const FAR_TERMS: usize = 64;

type Sums<V, const R: usize> = [[V; MAX_VECTORS]; R];

impl<E: Element, const R: usize, const FAST: bool, const MASK: bool, const W: usize> Kernel
    for Registers<'_, E, R, FAST, MASK, W>
{
    type Output = ();

    #[inline(always)]
    unsafe fn call<V: Vector>(self) {
        // A block that the registers of `V` cannot hold is never asked for (`block_rows`).
        if R > V::TILE_ROWS * NR / W || W < V::LANES || (E::PAIRED && (W < NR || MASK)) {
            return;
        }
        let &Block { tile: t, tail, row } = self.0;
        // SAFETY: the caller's promise: `R` rows from `row` on, `cols` columns, are in the tile.
        unsafe {
            let mut sums: Sums<V, R> = [[V::zero(); MAX_VECTORS]; R];
            let y = t.y.wrapping_add(row * t.y_row);
            if t.k >= FAR_TERMS {
                // Rows of `y` lie far apart; ask for them now, to write them at once later.
                for i in 0..R {
                    prefetch(y.wrapping_add(i * t.y_row));
                    prefetch(y.wrapping_add(i * t.y_row + NR / 2));
                }
            }
            let terms = Terms {
                k: t.k,
                x: t.x.wrapping_add(row * t.x_row),
                x_row: t.x_row,
                x_col: t.x_col,
                panel: t.panel,
                panel_row: t.panel_row,
                cols: t.cols,
                next: self.next(),
            };
            terms.add::<V, R, FAST, MASK, W>(&mut sums);
            if tail.k > 0 {
                let terms = Terms {
                    k: tail.k,
                    x: tail.x.wrapping_add(row * tail.x_row),
                    x_row: tail.x_row,
                    x_col: tail.x_col,
                    panel: tail.panel,
                    panel_row: tail.panel_row,
                    cols: t.cols,
                    next: (tail.panel, 0),
                };
                terms.add::<V, R, FAST, MASK, W>(&mut sums);
            }
            let y = Rows {
                at: y,
                row: t.y_row,
            };
            write::<V, R, W>(&sums, y, t.cols, t.onto.from(row, 0));
        }
    }
}

impl<E: Element, const R: usize, const FAST: bool, const MASK: bool, const W: usize>
    Registers<'_, E, R, FAST, MASK, W>
{
    /// Where this block's part of the next panel begins, and how much of it each term asks for. Without a next panel it is
    /// the start of this one again and again, for a branch in the loop would cost more.
    fn next(&self) -> (*const E, usize) {
        let &Block { tile, row, .. } = self.0;
        let Next {
            at,
            row: first,
            rows,
        } = tile.next;
        if at.is_null() {
            return (tile.panel, 0);
        }
        let part = tile.k * NR * (first + row) / rows;
        (at.wrapping_add(part), (NR * R).div_ceil(rows))
    }
}

/// Terms of the sums of one register block.
struct Terms<E> {
    k: usize,
    x: *const f32,
    x_row: usize,
    x_col: usize,
    panel: *const E,
    panel_row: usize,
    cols: usize,
    /// What the first term asks memory for, and how much further the next one looks.
    next: (*const E, usize),
}

impl<E: Element> Terms<E> {
    /// # Safety
    /// The elements named are readable: `R` rows of `x` (rows 1 apart if `FAST`), and of the panel
    /// `cols` columns if `MASK`, else `W`.
    #[inline(always)]
    unsafe fn add<V: Vector, const R: usize, const FAST: bool, const MASK: bool, const W: usize>(
        &self,
        sums: &mut Sums<V, R>,
    ) {
        let vectors = W / V::LANES;
        let x_row = if FAST { 1 } else { self.x_row };
        let mut x = self.x;
        let mut p = self.panel;
        let (mut next, step) = self.next;
        // SAFETY: `l` stays below `k`; vectors beyond `cols` are fully masked.
        unsafe {
            let masks = masks::<V>(self.cols);
            for _ in 0..self.k {
                prefetch_far(next);
                next = next.wrapping_add(step);
                if V::LANES == 16 || W < NR {
                    // Registers for the panel's vectors; elements of `x` are broadcast operands.
                    let w = self.row::<V, MASK, W>(p, &masks);
                    for (i, row) in sums.iter_mut().enumerate() {
                        let a = V::splat(*x.add(i * x_row));
                        for j in 0..vectors {
                            row[j] = a.mul_add(w[j], row[j]);
                        }
                    }
                } else {
                    // Fewer registers: keep the elements of `x`, and a pair of the panel's vectors.
                    let mut a = [V::zero(); R];
                    for (i, a) in a.iter_mut().enumerate() {
                        *a = V::splat(*x.add(i * x_row));
                    }
                    for j in 0..vectors / 2 {
                        let upper = j + vectors / 2;
                        let (lo, hi) = self.pair::<V, MASK>(p, j, (masks[j], masks[upper]));
                        for (i, row) in sums.iter_mut().enumerate() {
                            row[j] = a[i].mul_add(lo, row[j]);
                        }
                        for (i, row) in sums.iter_mut().enumerate() {
                            row[upper] = a[i].mul_add(hi, row[upper]);
                        }
                    }
                }
                x = x.wrapping_add(self.x_col);
                p = p.wrapping_add(self.panel_row);
            }
        }
    }

    /// The vectors of the panel row at `p`.
    ///
    /// # Safety
    /// As for [`Terms::add`].
    #[inline(always)]
    unsafe fn row<V: Vector, const MASK: bool, const W: usize>(
        &self,
        p: *const E,
        masks: &[V::Mask; MAX_VECTORS],
    ) -> [V; MAX_VECTORS] {
        let vectors = W / V::LANES;
        // SAFETY: the caller's promise; a paired row is 32 columns wide.
        unsafe {
            let mut w = [V::zero(); MAX_VECTORS];
            if E::PAIRED {
                for j in 0..vectors / 2 {
                    (w[j], w[j + vectors / 2]) = E::pair(p, j * V::LANES);
                }
            } else {
                for (j, w) in w.iter_mut().enumerate().take(vectors) {
                    *w = E::load::<V, MASK>(p, j * V::LANES, masks[j]);
                }
            }
            w
        }
    }

    /// Vector `j` of the panel row at `p`, and the one 16 columns later.
    ///
    /// # Safety
    /// As for [`Terms::add`]; the row is 32 columns wide.
    #[inline(always)]
    unsafe fn pair<V: Vector, const MASK: bool>(
        &self,
        p: *const E,
        j: usize,
        masks: (V::Mask, V::Mask),
    ) -> (V, V) {
        // SAFETY: the caller's promise.
        unsafe {
            if MASK {
                let upper = j * V::LANES + NR / 2;
                (
                    E::load::<V, true>(p, j * V::LANES, masks.0),
                    E::load::<V, true>(p, upper, masks.1),
                )
            } else {
                E::pair(p, j * V::LANES)
            }
        }
    }
}

/// Lanes of vector `j` that hold columns below `cols`.
#[inline(always)]
fn lanes<V: Vector>(cols: usize, j: usize) -> usize {
    cols.saturating_sub(j * V::LANES).min(V::LANES)
}

/// # Safety
/// The machine has the instructions of `V`.
#[inline(always)]
unsafe fn masks<V: Vector>(cols: usize) -> [V::Mask; MAX_VECTORS] {
    // SAFETY: the caller's promise; `lanes` is at most `LANES`.
    unsafe {
        let mut masks = [V::mask(0); MAX_VECTORS];
        for (j, mask) in masks.iter_mut().enumerate().take(NR / V::LANES) {
            *mask = V::mask(lanes::<V>(cols, j));
        }
        masks
    }
}

/// Writes the sums of a register block.
///
/// # Safety
/// `cols` elements of `R` rows of `y` are writable, and those of `onto` readable.
#[inline(always)]
unsafe fn write<V: Vector, const R: usize, const W: usize>(
    sums: &Sums<V, R>,
    y: Rows<*mut f32>,
    cols: usize,
    onto: Rows<*const f32>,
) {
    let vectors = W / V::LANES;
    // SAFETY: the caller's promise.
    unsafe {
        let masks = masks::<V>(cols);
        for (i, row) in sums.iter().enumerate() {
            for j in 0..vectors {
                let at = y.at.wrapping_add(i * y.row + j * V::LANES);
                let old = onto.from(i, j * V::LANES).at;
                put(row[j], at, old, cols < W, masks[j]);
            }
        }
    }
}

/// Writes one vector of sums. Masked stores are slow, so `part` says whether one is needed.
///
/// # Safety
/// The elements of `mask`, or all if not `part`, are writable at `at`, and readable at `old` unless that is null.
#[inline(always)]
unsafe fn put<V: Vector>(sum: V, at: *mut f32, old: *const f32, part: bool, mask: V::Mask) {
    // SAFETY: the caller's promise.
    unsafe {
        match (part, !old.is_null()) {
            (false, false) => sum.store(at),
            (false, true) => sum.add(V::load(old)).store(at),
            (true, false) => sum.store_mask(at, mask),
            (true, true) => sum.add(V::load_mask(old, mask)).store_mask(at, mask),
        }
    }
}

#[cfg(test)]
mod tests;
