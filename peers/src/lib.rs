//! Peers: the same model, the same random weights and the same batches, run by other people's engines.
//!
//! Invariant: every contender gets its weights from [`Weights`] and its ids from [`Batch`], so losses and greedy tokens
//! can be compared as well as times.
//! Absent on purpose: tuning that a user of the peer would not do, and any part of the default build of tallow.

pub mod candle;
pub mod products;
pub mod rounds;
pub mod stats;
pub mod tallow;
pub mod threads;
pub mod versions;
pub mod weights;

pub use rounds::{Round, Settings, run};
pub use stats::Summary;
pub use weights::{Batch, ModelShape, Weights};

/// What went wrong in a peer. A benchmark stops at the first error.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
/// A result with [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// One engine with one model, ready to be timed round by round beside others in the same process.
pub trait Contender {
    /// Name for the report, with the variant that runs (`candle 0.11.1, flash`).
    fn name(&self) -> &str;

    /// One optimizer step on `batch`, finished when this returns: forward, backward, AdamW. Returns the loss a token.
    ///
    /// # Errors
    /// Whatever the engine reports.
    fn train_step(&mut self, batch: &Batch) -> Result<f32>;

    /// Reads `prompt` into an empty cache and generates `tokens` greedy tokens with the bare model, end-of-sequence
    /// ignored. Returns them.
    ///
    /// # Errors
    /// Whatever the engine reports.
    fn decode(&mut self, prompt: &[u32], tokens: usize) -> Result<Vec<u32>>;
}
