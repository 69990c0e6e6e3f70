//! The general product `c = alpha a b`, batched, with any strides on `a` and `b`.
//! Invariant: a sum runs over `k` in order, in pieces of a fixed length; where `a` has few rows and
//! both run along `k`, it is a dot product in lanes instead (the one case where bits depend on `m`).
//! Absent on purpose: accumulating into `c`, and transposed `c`.

use std::ops::Range;

use super::dots::{self, Dots};
use super::pack::turn;
use super::split::Split;
use super::{Raw, Rows};
use crate::exec::Exec;
use crate::tile::{self, MR, NR, Next, Tile};

/// Terms of a sum that are worked on at a time: a panel of `b` packed for them is 32 KiB.
const PIECE: usize = 256;
/// From this many rows of `a` on, a panel of `b` is packed even if its rows are contiguous.
const PACK_ROWS: usize = 36;
/// The most rows of a task: a packed panel is used for all of them.
const MAX_ROWS: usize = 32 * MR;
/// The fewest, where there are more.
const MIN_ROWS: usize = 12 * MR;
/// What a copied row of `a` is longer than its piece, so that rows do not fight for cache lines.
const APART: usize = 16;
/// Up to this many rows of `a`, dot products beat packing.
const DOT_ROWS: usize = 4;

/// `c[g, i, j] = alpha * sum_l a[g, i, l] * b[g, l, j]` for each `g < batch`. Strides count elements.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// Products.
    pub batch: usize,
    /// Rows of `a` and `c`.
    pub m: usize,
    /// Columns of `b` and `c`.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// What the sums are multiplied by.
    pub alpha: f32,
    /// The left factors.
    pub a: Strided,
    /// The right factors.
    pub b: Strided,
    /// The first result, written.
    pub c: Rows<*mut f32>,
    /// Distance between results.
    pub c_batch: usize,
}

/// Matrices: element `(g, i, j)` at `at + g * batch + i * row + j * col`.
#[derive(Clone, Copy, Debug)]
pub struct Strided {
    /// Element `(0, 0, 0)`.
    pub at: *const f32,
    /// Distance between matrices; 0 to use one for all.
    pub batch: usize,
    /// Distance between rows.
    pub row: usize,
    /// Distance between columns.
    pub col: usize,
}

/// Floats of workspace that [`gemm`] needs, for any sizes.
#[must_use]
pub fn gemm_workspace(threads: usize) -> usize {
    threads * SCRATCH
}

/// Floats of one worker: a panel of `b`, the rows of `a`.
const SCRATCH: usize = PIECE * NR + MAX_ROWS * (PIECE + APART);

/// Computes `job` on the threads of `exec`.
///
/// # Safety
/// The machine has `exec.isa`; the matrices are readable and writable as [`Gemm`] says, and `c`
/// overlaps neither `a` nor `b`.
///
/// # Panics
/// If `workspace` is shorter than [`gemm_workspace`].
pub unsafe fn gemm(exec: Exec<'_>, job: &Gemm, workspace: &mut [f32]) {
    let threads = exec.pool.threads();
    assert!(
        workspace.len() >= gemm_workspace(threads),
        "bug in tallow: gemm: workspace too small"
    );
    let extents = (job.m, job.n.div_ceil(NR), job.k);
    let split = Split::new(
        extents,
        MIN_ROWS..=MAX_ROWS,
        threads.div_ceil(job.batch.max(1)),
    );
    let tasks = split.tasks();
    // Small products of a large batch go together.
    let cycles = job.n.div_ceil(NR) * job.k * (2 * job.m).max(5) / tasks.max(1);
    let most = (job.batch * tasks).div_ceil(threads * 4).max(1);
    let each = (6000 / cycles.max(1)).clamp(1, most);
    let shared = Raw((*job, workspace.as_mut_ptr()));
    exec.pool
        .run((job.batch * tasks).div_ceil(each), &|group, worker| {
            let (job, workspace) = shared.get();
            for task in group * each..(job.batch * tasks).min((group + 1) * each) {
                let g = task / tasks;
                let (_, rows, panels) = split.task(task % tasks);
                let scratch = workspace.wrapping_add(worker * SCRATCH);
                let part = Part {
                    exec,
                    job: &job,
                    g,
                    rows,
                    scratch,
                };
                // SAFETY: the caller's promise; each task writes rows and columns of its own and each
                // worker scratch of its own.
                unsafe { part.run(panels) };
            }
        });
}

/// Some rows of one product of the batch.
struct Part<'a> {
    exec: Exec<'a>,
    job: &'a Gemm,
    g: usize,
    rows: Range<usize>,
    scratch: *mut f32,
}

