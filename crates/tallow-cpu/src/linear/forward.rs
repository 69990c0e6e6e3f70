//! The forward product of a linear: `y = x Wᵀ + bias + s (x Aᵀ) Bᵀ + residual`, block by block.
//! Invariant: a block without an adapter does no work for one; nothing outside `y` and `h` is written.
//! Absent on purpose: a phase of its own for `h`. Each thread computes the rows it needs, once.

use std::ops::Range;

use super::dots::{self, Dots};
use super::pack::tail_panel;
use super::product::{Product, Tails, copy_len};
use super::split::{MAX_ROWS, MIN_ROWS, Split};
use super::{Block, Raw, Rows, add_to};
use crate::exec::Exec;
use crate::tile::{Element, HEAD_PAD, Head, NR, Tail};

/// A forward product. `n` is the sum of the blocks' outputs, `r` that of their ranks.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a, E = f32> {
    /// Rows.
    pub m: usize,
    /// Inputs.
    pub k: usize,
    /// `[m, k]`
    pub x: Rows<*const f32>,
    /// The projections of `x`.
    pub blocks: &'a [Block<E>],
    /// `[m, n]`, written.
    pub y: Rows<*mut f32>,
    /// `[m, n]`, added to the result; null if there is none. It may be `y` itself (the same pointer
    /// and stride): then the product is added in place.
    pub residual: Rows<*const f32>,
    /// `[m, r]`, written with `x Aᵀ` (not scaled) for the backward product; may be null.
    pub h: Rows<*mut f32>,
}

/// Floats of workspace that [`forward`] needs with `k` inputs, for any number of rows.
#[must_use]
pub fn forward_workspace<E>(blocks: &[Block<E>], k: usize, threads: usize) -> usize {
    threads * Scratch::new(blocks, k).floats
}

/// The scratch of one worker: which rows each `h` is of, the `h`s, one panel of a tail, a copy of
/// rows of `x`. Where each begins.
#[derive(Clone, Copy)]
struct Scratch {
    h: usize,
    tail: usize,
    copy: usize,
    floats: usize,
}

impl Scratch {
    fn new<E>(blocks: &[Block<E>], k: usize) -> Self {
        let total: usize = blocks.iter().map(Block::rank).sum();
        let largest = blocks.iter().map(Block::rank).max().unwrap_or(0);
        let h = blocks.len();
        let tail = h + MAX_ROWS * total + HEAD_PAD;
        let copy = tail + NR * largest;
        Self {
            h,
            tail,
            copy,
            floats: copy + copy_len(k),
        }
    }
}

/// Computes `job` on the threads of `exec`.
///
/// # Safety
/// The machine has `exec.isa`; the matrices are readable and writable as [`Forward`] and [`Block`]
/// say, and what is written overlaps nothing that is read except as said of `residual`.
///
/// # Panics
/// If `workspace` is shorter than [`forward_workspace`].
pub unsafe fn forward<E: Element>(exec: Exec<'_>, job: &Forward<'_, E>, workspace: &mut [f32]) {
    let (threads, at) = (exec.pool.threads(), Scratch::new(job.blocks, job.k));
    let enough = workspace.len() >= threads * at.floats;
    assert!(enough, "bug in tallow: forward: workspace too small");
    let panels = job.blocks.iter().map(|b| b.n.div_ceil(NR)).sum();
    let split = Split::new((job.m, panels, job.k), MIN_ROWS..=MAX_ROWS, threads);
    for scratch in workspace.chunks_exact_mut(at.floats).take(threads) {
        scratch[..at.h].fill(f32::from_bits(u32::MAX));
    }
    let shared = Raw((job, workspace.as_mut_ptr()));
    exec.pool.run(split.tasks(), &|task, worker| {
        let (job, workspace) = shared.get();
        let (key, rows, panels) = split.task(task);
        let part = Part {
            exec,
            job,
            scratch: workspace.wrapping_add(worker * at.floats),
            at,
            key: key as u32,
            row: rows.start,
            m: rows.len(),
        };
        // SAFETY: the caller's promise; each task writes rows and columns of its own, and each
        // worker scratch of its own.
        unsafe { part.run(panels) };
    });
}

/// `h` of a block, and how it is made if it is not there yet.
struct Hidden {
    at: *const f32,
    head: Head,
}

/// Rows `row..row + m` of a job on one worker.
struct Part<'a, E> {
    exec: Exec<'a>,
    job: &'a Forward<'a, E>,
    scratch: *mut f32,
    at: Scratch,
    key: u32,
    row: usize,
    m: usize,
}

