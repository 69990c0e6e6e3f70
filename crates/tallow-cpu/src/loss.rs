//! Cross entropy over a projection: `nll = logsumexp(x Wᵀ) - (x Wᵀ)[target]` and its gradient by `x`.
//! Invariant: a worker holds 128 logits of 32 rows at a time and reads `W` once for those rows;
//! rows that are not counted cost nothing; a row's bits depend on that row and `W` alone.
//! Absent on purpose: gradients of `W`, and, in f32, a second layout of `W` for the second product.
//!
//! Rows are lanes: logits are made as `[128, 32]` with `W` as the left side of the product, read in
//! whatever layout it has. So softmax, with a running maximum, needs no sums across lanes. The
//! gradient, `Wᵀ p` over panels and `pᵀ W` over rows, reads each piece of `W` right after that (in pairs of bf16
//! another copy of it, see [`PairWeights`]).

use std::ops::Range;

use crate::exec::{Exec, RowKernel, spans};
use crate::lanes::{LANES, Row, Softmax, transpose};
use crate::norm::Rows;
use crate::simd::{Isa, Vector};
use crate::tile::{self, NR, Next, Tile};
use crate::vecmath::log_lane;

mod pairs;
pub use pairs::PairWeights;

/// Classes of a piece.
const PIECE: usize = 4 * NR;

/// How the weights `[v, c]` lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightLayout {
    /// Row-major, rows that many elements apart: a checkpoint's embedding or head.
    Rows(usize),
    /// Panels `[v / 32][c][32]`, zero beyond `v`: as packed for the forward product.
    Panels,
    /// Pairs of bf16, for [`Isa::Avx512Bf16`]. `w` is not read.
    Pairs(PairWeights),
}

/// Arguments of cross entropy.
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropy {
    /// Rows.
    pub rows: usize,
    /// Columns of `x`.
    pub c: usize,
    /// Classes: rows of `w`.
    pub v: usize,
    /// Input `[rows, c]`.
    pub x: Rows,
    /// Weights `[v, c]`.
    pub w: *const f32,
    /// Their layout.
    pub layout: WeightLayout,
    /// Targets `[rows]`; one at or above `v` is not counted.
    pub targets: *const u32,
    /// Negative log likelihood `[rows]` in nats; 0 where not counted.
    pub nll: *mut f32,
    /// Gradient of each row's `nll` by that row, `[rows, c]`, or null; 0 where not counted.
    pub dx: Rows<*mut f32>,
    /// Scratch of [`CrossEntropy::workspace_elems`].
    pub workspace: *mut f32,
}

impl CrossEntropy {
    /// Scratch elements for `[rows, c]` on `threads` workers.
    #[must_use]
    pub fn workspace_elems(rows: usize, c: usize, threads: usize) -> usize {
        rows.next_multiple_of(16) + threads * Self::worker_elems(c)
    }

    fn worker_elems(c: usize) -> usize {
        // Rows (then their gradient), rows as lanes, logits, those in pairs.
        2 * LANES * c.next_multiple_of(NR) + LANES * PIECE + pairs::PAIR_ELEMS
    }

    /// Computes `nll` and `dx`.
    ///
    /// # Safety
    /// Pointers cover what they are said to; outputs and workspace overlap nothing; the machine
    /// has `exec.isa`.
    pub unsafe fn run(&self, exec: Exec<'_>) {
        // SAFETY: the caller's promise; the list of rows lies before the workers' scratch.
        unsafe {
            let list = self.workspace.cast::<u32>();
            let n = self.list_counted(list);
            let threads = exec.pool.threads();
            // Fewer lanes a chunk where that gives more threads something to do.
            let lanes = [LANES, 16, 8]
                .into_iter()
                .find(|l| n.div_ceil(*l) >= threads)
                .unwrap_or(8);
            let chunks = n.div_ceil(lanes);
            let kernel = Chunks {
                args: self,
                isa: exec.isa,
                list: std::slice::from_raw_parts(list, n),
                lanes,
            };
            let work_ns = n * self.c * self.v / 25;
            exec.tasks(chunks, if work_ns < 10_000 { 1 } else { chunks }, &kernel);
        }
    }

