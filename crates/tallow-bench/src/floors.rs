//! Rows held against the floor, and the floor against rows: a probe that was disturbed says that the machine needs longer than
//! it does, and rows that reach more than it did would be taken for lies.
//! Invariant: rates only rise, so a floor only falls; how often the machine is probed again is bounded, and every time is told.
//! Absent on purpose: what a row takes; that was measured before.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::measure::doubt::{self, Reason};
use crate::measure::{Measured, Row, Verdict};
use crate::probe::Probe;

/// How often the machine is probed again for one task,
const TRIES: usize = 2;
/// and in a run.
const TRIES_A_RUN: usize = 6;

/// Why rates are no longer those of the first probe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "why")]
#[non_exhaustive]
pub enum Revised {
    /// A row was under its floor, so the machine was probed again, and the row judged anew.
    Under {
        /// Which row: the one furthest under its floor.
        engine: String,
        /// Its time in floors before,
        was: f64,
        /// and by the better of all probes.
        now: f64,
    },
    /// Several threads had not reached what they promise alone, so the machine was probed again.
    Short,
    /// A valid row reached more than was probed; the rate counts for the rows behind it.
    Exceeded {
        /// Which row.
        engine: String,
        /// Which rate.
        what: String,
        /// A second, before.
        from: f64,
        /// A second, now.
        to: f64,
    },
    /// Probing again failed.
    Failed {
        /// How.
        what: String,
    },
}

impl std::fmt::Display for Revised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Revised::Under { engine, was, now } => write!(
                f,
                "the machine was probed again: {engine} was at {was:.2} floors, is at {now:.2}"
            ),
            Revised::Short => write!(
                f,
                "the machine was probed again: its threads together had been slower than they promise alone"
            ),
            Revised::Exceeded {
                engine,
                what,
                from,
                to,
            } => write!(
                f,
                "{engine} reached more than was probed: {what} {:.4} G, not {:.4} G, from here on",
                to * 1e-9,
                from * 1e-9
            ),
            Revised::Failed { what } => write!(f, "the machine cannot be probed again: {what}"),
        }
    }
}

/// What the machine reaches, as far as is known.
pub struct Floors<'a> {
    /// The better of all probes, and what rows showed.
    pub probe: Probe,
    again: Box<dyn FnMut() -> Result<Probe> + 'a>,
    left: usize,
    short: bool,
}

impl<'a> Floors<'a> {
    /// Begins with `probe`; `again` takes another one.
    #[must_use]
    pub fn new(probe: Probe, again: impl FnMut() -> Result<Probe> + 'a) -> Self {
        Floors {
            short: probe.short(),
            probe,
            again: Box::new(again),
            left: TRIES_A_RUN,
        }
    }

    /// The rows of a task called `name`, and what was changed for them.
    pub fn rows(&mut self, name: &str, measured: &[Measured]) -> (Vec<Row>, Vec<Revised>) {
        let mut told = vec![];
        if std::mem::take(&mut self.short) {
            match self.probe_again() {
                Ok(()) => told.push(Revised::Short),
                Err(failed) => told.push(failed),
            }
        }
        let mut rows = self.judged(measured);
        for _ in 0..TRIES {
            let Some((i, was)) = furthest_under(&rows) else {
                break;
            };
            if self.left == 0 {
                break;
            }
            if let Err(failed) = self.probe_again() {
                told.push(failed);
                break;
            }
            let before = rows[i].floor.seconds;
            rows = self.judged(measured);
            told.push(Revised::Under {
                engine: rows[i].engine.clone(),
                was,
                now: was * before / rows[i].floor.seconds,
            });
        }
        for (row, m) in rows.iter().zip(measured) {
            let Some(f) = row.figures() else { continue };
            let who = format!("{name}, {}", row.engine);
            let most = 1.0 / doubt::UNDER;
            let rose = self.probe.learn(&who, &m.need, doubt::shortest(f), most);
            told.extend(rose.into_iter().map(|r| Revised::Exceeded {
                engine: row.engine.clone(),
                what: r.what,
                from: r.from,
                to: r.to,
            }));
        }
        (rows, told)
    }

    fn judged(&self, measured: &[Measured]) -> Vec<Row> {
        let row = |m: &Measured| m.row(self.probe.least(&m.need));
        measured.iter().map(row).collect()
    }

    fn probe_again(&mut self) -> Result<(), Revised> {
        self.left = self.left.saturating_sub(1);
        match (self.again)() {
            Ok(new) => {
                self.probe.better_of(&new);
                Ok(())
            }
            Err(e) => {
                self.left = 0;
                Err(Revised::Failed {
                    what: e.to_string(),
                })
            }
        }
    }
}

/// The row that is furthest under its floor, if there is one, and its time in floors.
fn furthest_under(rows: &[Row]) -> Option<(usize, f64)> {
    let under = |(i, row): (usize, &Row)| match &row.verdict {
        Verdict::Invalid(Reason::UnderFloor {
            seconds, floor_s, ..
        }) => Some((i, seconds / floor_s)),
        _ => None,
    };
    let all = rows.iter().enumerate().filter_map(under);
    all.min_by(|a, b| a.1.total_cmp(&b.1))
}

#[cfg(test)]
mod tests;
