//! Gradients of an adapter: `out = scale aᵀ b` for an `a` of few columns, summed over many rows.
//! Invariant: a sum runs over the rows in order, in pieces of a fixed length: no bit depends on
//! threads.
//! Absent on purpose: splitting the sum between threads. Threads split the columns of `b`.

use super::{Raw, Rows};
use crate::exec::Exec;
use crate::simd::{Isa, prefetch_far};
use crate::tile::{self, MR, NR, Next, Tile};

/// Rows summed before going on to the next columns: their part of `a` and `b` stays near.
const PIECE: usize = 128;
/// Panels of a task that are worked on side by side, so that rows of `b` are read in long runs.
const WIDE: usize = 16;

/// `out[i, j] = scale * sum_t a[t, i] * b[t, j]`, `t < m`, `i < r`, `j < n`.
/// `dA = dhᵀ x` is this with `a = dh`, `b = x`; `dB = s dyᵀ h` with `a = h`, `b = dy`, transposed.
#[derive(Clone, Copy, Debug)]
pub struct Outer {
    /// Rows of `a` and `b`.
    pub m: usize,
    /// Columns of `a`: few.
    pub r: usize,
    /// Columns of `b`.
    pub n: usize,
    /// What the sums are multiplied by.
    pub scale: f32,
    /// `[m, r]`
    pub a: Rows<*const f32>,
    /// `[m, n]`
    pub b: Rows<*const f32>,
    /// `[r, n]`, written; `[n, r]` if `transposed`.
    pub out: Rows<*mut f32>,
    /// Writes the transposed result.
    pub transposed: bool,
}

/// Computes `job` on the threads of `exec`.
///
/// # Safety
/// The machine has `exec.isa`; the matrices are readable and writable as [`Outer`] says, and `out`
/// overlaps neither `a` nor `b`.
pub unsafe fn outer(exec: Exec<'_>, job: &Outer) {
    let panels = job.n.div_ceil(NR);
    // A panel's row costs two cycles a column of `a`; a task should take some microseconds.
    let enough = 12_000 / (job.m * (2 * job.r).max(5)).max(1);
    let share = panels.div_ceil(exec.pool.threads() * 3);
    let each = enough.max(share).clamp(1, WIDE);
    let shared = Raw(*job);
    exec.pool.run(panels.div_ceil(each), &|task, _| {
        let job = shared.get();
        // Even blocks of at most `MR` columns of `a`.
        let block = job.r.div_ceil(job.r.div_ceil(MR).max(1)).max(1);
        for i in (0..job.r).step_by(block) {
            let part = Part {
                job,
                i,
                rows: (job.r - i).min(block),
                first: task * each,
                panels: panels.min((task + 1) * each) - task * each,
            };
            // SAFETY: the caller's promise; each task writes columns of its own.
            unsafe { part.run(exec.isa) };
        }
    });
}

/// Rows `i..i + rows` of the result, `panels <= WIDE` panels of it from panel `first` on.
struct Part {
    job: Outer,
    i: usize,
    rows: usize,
    first: usize,
    panels: usize,
}

impl Part {
    /// # Safety
    /// As for [`outer`]; `rows <= MR`.
    unsafe fn run(&self, isa: Isa) {
        let job = &self.job;
        let mut sums = [0.0f32; WIDE * MR * NR];
        for t in (0..job.m.max(1)).step_by(PIECE) {
            for (p, sums) in sums.chunks_exact_mut(MR * NR).enumerate().take(self.panels) {
                let column = (self.first + p) * NR;
                let tile = Tile {
                    m: self.rows,
                    k: (job.m - t).min(PIECE),
                    x: job.a.at.wrapping_add(t * job.a.row + self.i),
                    x_row: 1,
                    x_col: job.a.row,
                    panel: job.b.at.wrapping_add(t * job.b.row + column),
                    panel_row: job.b.row,
                    padded: false,
                    y: sums.as_mut_ptr(),
                    y_row: NR,
                    cols: (job.n - column).min(NR),
                    onto: Rows::old(sums.as_mut_ptr(), NR, t > 0),
                    next: Next::NONE,
                };
                self.ahead(t, p);
                // SAFETY: rows `t..`, columns `i..` and `column..` are inside; `sums` has `MR` rows
                // of 32.
                unsafe { tile::run(isa, &tile) };
            }
        }
        for (p, sums) in sums.chunks_exact(MR * NR).enumerate().take(self.panels) {
            // SAFETY: the caller's promise.
            unsafe { self.write(sums, (self.first + p) * NR) };
        }
    }

    /// Asks for the next piece of `b`, some rows of it with each panel `p` of this one: row by row,
    /// in the order of memory. The tiles read short runs of many rows, which is slow from afar.
    fn ahead(&self, t: usize, p: usize) {
        let b = self.job.b;
        let next = t + PIECE;
        let first = next + p * PIECE / self.panels;
        let last = next + (p + 1) * PIECE / self.panels;
        for row in first..last.min(self.job.m) {
            let at = b.at.wrapping_add(row * b.row + self.first * NR);
            for line in 0..self.panels * NR / 16 {
                prefetch_far(at.wrapping_add(line * 16));
            }
        }
    }

    /// Writes `rows` rows of a panel whose columns begin at `column`.
    ///
    /// # Safety
    /// As for [`outer`].
    unsafe fn write(&self, sums: &[f32], column: usize) {
        let job = &self.job;
        for (row, sums) in sums.chunks_exact(NR).enumerate().take(self.rows) {
            for (j, sum) in sums.iter().enumerate().take(job.n - column) {
                let (row, column) = (self.i + row, column + j);
                let at = match job.transposed {
                    false => row * job.out.row + column,
                    true => column * job.out.row + row,
                };
                // SAFETY: `row < r` and `column < n`.
                unsafe { *job.out.at.add(at) = job.scale * sum };
            }
        }
    }
}
