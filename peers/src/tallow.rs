//! tallow as its own user would write it: default threads, the recorded training step, the cached decoder.
//! Invariant: every call uploads its ids and reads its result; nothing is left running when it returns.
//! Absent on purpose: settings that the command line does not use by default.

use ::tallow::llm::{Adapter, Decoder, LoadOptions, Model, data::LossOn};
use ::tallow::train::{Batch as Padded, OptimizerKind, Schedule, TrainConfig, Trainer};
use ::tallow::{DType, OpenOptions, Program, Role, Session, TensorType};
use tempfile::TempDir;

use crate::products::{LoraData, LoraShape};
use crate::weights::{Batch, Weights, adamw};
use crate::{Contender, Result};

/// tallow training and decoding the model.
pub struct Tallow {
    name: String,
    model: Model,
    trainer: Trainer,
    decoder: Option<Decoder>,
    /// The model's files, mapped while it lives.
    _files: TempDir,
}

impl Tallow {
    /// Writes `weights` as Hugging Face and PEFT folders and loads them like any other.
    ///
    /// # Errors
    /// Whatever tallow reports; a folder for temporary files that cannot be written.
    pub fn new(weights: &Weights) -> Result<Self> {
        let files = tempfile::tempdir()?;
        let [base, lora] = ["model", "adapter"].map(|name| files.path().join(name));
        weights.write_dir(&base)?;
        weights.write_adapter(&lora)?;
        let session = ::tallow::open("cpu")?;
        let model = Model::load(&session, &base, &LoadOptions::default())?;
        let (adapter, _) = Adapter::load(&model, &lora, Role::State)?;
        Ok(Self {
            name: format!("tallow {}", crate::versions::locked("tallow").join("/")),
            trainer: Trainer::new(&model, &adapter, &settings())?,
            decoder: None,
            model,
            _files: files,
        })
    }

    /// The decoder for `tokens` tokens; recordings of an earlier call are kept.
    fn decoder(&mut self, tokens: usize) -> Result<&mut Decoder> {
        let large_enough = |d: &Decoder| d.capacity() >= tokens;
        let decoder = match self.decoder.take().filter(large_enough) {
            Some(mut decoder) => {
                decoder.reset();
                decoder
            }
            None => Decoder::new(&self.model, None, tokens)?,
        };
        Ok(self.decoder.insert(decoder))
    }
}

impl Contender for Tallow {
    fn name(&self) -> &str {
        &self.name
    }

    fn train_step(&mut self, batch: &Batch) -> Result<f32> {
        let (b, t) = (batch.rows, batch.len);
        let padded = Padded {
            b,
            t,
            ids: batch.ids.clone(),
            pos: (0..b).flat_map(|_| 0..t as u32).collect(),
            targets: batch.targets.clone(),
            counted: batch.tokens(),
            ..Padded::default()
        };
        Ok(self.trainer.step(&[padded], adamw::LR)?.loss)
    }

    fn decode(&mut self, prompt: &[u32], tokens: usize) -> Result<Vec<u32>> {
        let decoder = self.decoder(prompt.len() + tokens)?;
        let mut out = Vec::with_capacity(tokens);
        let mut next = greedy(decoder.feed(prompt)?);
        for i in 0..tokens {
            out.push(next);
            if i + 1 < tokens {
                next = greedy(decoder.feed(&[next])?);
            }
        }
        Ok(out)
    }
}

/// Everything that every contender does alike. The number of steps is decided by who calls.
fn settings() -> TrainConfig {
    TrainConfig {
        steps: Some(1),
        epochs: 1.0,
        batch: 4,
        accumulate: 1,
        seq_len: 128,
        packing: false,
        loss_on: LossOn::Answers,
        optimizer: OptimizerKind::AdamW,
        lr: adamw::LR,
        schedule: Schedule::Constant,
        warmup: 0,
        weight_decay: adamw::WEIGHT_DECAY,
        beta1: adamw::BETA1,
        beta2: adamw::BETA2,
        eps: adamw::EPS,
        clip: None,
        seed: 0,
        eval_every: None,
        patience: None,
        checkpoint_layers: false,
        skip_nonfinite: false,
    }
}

/// The first of the best, as in candle.
fn greedy(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, score) in logits.iter().enumerate() {
        if *score > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// One LoRA forward in tallow, recorded beforehand.
pub struct TallowLora {
    session: Session,
    program: Program,
}

impl TallowLora {
    /// Copies the operands of `d`; bare where `with_adapter` is false.
    ///
    /// # Errors
    /// Whatever tallow reports.
    pub fn new(d: &LoraData, with_adapter: bool, threads: usize) -> Result<Self> {
        let LoraShape { m, k, n, r } = d.shape;
        let session = ::tallow::open_with(&OpenOptions {
            device: "cpu".to_owned(),
            threads: Some(threads),
            weights: DType::F32,
            choose: ::tallow::Choose::Estimate,
        })?;
        let frozen = |v: &[f32], shape: [usize; 2]| session.tensor(v, shape, Role::Frozen);
        let x = session.zeros(TensorType::f32([m, k]), Role::Data)?;
        session.write(&x, &d.x)?;
        let w = frozen(&d.w, [n, k])?;
        let y = match with_adapter {
            true => x.lora_linear(&w, &frozen(&d.a, [r, k])?, &frozen(&d.b, [n, r])?, d.scale)?,
            false => x.linear(&w)?,
        };
        let program = session.record(&[&y], &[])?;
        Ok(Self { session, program })
    }

    /// Replays and reads the result into `y: [m, n]`.
    ///
    /// # Errors
    /// Whatever tallow reports.
    pub fn forward(&mut self, y: &mut [f32]) -> Result<()> {
        self.program.replay()?;
        Ok(self.session.read_into(&self.program.outputs[0], y)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::candle::{Attention, Candle};
    use crate::weights::{AdapterShape, ModelShape};

    #[test]
    fn candle_agrees_on_losses_and_tokens() {
        let weights = Weights::random(ModelShape::SMALL, AdapterShape::QV8, 1);
        let mut ours = Tallow::new(&weights).unwrap();
        let mut theirs = Candle::new(&weights, Attention::Fused).unwrap();
        let batch = Batch::random(&weights.shape, 2, 16, 2);
        let mut losses = Vec::new();
        for step in 0..8 {
            let a = ours.train_step(&batch).unwrap();
            let b = theirs.train_step(&batch).unwrap();
            assert!(((a - b) / b).abs() < 2e-6, "step {step}: {a} and {b}");
            losses.push(a);
        }
        assert!(losses[7] < 0.999 * losses[0], "nothing learnt: {losses:?}");
        let prompt = Batch::random(&weights.shape, 1, 32, 3).ids;
        for _ in 0..2 {
            assert_eq!(
                ours.decode(&prompt, 16).unwrap(),
                theirs.decode(&prompt, 16).unwrap()
            );
        }
    }

    #[test]
    fn products_agree_with_f64() {
        let shape = LoraShape {
            m: 17,
            k: 33,
            n: 29,
            r: 5,
        };
        for with_adapter in [false, true] {
            let mut d = LoraData::random(shape, 5);
            let mut lora = TallowLora::new(&d, with_adapter, 2).unwrap();
            lora.forward(&mut d.y).unwrap();
            assert!(d.worst_error(with_adapter) < 4.0, "{with_adapter}");
        }
    }
}
