//! Attention with grouped heads, causal or not, with an optional window: `o = softmax(scale q kᵀ) v`.
//! Invariant: the key at index `j` has position `j`. Under a causal mask a query at `p` sees keys
//! `j <= p` and, with a window `w`, `j + w > p`; a query at or past `s` is padding: its outputs are
//! zero and its own data is not read. Keys that no query of a block sees are not read either.
//! A query's bits depend on its keys alone: not on its block, the batch or the threads.
//! Absent on purpose: score matrices in memory. A worker holds 32 queries by some hundred keys.
//!
//! Queries are lanes. Scores are made transposed, `[keys, 32 queries]`: then both products read
//! their left side as it lies in memory, softmax needs no sums across lanes, and the heads that
//! share a key head fill one block together.

use crate::lanes::LANES;

mod backward;
mod block;
mod decode;
mod forward;
mod kv;

pub use backward::Backward;
pub use forward::Forward;
pub use kv::KvWrite;

/// Which keys a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// All of them.
    Full,
    /// Those at or before it; with a window of `w`, itself and the `w - 1` before it.
    Causal {
        /// Keys seen at most, at least 1.
        window: Option<usize>,
    },
}

/// A strided view `[b, n, h, d]` with dense `d`. Strides count elements.
#[derive(Clone, Copy, Debug)]
pub struct Heads<P = *const f32> {
    /// Element `(0, 0, 0, 0)`.
    pub ptr: P,
    /// Distance between batch rows.
    pub batch: usize,
    /// Distance between tokens.
    pub token: usize,
    /// Distance between heads.
    pub head: usize,
}

impl Heads<*const f32> {
    /// The first element of `(b, i, h)`.
    #[inline(always)]
    pub(crate) fn at(&self, b: usize, i: usize, h: usize) -> *const f32 {
        self.ptr
            .wrapping_add(b * self.batch + i * self.token + h * self.head)
    }
}

impl Heads<*mut f32> {
    /// The first element of `(b, i, h)`.
    #[inline(always)]
    pub(crate) fn at(&self, b: usize, i: usize, h: usize) -> *mut f32 {
        self.ptr
            .wrapping_add(b * self.batch + i * self.token + h * self.head)
    }
}

/// Extents and rules of one attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Batch rows.
    pub b: usize,
    /// Queries a batch row.
    pub t: usize,
    /// Keys a batch row: the sequence, or the capacity of a cache.
    pub s: usize,
    /// Query heads.
    pub h: usize,
    /// Key heads; divides `h`. Query head `i` reads key head `i / (h / hk)`.
    pub hk: usize,
    /// Elements of a head.
    pub d: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Which keys a query sees.
    pub mask: Mask,
}

impl Shape {
    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.h / self.hk
    }

    /// The keys `lo..hi` that a query at `pos` sees.
    fn visible(&self, pos: u32) -> (usize, usize) {
        match self.mask {
            Mask::Full => (0, self.s),
            Mask::Causal { .. } if pos as usize >= self.s => (0, 0),
            Mask::Causal { window } => {
                let hi = pos as usize + 1;
                (window.map_or(0, |w| hi.saturating_sub(w)), hi)
            }
        }
    }

    /// `d` rounded up to whole panels.
    fn padded_d(&self) -> usize {
        self.d.next_multiple_of(LANES)
    }

    /// Blocks of query lanes under one key head.
    fn blocks(&self) -> usize {
        (self.t * self.group()).div_ceil(LANES)
    }
}

#[cfg(test)]
mod tests;
