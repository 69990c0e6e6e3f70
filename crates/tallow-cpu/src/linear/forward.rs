//! The forward product of a linear: `y = x Wᵀ + bias + s (x Aᵀ) Bᵀ + residual`, block by block.
//! Invariant: a block without an adapter does no work for one; nothing outside `y` and `h` is written.
//! Absent on purpose: a phase of its own for `h`. Each thread computes the rows it needs, once.

use std::ops::Range;

use super::dots::{self, Dots};
use super::pack::tail_panel;
use super::product::{Product, Tails, copy_len, forget};
use super::split::{MAX_ROWS, MIN_ROWS, Split};
use super::{Block, Held, Raw, Rows, Segment, Shares, add_row, blocks_of, ranks};
use crate::exec::Exec;
use crate::tile::{Element, HEAD_PAD, Head, NR, Tail};

/// A forward product. `n` is the sum of the blocks' outputs, `r` that of their ranks in a share.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a, E = f32> {
    /// Rows.
    pub m: usize,
    /// Inputs.
    pub k: usize,
    /// `[m, k]`
    pub x: Rows<*const f32>,
    /// Parts of the rows with adapters of their own; divides `m`.
    pub shares: usize,
    /// The projections of `x`, share after share: alike but for their adapters.
    pub blocks: &'a [Block<E>],
    /// `[m, n]`, written.
    pub y: Rows<*mut f32>,
    /// `[m, n]`, added to the result; null if there is none. It may be `y` itself (the same pointer
    /// and stride): then the product is added in place.
    pub residual: Rows<*const f32>,
    /// `[m / shares, r]` of each share, written with `x Aᵀ` (not scaled) for the backward product; may be null.
    pub h: &'a [Rows<*mut f32>],
}

/// Floats of workspace that [`forward`] needs with `k` inputs, for any number of rows.
#[must_use]
pub fn forward_workspace<E>(blocks: &[Block<E>], shares: usize, k: usize, threads: usize) -> usize {
    threads * Scratch::new(blocks, shares, k).floats
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
    fn new<E>(blocks: &[Block<E>], shares: usize, k: usize) -> Self {
        let (total, largest) = ranks(blocks, shares);
        let h = blocks.len() / shares;
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
    let (threads, at) = (
        exec.pool.threads(),
        Scratch::new(job.blocks, job.shares, job.k),
    );
    let enough = workspace.len() >= threads * at.floats;
    assert!(enough, "bug in tallow: forward: workspace too small");
    let first = blocks_of(job.blocks, job.shares, 0);
    let panels = first.iter().map(|b| b.n.div_ceil(NR)).sum();
    let split = Split::new((job.m, panels, job.k), MIN_ROWS..=MAX_ROWS, threads);
    for scratch in workspace.chunks_exact_mut(at.floats).take(threads) {
        scratch[..at.h].fill(f32::from_bits(u32::MAX));
        forget(&mut scratch[at.copy..]);
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
            descending: worker % 2 == 1,
        };
        // SAFETY: the caller's promise; each task writes rows and columns of its own, and each
        // worker scratch of its own.
        unsafe { part.run(panels) };
    });
}

/// `h` of a block, and how it is made if it is not there yet.
struct Hidden {
    held: Held,
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
    descending: bool,
}

