//! Draws of uniform numbers by the core's Philox4x32-10, many counters at a time.
//! Invariant: element `i` of draw `id` under `seed` depends on those three alone, so it can be
//! made again in backward, in any order, by any thread.
//! Absent on purpose: state.
//!
//! Four elements share a counter: element `i` is word `i % 4` of counter `[i / 4 (two
//! words), id, 0]` under key `seed`.

use std::ops::Range;

use tallow_core::philox::{philox4x32, unit};

use crate::exec::{Exec, RowKernel};
use crate::simd::Vector;

/// Counters made side by side, so that the compiler can use vectors.
const WIDE: usize = 16;

/// The four words that elements `4 * quad..` of a draw are made of.
#[inline(always)]
fn words(quad: u64, id: u32, seed: [u32; 2]) -> [u32; 4] {
    philox4x32([quad as u32, (quad >> 32) as u32, id, 0], seed)
}

/// Elements made side by side.
pub(crate) const BLOCK: usize = 4 * WIDE;

/// Elements `block * BLOCK ..` of a draw, in `[0, 1)`.
#[inline(always)]
pub(crate) fn numbers(block: usize, id: u32, seed: [u32; 2]) -> [f32; BLOCK] {
    let mut numbers = [0.0; BLOCK];
    for i in 0..WIDE {
        let words = words((block * WIDE + i) as u64, id, seed);
        for (k, word) in words.into_iter().enumerate() {
            numbers[4 * i + k] = unit(word);
        }
    }
    numbers
}

/// Arguments for filling an array with uniform numbers.
#[derive(Clone, Copy, Debug)]
pub struct Uniform {
    /// Elements.
    pub n: usize,
    /// Identity of the draw.
    pub id: u32,
    /// Key, read when run.
    pub seed: *const [u32; 2],
    /// Output `[n]`.
    pub y: *mut f32,
}

impl Uniform {
    /// Fills `y` with numbers in `[0, 1)`.
    ///
    /// # Safety
    /// `y` holds `n` elements; the machine has `exec.isa`.
    pub unsafe fn run(&self, exec: Exec<'_>) {
        // SAFETY: the caller's promise.
        unsafe { exec.over(self.n.div_ceil(BLOCK), BLOCK, self) }
    }
}

// SAFETY: elements are independent.
unsafe impl RowKernel for Uniform {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, _worker: usize) {
        // SAFETY: the caller's promise.
        let seed = unsafe { *self.seed };
        for block in rows {
            let numbers = numbers(block, self.id, seed);
            let first = block * BLOCK;
            let n = (self.n - first).min(BLOCK);
            // SAFETY: `first + n <= self.n`.
            unsafe { std::ptr::copy_nonoverlapping(numbers.as_ptr(), self.y.add(first), n) };
        }
    }
}

#[cfg(test)]
mod tests;
