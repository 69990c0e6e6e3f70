//! What a kernel runs with: an instruction set and a pool; and how rows become tasks.
//! Invariant: a kernel over rows computes each row alone, so how the rows are split changes no bit.
//! Absent on purpose: scheduling beyond even ranges; the pool hands them out.

use std::marker::PhantomData;
use std::ops::Range;

use crate::pool::Pool;
use crate::simd::{Isa, Kernel, Vector};

/// Below this much estimated work a kernel stays on the calling thread.
const INLINE_NS: usize = 5_000;
/// The least estimated work of one task.
const TASK_NS: usize = 3_000;

/// The instruction set and the threads that a kernel uses.
#[derive(Clone, Copy, Debug)]
pub struct Exec<'a> {
    /// One that this machine has.
    pub isa: Isa,
    /// The threads.
    pub pool: &'a Pool,
}

/// A kernel over independent rows.
///
/// # Safety
/// Disjoint ranges of rows may be computed at the same time, by different workers, with `&self`
/// shared between threads.
pub(crate) unsafe trait RowKernel {
    /// Computes the rows of one range. Must be `#[inline(always)]`.
    ///
    /// # Safety
    /// The machine has the instructions of `V`; pointers in `self` are valid as its docs say;
    /// no other thread computes these rows or uses the scratch of `worker`.
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, worker: usize);
}

struct Part<'a, K> {
    kernel: &'a K,
    rows: Range<usize>,
    worker: usize,
}

impl<K: RowKernel> Kernel for Part<'_, K> {
    type Output = ();
    #[inline(always)]
    unsafe fn call<V: Vector>(self) {
        // SAFETY: the promises of `rows`, which the creator of the part made.
        unsafe { self.kernel.rows::<V>(self.rows, self.worker) }
    }
}

struct Shared<'a, K>(&'a K);
// SAFETY: `RowKernel` promises that its values may be shared between threads.
unsafe impl<K: RowKernel> Sync for Shared<'_, K> {}

impl<K: RowKernel> Shared<'_, K> {
    /// # Safety
    /// As [`RowKernel::rows`]; the machine has `isa`.
    unsafe fn run(&self, isa: Isa, rows: Range<usize>, worker: usize) {
        let part = Part {
            kernel: self.0,
            rows,
            worker,
        };
        // SAFETY: the caller's promise.
        unsafe { isa.dispatch(part) }
    }
}

impl Exec<'_> {
    /// Runs `kernel` over `rows`, each of about `row_ns` nanoseconds on one thread.
    ///
    /// # Safety
    /// Pointers in `kernel` are valid as its docs say, for all rows.
    pub(crate) unsafe fn over<K: RowKernel>(&self, rows: usize, row_ns: usize, kernel: &K) {
        let total = rows.saturating_mul(row_ns);
        let threads = self.pool.threads();
        if rows == 0 {
            return;
        }
        let tasks = if total < INLINE_NS || threads == 1 {
            1
        } else {
            let tasks = rows.min(total / TASK_NS).min(threads * 4).max(1);
            // As many for each thread, or one would wait for another.
            tasks - tasks % threads.min(tasks)
        };
        // SAFETY: the caller's promise.
        unsafe { self.tasks(rows, tasks, kernel) }
    }

    /// Runs `kernel` over `rows` in `tasks` ranges of nearly equal length.
    ///
    /// # Safety
    /// As [`Exec::over`].
    pub(crate) unsafe fn tasks<K: RowKernel>(&self, rows: usize, tasks: usize, kernel: &K) {
        let shared = Shared(kernel);
        let isa = self.isa;
        if tasks <= 1 {
            // SAFETY: the caller's promise; one range on one thread.
            return unsafe { shared.run(isa, 0..rows, 0) };
        }
        self.pool.run(tasks, &|task, worker| {
            let range = task * rows / tasks..(task + 1) * rows / tasks;
            // SAFETY: the caller's promise; ranges of different tasks are disjoint, and a worker
            // runs one task at a time.
            unsafe { shared.run(isa, range, worker) }
        });
    }
}

/// Loads and stores of a whole vector or of a masked one: what [`spans!`] hands to its body.
pub(crate) trait Span<V: Vector>: Copy {
    /// # Safety
    /// The machine has the instructions; the lanes of the span are readable at `p`.
    unsafe fn load(self, p: *const f32) -> V;
    /// # Safety
    /// The machine has the instructions; the lanes of the span are writable at `p`.
    unsafe fn store(self, v: V, p: *mut f32);
    /// Are these all lanes?
    fn is_whole(self) -> bool;
}

/// All lanes.
pub(crate) struct Whole<V>(pub(crate) PhantomData<V>);
impl<V> Clone for Whole<V> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<V> Copy for Whole<V> {}

impl<V: Vector> Span<V> for Whole<V> {
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load(p) }
    }
    #[inline(always)]
    unsafe fn store(self, v: V, p: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { v.store(p) }
    }
    #[inline(always)]
    fn is_whole(self) -> bool {
        true
    }
}

/// The first lanes, as the mask says; the others read as zero.
pub(crate) struct Tail<V: Vector>(pub(crate) V::Mask);
impl<V: Vector> Clone for Tail<V> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<V: Vector> Copy for Tail<V> {}

impl<V: Vector> Span<V> for Tail<V> {
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load_mask(p, self.0) }
    }
    #[inline(always)]
    unsafe fn store(self, v: V, p: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { v.store_mask(p, self.0) }
    }
    #[inline(always)]
    fn is_whole(self) -> bool {
        false
    }
}

/// `spans!(V, n, i, s => body)`: `body` once for each vector of `0..n`, with `i` its first element
/// and `s` its [`Span`]; the last one may be a [`Tail`]. Must stand in an unsafe block.
macro_rules! spans {
    ($V:ident, $n:expr, $i:ident, $s:ident => $body:block) => {{
        #[allow(unused_imports, reason = "a body may use neither load nor store")]
        use $crate::exec::Span as _;
        let n: usize = $n;
        let mut $i = 0usize;
        while $i + $V::LANES <= n {
            let $s = $crate::exec::Whole::<$V>(std::marker::PhantomData);
            $body
            $i += $V::LANES;
        }
        if $i < n {
            let $s = $crate::exec::Tail::<$V>($V::mask(n - $i));
            $body
        }
    }};
}
pub(crate) use spans;

/// Chains of [`chains!`].
pub(crate) const CHAINS: usize = 4;

/// `chains!(V, n, i, chain, s => body)`: as [`spans!`], with the number of the chain that a vector
/// belongs to, so that what is summed in one chain need not wait for another. Must stand in an unsafe
/// block.
macro_rules! chains {
    ($V:ident, $n:expr, $i:ident, $chain:ident, $s:ident => $body:block) => {{
        #[allow(unused_imports, reason = "a body may use neither load nor store")]
        use $crate::exec::Span as _;
        let n: usize = $n;
        let mut $i = 0usize;
        while $i + $crate::exec::CHAINS * $V::LANES <= n {
            let $s = $crate::exec::Whole::<$V>(std::marker::PhantomData);
            for $chain in 0..$crate::exec::CHAINS {
                $body
                $i += $V::LANES;
            }
        }
        let $chain = 0usize;
        while $i + $V::LANES <= n {
            let $s = $crate::exec::Whole::<$V>(std::marker::PhantomData);
            $body
            $i += $V::LANES;
        }
        if $i < n {
            let $s = $crate::exec::Tail::<$V>($V::mask(n - $i));
            $body
        }
    }};
}
pub(crate) use chains;
