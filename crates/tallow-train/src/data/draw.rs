//! Random numbers with a place that can be written down.
//! Invariant: equal seeds, streams and places draw equal numbers on every machine and in every version.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};
use serde_json::{Value, json};

/// One stream of numbers.
#[derive(Clone, Debug)]
pub(super) struct Draws(ChaCha8Rng);

impl Draws {
    /// `stream` tells the uses of one seed apart; epochs have the low ones.
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(u64::MAX - stream);
        Draws(random)
    }

    /// A number below `n`.
    pub(super) fn below(&mut self, n: usize) -> usize {
        let draw = u128::from(self.0.next_u64()) * n as u128;
        (draw >> 64) as usize
    }

    /// A number in `[0, 1)`.
    pub(super) fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub(super) fn state(&self) -> Value {
        json!(self.0.get_word_pos().to_string())
    }

    pub(super) fn restore(&mut self, state: &Value) -> Option<()> {
        self.0.set_word_pos(state.as_str()?.parse().ok()?);
        Some(())
    }
}
