//! Attention backward: probabilities are made again, block by block, from the saved `lse`.
//! Invariant: `dk` and `dv` are summed over query blocks in order, `dq` over key chunks in order,
//! however the work is split, so the bits do not depend on the number of threads.
//! Absent on purpose: saved probabilities, and sums by several threads into one place.
//!
//! Enough key heads for all threads: one task each makes everything (5 products). Fewer: one set of
//! tasks makes `dq` by blocks, another `dk` and `dv` by chunks of keys (7 products).

use std::ops::Range;

use super::bend::{bend, slope};
use super::block::Block;
use super::forward::mask;
use super::{Heads, Queries, Shape};
use crate::exec::{Exec, RowKernel, spans};
use crate::lanes::{LANES, Row, transpose};
use crate::simd::{Isa, Vector};
use crate::vecmath::exp_nonpos;

/// Keys of a chunk: two sets of scores stay in the first-level cache.
const CHUNK: usize = 96;

/// Arguments of attention backward.
#[derive(Clone, Copy, Debug)]
pub struct Backward {
    /// Extents.
    pub shape: Shape,
    /// Queries `[b, t, h, d]`.
    pub q: Heads,
    /// Keys `[b, s, hk, d]`.
    pub k: Heads,
    /// Values `[b, s, hk, d]`.
    pub v: Heads,
    /// Where the queries stand.
    pub queries: Queries,
    /// Forward's output `[b, t, h, d]`.
    pub out: Heads,
    /// Forward's `lse`, `[b, h, t]`.
    pub lse: *const f32,
    /// Gradient of `out`, `[b, t, h, d]`.
    pub dout: Heads,
    /// Gradient of `q`, or null; rows whose query sees nothing are zero.
    pub dq: Heads<*mut f32>,
    /// Gradient of `k`, or null; rows that no query sees are zero.
    pub dk: Heads<*mut f32>,
    /// Gradient of `v`, or null; as `dk`.
    pub dv: Heads<*mut f32>,
    /// Scratch of [`Backward::workspace_elems`].
    pub workspace: *mut f32,
}

impl Backward {
    /// Scratch elements that `threads` workers need.
    #[must_use]
    pub fn workspace_elems(shape: &Shape, threads: usize) -> usize {
        threads * Self::worker_elems(shape)
    }

    fn worker_elems(shape: &Shape) -> usize {
        5 * LANES * shape.padded_d() + 2 * CHUNK * LANES
    }

    /// Computes those of `dq`, `dk`, `dv` that are not null.
    ///
    /// # Safety
    /// As for [`super::Forward::run`].
    pub unsafe fn run(&self, exec: Exec<'_>) {
        let shape = &self.shape;
        let heads = shape.b * shape.hk;
        let pairs = heads * shape.t * shape.group() * shape.s;
        let small = pairs * (10 * shape.d + 60) / 200 < 10_000;
        let part = |what| Part {
            args: self,
            isa: exec.isa,
            what,
        };
        // SAFETY: the caller's promise; each part writes what its tasks alone own.
        unsafe {
            if small || exec.pool.threads() <= heads {
                let tasks = if small { 1 } else { heads };
                exec.tasks(heads, tasks, &part(What::Everything));
            } else {
                let blocks = heads * shape.blocks();
                exec.tasks(blocks, blocks, &part(What::Queries));
                let chunks = heads * shape.s.div_ceil(CHUNK);
                exec.tasks(chunks, chunks, &part(What::Keys));
            }
        }
    }
}

/// What a set of tasks makes.
#[derive(Clone, Copy, PartialEq)]
enum What {
    /// All of a key head; a row is a key head.
    Everything,
    /// `dq`; a row is a block of a key head.
    Queries,
    /// `dk` and `dv`; a row is a chunk of the keys of a key head.
    Keys,
}

struct Part<'a> {
    args: &'a Backward,
    isa: Isa,
    what: What,
}