    /// Lists the rows that count and zeroes the results of the others.
    ///
    /// # Safety
    /// As for [`CrossEntropy::run`]; `list` has room for all rows.
    unsafe fn list_counted(&self, list: *mut u32) -> usize {
        let mut n = 0;
        for i in 0..self.rows {
            // SAFETY: `i < rows` and `n <= i`.
            unsafe {
                if (*self.targets.add(i) as usize) < self.v {
                    *list.add(n) = i as u32;
                    n += 1;
                } else {
                    *self.nll.add(i) = 0.0;
                    if !self.dx.ptr.is_null() {
                        self.dx.at(i).write_bytes(0, self.c);
                    }
                }
            }
        }
        n
    }

    /// Distances `(panel, class, column)` of the weights: class `32 p + i`, column `l` is at
    /// `p * panel + i * class + l * column`.
    fn strides(&self) -> (usize, usize, usize) {
        match self.layout {
            WeightLayout::Rows(ld) => (NR * ld, ld, 1),
            WeightLayout::Panels | WeightLayout::Pairs(_) => (NR * self.c, 1, NR),
        }
    }
}

/// Counted rows in chunks of `lanes`.
struct Chunks<'a> {
    args: &'a CrossEntropy,
    isa: Isa,
    list: &'a [u32],
    lanes: usize,
}

// SAFETY: a chunk writes the results of its own rows.
unsafe impl RowKernel for Chunks<'_> {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, chunks: Range<usize>, worker: usize) {
        for chunk in chunks {
            let first = chunk * self.lanes;
            let rows = &self.list[first..self.list.len().min(first + self.lanes)];
            // SAFETY: the caller's promise.
            unsafe { self.chunk::<V>(rows, worker) }
        }
    }
}

