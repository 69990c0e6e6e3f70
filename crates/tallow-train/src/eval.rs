//! Loss a token over a JSONL file.
//! Invariant: every line is seen whole (one the model has no positions for is an error, never cut), each
//! token that counts is counted once, packed or not; memory is bounded by a window of lines, whatever the size of
//! the file. Absent on purpose: other metrics.
use crate::{
    Error, Result,
    batch::{Batch, BatchShape, Buckets, Doc},
    data::pack::{Packable as _, Packer},
};
use std::{collections::BTreeMap, path::Path, time::Instant};
use tallow_core::{op::Role, session::Program, tensor::Tensor, types::TensorType};
use tallow_llm::data::{Encoder, Examples, LossOn, Row};
use tallow_llm::{Tokenizer, adapter::Adapter, model::Model};

/// Lines read before they are sorted by length into batches, or packed, and their tokens (and a line more).
const WINDOW_LINES: usize = 256;
const WINDOW_TOKENS: usize = 1 << 20;
/// Inputs of a row that several lines share; longer lines have a row each.
const PACKED_INPUTS: usize = 512;
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

    /// Of several files as if they were one.
    pub fn together(all: &[Evaluation]) -> Self {
        let tokens = all.iter().map(|e| e.tokens).sum();
        let nll: f64 = all.iter().map(|e| e.loss * e.tokens as f64).sum();
        Evaluation {
            loss: match all {
                // As it is, to the last bit.
                [one] => one.loss,
                _ => nll / tokens as f64,
            },
            tokens,
            lines: all.iter().map(|e| e.lines).sum(),
            seconds: all.iter().map(|e| e.seconds).sum(),
        }
    }
}

/// Evaluates one model with one adapter (or none) as often as wanted; recordings are kept. It sees the
/// adapter's parameters as they are when it runs.
pub struct Evaluator {
    model: Model,
    adapter: Option<Adapter>,
    loss_on: LossOn,
    /// Inputs of a row that lines share, where they do.
    packing: Option<usize>,
    buckets: Buckets,
    /// By rows and tokens `[b, t]`, and whether rows hold several lines.
    passes: BTreeMap<([usize; 2], bool), Pass>,
}

/// A recorded forward pass for batches of one shape.
struct Pass {
    program: Program,
    /// Ids, positions, targets and, where rows hold several lines, where these begin: `[b, t]`.
    inputs: Vec<Tensor>,
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
            packing: None,
            passes: BTreeMap::new(),
        }
    }

    /// Puts several lines into a row, none seeing another: less padding, the same loss.
    #[must_use]
    pub fn packed(self) -> Self {
        let most = self.model.config.max_positions;
        Evaluator {
            packing: Some(PACKED_INPUTS.min(most)),
            ..self
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
        let mut window = Window::default();
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
            window.tokens += row.ids.len();
            window.rows.push(row);
            if window.rows.len() == WINDOW_LINES || window.tokens >= WINDOW_TOKENS {
                self.window(&mut window, &mut sum)?;
            }
        }
        self.window(&mut window, &mut sum)?;
        self.packed_rows(&mut window.packed, &mut sum)?;
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
        let mut window = Window {
            rows: rows.iter().map(row).collect(),
            ..Window::default()
        };
        let mut sum = Sum::default();
        self.window(&mut window, &mut sum)?;
        self.packed_rows(&mut window.packed, &mut sum)?;
        Ok((sum.nll, sum.tokens))
    }

    /// Computes all rows of a window but those that may still share a batch with the next window's.
    fn window(&mut self, window: &mut Window, sum: &mut Sum) -> Result<()> {
        let mut rows = std::mem::take(&mut window.rows);
        window.tokens = 0;
        rows.retain(|row| row.targets() > 0);
        if let Some(capacity) = self.packing {
            let (short, long) = rows.into_iter().partition(|r| r.inputs() <= capacity);
            rows = long;
            self.pack(short, capacity, &mut window.packed, sum)?;
        }
        rows.sort_by_key(|row| row.ids.len());
        let mut rest = &rows[..];
        while let Some(first) = rest.first() {
            let t = self.bucket(first.inputs())?;
            let b = rows_of(t);
            let fits = |row: &&Row| row.inputs() <= t;
            let n = rest.iter().take(b).take_while(fits).count();
            let (now, later) = rest.split_at(n);
            let pass = self.pass([b, t], false)?;
            pass.batch.fill([b, t], now.iter().map(Doc::from))?;
            self.compute([b, t], false, sum)?;
            rest = later;
        }
        Ok(())
    }

    /// Packs rows, and computes those that fill a batch.
    fn pack(
        &mut self,
        rows: Vec<Row>,
        capacity: usize,
        ready: &mut Vec<Vec<Row>>,
        sum: &mut Sum,
    ) -> Result<()> {
        let mut packer = Packer::new(capacity);
        let mut rows = rows.into_iter();
        while let Some(row) = packer.row(|| Ok(rows.next()))? {
            ready.push(row);
            if ready.len() == rows_of(capacity) {
                self.packed_rows(ready, sum)?;
            }
        }
        Ok(())
    }

    /// Computes packed rows, in a batch of as many.
    fn packed_rows(&mut self, ready: &mut Vec<Vec<Row>>, sum: &mut Sum) -> Result<()> {
        let (b, Some(t)) = (ready.len(), self.packing) else {
            return Ok(());
        };
        if b == 0 {
            return Ok(());
        }
        let pass = self.pass([b, t], true)?;
        let rows = ready.iter().map(|row| row.iter().map(Doc::from));
        pass.batch.fill_packed([b, t], rows)?;
        ready.clear();
        self.compute([b, t], true, sum)
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

    /// The recording for a shape of batches.
    fn pass(&mut self, dims: [usize; 2], packed: bool) -> Result<&mut Pass> {
        use std::collections::btree_map::Entry;
        Ok(match self.passes.entry((dims, packed)) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(place) => {
                let shape = BatchShape { dims, packed };
                place.insert(Pass::new(&self.model, self.adapter.as_ref(), shape)?)
            }
        })
    }

    /// Computes the batch that lies in a recording.
    fn compute(&mut self, dims: [usize; 2], packed: bool, sum: &mut Sum) -> Result<()> {
        let s = self.model.session.clone();
        let pass = self.pass(dims, packed)?;
        let Batch {
            ids,
            pos,
            targets,
            starts,
            ..
        } = &pass.batch;
        for (leaf, values) in pass.inputs.iter().zip([ids, pos, targets, starts]) {
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
    fn new(model: &Model, adapter: Option<&Adapter>, shape: BatchShape) -> Result<Self> {
        let ints = || {
            let ty = TensorType::u32(shape.dims);
            model.session.zeros(ty, Role::Data)
        };
        let (ids, pos, targets) = (ints()?, ints()?, ints()?);
        let starts = shape.packed.then(ints).transpose()?;
        let x = match &starts {
            None => model.hidden(&ids, &pos, adapter, None)?.x,
            Some(starts) => model.hidden_packed(&ids, &pos, starts, adapter)?.x,
        };
        let nll = model.nll_with(&x, &targets, adapter)?;
        Ok(Pass {
            program: model.session.record(&[&nll], &[])?,
            inputs: [ids, pos, targets].into_iter().chain(starts).collect(),
            batch: Batch::default(),
            nll: vec![0.0; shape.dims.iter().product()],
        })
    }
}

/// Lines that wait to be computed.
#[derive(Default)]
struct Window {
    rows: Vec<Row>,
    /// Of `rows`.
    tokens: usize,
    /// Packed rows that wait for a batch to be full.
    packed: Vec<Vec<Row>>,
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
