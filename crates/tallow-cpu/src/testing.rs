//! What the tests of kernels share: fresh random numbers and the tolerance.
//! Invariant: a failing test prints its seed; `TALLOW_TEST_SEED` repeats it.
//! Absent on purpose: anything that ships. This module exists in test builds only.

use std::time::{SystemTime, UNIX_EPOCH};

/// SplitMix64.
#[derive(Debug)]
pub(crate) struct Rng {
    seed: u64,
    state: u64,
}

impl Rng {
    /// Seeded by the clock, or by `TALLOW_TEST_SEED`. Prints the seed.
    pub(crate) fn fresh() -> Self {
        let clock = || {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(1, |d| d.as_nanos() as u64)
        };
        let seed = std::env::var("TALLOW_TEST_SEED")
            .ok()
            .and_then(|s| s.parse().ok());
        let seed = seed.unwrap_or_else(clock);
        println!("TALLOW_TEST_SEED={seed}");
        Self::new(seed)
    }

    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, state: seed }
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From -1 to 1.
    pub(crate) fn f32(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// `n` numbers from -1 to 1.
    pub(crate) fn vec(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.f32()).collect()
    }
}

/// Is `got` the sum of `terms`, up to one ulp of the result and the rounding of a sum in f32?
/// A chain of `n` roundings of random sign wanders by about `sqrt(n)` half ulps of the partial sums,
/// which are far below the sum of magnitudes; four ulps of that bound every order of summation.
pub(crate) fn close(got: f32, terms: &[f64]) -> Result<(), String> {
    let want: f64 = terms.iter().sum();
    let size: f64 = terms.iter().map(|t| t.abs()).sum();
    let eps = f64::from(f32::EPSILON);
    let bound = want.abs() * eps + 4.0 * eps * size + f64::from(f32::MIN_POSITIVE);
    let off = (f64::from(got) - want).abs();
    if off <= bound {
        Ok(())
    } else {
        Err(format!(
            "want {want}, got {got}: off by {off:e}, bound {bound:e}"
        ))
    }
}
