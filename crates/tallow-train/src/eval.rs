//! Loss a token over a JSONL file.
//! Invariant: every line is seen whole (one the model has no positions for is an error, never cut), each
//! token that counts is counted once; memory is bounded by a window of lines, whatever the size of the file.
//! Absent on purpose: other metrics.
use crate::{
    Error, Result,
    batch::{Batch, Buckets, Doc},
};
use std::{collections::BTreeMap, path::Path, time::Instant};
use tallow_core::{op::Role, session::Program, tensor::Tensor, types::TensorType};
use tallow_llm::data::{Encoder, Examples, LossOn, Row};
use tallow_llm::{Tokenizer, adapter::Adapter, model::Model};

/// Lines read before they are sorted by length into batches.
const WINDOW_LINES: usize = 256;
/// Inputs of one batch, padding included, unless a single line has more.
const BATCH_TOKENS: usize = 2048;
const MOST_ROWS: usize = 16;

/// The loss of a model on a file.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Evaluation {
    /// Mean over all tokens predicted, in nats.
    pub loss: f64,
    /// Tokens predicted.
    pub tokens: u64,
    /// Lines read.
    pub lines: u64,
    /// Time it took, in seconds.
    pub seconds: f64,
}

impl Evaluation {
    /// `e^loss`.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

/// Evaluates one model with one adapter (or none) as often as wanted; recordings are kept. It sees the
/// adapter's parameters as they are when it runs.
pub struct Evaluator {
    model: Model,
    adapter: Option<Adapter>,
    loss_on: LossOn,
    buckets: Buckets,
    passes: BTreeMap<usize, Pass>,
}

/// A recorded forward pass for batches of one shape.
struct Pass {
    program: Program,
    inputs: [Tensor; 3],
    batch: Batch,
    nll: Vec<f32>,
}

impl Evaluator {
    /// For lines of up to the model's positions.
    pub fn new(model: &Model, adapter: Option<&Adapter>) -> Self {
        Evaluator {
            buckets: Buckets::up_to(model.config.max_positions),
            model: model.clone(),
            adapter: adapter.cloned(),
            loss_on: LossOn::Answers,
            passes: BTreeMap::new(),
        }
    }

    /// Counts these tokens; [`LossOn::Answers`] otherwise.
    #[must_use]
    pub fn counting(self, loss_on: LossOn) -> Self {
        Evaluator { loss_on, ..self }
    }

    /// The loss on a file, of the tokens that a training run would learn.
    ///
    /// # Errors
    /// A line that cannot be read or is too long for the model; a file with nothing to predict.
    pub fn run(&mut self, data: &Path, tokenizer: &Tokenizer) -> Result<Evaluation> {
        let start = Instant::now();
        let most = self.model.config.max_positions;
        let mut sum = Sum::default();
        let mut window: Vec<Row> = Vec::with_capacity(WINDOW_LINES);
        let mut encoder = Encoder::new(tokenizer, &self.model.config, self.loss_on);
        let mut lines = Examples::open(data)?;
        let mut count = 0;
        while let Some(example) = lines.next() {
            let row = encoder.encode(&example?);
            let row = row.map_err(|e| lines.blame(e))?;
            if row.ids.len() > most {
                return Err(Error::LineTooLong {
                    path: data.to_path_buf(),
                    line: lines.line(),
                    tokens: row.ids.len(),
                    most,
                });
            }
            count += 1;
            window.push(row);
            if window.len() == WINDOW_LINES {
                self.window(&mut window, &mut sum)?;
            }
        }
        self.window(&mut window, &mut sum)?;
        if sum.tokens == 0 {
            let path = data.to_path_buf();
            return Err(Error::NothingToPredict { path });
        }
        Ok(Evaluation {
            loss: sum.nll / sum.tokens as f64,
            tokens: sum.tokens,
            lines: count,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    /// The summed loss, in nats, and the number of tokens predicted in some rows of ids.
    ///
    /// # Errors
    /// A row longer than the model's positions; a device that fails.
    pub fn rows(&mut self, rows: &[&[u32]]) -> Result<(f64, u64)> {
        let row = |ids: &&[u32]| Row {
            ids: ids.to_vec(),
            counted: (0..ids.len()).map(|i| i > 0).collect(),
        };
        let mut window: Vec<Row> = rows.iter().map(row).collect();
        let mut sum = Sum::default();
        self.window(&mut window, &mut sum)?;
        Ok((sum.nll, sum.tokens))
    }

    fn window(&mut self, window: &mut Vec<Row>, sum: &mut Sum) -> Result<()> {
        window.retain(|row| row.targets() > 0);
        window.sort_by_key(|row| row.ids.len());
        let mut rest = &window[..];
        while let Some(first) = rest.first() {
            let t = self.bucket(first.ids.len() - 1)?;
            let b = rows_of(t);
            let fits = |row: &&Row| row.ids.len() - 1 <= t;
            let n = rest.iter().take(b).take_while(fits).count();
            let (now, later) = rest.split_at(n);
            self.batch([b, t], now, sum)?;
            rest = later;
        }
        window.clear();
        Ok(())
    }

    fn bucket(&self, inputs: usize) -> Result<usize> {
        let longest = self.buckets.lengths().last().copied().unwrap_or(0);
        self.buckets.fit(inputs).ok_or(Error::BatchShape {
            want_rows: 1,
            want_len: longest,
            rows: 1,
            len: inputs,
        })
    }

    fn batch(&mut self, [b, t]: [usize; 2], rows: &[Row], sum: &mut Sum) -> Result<()> {
        use std::collections::btree_map::Entry;
        let pass = match self.passes.entry(t) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(place) => {
                place.insert(Pass::new(&self.model, self.adapter.as_ref(), [b, t])?)
            }
        };
        let s = &self.model.session;
        pass.batch.fill([b, t], rows.iter().map(Doc::from))?;
        let Batch {
            ids, pos, targets, ..
        } = &pass.batch;
        for (leaf, values) in pass.inputs.iter().zip([ids, pos, targets]) {
            s.write_u32(leaf, values)?;
        }
        pass.program.replay()?;
        s.read_into(&pass.program.outputs[0], &mut pass.nll)?;
        // Uncounted targets are exactly 0.
        sum.nll += pass.nll.iter().map(|x| f64::from(*x)).sum::<f64>();
        sum.tokens += pass.batch.counted as u64;
        Ok(())
    }
}

impl Pass {
    fn new(model: &Model, adapter: Option<&Adapter>, [b, t]: [usize; 2]) -> Result<Self> {
        let ints = || model.session.zeros(TensorType::u32([b, t]), Role::Data);
        let (ids, pos, targets) = (ints()?, ints()?, ints()?);
        let x = model.hidden(&ids, &pos, adapter, None)?.x;
        let nll = model.nll_with(&x, &targets, adapter)?;
        Ok(Pass {
            program: model.session.record(&[&nll], &[])?,
            inputs: [ids, pos, targets],
            batch: Batch::default(),
            nll: vec![0.0; b * t],
        })
    }
}

#[derive(Default)]
struct Sum {
    nll: f64,
    tokens: u64,
}

/// Rows of a batch of length `t`: fewer where they are longer, so that memory stays the same.
fn rows_of(t: usize) -> usize {
    (BATCH_TOKENS / t).clamp(1, MOST_ROWS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_batches_have_fewer_rows() {
        assert_eq!([16, 128, 256, 2048, 10_000].map(rows_of), [16, 16, 8, 1, 1]);
    }
}
