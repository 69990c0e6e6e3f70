//! One stream of rows from all files: pass by pass over them together, or mixed by weight.
//! Invariant: without weights the end of a pass is told once; with weights there is none, each file beginning anew
//! when it ends. Absent on purpose: batches.

use serde_json::{Value, json};
use tallow_llm::data::Encoder;

use super::draw::Draws;
use super::resident::Resident;
use super::stream::Stream;
use super::{Input, Limits, Origin, Sample};
use crate::batch::Tally;
use crate::{Error, Result};

/// The stream of numbers that chooses files.
const STREAM: u64 = 0;

/// Rows without end.
pub(crate) struct Source {
    inputs: Vec<Input>,
    parts: Vec<Part>,
    /// Shares of the parts, summing up to 1; empty if there is only one.
    shares: Vec<f64>,
    draws: Draws,
    seed: u64,
}

enum Part {
    Resident(Resident),
    Stream(Box<Stream>),
}

/// What a source reads and how.
pub(crate) struct Opening<'a> {
    pub(crate) inputs: &'a [Input],
    /// A weight for each input, or none.
    pub(crate) weights: &'a [f64],
    pub(crate) encoder: Encoder,
    /// Rows are cut after this many tokens.
    pub(crate) longest: usize,
    pub(crate) seed: u64,
    pub(crate) limits: Limits,
}

impl Source {
    pub(crate) fn open(mut o: Opening<'_>) -> Result<Self> {
        let size = |i: &Input| {
            let about = std::fs::metadata(&i.path);
            about.map_err(|cause| Error::ReadData {
                path: i.shown.clone(),
                cause,
            })
        };
        let mut bytes = 0;
        for input in o.inputs {
            bytes += size(input).map_or(0, |m| m.len());
        }
        let whole = bytes <= o.limits.resident_bytes;
        let mut part = |inputs: &[Input], seed: u64| -> Result<Part> {
            Ok(match whole {
                true => Part::Resident(Resident::open(inputs, &mut o.encoder, o.longest, seed)?),
                false => {
                    let made = Stream::new(inputs, &o.encoder, o.longest, seed, o.limits)?;
                    Part::Stream(Box::new(made))
                }
            })
        };
        let parts = match o.weights {
            [] => vec![part(o.inputs, o.seed)?],
            _ => {
                // Files of equal length must not be drawn in equal orders.
                let seed = |i: usize| o.seed.wrapping_add((i as u64).wrapping_mul(1 << 48));
                let all = o.inputs.iter().enumerate();
                all.map(|(i, input)| part(std::slice::from_ref(input), seed(i)))
                    .collect::<Result<_>>()?
            }
        };
        let sum: f64 = o.weights.iter().sum();
        Ok(Self {
            inputs: o.inputs.to_vec(),
            parts,
            shares: o.weights.iter().map(|w| w / sum).collect(),
            draws: Draws::new(o.seed, STREAM),
            seed: o.seed,
        })
    }

    /// The file of a row, as it was named.
    pub(crate) fn input(&self, origin: &Origin) -> &Input {
        &self.inputs[origin.file]
    }

    /// Are all rows in memory?
    pub(crate) fn is_resident(&self) -> bool {
        self.parts.iter().all(|p| matches!(p, Part::Resident(_)))
    }

    /// Inputs of every row of a pass in their order, where that is known; of all rows where files are mixed.
    pub(crate) fn lengths(&self) -> Option<Vec<usize>> {
        let one = |p: &Part| match p {
            Part::Resident(r) => Some(r.lengths(self.seed)),
            Part::Stream(_) => None,
        };
        Some(
            self.parts
                .iter()
                .map(one)
                .collect::<Option<Vec<_>>>()?
                .concat(),
        )
    }

    /// What became of the lines read so far.
    pub(crate) fn tally(&self) -> Tally {
        let mut sum = Tally::default();
        for part in &self.parts {
            let t = match part {
                Part::Resident(r) => r.tally(),
                Part::Stream(s) => s.tally,
            };
            sum.cut += t.cut;
            sum.too_short += t.too_short;
            sum.no_target += t.no_target;
        }
        sum
    }

    /// The next row; `None` where a pass over all files ends.
    pub(crate) fn next(&mut self) -> Result<Option<Sample>> {
        if self.shares.is_empty() {
            return self.parts[0].next();
        }
        let mut at = self.draws.unit();
        let mut chosen = self.shares.len() - 1;
        for (i, share) in self.shares.iter().enumerate() {
            if at < *share {
                chosen = i;
                break;
            }
            at -= share;
        }
        loop {
            // At the end of its pass a file begins anew; it has at least one row.
            if let Some(mut sample) = self.parts[chosen].next()? {
                sample.origin.file = chosen;
                return Ok(Some(sample));
            }
        }
    }

