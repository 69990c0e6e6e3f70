//! Reasons not to believe a time, and the limits behind them.
//! Invariant: every limit of the clock is a constant of this file.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::Figures;
use crate::probe::Floor;
use crate::work::Check;

/// What "about four times" means: caches and clocks that ramp up are allowed, a constant is not.
pub(super) const GROWTH: RangeInclusive<f64> = 2.9..=5.6;
/// A time may be this far under the floor, because the probe that made it may have been disturbed.
pub(crate) const UNDER: f64 = 0.9;
/// Waiting a second time may take this share of a repetition,
const AGAIN: f64 = 0.5;
/// or this many seconds: a call, a copy, another program.
const AGAIN_S: f64 = 200e-6;
/// How far the same repetition may be from itself where an engine adds in another order, relative.
const ALIKE: f32 = 1e-3;

/// Why a row has no figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "why")]
#[non_exhaustive]
pub enum Reason {
    /// Less time than the machine needs.
    UnderFloor {
        /// Which column.
        column: String,
        /// Median seconds.
        seconds: f64,
        /// Seconds of the floor.
        floor_s: f64,
    },
    /// Dependent repetitions do not add up.
    Growth {
        /// Which column.
        column: String,
        /// Times as long for four times as many.
        growth: f64,
    },
    /// The oracle says otherwise.
    Check {
        /// Which result.
        what: String,
        /// Error over tolerance.
        worst: f64,
        /// Where, printed: it may not be a number.
        #[serde(default)]
        at: Option<String>,
    },
    /// The result was still the poison that was put there before: nothing was written.
    Poisoned,
    /// The result changed after it had been waited for, or the same operands gave another one.
    Changed {
        /// What was returned first, printed: it may not be a number.
        last: String,
        /// What was returned then.
        again: String,
    },
    /// Work was still going on when the clock was read.
    StillRunning {
        /// Seconds that a second wait took.
        more_s: f64,
    },
    /// A part of the result was computed only when it was read.
    PutOff {
        /// Seconds that reading it took longer the first time.
        more_s: f64,
    },
    /// It failed.
    Failed {
        /// How.
        what: String,
    },
    /// It is not there; what to do about it.
    NotInstalled {
        /// A command.
        what: String,
    },
    /// It was stopped before there was a figure.
    Stopped,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reason::UnderFloor {
                column,
                seconds,
                floor_s,
            } => write!(
                f,
                "{column}: {:.3} µs is less than this machine needs ({:.3} µs)",
                seconds * 1e6,
                floor_s * 1e6
            ),
            Reason::Growth { column, growth } => write!(
                f,
                "{column}: four times as many repetitions took {growth:.2} times as long"
            ),
            Reason::Check { what, worst, at } => {
                write!(
                    f,
                    "{what}: wrong by {worst:.3e} times what rounding may cause"
                )?;
                at.iter().try_for_each(|at| write!(f, "; {at}"))
            }
            Reason::Poisoned => write!(f, "nothing was written: the poison is still there"),
            Reason::Changed { last, again } => write!(
                f,
                "the result was not final when it was returned: {last} first, then {again}"
            ),
            Reason::StillRunning { more_s } => write!(
                f,
                "work was still going on when the clock was read: {:.1} µs more",
                more_s * 1e6
            ),
            Reason::PutOff { more_s } => write!(
                f,
                "a part of the result was computed only when it was read: {:.1} µs more the first time",
                more_s * 1e6
            ),
            Reason::Failed { what } => write!(f, "failed: {what}"),
            Reason::NotInstalled { what } => write!(f, "not installed: {what}"),
            Reason::Stopped => write!(f, "stopped"),
        }
    }
}

/// Median seconds of what was executed, by column.
fn executed(f: &Figures) -> impl Iterator<Item = (&'static str, f64)> {
    let more = [("queued", &f.queued), ("in plan", &f.in_plan)];
    let more = more.map(|(column, s)| Some((column, s.as_ref()?.median)));
    [Some(("waited", f.waited.median))]
        .into_iter()
        .chain(more)
        .flatten()
}

/// The shortest of them.
pub(crate) fn shortest(f: &Figures) -> f64 {
    executed(f).map(|(_, s)| s).fold(f64::INFINITY, f64::min)
}

pub(super) fn above(f: &Figures, floor: &Floor) -> Result<(), Reason> {
    let under = |s: f64| s.is_nan() || s < UNDER * floor.seconds;
    match executed(f).find(|(_, s)| under(*s)) {
        None => Ok(()),
        Some((column, seconds)) => Err(Reason::UnderFloor {
            column: column.to_owned(),
            seconds,
            floor_s: floor.seconds,
        }),
    }
}

pub(super) fn check(what: &'static str, check: &Check) -> Result<(), Reason> {
    match check.pass() {
        true => Ok(()),
        false => Err(Reason::Check {
            what: what.to_owned(),
            worst: check.worst,
            at: check.at.map(|at| at.to_string()),
        }),
    }
}

/// `more_s`: a second wait; `one_s`: one repetition.
pub(super) fn still_running(more_s: f64, one_s: f64) -> Option<Reason> {
    (more_s > AGAIN_S && more_s > AGAIN * one_s).then_some(Reason::StillRunning { more_s })
}

pub(super) fn changed(last: f32, again: f32) -> Reason {
    let [last, again] = [last, again].map(|v| format!("{v:e}"));
    Reason::Changed { last, again }
}

pub(super) fn growth(column: &str, growth: f64) -> Reason {
    Reason::Growth {
        column: column.to_owned(),
        growth: if growth.is_finite() { growth } else { 0.0 },
    }
}

pub(super) fn alike(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a - b).abs() <= ALIKE * a.abs().max(b.abs())
}
