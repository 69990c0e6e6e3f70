//! Attention forward over blocks of 32 queries, with a running maximum over chunks of keys.
//! Invariant: chunks begin at multiples of `CHUNK` in the sequence, wherever the block is.
//! Absent on purpose: packing of keys or values; they are read where they lie.

use std::ops::Range;

use super::bend::bend;
use super::block::Block;
use super::{Heads, Queries, Shape};
use crate::exec::{Exec, RowKernel};
use crate::lanes::{LANES, Row, Softmax, transpose};
use crate::simd::{Isa, Vector};
use crate::vecmath::log_lane;

/// Keys of a chunk: its scores stay in the first-level cache.
const CHUNK: usize = 192;

/// Arguments of attention forward.
#[derive(Clone, Copy, Debug)]
pub struct Forward {
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
    /// Output `[b, t, h, d]`.
    pub out: Heads<*mut f32>,
    /// If not null: `[b, h, t]`, the logarithm of the sum of `e^score`, for backward;
    /// zero where a query sees nothing.
    pub lse: *mut f32,
    /// Scratch of [`Forward::workspace_elems`].
    pub workspace: *mut f32,
}

impl Forward {
    /// Scratch elements that `threads` workers need.
    #[must_use]
    pub fn workspace_elems(shape: &Shape, threads: usize) -> usize {
        threads * Self::worker_elems(shape)
    }

    fn worker_elems(shape: &Shape) -> usize {
        if shape.t == 1 {
            return super::decode::worker_elems(shape);
        }
        // Rows of queries and outputs, queries as lanes, scores.
        3 * LANES * shape.padded_d() + CHUNK * LANES
    }

    /// Computes `out` and `lse`.
    ///
    /// # Safety
    /// The views and pointers cover what they are said to; outputs and workspace overlap nothing
    /// else; `h % hk == 0`, `d > 0`; the machine has `exec.isa`.
    pub unsafe fn run(&self, exec: Exec<'_>) {
        let shape = &self.shape;
        if shape.t == 1 {
            // SAFETY: the caller's promise.
            return unsafe { super::decode::run(self, exec) };
        }
        let blocks = shape.b * shape.hk * shape.blocks();
        let kernel = ForwardBlocks {
            args: self,
            isa: exec.isa,
        };
        let block_ns = (LANES * shape.s.min(256) * (2 * shape.d + 30)).div_ceil(100);
        // SAFETY: the caller's promise. Late blocks see more keys: a task for each, where it pays.
        unsafe {
            if blocks * block_ns < 10_000 {
                exec.tasks(blocks, 1, &kernel);
            } else {
                exec.tasks(blocks, blocks, &kernel);
            }
        }
    }
}

struct ForwardBlocks<'a> {
    args: &'a Forward,
    isa: Isa,
}

// SAFETY: a block writes the outputs of its own queries.
unsafe impl RowKernel for ForwardBlocks<'_> {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, worker: usize) {
        let a = self.args;
        let per = a.shape.blocks();
        for row in rows {
            // SAFETY: the caller's promise; `row` is a block of a key head.
            unsafe {
                let block = Block::new(&a.shape, &a.queries, row / per, row % per);
                let scratch = a.workspace.add(worker * Forward::worker_elems(&a.shape));
                self.block::<V>(&block, scratch);
            }
        }
    }
}

impl ForwardBlocks<'_> {
    /// # Safety
    /// As for [`Forward::run`]; `scratch` belongs to this worker.
    #[inline(always)]
    unsafe fn block<V: Vector>(&self, block: &Block<'_>, scratch: *mut f32) {
        let a = self.args;
        let padded = a.shape.padded_d();
        let mut state = Softmax::new();
        // SAFETY: `scratch` has `worker_elems`; the rest the caller promises.
        unsafe {
            let rows = scratch;
            let lanes = rows.add(LANES * padded);
            let out = lanes.add(LANES * padded);
            let scores = out.add(LANES * padded);
            block.gather::<V>(&a.q, a.shape.scale, rows);
            transpose(rows, padded, lanes);
            let mut first = true;
            for chunk in block.chunks(CHUNK) {
                block.times_keys(self.isa, &a.k, &chunk, lanes, scores);
                bend::<V>(a.shape.cap, scores, chunk.len() * LANES);
                mask::<V>(block, &chunk, scores);
                state.add::<V>(scores, chunk.len(), LANES);
                if !first {
                    state.fade_rows::<V>(out, padded);
                }
                block.times_values(self.isa, &a.v, &chunk, scores, out, !first);
                first = false;
            }
            let inverse = Row(state.sum.0.map(|l| 1.0 / l));
            block.scatter::<V>(out, &inverse, &a.out);
            self.write_lse(block, &state);
        }
    }

    /// # Safety
    /// `lse` is null or `[b, h, t]`.
    #[inline(always)]
    unsafe fn write_lse(&self, block: &Block<'_>, state: &Softmax) {
        let a = self.args;
        if a.lse.is_null() {
            return;
        }
        // All lanes, used or not: that is vector code.
        let mut all = state.max;
        for (lse, sum) in all.0.iter_mut().zip(&state.sum.0) {
            *lse += log_lane(*sum);
        }
        for (i, lse) in all.0.into_iter().enumerate().take(block.n) {
            let (token, head) = block.place(i);
            let at = (block.b * a.shape.h + head) * a.shape.t + token;
            // SAFETY: the caller's promise.
            unsafe { *a.lse.add(at) = if block.sees(i) { lse } else { 0.0 } };
        }
    }
}

/// Minus infinity where a lane does not see the key; nothing if all see all keys of the chunk.
///
/// # Safety
/// The machine has the instructions; `scores` has a row of 32 for each key of the chunk.
#[inline(always)]
pub(super) unsafe fn mask<V: Vector>(block: &Block<'_>, chunk: &Range<usize>, scores: *mut f32) {
    if chunk.start >= block.all.start && chunk.end <= block.all.end {
        return;
    }
    for lane in (0..LANES).step_by(V::LANES) {
        // SAFETY: the caller's promise.
        unsafe {
            let lo = V::load(block.lo.0.as_ptr().add(lane));
            let hi = V::load(block.hi.0.as_ptr().add(lane));
            let never = V::splat(f32::NEG_INFINITY);
            for (row, j) in chunk.clone().enumerate() {
                if block.all.contains(&j) {
                    continue;
                }
                let key = V::splat(j as f32);
                let p = scores.add(row * LANES + lane);
                let seen = key.lt_select(hi, V::load(p), never);
                key.lt_select(lo, never, seen).store(p);
            }
        }
    }
}