impl Part<'_> {
    /// # Safety
    /// As for [`gemm`], for these rows and panels and this worker's scratch.
    unsafe fn run(&self, panels: Range<usize>) {
        let Gemm { m, n, k, a, b, .. } = *self.job;
        let column = |p: usize| (p * NR, (n - p * NR).min(NR));
        // SAFETY: the caller's promise, for each panel.
        unsafe {
            if a.col == 1 && b.row == 1 && m <= DOT_ROWS {
                for p in panels.clone() {
                    let (first, cols) = column(p);
                    self.dots(first, cols);
                }
            } else {
                for l in (0..k.max(1)).step_by(PIECE) {
                    let l = l..k.min(l + PIECE);
                    let rows = self.near(l.clone());
                    for p in panels.clone() {
                        let (first, cols) = column(p);
                        self.tile(rows, first, cols, l.clone());
                    }
                }
            }
            for p in panels {
                let (first, cols) = column(p);
                self.scale(first, cols);
            }
        }
    }

    fn a(&self) -> *const f32 {
        let a = self.job.a;
        a.at.wrapping_add(self.g * a.batch + self.rows.start * a.row)
    }

    fn b(&self, l: usize, column: usize) -> *const f32 {
        let b = self.job.b;
        b.at.wrapping_add(self.g * b.batch + l * b.row + column * b.col)
    }

    fn c(&self, column: usize) -> *mut f32 {
        let job = self.job;
        job.c
            .at
            .wrapping_add(self.g * job.c_batch + self.rows.start * job.c.row + column)
    }

    /// # Safety
    /// As for [`Part::run`]; `a` and `b` run along `k`.
    unsafe fn dots(&self, column: usize, cols: usize) {
        let job = self.job;
        let dots = Dots {
            m: self.rows.len(),
            n: cols,
            k: job.k,
            x: self.a(),
            x_row: job.a.row,
            w: self.b(0, column),
            w_row: job.b.col,
            y: self.c(column),
            y_row: job.c.row,
        };
        // SAFETY: the caller's promise.
        unsafe { dots::run(self.exec.isa, &dots) };
    }

    /// Terms `l` of the rows of `a`, and their strides; copied unless rows lie side by side in memory
    /// at a harmless distance.
    ///
    /// # Safety
    /// As for [`Part::run`]; `l.len() <= PIECE`.
    unsafe fn near(&self, l: Range<usize>) -> (*const f32, usize, usize) {
        let (a, m) = (self.job.a, self.rows.len());
        let from = self.a().wrapping_add(l.start * a.col);
        if a.col == 1 && !(a.row * size_of::<f32>()).is_multiple_of(4096) || m < MR {
            return (from, a.row, a.col);
        }
        let to = self.scratch.wrapping_add(PIECE * NR);
        // SAFETY: `m <= MAX_ROWS` rows of `PIECE + APART` floats fit the scratch.
        unsafe {
            if a.row == 1 {
                for i in 0..l.len() {
                    std::ptr::copy_nonoverlapping(from.add(i * a.col), to.add(i * m), m);
                }
                return (to, 1, m);
            }
            for i in 0..m {
                for j in 0..l.len() {
                    *to.add(i * (PIECE + APART) + j) = *from.add(i * a.row + j * a.col);
                }
            }
        }
        (to, PIECE + APART, 1)
    }

    /// Adds (or sets, for the first) the terms `l` of the rows `x`, given with their strides.
    ///
    /// # Safety
    /// As for [`Part::run`].
    unsafe fn tile(
        &self,
        (x, x_row, x_col): (*const f32, usize, usize),
        column: usize,
        cols: usize,
        l: Range<usize>,
    ) {
        let job = self.job;
        let pack = job.b.col != 1 || self.rows.len() >= PACK_ROWS;
        if pack {
            // SAFETY: at most `PIECE` rows of 32 floats fit the scratch; the caller's promise.
            unsafe { self.pack(column, cols, l.clone()) };
        }
        let tile = Tile {
            m: self.rows.len(),
            k: l.len(),
            x,
            x_row,
            x_col,
            panel: if pack {
                self.scratch
            } else {
                self.b(l.start, column)
            },
            panel_row: if pack { NR } else { job.b.row },
            padded: pack,
            y: self.c(column),
            y_row: job.c.row,
            cols,
            onto: Rows::old(self.c(column), job.c.row, l.start > 0),
            next: Next::NONE,
        };
        // SAFETY: the caller's promise.
        unsafe { tile::run(self.exec.isa, &tile) };
    }

    /// Copies terms `l` of a panel of `b` to scratch, columns beyond `cols` zero.
    ///
    /// # Safety
    /// As for [`Part::run`]; `l.len() <= PIECE`.
    unsafe fn pack(&self, column: usize, cols: usize, l: Range<usize>) {
        let b = self.job.b;
        let (terms, from) = (l.len(), self.b(l.start, column));
        // SAFETY: rows `l` and columns `column..column + cols` of `b` exist; the scratch holds
        // `terms` rows of 32.
        unsafe {
            let row = |i: usize| self.scratch.add(i * NR);
            if cols < NR {
                (0..terms).for_each(|i| std::ptr::write_bytes(row(i).add(cols), 0, NR - cols));
            }
            if b.col == 1 {
                for i in 0..terms {
                    std::ptr::copy_nonoverlapping(from.add(i * b.row), row(i), cols);
                }
                return;
            }
            let (mut whole, mut across) = (0, 0);
            if b.row == 1 {
                (whole, across) = (terms - terms % 4, cols - cols % 4);
                turn(from, b.col, (whole, across), 1.0, self.scratch);
            }
            for i in 0..terms {
                for j in if i < whole { across } else { 0 }..cols {
                    *row(i).add(j) = *from.add(i * b.row + j * b.col);
                }
            }
        }
    }

    /// Multiplies the columns written by `alpha`.
    ///
    /// # Safety
    /// As for [`Part::run`].
    unsafe fn scale(&self, column: usize, cols: usize) {
        let job = self.job;
        if job.alpha == 1.0 {
            return;
        }
        for i in 0..self.rows.len() {
            // SAFETY: row `i` of this part exists in `c`, and its columns from `column` on.
            let row =
                unsafe { std::slice::from_raw_parts_mut(self.c(column).add(i * job.c.row), cols) };
            row.iter_mut().for_each(|v| *v *= job.alpha);
        }
    }
}
