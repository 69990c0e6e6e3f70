//! candle as a careful user would write it: default features, both threads, its own AdamW.
//! Invariant: training uses only ops that have a backward; decode uses the fused ones.
//! Absent on purpose: custom ops. What candle does not ship is not candle.

mod decode;
mod train;

pub use decode::{Attention, CandleDecoder};
pub use train::CandleTrainer;

use candle_core::{Device, Tensor};

use crate::weights::{Batch, ModelShape, Rows, Weights};
use crate::{Contender, Result};

/// candle training and decoding the model, with the decode path named by `attention`.
pub struct Candle {
    name: String,
    trainer: CandleTrainer,
    decoder: CandleDecoder,
}

impl Candle {
    /// Copies `weights` into candle tensors.
    ///
    /// # Errors
    /// Whatever candle reports.
    pub fn new(weights: &Weights, attention: Attention) -> Result<Self> {
        let version = crate::versions::locked("candle-core").join("/");
        Ok(Self {
            name: format!("candle {version}, {}", attention.label()),
            trainer: CandleTrainer::new(weights)?,
            decoder: CandleDecoder::new(weights, attention)?,
        })
    }

    /// The training half, for checks.
    pub fn trainer(&mut self) -> &mut CandleTrainer {
        &mut self.trainer
    }
}

impl Contender for Candle {
    fn name(&self) -> &str {
        &self.name
    }

    fn train_step(&mut self, batch: &Batch) -> Result<f32> {
        self.trainer.step(batch)
    }

    fn decode(&mut self, prompt: &[u32], tokens: usize) -> Result<Vec<u32>> {
        self.decoder.generate(prompt, tokens)
    }
}

/// `rows` as a candle tensor of the same extents.
fn tensor(rows: &Rows) -> candle_core::Result<Tensor> {
    Tensor::from_slice(&rows.data, rows.shape.as_slice(), &Device::Cpu)
}

/// Cosines and sines `[max_positions, head_dim / 2]` of the rotary embedding.
fn rotary_tables(shape: &ModelShape) -> candle_core::Result<(Tensor, Tensor)> {
    let half = shape.head_dim / 2;
    let angles: Vec<f32> = (0..shape.max_positions * half)
        .map(|i| {
            let (position, pair) = (i / half, i % half);
            position as f32 / shape.rope_theta.powf(pair as f32 / half as f32)
        })
        .collect();
    let angles = Tensor::from_vec(angles, (shape.max_positions, half), &Device::Cpu)?;
    Ok((angles.cos()?, angles.sin()?))
}
