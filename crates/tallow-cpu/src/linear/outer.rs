//! Gradients of an adapter: `out = scale aᵀ b` for an `a` of few columns, summed over many rows.
//! Invariant: a sum runs over the rows in order, in pieces of a fixed length: no bit depends on
//! threads.
//! Absent on purpose: splitting the sum between threads. Threads split the columns of `b`.

use super::{Raw, Rows};
use crate::exec::Exec;
use crate::tile::{self, MR, NR, Tile};

/// Rows summed before going on to the next columns: their part of `a` and `b` stays near.
const PIECE: usize = 256;

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
    let each = (12_000 / (job.m * (2 * job.r).max(5)).max(1)).max(1);
    let most = panels.div_ceil(exec.pool.threads() * 2).max(1);
    let each = each.min(if job.m * job.r * job.n < 30_000 {
        panels.max(1)
    } else {
        most
    });
    let shared = Raw(*job);
    exec.pool.run(panels.div_ceil(each), &|task, _| {
        for p in task * each..panels.min((task + 1) * each) {
            // SAFETY: the caller's promise; each task writes columns of its own.
            unsafe { panel(exec, &shared.get(), p) };
        }
    });
}

/// Columns `32 p` and on.
///
/// # Safety
/// As for [`outer`].
unsafe fn panel(exec: Exec<'_>, job: &Outer, p: usize) {
    let cols = (job.n - p * NR).min(NR);
    let mut sums = [0.0f32; MR * NR];
    // Even blocks of at most 12 columns of `a`.
    let block = job.r.div_ceil(job.r.div_ceil(MR).max(1)).max(1);
    for i in (0..job.r).step_by(block) {
        let rows = (job.r - i).min(block);
        for t in (0..job.m.max(1)).step_by(PIECE) {
            let tile = Tile {
                m: rows,
                k: (job.m - t).min(PIECE),
                x: job.a.at.wrapping_add(t * job.a.row + i),
                x_row: 1,
                x_col: job.a.row,
                panel: job.b.at.wrapping_add(t * job.b.row + p * NR),
                panel_row: job.b.row,
                padded: false,
                y: sums.as_mut_ptr(),
                y_row: NR,
                cols,
                accumulate: t > 0,
            };
            // SAFETY: rows `t..` and columns `i..`, `32 p..` are inside; `sums` has `MR` rows of 32.
            unsafe { tile::run(exec.isa, &tile) };
        }
        for (row, sums) in sums.chunks_exact(NR).enumerate().take(rows) {
            for (j, sum) in sums.iter().enumerate().take(cols) {
                let (row, column) = (i + row, p * NR + j);
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