    /// Rows given out before; `None` if they are not there.
    pub(crate) fn fetch(&mut self, origins: &[Origin]) -> Result<Option<Vec<Sample>>> {
        if self.shares.is_empty() {
            return self.parts[0].fetch(origins);
        }
        let mut all = vec![];
        for origin in origins {
            let inner = Origin { file: 0, ..*origin };
            let Some(part) = self.parts.get_mut(origin.file) else {
                return Ok(None);
            };
            let Some(found) = part.fetch(&[inner])? else {
                return Ok(None);
            };
            all.extend(found.into_iter().map(|mut s| {
                s.origin.file = origin.file;
                s
            }));
        }
        Ok(Some(all))
    }

    /// What tells the data from other data.
    pub(crate) fn data(&self) -> Value {
        let one = |p: &Part| match p {
            Part::Resident(r) => r.data(),
            Part::Stream(s) => s.data(),
        };
        self.parts.iter().map(one).collect()
    }

    pub(crate) fn state(&self) -> Value {
        let one = |p: &Part| match p {
            Part::Resident(r) => r.state(),
            Part::Stream(s) => s.state(),
        };
        let parts: Value = self.parts.iter().map(one).collect();
        json!({"parts": parts, "draws": self.draws.state()})
    }

    /// `None` if the state belongs to something else.
    pub(crate) fn restore(&mut self, state: &Value) -> Result<Option<()>> {
        let Some(parts) = state["parts"].as_array() else {
            return Ok(None);
        };
        if parts.len() != self.parts.len() || self.draws.restore(&state["draws"]).is_none() {
            return Ok(None);
        }
        for (part, state) in self.parts.iter_mut().zip(parts) {
            let restored = match part {
                Part::Resident(r) => r.restore(state),
                Part::Stream(s) => s.restore(state)?,
            };
            if restored.is_none() {
                return Ok(None);
            }
        }
        Ok(Some(()))
    }
}

impl Part {
    fn next(&mut self) -> Result<Option<Sample>> {
        match self {
            Part::Resident(r) => Ok(r.next()),
            Part::Stream(s) => s.next(),
        }
    }

    fn fetch(&mut self, origins: &[Origin]) -> Result<Option<Vec<Sample>>> {
        match self {
            Part::Resident(r) => Ok(r.fetch(origins)),
            Part::Stream(s) => s.fetch(origins),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Spool;
    use std::io::{BufReader, Cursor};
    use std::path::Path;
    use tallow_llm::data::LossOn;
    use tallow_llm::{ModelConfig, Tokenizer};

    const SMALL: Limits = Limits {
        resident_bytes: 1000,
        buffer_rows: 5,
        buffer_tokens: 1000,
    };

    /// Over inputs, each row in hand after the next.
    fn source(inputs: &[Input]) -> Source {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny");
        let tokenizer = Tokenizer::open(&dir).unwrap();
        let config = ModelConfig::read(&dir).unwrap();
        let opening = Opening {
            inputs,
            weights: &[],
            encoder: Encoder::new(&tokenizer, &config, LossOn::Answers),
            longest: 64,
            seed: 3,
            limits: SMALL,
        };
        Source::open(opening).unwrap()
    }

    #[test]
    fn a_pipe_is_read_as_it_is_needed_and_gives_what_its_file_gives() {
        // More than a piece of it, in lines of 1000 bytes.
        let line = |i: usize| format!("{{\"text\": \"{i} {}\"}}\n", "w ".repeat(490));
        let text: String = (0..1600).map(line).collect();
        let pipe = || {
            let from = BufReader::new(Cursor::new(text.clone().into_bytes()));
            Input::spooled(Spool::new(from), "-".into(), SMALL.resident_bytes).unwrap()
        };
        let spooled = pipe();
        let size = || std::fs::metadata(&spooled.path).unwrap().len();
        let mut piped = source(std::slice::from_ref(&spooled));
        assert!(!piped.is_resident() && size() < text.len() as u64 * 3 / 4);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &text).unwrap();
        let mut whole = source(&[Input::file(file.path().into())]);
        // A pass and the beginning of the next, which no pipe could give again.
        let mut state = Value::Null;
        for i in 0..1700 {
            assert_eq!(piped.next().unwrap(), whole.next().unwrap(), "{i}");
            if i == 1500 {
                state = piped.state();
            }
        }
        assert_eq!(size(), text.len() as u64);
        // Going on with the same input once more.
        let mut again = source(&[pipe()]);
        assert!(again.restore(&state).unwrap().is_some());
        let mut there = source(&[Input::file(file.path().into())]);
        assert!(there.restore(&state).unwrap().is_some());
        for i in 0..300 {
            assert_eq!(again.next().unwrap(), there.next().unwrap(), "{i}");
        }
    }
}
