//! Philox4x32-10: random numbers that are a function of a counter, the same on every device.
//! Invariant: element `i` of draw `id` under `seed` depends on those three alone, so it can be
//! made again in backward, in any order, by any thread.
//! Absent on purpose: state.
//!
//! Four elements share a counter: element `i` is word `i % 4` of counter `[i / 4 (two
//! words), id, 0]` under key `seed`. Reference: Salmon et al., "Parallel random numbers: as easy as
//! 1, 2, 3", 2011.

use std::ops::Range;

use crate::exec::{Exec, RowKernel};
use crate::simd::Vector;

const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
const ROUNDS: usize = 10;
/// Counters made side by side, so that the compiler can use vectors.
const WIDE: usize = 16;

/// The four words of a counter under a key.
#[inline(always)]
#[must_use]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let a = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// The four words that elements `4 * quad..` of a draw are made of.
#[inline(always)]
fn words(quad: u64, id: u32, seed: [u32; 2]) -> [u32; 4] {
    philox([quad as u32, (quad >> 32) as u32, id, 0], seed)
}

/// A word as a number in `[0, 1)`: its upper 24 bits.
#[inline(always)]
fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
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
        unsafe { exec.over(self.n.div_ceil(4 * WIDE), 4 * WIDE, self) }
    }
}

// SAFETY: elements are independent.
unsafe impl RowKernel for Uniform {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, _worker: usize) {
        // SAFETY: the caller's promise.
        let seed = unsafe { *self.seed };
        for block in rows {
            let mut numbers = [0.0; 4 * WIDE];
            for i in 0..WIDE {
                let words = words((block * WIDE + i) as u64, self.id, seed);
                for (k, word) in words.into_iter().enumerate() {
                    numbers[4 * i + k] = unit(word);
                }
            }
            let first = block * 4 * WIDE;
            let n = (self.n - first).min(4 * WIDE);
            // SAFETY: `first + n <= self.n`.
            unsafe { std::ptr::copy_nonoverlapping(numbers.as_ptr(), self.y.add(first), n) };
        }
    }
}

#[cfg(test)]
mod tests;