impl<E: Element> Part<'_, E> {
    /// Computes the panels of a range, counted over all blocks.
    ///
    /// # Safety
    /// As for [`forward`], for these rows and panels and this worker's scratch.
    unsafe fn run(&self, panels: Range<usize>) {
        let (mut first, mut column, mut rank) = (0, 0, 0);
        for (i, block) in self.job.blocks.iter().enumerate() {
            let count = block.n.div_ceil(NR);
            let from = panels.start.max(first) - first;
            let to = panels.end.min(first + count).max(first) - first;
            if from < to {
                // SAFETY: the caller's promise; `column` and `rank` are where the block's outputs
                // and its part of `h` begin.
                unsafe {
                    let hidden = self.hidden(i, block, rank);
                    self.panels(block, from..to, column, &hidden);
                    if from == 0 {
                        self.keep(block, rank, hidden.at);
                    }
                }
            }
            first += count;
            column += block.n;
            rank += block.rank();
        }
    }

    /// `h` of a block for these rows, computed unless this worker has it, or to be computed with the
    /// next panels.
    ///
    /// # Safety
    /// As for [`Part::run`]. If there is a head, the block's panels are computed next.
    unsafe fn hidden(&self, i: usize, block: &Block<E>, rank: usize) -> Hidden {
        let mut head = Head::NONE;
        let Some(adapter) = block.adapter else {
            return Hidden {
                at: std::ptr::null(),
                head,
            };
        };
        let job = self.job;
        // SAFETY: the scratch holds a key for each block and then `MAX_ROWS` rows of every rank.
        unsafe {
            let key = self.scratch.add(i);
            let h = self.scratch.add(self.at.h + MAX_ROWS * rank);
            let here = (*key).to_bits() == self.key;
            let streams = self.m == 1 && !adapter.turned.is_null() && !adapter.tail.is_null();
            if !here && streams {
                head = Head {
                    a: adapter.turned,
                    out: h,
                    accumulate: false,
                    r: adapter.rank,
                };
            } else if !here {
                let dots = Dots {
                    m: self.m,
                    n: adapter.rank,
                    k: job.k,
                    x: job.x.at.add(self.row * job.x.row),
                    x_row: job.x.row,
                    w: adapter.a,
                    w_row: job.k,
                    y: h,
                    y_row: adapter.rank,
                };
                dots::run(self.exec.isa, &dots);
            }
            *key = f32::from_bits(self.key);
            Hidden { at: h, head }
        }
    }

    /// Writes `h` of a block out for the backward product, if it is wanted.
    ///
    /// # Safety
    /// As for [`Part::run`]; `h` is the block's.
    unsafe fn keep(&self, block: &Block<E>, rank: usize, h: *const f32) {
        let (to, r) = (self.job.h, block.rank());
        if to.at.is_null() || r == 0 {
            return;
        }
        for row in 0..self.m {
            // SAFETY: the scratch holds `m` rows of `r`, and `to` row `self.row + row`.
            unsafe {
                let to = to.at.add((self.row + row) * to.row + rank);
                std::ptr::copy_nonoverlapping(h.add(row * r), to, r);
            }
        }
    }

    /// Panels of a block whose outputs begin at `column`.
    ///
    /// # Safety
    /// As for [`Part::run`]; `hidden` is the block's.
    unsafe fn panels(
        &self,
        block: &Block<E>,
        panels: Range<usize>,
        column: usize,
        hidden: &Hidden,
    ) {
        let (job, h) = (self.job, hidden.at);
        let first = panels.start * NR;
        let product = Product {
            isa: self.exec.isa,
            m: self.m,
            k: job.k,
            n: block.n,
            x: job.x.at.wrapping_add(self.row * job.x.row),
            x_row: job.x.row,
            panels: block.weights,
            y: job.y.at.wrapping_add(self.row * job.y.row + column),
            y_row: job.y.row,
            accumulate: job.residual.is(job.y),
            scratch: self.scratch.wrapping_add(self.at.copy),
            head: hidden.head,
        };
        let y = Rows {
            at: product.y.wrapping_add(first),
            row: job.y.row,
        };
        let cols = block.n.min(panels.end * NR) - first;
        let each = |p: usize| self.tail(block, p, h);
        let tails = match block.adapter {
            None => Tails::None,
            Some(a) if a.tail.is_null() => Tails::Each(&each),
            Some(a) => Tails::Packed {
                k: a.rank,
                x: h,
                panels: a.tail,
            },
        };
        // SAFETY: the caller's promise.
        unsafe {
            product.run(panels, &tails);
            let bias = block.bias;
            let bias = if bias.is_null() {
                bias
            } else {
                bias.add(first)
            };
            let residual = job
                .residual
                .other_than(job.y)
                .from(self.row, column + first);
            add_to(self.m, cols, y, bias, residual);
        }
    }

    /// The adapter's part of panel `p`, packed into scratch.
    fn tail(&self, block: &Block<E>, p: usize, h: *const f32) -> Tail {
        let Some(adapter) = block.adapter else {
            return Tail::NONE;
        };
        let r = adapter.rank;
        let panel = self.scratch.wrapping_add(self.at.tail);
        let cols = (block.n - p * NR).min(NR);
        // SAFETY: this runs inside `panels`: row `p * 32` of `b` and the `cols` after it exist, and
        // the scratch has `32 * r` floats for it.
        unsafe { tail_panel(adapter.b.add(p * NR * r), cols, r, adapter.scale, panel) };
        Tail {
            k: r,
            x: h,
            x_row: r,
            x_col: 1,
            panel,
            panel_row: NR,
        }
    }
}
