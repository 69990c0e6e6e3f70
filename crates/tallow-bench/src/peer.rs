//! Other people's engines: what they can be asked to compute.
//! Absent on purpose: the engines themselves, which are behind features and in other processes.

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