// SAFETY: rows own their queries, or their keys, or both.
unsafe impl RowKernel for Part<'_> {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, worker: usize) {
        let a = self.args;
        let (blocks, s) = (a.shape.blocks(), a.shape.s);
        let chunks = s.div_ceil(CHUNK);
        for row in rows {
            let (bk, blocks, keys) = match self.what {
                What::Everything => (row, 0..blocks, 0..s),
                What::Queries => {
                    let i = row % blocks;
                    (row / blocks, i..i + 1, 0..s)
                }
                What::Keys => {
                    let c = row % chunks;
                    (row / chunks, 0..blocks, c * CHUNK..((c + 1) * CHUNK).min(s))
                }
            };
            // SAFETY: the caller's promise; scratch by worker.
            unsafe {
                let scratch = Scratch::new(a, worker);
                if self.what != What::Queries {
                    self.clear(bk, &keys);
                }
                for i in blocks {
                    let block = Block::new(&a.shape, &a.queries, bk, i);
                    let apart = block.any.end <= keys.start || block.any.start >= keys.end;
                    if self.what == What::Keys && apart {
                        continue;
                    }
                    self.block::<V>(&block, &keys, &scratch);
                }
            }
        }
    }
}

/// The scratch of a worker.
struct Scratch {
    /// Queries and output gradients, as rows `[32, padded d]` and as lanes `[padded d, 32]`.
    q: *mut f32,
    q_lanes: *mut f32,
    dout: *mut f32,
    dout_lanes: *mut f32,
    /// Gradient of the queries, `[32, padded d]`.
    dq: *mut f32,
    /// Probabilities and gradients of the scores, `[CHUNK, 32]`.
    p: *mut f32,
    ds: *mut f32,
}

impl Scratch {
    /// # Safety
    /// The workspace of `a` has room for `worker`.
    unsafe fn new(a: &Backward, worker: usize) -> Self {
        let rows = LANES * a.shape.padded_d();
        // SAFETY: seven parts of the worker's own scratch.
        unsafe {
            let q = a.workspace.add(worker * Backward::worker_elems(&a.shape));
            Scratch {
                q,
                q_lanes: q.add(rows),
                dout: q.add(2 * rows),
                dout_lanes: q.add(3 * rows),
                dq: q.add(4 * rows),
                p: q.add(5 * rows),
                ds: q.add(5 * rows + CHUNK * LANES),
            }
        }
    }
}

