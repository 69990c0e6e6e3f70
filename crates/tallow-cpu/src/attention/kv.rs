//! Writing new keys and values into a cache, each at its position.
//! Invariant: a row whose position is not below the capacity is written nowhere; of equal positions
//! the last wins; nothing else changes.
//! Absent on purpose: eviction and paging.

use std::ops::Range;

use super::Heads;
use crate::exec::{Exec, RowKernel, spans};
use crate::simd::Vector;

/// Copies `src[b, i]` to `cache[b, pos[b, i]]`, all heads of it. One of keys, values each.
#[derive(Clone, Copy, Debug)]
pub struct KvWrite {
    /// Batch rows.
    pub b: usize,
    /// New tokens a batch row.
    pub t: usize,
    /// Capacity of the cache, tokens a batch row.
    pub s: usize,
    /// Key heads.
    pub hk: usize,
    /// Elements of a head.
    pub d: usize,
    /// Positions `[b, t]`.
    pub pos: *const u32,
    /// New rows `[b, t, hk, d]`.
    pub src: Heads,
    /// Cache `[b, s, hk, d]`.
    pub cache: Heads<*mut f32>,
}

impl KvWrite {
    /// Copies.
    ///
    /// # Safety
    /// Views and positions cover what they are said to and do not overlap; the machine has
    /// `exec.isa`.
    pub unsafe fn run(&self, exec: Exec<'_>) {
        let head_ns = self.t * (self.d / 16 + 2);
        // SAFETY: the caller's promise.
        unsafe { exec.over(self.b * self.hk, head_ns, self) }
    }
}

// SAFETY: a row is a key head of a batch row, written by one task.
unsafe impl RowKernel for KvWrite {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, _worker: usize) {
        for row in rows {
            let (b, h) = (row / self.hk, row % self.hk);
            for i in 0..self.t {
                // SAFETY: token `(b, i)` exists; its position is checked against the capacity.
                unsafe {
                    let at = *self.pos.add(b * self.t + i) as usize;
                    if at < self.s {
                        let (from, to) = (self.src.at(b, i, h), self.cache.at(b, at, h));
                        spans!(V, self.d, l, s => { s.store(s.load(from.add(l)), to.add(l)) });
                    }
                }
            }
        }
    }
}
