//! Other people's engines: what they can be asked to compute.
//! Absent on purpose: the engines themselves, which are behind features and in other processes.

use crate::Result;
use crate::measure::Contender;
use crate::suite::Context;
use crate::suite::products::LoraShape;

/// A norm or a softmax over the last axis of 4x16x1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOp {
    /// Softmax.
    Softmax,
    /// Root mean square norm with weights.
    RmsNorm,
    /// Layer norm with weights and biases.
    LayerNorm,
}

impl RowOp {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Softmax, Self::RmsNorm, Self::LayerNorm];

    /// As in a table.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Softmax => "softmax",
            Self::RmsNorm => "RMSNorm",
            Self::LayerNorm => "LayerNorm",
        }
    }
}

/// What a peer computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// A product, with or without an adapter.
    Lora(LoraShape),
    /// A norm or a softmax.
    Rows(RowOp),
}

/// An engine that takes part in a run.
pub trait Peer {
    /// "candle", "mlx".
    fn name(&self) -> &str;
    /// Its version, and what it runs on where that matters ("0.32.4, reference BLAS").
    fn version(&self) -> String;
    /// It, with a job; `None` where it has no such thing.
    ///
    /// # Errors
    /// What the engine reports.
    fn contender(&mut self, job: &Job, cx: &Context) -> Result<Option<Contender>>;
}