impl Part<'_> {
    /// Zeroes the rows of `dk` and `dv` that the task will add to.
    ///
    /// # Safety
    /// They belong to this task.
    unsafe fn clear(&self, bk: usize, keys: &Range<usize>) {
        let a = self.args;
        let (b, kv) = (bk / a.shape.hk, bk % a.shape.hk);
        for j in keys.clone() {
            // SAFETY: the caller's promise.
            unsafe {
                for grad in [&a.dk, &a.dv] {
                    if !grad.ptr.is_null() {
                        grad.at(b, j, kv).write_bytes(0, a.shape.d);
                    }
                }
            }
        }
    }

    /// # Safety
    /// As for [`Backward::run`]; the block's queries, or `keys`, or both belong to this task.
    #[inline(always)]
    unsafe fn block<V: Vector>(&self, block: &Block<'_>, keys: &Range<usize>, scratch: &Scratch) {
        let a = self.args;
        let (padded, s) = (a.shape.padded_d(), scratch);
        let for_queries = self.what != What::Keys && !a.dq.ptr.is_null();
        let for_keys = self.what != What::Queries;
        // SAFETY: the caller's promise.
        unsafe {
            block.gather::<V>(&a.q, a.shape.scale, s.q);
            block.gather::<V>(&a.dout, 1.0, s.dout);
            transpose(s.q, padded, s.q_lanes);
            transpose(s.dout, padded, s.dout_lanes);
            let numbers = self.lane_numbers::<V>(block, s);
            let mut first = true;
            for chunk in block.chunks(CHUNK) {
                if chunk.start < keys.start || chunk.start >= keys.end {
                    continue;
                }
                // The next block's rows lie far apart: they are asked for a few at a time, between the products.
                let ask = |view: &Heads| {
                    if first {
                        block.ask_next(view);
                    }
                };
                block.times_keys(self.isa, &a.k, &chunk, s.q_lanes, s.p);
                ask(&a.q);
                block.times_keys(self.isa, &a.v, &chunk, s.dout_lanes, s.ds);
                ask(&a.dout);
                bend::<V>(a.shape.cap, s.p, chunk.len() * LANES);
                mask::<V>(block, &chunk, s.p);
                match a.shape.cap {
                    None => score_gradients::<V, false>(chunk.len(), s, &numbers, 0.0),
                    Some(c) => score_gradients::<V, true>(chunk.len(), s, &numbers, 1.0 / c),
                }
                ask(&a.out);
                if for_keys && !a.dv.ptr.is_null() {
                    block.add_to_keys(self.isa, &a.dv, &chunk, s.p, s.dout);
                }
                if for_keys && !a.dk.ptr.is_null() {
                    block.add_to_keys(self.isa, &a.dk, &chunk, s.ds, s.q);
                }
                if for_queries {
                    ask(&a.dq.read());
                    block.times_values(self.isa, &a.k, &chunk, s.ds, s.dq, !first);
                }
                first = false;
            }
            if for_queries {
                block.scatter::<V>(s.dq, &Row::splat(a.shape.scale), &a.dq);
            }
        }
    }

    /// Each lane's `lse` and the dot product of its output and output gradient.
    ///
    /// # Safety
    /// As for [`Backward::run`]; `s.dout` holds the block's rows.
    #[inline(always)]
    unsafe fn lane_numbers<V: Vector>(&self, block: &Block<'_>, s: &Scratch) -> (Row, Row) {
        let a = self.args;
        let (mut lse, mut delta) = (Row::splat(0.0), Row::splat(0.0));
        for i in 0..block.n {
            if !block.sees(i) {
                continue;
            }
            let (token, head) = block.place(i);
            // SAFETY: a lane in use is a row of the views.
            unsafe {
                lse.0[i] = *a.lse.add((block.b * a.shape.h + head) * a.shape.t + token);
                let out = a.out.at(block.b, token, head);
                let dout = s.dout.add(i * a.shape.padded_d());
                let mut sum = V::zero();
                spans!(V, a.shape.d, l, sp => {
                    sum = sp.load(out.add(l)).mul_add(sp.load(dout.add(l)), sum);
                });
                delta.0[i] = sum.sum();
            }
        }
        (lse, delta)
    }
}

/// Scores in `p` and gradients of probabilities in `ds` become probabilities and gradients of scores; of those before
/// they were bent, with `part = 1 / cap`, where `BENT`.
///
/// # Safety
/// The machine has the instructions; both are `[n, 32]`.
#[inline(always)]
unsafe fn score_gradients<V: Vector, const BENT: bool>(
    n: usize,
    s: &Scratch,
    (lse, delta): &(Row, Row),
    part: f32,
) {
    for lane in (0..LANES).step_by(V::LANES) {
        // SAFETY: the caller's promise.
        unsafe {
            let lse = V::load(lse.0.as_ptr().add(lane));
            let delta = V::load(delta.0.as_ptr().add(lane));
            for j in 0..n {
                let (p, ds) = (s.p.add(j * LANES + lane), s.ds.add(j * LANES + lane));
                let score = V::load(p);
                let probability = exp_nonpos(score.sub(lse));
                probability.store(p);
                let mut gradient = V::load(ds).sub(delta).mul(probability);
                if BENT {
                    gradient = gradient.mul(slope(score, V::splat(part)));
                }
                gradient.store(ds);
            }
        }
    }
}