impl Chunks<'_> {
    /// # Safety
    /// As for [`CrossEntropy::run`]; `rows` are at most 32 rows of this task, scratch is `worker`'s.
    #[inline(always)]
    unsafe fn chunk<V: Vector>(&self, rows: &[u32], worker: usize) {
        let a = self.args;
        let padded = a.c.next_multiple_of(NR);
        // SAFETY: the workspace has `worker_elems` for each worker after the list.
        unsafe {
            let scratch = a
                .workspace
                .add(a.rows.next_multiple_of(16) + worker * CrossEntropy::worker_elems(a.c));
            let lanes = scratch.add(LANES * padded);
            let logits = lanes.add(LANES * padded);
            if let WeightLayout::Pairs(_) = a.layout {
                self.lanes_of_pairs(rows, scratch, lanes);
            } else {
                self.rows_as_lanes::<V>(rows, scratch, lanes);
            }
            // The rows are not needed any more: their place takes the gradient.
            let (softmax, picked) = self.pieces::<V>(rows, lanes, logits, scratch);
            for (i, row) in rows.iter().enumerate() {
                let (max, sum) = (softmax.max.0[i], softmax.sum.0[i]);
                *a.nll.add(*row as usize) = (max - picked.0[i]) + log_lane(sum);
                if !a.dx.ptr.is_null() {
                    self.write_gradient(*row as usize, scratch, i, 1.0 / sum);
                }
            }
        }
    }

    /// `rows` as lanes, `[c, 32]`, those that are not there as zeros.
    ///
    /// # Safety
    /// As for [`Chunks::chunk`]; `scratch` and `lanes` have `32 * c` elements, `c` rounded up to 32.
    #[inline(always)]
    unsafe fn rows_as_lanes<V: Vector>(&self, rows: &[u32], scratch: *mut f32, lanes: *mut f32) {
        let a = self.args;
        let padded = a.c.next_multiple_of(NR);
        // SAFETY: the caller's promise.
        unsafe {
            for i in 0..LANES {
                let to = scratch.add(i * padded);
                match rows.get(i) {
                    Some(row) => {
                        let from = a.x.at(*row as usize);
                        spans!(V, a.c, l, s => { s.store(s.load(from.add(l)), to.add(l)) });
                        to.add(a.c).write_bytes(0, padded - a.c);
                    }
                    None => to.write_bytes(0, padded),
                }
            }
            transpose(scratch, padded, lanes);
        }
    }

    /// Goes through all classes. Returns the softmax and the logits of the targets; `gradient`
    /// becomes, if wanted, the sum of `e^(logit - max) W`: `[c, 32]` where the weights are panels,
    /// `[32, padded c]` where they are rows.
    ///
    /// # Safety
    /// As for [`Chunks::chunk`]; `lanes` is `[c, 32]`, `logits` `[PIECE, 32]`.
    #[inline(always)]
    unsafe fn pieces<V: Vector>(
        &self,
        rows: &[u32],
        lanes: *const f32,
        logits: *mut f32,
        gradient: *mut f32,
    ) -> (Softmax, Row) {
        let a = self.args;
        let cols = rows.len().next_multiple_of(V::LANES).min(LANES);
        let (mut softmax, mut picked) = (Softmax::new(), Row::splat(0.0));
        for start in (0..a.v).step_by(PIECE) {
            let classes = start..a.v.min(start + PIECE);
            // SAFETY: the caller's promise.
            unsafe {
                match a.layout {
                    WeightLayout::Pairs(w) => {
                        self.logits_of_pairs(w, &classes, lanes, logits, cols);
                    }
                    _ => self.logits(&classes, lanes, logits, cols),
                }
                for (i, row) in rows.iter().enumerate() {
                    let target = *a.targets.add(*row as usize) as usize;
                    if classes.contains(&target) {
                        picked.0[i] = *logits.add((target - start) * LANES + i);
                    }
                }
                softmax.add::<V>(logits, classes.len(), cols);
                if a.dx.ptr.is_null() {
                    continue;
                }
                match a.layout {
                    WeightLayout::Panels => {
                        if start > 0 {
                            softmax.fade_columns::<V>(gradient, a.c);
                        }
                        self.add_panels(&classes, logits, gradient, cols);
                    }
                    WeightLayout::Rows(ld) => {
                        if start > 0 {
                            softmax.fade_rows::<V>(gradient, a.c.next_multiple_of(NR));
                        }
                        self.add_rows(&classes, logits, gradient, cols, ld);
                    }
                    WeightLayout::Pairs(w) => {
                        if start > 0 {
                            softmax.fade_rows::<V>(gradient, a.c.next_multiple_of(NR));
                        }
                        let pairs = logits.add(LANES * PIECE).cast();
                        let at = (pairs, gradient);
                        self.add_pairs(w, &classes, logits, rows.len(), at);
                    }
                }
            }
        }
        (softmax, picked)
    }

    /// Logits `[classes, 32]`.
    ///
    /// # Safety
    /// As for [`Chunks::pieces`].
    unsafe fn logits(
        &self,
        classes: &Range<usize>,
        lanes: *const f32,
        logits: *mut f32,
        cols: usize,
    ) {
        let a = self.args;
        let (panel, class, column) = a.strides();
        // Panels, and rows without gaps, are runs of 32 classes.
        let dense = panel == NR * a.c;
        for first in classes.clone().step_by(NR) {
            let m = NR.min(classes.end - first);
            let next = match dense && first + NR < a.v {
                true => a.w.wrapping_add((first / NR + 1) * panel),
                false => std::ptr::null(),
            };
            // SAFETY: up to 32 classes from `first` on are weights and rows of `logits`.
            unsafe {
                let tile = Tile {
                    m,
                    k: a.c,
                    x: a.w.add(first / NR * panel),
                    x_row: class,
                    x_col: column,
                    panel: lanes,
                    panel_row: LANES,
                    padded: true,
                    y: logits.add((first - classes.start) * LANES),
                    y_row: LANES,
                    cols,
                    onto: tile::Rows::<*const f32>::NONE,
                    next: Next {
                        at: next,
                        row: 0,
                        rows: m,
                    },
                };
                tile::run(self.isa, &tile);
            }
        }
    }

    /// `gradient: [c, 32] += Wᵀ e` over some classes.
    ///
    /// # Safety
    /// As for [`Chunks::pieces`]; `e` is `[classes, 32]`, weights are panels.
    unsafe fn add_panels(
        &self,
        classes: &Range<usize>,
        e: *const f32,
        gradient: *mut f32,
        cols: usize,
    ) {
        let a = self.args;
        let (panel, class, column) = a.strides();
        for first in classes.clone().step_by(NR) {
            // SAFETY: as in `logits`.
            unsafe {
                let tile = Tile {
                    m: a.c,
                    k: NR.min(classes.end - first),
                    x: a.w.add(first / NR * panel),
                    x_row: column,
                    x_col: class,
                    panel: e.add((first - classes.start) * LANES),
                    panel_row: LANES,
                    padded: true,
                    y: gradient,
                    y_row: LANES,
                    cols,
                    onto: tile::Rows::old(gradient, LANES, first > 0),
                    next: Next::NONE,
                };
                tile::run(self.isa, &tile);
            }
        }
    }

    /// `gradient: [32, padded c] += eᵀ W` over some classes.
    ///
    /// # Safety
    /// As for [`Chunks::pieces`]; `e` is `[classes, 32]`, weights are rows `ld` apart.
    unsafe fn add_rows(
        &self,
        classes: &Range<usize>,
        e: *const f32,
        gradient: *mut f32,
        lanes: usize,
        ld: usize,
    ) {
        let a = self.args;
        for col in (0..a.c).step_by(NR) {
            let cols = NR.min(a.c - col);
            // SAFETY: the caller's promise; the last columns may end with the memory.
            unsafe {
                let tile = Tile {
                    m: lanes,
                    k: classes.len(),
                    x: e,
                    x_row: 1,
                    x_col: LANES,
                    panel: a.w.add(classes.start * ld + col),
                    panel_row: ld,
                    padded: cols == NR,
                    y: gradient.add(col),
                    y_row: a.c.next_multiple_of(NR),
                    cols,
                    onto: tile::Rows::old(
                        gradient.add(col),
                        a.c.next_multiple_of(NR),
                        classes.start > 0,
                    ),
                    next: Next::NONE,
                };
                tile::run(self.isa, &tile);
            }
        }
    }

    /// `dx[row] = gradient * factor - W[target]`, the gradient being that of lane `lane`.
    ///
    /// # Safety
    /// As for [`Chunks::chunk`].
    unsafe fn write_gradient(&self, row: usize, gradient: *const f32, lane: usize, factor: f32) {
        let a = self.args;
        let (panel, class, column) = a.strides();
        let (start, step) = match a.layout {
            WeightLayout::Panels => (lane, LANES),
            WeightLayout::Rows(_) | WeightLayout::Pairs(_) => (lane * a.c.next_multiple_of(NR), 1),
        };
        // SAFETY: the target of a counted row is below `v`.
        unsafe {
            let target = *a.targets.add(row) as usize;
            let dx = a.dx.at(row);
            if let WeightLayout::Pairs(w) = a.layout {
                for l in 0..a.c {
                    let w = pairs::weight(w, a.c, target, l);
                    *dx.add(l) = *gradient.add(start + l * step) * factor - w;
                }
                return;
            }
            let w = a.w.add(target / NR * panel + target % NR * class);
            for l in 0..a.c {
                *dx.add(l) = *gradient.add(start + l * step) * factor - *w.add(l * column);
            }
        }
    }
}

#[cfg(test)]
mod tests;
