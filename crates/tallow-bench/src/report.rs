//! What a run found: the machine, what it reaches, and for each task a row an engine.
//! Invariant: a report says everything that its figures depend on, and reads back as it was written.
//! Absent on purpose: judgement beyond the rows' own verdicts.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tallow::Session;
use tallow::cpu::simd::Isa;

use crate::calm::Rounds;
use crate::floors::Revised;
use crate::measure::{Row, Settings};
use crate::probe::Probe;
use crate::stats::{Ratio, by_round};
use crate::{Error, Result};

pub mod html;
pub mod table;

/// Raised when a field changes its meaning.
pub const FORMAT: u32 = 1;

/// A run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: u32,
    /// Version of tallow.
    pub tallow: String,
    /// Versions of peers, by name.
    pub peers: Vec<(String, String)>,
    /// Peers that were asked for and are not there, and why.
    pub missing: Vec<(String, String)>,
    /// What was typed.
    pub command: String,
    /// Seconds since 1970 at the start.
    pub unix_s: u64,
    /// Where it ran.
    pub machine: Machine,
    /// Threads of tallow.
    pub threads: usize,
    /// Of the weights.
    pub dtype: String,
    /// How much was measured.
    pub settings: Settings,
    /// What the machine reached: the best of all probes, and what rows showed.
    pub probe: Probe,
    /// Tasks done.
    pub groups: Vec<Group>,
    /// Was it stopped before all of them were?
    pub stopped: bool,
}

/// A task that was done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// Which suite.
    pub suite: String,
    /// Which task.
    pub name: String,
    /// Tokens of one repetition, where there are any.
    pub tokens: Option<usize>,
    /// By engine; the first is what the others are compared with.
    pub rows: Vec<Row>,
    /// Why floors behind it are not those before it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub revised: Vec<Revised>,
    /// What became of the rounds.
    #[serde(default, skip_serializing_if = "Rounds::fine")]
    pub rounds: Rounds,
}

impl Group {
    /// Waited time of row `i` over that of the first, round by round. `None` for the first, and without figures.
    #[must_use]
    pub fn ratio(&self, i: usize) -> Option<Ratio> {
        let of = |i: usize| Some(&self.rows.get(i)?.figures()?.waited.samples);
        match i {
            0 => None,
            _ => by_round(of(i)?, of(0)?),
        }
    }

    /// The same in a plan, where both have one.
    #[must_use]
    pub fn ratio_in_plan(&self, i: usize) -> Option<Ratio> {
        let of = |i: usize| Some(&self.rows.get(i)?.figures()?.in_plan.as_ref()?.samples);
        match i {
            0 => None,
            _ => by_round(of(i)?, of(0)?),
        }
    }

    /// The floor of row `i` over that of the first: the ratio that costs nothing.
    #[must_use]
    pub fn floor_ratio(&self, i: usize) -> Option<f64> {
        let (floor, first) = (&self.rows.get(i)?.floor, &self.rows.first()?.floor);
        (i > 0 && first.seconds > 0.0).then(|| floor.seconds / first.seconds)
    }
}

/// Where a run took place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name.
    pub processor: String,
    /// Instruction set of tallow's kernels on the processor.
    pub isa: String,
    /// The device that computes, where it is not the processor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Processors a process may use.
    pub logical: usize,
    /// `x86_64-linux`.
    pub system: String,
    /// Processes that wanted to run in the minute before the start, where the system tells. Above about 0.3 others were
    /// at work.
    pub load: Option<f64>,
}

impl Machine {
    /// This one, computing on the device behind `session`.
    ///
    /// # Errors
    /// A processor or a setting that means nothing.
    pub fn here(session: &Session) -> Result<Self> {
        let isa = Isa::detect()?;
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let info = read("/proc/cpuinfo");
        let name = info.lines().find(|l| l.starts_with("model name"));
        let name = name.and_then(|l| l.split_once(':')).map(|(_, n)| n.trim());
        let load = read("/proc/loadavg");
        let backend = session.backend();
        let elsewhere = backend.info().name != "cpu";
        Ok(Machine {
            processor: name.unwrap_or(std::env::consts::ARCH).to_owned(),
            isa: isa.name().to_owned(),
            device: elsewhere.then(|| backend.identity()),
            logical: std::thread::available_parallelism().map_or(1, usize::from),
            system: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
            load: load.split(' ').next().and_then(|n| n.parse().ok()),
        })
    }
}

impl Report {
    /// Reads what `--json` wrote.
    ///
    /// # Errors
    /// A file that is missing, or no report, or one of another version.
    pub fn read(path: &Path) -> Result<Self> {
        let wrong = |what: String| Error::Report {
            path: path.to_owned(),
            what,
        };
        let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
            path: path.to_owned(),
            source,
        })?;
        let value: serde_json::Value =
            serde_json::from_str(&text).map_err(|e| wrong(format!("is not JSON: {e}")))?;
        match value["format"].as_u64() {
            Some(n) if n == u64::from(FORMAT) => {}
            Some(n) => {
                return Err(wrong(format!(
                    "is of format {n}, this version reads {FORMAT}"
                )));
            }
            None => return Err(wrong("has no `format`".to_owned())),
        }
        serde_json::from_value(value).map_err(|e| wrong(e.to_string()))
    }

    /// As JSON, with every sample.
    ///
    /// # Errors
    /// None in practice.
    pub fn json(&self) -> Result<String> {
        serde_json::to_string(self).map_err(|e| Error::Report {
            path: PathBuf::from("report"),
            what: e.to_string(),
        })
    }

    /// Rows without figures.
    #[must_use]
    pub fn invalid(&self) -> usize {
        let rows = self.groups.iter().flat_map(|g| &g.rows);
        rows.filter(|r| r.figures().is_none()).count()
    }
}

/// Seconds as "12.3 µs", "4.56 ms" or "7.89 s".
#[must_use]
pub fn seconds(s: f64) -> String {
    match s {
        _ if s < 1e-6 => format!("{:.0} ns", s * 1e9),
        _ if s < 1e-5 => format!("{:.2} µs", s * 1e6),
        _ if s < 1e-3 => format!("{:.1} µs", s * 1e6),
        _ if s < 1.0 => format!("{:.2} ms", s * 1e3),
        _ => format!("{s:.2} s"),
    }
}

#[cfg(test)]
pub(crate) mod tests;
