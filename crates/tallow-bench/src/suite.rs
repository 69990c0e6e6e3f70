//! What is measured: suites of tasks, each a work with one contender or several that take turns.
//! Invariant: a task is made when its turn comes and dropped behind it; costs are counted by hand from the definition of
//! the work, so that a plan that does more than it must does not lower its own floor.
//! Absent on purpose: how it is measured.

use std::ffi::OsString;
use std::path::PathBuf;

use tallow::{DType, Session};

use crate::measure::{Contender, Memory, Settings};
use crate::ours::Ours;
use crate::probe::{Cost, Need};
use crate::{Error, Result};

pub mod busy;
pub mod candidates;
mod in_turn;
pub mod layers;
pub mod models;
mod normed;
pub mod products;
pub mod rows;
pub mod sweep;
pub mod tax;

/// Shortest loop beside another program, in seconds: some 25 ticks of 4 ms of the system's scheduler.
const BUSY_LOOP_S: f64 = 0.1;

/// A set of tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Suite {
    /// The products and norms that this project began with.
    Seed,
    /// The other layers of a model, forward and backward.
    Layers,
    /// A model without and with adapters.
    Tax,
    /// A whole model trained.
    Train,
    /// A whole model decoding.
    Decode,
    /// Adapters trained side by side.
    Sweep,
    /// Works beside a program that keeps every core busy.
    Busy,
}

impl Suite {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Seed,
        Self::Layers,
        Self::Tax,
        Self::Train,
        Self::Decode,
        Self::Sweep,
        Self::Busy,
    ];

    /// Lower-case name, as on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Seed => "seed",
            Self::Layers => "layers",
            Self::Tax => "tax",
            Self::Train => "train",
            Self::Decode => "decode",
            Self::Sweep => "sweep",
            Self::Busy => "busy",
        }
    }

    /// How much of it is measured where `usual` is asked for: beside another program a loop must be longer than the time
    /// that the system gives to one of them in one go.
    #[must_use]
    pub fn settings(self, usual: Settings) -> Settings {
        match self {
            Self::Busy => Settings {
                rounds: usual.rounds.min(9),
                loop_s: usual.loop_s.max(BUSY_LOOP_S),
                ..usual
            },
            _ => usual,
        }
    }
}

/// What all tasks of a run share.
pub struct Context {
    /// Where tallow computes. Its weights are kept in `dtype`.
    pub session: Session,
    /// Threads of it.
    pub threads: usize,
    /// Of weight matrices: f32 or bf16.
    pub dtype: DType,
    /// Fewer shapes.
    pub quick: bool,
    /// Rows and tokens a row of a training step (of a sweep: of each adapter), where not the suite's own.
    pub batch: Option<[usize; 2]>,
    /// Models of the suites that need one: what they are called and where they lie.
    pub models: Vec<(String, PathBuf)>,
    /// A command that keeps every core busy, as [`crate::load::spin`] does; for the suite that wants it.
    pub spinner: Option<Vec<OsString>>,
}

impl Context {
    /// The least of one such work on all threads.
    #[must_use]
    pub fn need(&self, cost: &Cost) -> Need {
        Need {
            cost: *cost,
            threads: self.threads,
            times: 1,
        }
    }

    /// A contender that is tallow itself.
    #[must_use]
    pub fn ours(&self, engine: &str, work: Ours, cost: &Cost) -> Contender {
        Contender {
            engine: engine.to_owned(),
            work: Box::new(work),
            need: self.need(cost),
            lazy: false,
            memory: None,
        }
    }

    /// The same with a whole model: what it takes of memory is told as well.
    #[must_use]
    pub fn model(&self, engine: &str, work: Ours, cost: &Cost) -> Contender {
        let planned = work.plan().memory();
        Contender {
            memory: Some(Memory {
                intermediates: planned.arena,
                own: planned.arena + planned.state + planned.data + planned.outputs,
                grew: None,
            }),
            ..self.ours(engine, work, cost)
        }
    }
}

/// The contenders of a task, made when its turn comes.
pub type Make = Box<dyn FnOnce(&Context) -> Result<Vec<Contender>>>;

/// One work to measure.
pub struct Task {
    /// Which suite it is of.
    pub suite: Suite,
    /// "LoRA forward 128x2048 @ 2048x2048, rank 8".
    pub name: String,
    /// Tokens of one repetition, where there are any.
    pub tokens: Option<usize>,
    /// What peers are told to compute, where they can, and what to add to their names.
    pub peers: Vec<(String, crate::peer::Job)>,
    /// Its contenders; the first is what others are compared with.
    pub make: Make,
}

/// The tasks of a suite.
///
/// # Errors
/// A model that cannot be read or does not fit into memory.
pub fn tasks(suite: Suite, cx: &Context) -> Result<Vec<Task>> {
    match suite {
        Suite::Seed => Ok(products::tasks(cx)
            .into_iter()
            .chain(rows::tasks())
            .collect()),
        Suite::Layers => Ok(layers::tasks(cx)),
        Suite::Tax => Ok(normed::tasks(cx).chain(tax::tasks(cx)?).collect()),
        Suite::Train => models::train(cx),
        Suite::Decode => models::decode(cx),
        Suite::Sweep => sweep::tasks(cx),
        Suite::Busy => busy::tasks(cx),
    }
}

/// A suite by its name.
impl std::str::FromStr for Suite {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|s| s.name() == name);
        found.ok_or_else(|| Error::Setting {
            name: "suite",
            want: "seed, layers, tax, train, decode, sweep or busy",
            got: name.to_owned(),
        })
    }
}
