//! The LoRA linear: the adapter rides in the matrix product, forward and backward; and its gradients.
//! Invariant: an output's bits depend on the instruction set and on the sizes it is a sum over, not
//! on the number of rows, the threads, or which other projections share the call (one row with a
//! turned `A` has bits of its own).
//! Absent on purpose: gradients of frozen weights, dropout, merging an adapter into a weight.
//!
//! A *linear* has one input `x: [m, k]` and blocks (projections that share `x`: q, k, v). Block `i`
//! has `n_i` outputs, weights `W_i: [n_i, k]` in panels (see [`pack_nk`]), and optionally an adapter
//! `A_i: [r_i, k]`, `B_i: [n_i, r_i]`, scale `s_i`. Outputs of all blocks lie side by side.
//!
//! Forward: `h_i = x A_iᵀ` for a block of rows, then for each panel of `W_i` the sum runs over `k`
//! and on over `r_i` in the same registers: `y_i = [x | h_i] [W_i | s_i B_i]ᵀ`. Backward:
//! `dh_i = s_i dy_i B_i`, then `dx = sum_i [dy_i | dh_i] [W_i ; A_i]`, again one sum a register.
//!
//! Several adapters side by side have equal *shares* of the rows. `W` is read once for all of them; each tail is
//! that of its own rows, so one adapter's numbers never meet another's.

mod backward;
mod dots;
mod forward;
mod gemm;
mod outer;
mod pack;
mod product;
mod split;
mod thin;

pub use crate::tile::Rows;
pub use backward::{Backward, backward, backward_workspace};
pub use forward::{Forward, forward, forward_workspace};
pub use gemm::{Gemm, Strided, gemm, gemm_workspace};
pub use outer::{Outer, outer};
pub use pack::{Packed, Source, head_len, pack_head, pack_kn, pack_nk, pack_tail, packed_len};
pub use thin::{THIN, Thin, thin};

/// An adapter of one block. Matrices are row-major and dense.
#[derive(Clone, Copy, Debug)]
pub struct Adapter {
    /// `r`, at least 1.
    pub rank: usize,
    /// `s`: what the branch is multiplied by.
    pub scale: f32,
    /// `A: [r, k]`.
    pub a: *const f32,
    /// `B: [n, r]`. May be null in a forward product with `tail`.
    pub b: *const f32,
    /// `s B` packed by [`pack_tail`], or null: then the forward product packs `b` as it goes.
    pub tail: *const f32,
    /// `A` turned by [`pack_head`], or null. With `tail` and one row, `h` is then summed in the same
    /// pass over `x` as `y`, and `a` is not read; its last bits differ from those of `a`'s way.
    pub turned: *const f32,
}

/// One projection of a linear. `E` is what its panels are made of: `f32` or `bf16`.
#[derive(Clone, Copy, Debug)]
pub struct Block<E = f32> {
    /// Outputs.
    pub n: usize,
    /// Panels: from [`pack_nk`] in a forward product, from [`pack_kn`] in a backward one.
    pub weights: *const E,
    /// `[n]`, or null. The backward product ignores it.
    pub bias: *const f32,
    /// The adapter, if this projection has one.
    pub adapter: Option<Adapter>,
}

impl<E> Block<E> {
    fn rank(&self) -> usize {
        self.adapter.map_or(0, |a| a.rank)
    }
}

/// Which rows belong to which adapter.
#[derive(Clone, Copy, Debug)]
struct Shares {
    /// Rows of each, at least 1.
    rows: usize,
}

/// Rows `start..end` of a task that belong to one share.
#[derive(Clone, Copy, Debug)]
struct Segment {
    share: usize,
    start: usize,
    end: usize,
}

impl Shares {
    fn new(m: usize, count: usize) -> Self {
        Self {
            rows: (m / count).max(1),
        }
    }

    /// The rows `row..row + m`, cut where a share ends.
    fn cut(self, row: usize, m: usize) -> impl Iterator<Item = Segment> {
        let mut start = 0;
        std::iter::from_fn(move || {
            let share = (row + start) / self.rows;
            let end = m.min((share + 1) * self.rows - row);
            let segment = Segment { share, start, end };
            let more = start < m;
            start = end;
            more.then_some(segment)
        })
    }
}

/// The blocks of one share: all of them lie share after share.
fn blocks_of<E>(all: &[Block<E>], shares: usize, share: usize) -> &[Block<E>] {
    let count = all.len() / shares;
    &all[share * count..(share + 1) * count]
}

/// `h` or `dh` of a block in a task's scratch: room for a row of its largest rank over the shares.
#[derive(Clone, Copy, Debug)]
struct Held {
    at: *mut f32,
    /// Floats of room for a row; 0 where no share has an adapter.
    row: usize,
}

impl Held {
    /// Of block `i`, where those of all blocks lie one behind the other from `at` on.
    fn new<E>(at: *mut f32, all: &[Block<E>], shares: usize, i: usize) -> Self {
        let before: usize = (0..i).map(|i| widest(all, shares, i)).sum();
        Self {
            at: at.wrapping_add(split::MAX_ROWS * before),
            row: widest(all, shares, i),
        }
    }

    /// Where the rows of a segment begin; they are as far apart as its own rank.
    fn of(self, segment: Segment) -> *mut f32 {
        self.at.wrapping_add(segment.start * self.row)
    }
}

/// The largest rank of a block over the shares.
fn widest<E>(all: &[Block<E>], shares: usize, block: usize) -> usize {
    let each = (0..shares).map(|g| blocks_of(all, shares, g)[block].rank());
    each.max().unwrap_or(0)
}

/// The sum of the blocks' largest ranks, and the largest of all.
fn ranks<E>(all: &[Block<E>], shares: usize) -> (usize, usize) {
    let count = all.len() / shares;
    let each = |i: usize| widest(all, shares, i);
    let largest = (0..count).map(each).max().unwrap_or(0);
    ((0..count).map(each).sum(), largest)
}

/// Adds a row vector to the rows of `y: [m, cols]`.
///
/// # Safety
/// The elements are readable and those of `y` writable.
unsafe fn add_row(m: usize, cols: usize, y: Rows<*mut f32>, row: *const f32) {
    for i in 0..m {
        // SAFETY: `i < m` and `j < cols`.
        unsafe {
            let y = std::slice::from_raw_parts_mut(y.at.add(i * y.row), cols);
            let row = std::slice::from_raw_parts(row, cols);
            y.iter_mut().zip(row).for_each(|(y, b)| *y += b);
        }
    }
}

/// A pointer (or a struct of them) that tasks share. Each kernel says why its tasks may.
#[derive(Clone, Copy)]
struct Raw<T>(T);

impl<T: Copy> Raw<T> {
    fn get(&self) -> T {
        self.0
    }
}

// SAFETY: moving a pointer between threads is harmless; what is done with it is the kernel's promise.
unsafe impl<T> Send for Raw<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Raw<T> {}

#[cfg(test)]
mod tests;
