//! The backward product of a linear: `dh_i = s_i dy_i B_i` and `dx = sum_i dy_i W_i + dh_i A_i`.
//! Invariant: the frozen weights get no gradient; a block without an adapter does no work for one.
//! Absent on purpose: `dA` and `dB`; they are [`super::outer`] of what is computed here.

use std::ops::Range;

use super::product::{PIECE, Product, Tails, copy_len, forget};
use super::split::{MAX_ROWS, MIN_ROWS, Split};
use super::{Block, Held, Raw, Rows, Segment, Shares, blocks_of, ranks};
use crate::exec::Exec;
use crate::tile::{self, Element, Head, NR, Next, Tail, Tile};

/// A backward product. `n` is the sum of the blocks' outputs, `r` that of their ranks in a share.
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a, E = f32> {
    /// Rows.
    pub m: usize,
    /// Inputs of the linear.
    pub k: usize,
    /// `[m, n]`: the gradient of the outputs.
    pub dy: Rows<*const f32>,
    /// Parts of the rows with adapters of their own; divides `m`.
    pub shares: usize,
    /// The projections, share after share: alike but for their adapters, which have `b`. Panels are from
    /// [`super::pack_kn`] (unused if `dx` is null).
    pub blocks: &'a [Block<E>],
    /// `[m, k]`, written; null if nothing below the linear needs it.
    pub dx: Rows<*mut f32>,
    /// `[m, k]`, added to `dx`; null if there is none. It may be `dx` itself (the same pointer and
    /// stride): then the product is added in place.
    pub residual: Rows<*const f32>,
    /// `[m / shares, r]` of each share, written with `s dy B`; may be null.
    pub dh: &'a [Rows<*mut f32>],
}

/// Floats of workspace that [`backward`] needs, for any number of rows.
#[must_use]
pub fn backward_workspace<E>(blocks: &[Block<E>], shares: usize, threads: usize) -> usize {
    threads * Scratch::new(blocks, shares).floats
}

/// The scratch of one worker: which rows its `dh` is of, that, one panel of a tail, a copy of rows
/// of `dy`. Where each begins.
#[derive(Clone, Copy)]
struct Scratch {
    tail: usize,
    copy: usize,
    floats: usize,
}

impl Scratch {
    fn new<E>(blocks: &[Block<E>], shares: usize) -> Self {
        let (total, largest) = ranks(blocks, shares);
        let tail = 1 + MAX_ROWS * total;
        let copy = tail + NR * largest;
        let longest = blocks.iter().map(|b| b.n).max().unwrap_or(0);
        Self {
            tail,
            copy,
            floats: copy + copy_len(longest),
        }
    }
}

/// Computes `job` on the threads of `exec`.
///
/// # Safety
/// The machine has `exec.isa`; the matrices are readable and writable as [`Backward`] and [`Block`]
/// say, and what is written overlaps nothing that is read except as said of `residual`.
///
/// # Panics
/// If `workspace` is shorter than [`backward_workspace`].
pub unsafe fn backward<E: Element>(exec: Exec<'_>, job: &Backward<'_, E>, workspace: &mut [f32]) {
    let at = Scratch::new(job.blocks, job.shares);
    let (threads, per) = (exec.pool.threads(), at.floats);
    assert!(
        workspace.len() >= threads * per,
        "bug in tallow: backward: workspace too small"
    );
    let first = blocks_of(job.blocks, job.shares, 0);
    let n: usize = first.iter().map(|b| b.n).sum();
    let panels = if job.dx.at.is_null() {
        0
    } else {
        job.k.div_ceil(NR)
    };
    let split = Split::new((job.m, panels, n), MIN_ROWS..=MAX_ROWS, threads);
    for scratch in workspace.chunks_exact_mut(per).take(threads) {
        scratch[0] = f32::from_bits(u32::MAX);
        forget(&mut scratch[at.copy..]);
    }
    let shared = Raw((job, workspace.as_mut_ptr()));
    exec.pool.run(split.tasks(), &|task, worker| {
        let (job, workspace) = shared.get();
        let (key, rows, panels) = split.task(task);
        let part = Part {
            exec,
            job,
            scratch: workspace.wrapping_add(worker * per),
            at,
            row: rows.start,
            m: rows.len(),
            descending: worker % 2 == 1,
        };
        // SAFETY: the caller's promise; each task writes rows and columns of its own (`dh` the first
        // task of a row block), and each worker scratch of its own, `per` floats long.
        unsafe {
            part.hidden(key as u32, panels.start == 0);
            if !panels.is_empty() {
                part.panels(panels);
            }
        }
    });
}

/// Rows `row..row + m` of a job on one worker.
struct Part<'a, E> {
    exec: Exec<'a>,
    job: &'a Backward<'a, E>,
    scratch: *mut f32,
    at: Scratch,
    row: usize,
    m: usize,
    descending: bool,
}

