//! Rows of small files, all in memory, in an order of their own in every pass.
//! Invariant: a pass gives every row once.

use serde_json::{Value, json};
use tallow_llm::data::{Encoder, Place, Row};

use super::{Input, Origin, Sample};
use crate::batch::{Order, Rows, Tally};
use crate::{Error, Result};

/// Rows in memory.
pub(super) struct Resident {
    pub(super) rows: Rows,
    /// Where the rows of each file end.
    ends: Vec<usize>,
    order: Order,
    /// The end of the last pass was told.
    told: bool,
}

impl Resident {
    pub(super) fn open(
        inputs: &[Input],
        encoder: &mut Encoder,
        longest: usize,
        seed: u64,
    ) -> Result<Self> {
        let (mut rows, mut ends) = (Rows::default(), vec![]);
        for input in inputs {
            let read = rows.read(&input.path, encoder, longest);
            read.map_err(|e| match e {
                Error::Llm(e) => Error::Llm(input.named(e)),
                other => other,
            })?;
            ends.push(rows.len());
        }
        if rows.is_empty() {
            let path = inputs.first().map(|i| i.shown.clone()).unwrap_or_default();
            return Err(Error::NothingToPredict { path });
        }
        Ok(Self {
            order: Order::new(seed, rows.len()),
            rows,
            ends,
            told: true,
        })
    }

    pub(super) fn tally(&self) -> Tally {
        self.rows.tally
    }

    /// Inputs of every row, in the order of the first pass.
    pub(super) fn lengths(&self, seed: u64) -> Vec<usize> {
        let mut order = Order::new(seed, self.rows.len());
        let all = order.next(self.rows.len()).iter();
        all.map(|i| self.rows.row(*i).inputs()).collect()
    }

    pub(super) fn next(&mut self) -> Option<Sample> {
        let (_, at) = self.order.cursor();
        if at == self.rows.len() && !self.told {
            self.told = true;
            return None;
        }
        self.told = false;
        let row = *self.order.next(1).first()?;
        Some(self.sample(row, self.order.epoch()))
    }

    fn sample(&self, row: usize, epoch: u64) -> Sample {
        let doc = self.rows.row(row);
        let counted = doc.counted.unwrap_or_default();
        Sample {
            row: Row {
                ids: doc.ids.to_vec(),
                counted: counted.to_vec(),
            },
            origin: Origin {
                file: self.ends.partition_point(|end| *end <= row),
                place: Place {
                    offset: 0,
                    line: self.rows.line(row).saturating_sub(1),
                },
                row,
                epoch,
            },
        }
    }

    /// Rows given out before.
    pub(super) fn fetch(&self, origins: &[Origin]) -> Option<Vec<Sample>> {
        let one = |o: &Origin| (o.row < self.rows.len()).then(|| self.sample(o.row, o.epoch));
        origins.iter().map(one).collect()
    }

    pub(super) fn data(&self) -> Value {
        json!({
            "rows": self.rows.len(),
            "tokens": self.rows.tokens(),
            "checksum": self.rows.checksum(),
        })
    }

    pub(super) fn state(&self) -> Value {
        let (epoch, at) = self.order.cursor();
        json!({"epoch": epoch, "at": at, "told": self.told})
    }

    pub(super) fn restore(&mut self, state: &Value) -> Option<()> {
        let (epoch, at) = (state["epoch"].as_u64()?, state["at"].as_u64()?);
        let at = usize::try_from(at)
            .ok()
            .filter(|at| *at <= self.rows.len())?;
        self.told = state["told"].as_bool()?;
        self.order.seek(epoch, at);
        Some(())
    }
}