impl<E: Element> Part<'_, E> {
    /// Computes the panels of a range, counted over all blocks.
    ///
    /// # Safety
    /// As for [`forward`], for these rows and panels and this worker's scratch.
    unsafe fn run(&self, panels: Range<usize>) {
        let (mut first, mut column) = (0, 0);
        for (i, block) in self.blocks(0).iter().enumerate() {
            let count = block.n.div_ceil(NR);
            let from = panels.start.max(first) - first;
            let to = panels.end.min(first + count).max(first) - first;
            if from < to {
                // SAFETY: the caller's promise; `column` is where the block's outputs begin.
                unsafe {
                    let hidden = self.hidden(i);
                    self.panels(i, from..to, column, &hidden);
                    if from == 0 {
                        self.keep(i, &hidden);
                    }
                }
            }
            first += count;
            column += block.n;
        }
    }

    /// The blocks of a share.
    fn blocks(&self, share: usize) -> &[Block<E>] {
        blocks_of(self.job.blocks, self.job.shares, share)
    }

    /// These rows, cut where a share ends.
    fn segments(&self) -> impl Iterator<Item = Segment> {
        Shares::new(self.job.m, self.job.shares).cut(self.row, self.m)
    }

    /// `h` of a block for these rows, computed unless this worker has it, or to be computed with the
    /// next panels.
    ///
    /// # Safety
    /// As for [`Part::run`]. If there is a head, the block's panels are computed next.
    unsafe fn hidden(&self, i: usize) -> Hidden {
        let at = self.scratch.wrapping_add(self.at.h);
        let mut found = Hidden {
            held: Held::new(at, self.job.blocks, self.job.shares, i),
            head: Head::NONE,
        };
        if found.held.row == 0 {
            return found;
        }
        let job = self.job;
        // SAFETY: the scratch holds a key for each block and then `MAX_ROWS` rows of every block's largest rank.
        unsafe {
            let key = self.scratch.add(i);
            if (*key).to_bits() != self.key {
                for segment in self.segments() {
                    let Some(adapter) = self.blocks(segment.share)[i].adapter else {
                        continue;
                    };
                    let h = found.held.of(segment);
                    if self.m == 1 && !adapter.turned.is_null() && !adapter.tail.is_null() {
                        found.head = Head {
                            a: adapter.turned,
                            out: h,
                            accumulate: false,
                            r: adapter.rank,
                        };
                        continue;
                    }
                    let dots = Dots {
                        m: segment.end - segment.start,
                        n: adapter.rank,
                        k: job.k,
                        x: job.x.at.add((self.row + segment.start) * job.x.row),
                        x_row: job.x.row,
                        w: adapter.a,
                        w_row: job.k,
                        y: h,
                        y_row: adapter.rank,
                    };
                    dots::run(self.exec.isa, &dots);
                }
            }
            *key = f32::from_bits(self.key);
        }
        found
    }

    /// Writes `h` of a block out for the backward product, if it is wanted.
    ///
    /// # Safety
    /// As for [`Part::run`]; `hidden` is the block's.
    unsafe fn keep(&self, i: usize, hidden: &Hidden) {
        let share_rows = self.job.m / self.job.shares;
        for segment in self.segments() {
            let blocks = self.blocks(segment.share);
            let (to, r) = (self.job.h[segment.share], blocks[i].rank());
            if to.at.is_null() || r == 0 {
                continue;
            }
            let before: usize = blocks[..i].iter().map(Block::rank).sum();
            let from = hidden.held.of(segment);
            let first = self.row + segment.start - segment.share * share_rows;
            for row in 0..segment.end - segment.start {
                // SAFETY: the scratch holds these rows of `r`, and `to` those from `first` on.
                unsafe {
                    let to = to.at.add((first + row) * to.row + before);
                    std::ptr::copy_nonoverlapping(from.add(row * r), to, r);
                }
            }
        }
    }

    /// Panels of a block whose outputs begin at `column`.
    ///
    /// # Safety
    /// As for [`Part::run`]; `hidden` is the block's.
    unsafe fn panels(&self, i: usize, panels: Range<usize>, column: usize, hidden: &Hidden) {
        let (job, block) = (self.job, &self.blocks(0)[i]);
        let first = panels.start * NR;
        let bias = Rows {
            at: block.bias,
            row: 0,
        };
        let (onto, bias) = match job.residual.at.is_null() {
            true => (bias, std::ptr::null()),
            false => (job.residual.from(self.row, column), block.bias),
        };
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
            onto,
            scratch: self.scratch.wrapping_add(self.at.copy),
            head: hidden.head,
            shares: (Shares::new(job.m, job.shares), self.row),
            descending: self.descending,
        };
        let y = Rows {
            at: product.y.wrapping_add(first),
            row: job.y.row,
        };
        let cols = block.n.min(panels.end * NR) - first;
        let each = |rows: Segment, p: usize| self.tail(i, rows, p, hidden);
        let tails = match block.adapter {
            _ if hidden.held.row == 0 => Tails::None,
            Some(a) if job.shares == 1 && !a.tail.is_null() => Tails::Packed {
                k: a.rank,
                x: hidden.held.at,
                panels: a.tail,
            },
            _ => Tails::Each(&each),
        };
        // SAFETY: the caller's promise.
        unsafe {
            product.run(panels, &tails);
            if !bias.is_null() {
                add_row(self.m, cols, y, bias.add(first));
            }
        }
    }

    /// The adapter's part of panel `p` for some rows, packed into scratch.
    fn tail(&self, i: usize, rows: Segment, p: usize, hidden: &Hidden) -> Tail {
        let block = &self.blocks(rows.share)[i];
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
            x: hidden.held.of(rows),
            x_row: r,
            x_col: 1,
            panel,
            panel_row: NR,
        }
    }
}