impl<E: Element> Part<'_, E> {
    /// The blocks of a share.
    fn blocks(&self, share: usize) -> &[Block<E>] {
        blocks_of(self.job.blocks, self.job.shares, share)
    }

    /// These rows, cut where a share ends.
    fn segments(&self) -> impl Iterator<Item = Segment> {
        Shares::new(self.job.m, self.job.shares).cut(self.row, self.m)
    }

    /// `dh` of a block, behind the key.
    fn held(&self, i: usize) -> Held {
        let at = self.scratch.wrapping_add(1);
        Held::new(at, self.job.blocks, self.job.shares, i)
    }

    /// `dh` of these rows in scratch, computed unless this worker has it; written out if `keep`.
    ///
    /// # Safety
    /// As for [`backward`], for these rows and this worker's scratch, which holds `dh`.
    unsafe fn hidden(&self, key: u32, keep: bool) {
        let job = self.job;
        let share_rows = job.m / job.shares;
        // SAFETY: the scratch holds a key and then `MAX_ROWS` rows of every block's largest rank.
        unsafe {
            let fresh = (*self.scratch).to_bits() == key;
            for segment in self.segments() {
                let (to, mut column, mut rank) = (job.dh[segment.share], 0, 0);
                let first = self.row + segment.start - segment.share * share_rows;
                for (i, block) in self.blocks(segment.share).iter().enumerate() {
                    if let Some(adapter) = block.adapter {
                        let dh = self.held(i).of(segment);
                        if !fresh {
                            self.down(block, segment, column, dh);
                        }
                        if keep && !to.at.is_null() {
                            for row in 0..segment.end - segment.start {
                                let to = to.at.add((first + row) * to.row + rank);
                                let from = dh.add(row * adapter.rank);
                                std::ptr::copy_nonoverlapping(from, to, adapter.rank);
                            }
                        }
                        rank += adapter.rank;
                    }
                    column += block.n;
                }
            }
            *self.scratch = f32::from_bits(key);
        }
    }

    /// `dh = s dy B` of one block whose outputs begin at `column`, for some rows.
    ///
    /// # Safety
    /// As for [`Part::hidden`]; `dh` has room for these rows.
    unsafe fn down(&self, block: &Block<E>, rows: Segment, column: usize, dh: *mut f32) {
        let Some(adapter) = block.adapter else { return };
        let (job, r) = (self.job, adapter.rank);
        let (first, m) = (self.row + rows.start, rows.end - rows.start);
        // SAFETY: the caller's promise; `B` is `[n, r]`, read a panel of columns at a time.
        unsafe {
            for j in (0..r).step_by(NR) {
                let to = dh.add(j);
                for i in (0..block.n.max(1)).step_by(PIECE) {
                    let tile = Tile {
                        m,
                        k: (block.n - i).min(PIECE),
                        x: job.dy.at.add(first * job.dy.row + column + i),
                        x_row: job.dy.row,
                        x_col: 1,
                        panel: adapter.b.add(i * r + j),
                        panel_row: r,
                        padded: false,
                        y: to,
                        y_row: r,
                        cols: (r - j).min(NR),
                        onto: Rows::old(to, r, i > 0),
                        next: Next::NONE,
                    };
                    tile::run(self.exec.isa, &tile);
                }
            }
            let dh = std::slice::from_raw_parts_mut(dh, m * r);
            dh.iter_mut().for_each(|v| *v *= adapter.scale);
        }
    }

    /// Panels of `dx`, over all blocks.
    ///
    /// # Safety
    /// As for [`Part::hidden`]; `dh` of these rows is in scratch.
    unsafe fn panels(&self, panels: Range<usize>) {
        let job = self.job;
        let dx = Rows {
            at: job.dx.at.wrapping_add(self.row * job.dx.row),
            row: job.dx.row,
        };
        let mut column = 0;
        for (i, block) in self.blocks(0).iter().enumerate() {
            let product = Product {
                isa: self.exec.isa,
                m: self.m,
                k: block.n,
                n: job.k,
                x: job.dy.at.wrapping_add(self.row * job.dy.row + column),
                x_row: job.dy.row,
                panels: block.weights,
                y: dx.at,
                y_row: dx.row,
                onto: match i {
                    0 => job.residual.from(self.row, 0),
                    _ => Rows::old(dx.at, dx.row, true),
                },
                scratch: self.scratch.wrapping_add(self.at.copy),
                head: Head::NONE,
                shares: (Shares::new(job.m, job.shares), self.row),
                descending: self.descending,
            };
            let dh = self.held(i);
            let each = |rows: Segment, p: usize| self.tail(i, rows, p, dh);
            let tails = match dh.row {
                0 => Tails::None,
                _ => Tails::Each(&each),
            };
            // SAFETY: the caller's promise.
            unsafe { product.run(panels.clone(), &tails) };
            column += block.n;
        }
    }

    /// The adapter's part of panel `p` of `dx` for some rows: columns of `A`, of the last panel a padded copy.
    fn tail(&self, i: usize, rows: Segment, p: usize, dh: Held) -> Tail {
        let Some(adapter) = self.blocks(rows.share)[i].adapter else {
            return Tail::NONE;
        };
        let (k, r) = (self.job.k, adapter.rank);
        let mut tail = Tail {
            k: r,
            x: dh.of(rows),
            x_row: r,
            x_col: 1,
            panel: adapter.a.wrapping_add(p * NR),
            panel_row: k,
        };
        let cols = (k - p * NR).min(NR);
        if cols < NR {
            let copy = self.scratch.wrapping_add(self.at.tail);
            for i in 0..r {
                // SAFETY: this runs inside `panels`: `A` has `r` rows with `cols` columns from
                // `p * 32` on, and the scratch has `32 * r` floats for them.
                unsafe {
                    let row = copy.add(i * NR);
                    std::ptr::copy_nonoverlapping(tail.panel.add(i * k), row, cols);
                    std::slice::from_raw_parts_mut(row.add(cols), NR - cols).fill(0.0);
                }
            }
            (tail.panel, tail.panel_row) = (copy, NR);
        }
        tail
    }
}
