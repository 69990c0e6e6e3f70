//! Attention with grouped heads, causal or not, with an optional window: `o = softmax(scale q kᵀ) v`, where a cap may
//! bend the scores.
//! Invariant: the key at index `j` has position `j`. Under a causal mask a query at `p` sees keys
//! `j <= p` and, with a window `w`, `j + w > p`; a query at or past `s` is padding: its outputs are
//! zero and its own data is not read. Where a row holds several documents, a query sees no key before
//! its start; one before its own start is padding too. Keys that no query of a block sees are not read either.
//! A query's bits depend on its keys alone: not on its block, the batch or the threads.
//! Absent on purpose: score matrices in memory. A worker holds 32 queries by some hundred keys.
//!
//! Queries are lanes. Scores are made transposed, `[keys, 32 queries]`: then both products read
//! their left side as it lies in memory, softmax needs no sums across lanes, and the heads that
//! share a key head fill one block together.

use crate::lanes::LANES;

mod backward;
mod bend;
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
    /// The same elements, to be read.
    #[inline(always)]
    fn read(&self) -> Heads {
        let Heads {
            ptr,
            batch,
            token,
            head,
        } = *self;
        Heads {
            ptr: ptr.cast_const(),
            batch,
            token,
            head,
        }
    }

    /// The first element of `(b, i, h)`.
    #[inline(always)]
    pub(crate) fn at(&self, b: usize, i: usize, h: usize) -> *mut f32 {
        self.ptr
            .wrapping_add(b * self.batch + i * self.token + h * self.head)
    }
}

/// Where the queries stand, both `[b, t]`.
#[derive(Clone, Copy, Debug)]
pub struct Queries {
    /// Their positions.
    pub pos: *const u32,
    /// If not null: the first key each may see, under a causal mask.
    pub starts: *const u32,
}

impl Queries {
    /// The keys `lo..hi` that query `row` of `[b, t]` sees.
    ///
    /// # Safety
    /// `row` is within `[b, t]`, which both pointers cover where they are not null.
    #[inline(always)]
    unsafe fn visible(&self, shape: &Shape, row: usize) -> (usize, usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let start = match self.starts.is_null() {
                true => 0,
                false => *self.starts.add(row),
            };
            shape.visible(*self.pos.add(row), start)
        }
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
    /// If there, a scaled score `x` becomes `cap * tanh(x / cap)`.
    pub cap: Option<f32>,
}

impl Shape {
    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.h / self.hk
    }

    /// The keys `lo..hi` that a query at `pos` sees, in a document that begins at `start`.
    fn visible(&self, pos: u32, start: u32) -> (usize, usize) {
        match self.mask {
            Mask::Full => (0, self.s),
            Mask::Causal { .. } if pos as usize >= self.s || start > pos => (0, 0),
            Mask::Causal { window } => {
                let hi = pos as usize + 1;
                let near = window.map_or(0, |w| hi.saturating_sub(w));
                (near.max(start as usize), hi)
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
