//! tallow-tune: a chooser that measures. Where a device offers several kernels for a spec, each is run on operands of
//! its own and checked, and the fastest is remembered on disk.
//!
//! Read in this order: `trial` runs the candidates of one spec; `table` is what is kept; here is when which is asked.
//! Invariant: a candidate that failed its check on a spec is not chosen for it; a table that cannot be read or written
//! costs time, never a result. Absent on purpose: any device. It is given one.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tallow_core::backend::{Backend, ByCost, Chooser};
use tallow_core::kernel::{Candidate, KernelSpec};
use tallow_core::{Error, Result};

mod table;
#[cfg(test)]
mod tests;
mod trial;

use table::{Entry, Hopeless, Table};

/// Time that the kernels of one session may be measured for, unless more is asked for.
pub const BUDGET: Duration = Duration::from_secs(2);
/// How much faster than the estimate's favourite another must be: nobody changes places for noise.
const CLEARLY: f64 = 0.97;

/// How a [`Tuner`] works.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where tables are kept; `None`: nowhere.
    pub folder: Option<PathBuf>,
    /// Time for measuring, all plans of the session together.
    pub budget: Duration,
    /// Hears, in one line, what was measured for a plan, and what is wrong with a table.
    pub tell: fn(&str),
}

impl Options {
    /// Tables in the user's cache: `TALLOW_CACHE`, else `$XDG_CACHE_HOME/tallow`, else `~/.cache/tallow`; [`BUDGET`].
    #[must_use]
    pub fn usual(tell: fn(&str)) -> Self {
        let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
        let base = var("TALLOW_CACHE").map(PathBuf::from).or_else(|| {
            let cache = var("XDG_CACHE_HOME").map(PathBuf::from);
            let home = || var("HOME").map(|h| PathBuf::from(h).join(".cache"));
            cache.or_else(home).map(|c| c.join("tallow"))
        });
        Options {
            folder: base.map(|b| b.join("kernels")),
            budget: BUDGET,
            tell,
        }
    }
}

/// Chooses by measurement where there is a choice, and by estimate once its time is spent.
pub struct Tuner {
    backend: Arc<dyn Backend>,
    budget: Duration,
    tell: fn(&str),
    state: Mutex<State>,
}

struct State {
    table: Table,
    /// By key of the table, which does not keep them: what fails today for want of memory may pass tomorrow.
    hopeless: HashMap<String, Hopeless>,
    spent: Duration,
    /// Since the last plan was complete.
    measured: usize,
    guessed: usize,
    began: Duration,
}

impl Tuner {
    /// For the kernels of `backend`.
    #[must_use]
    pub fn new(backend: Arc<dyn Backend>, options: Options) -> Self {
        let (table, trouble) = Table::open(options.folder.as_deref(), &backend.identity());
        if let Some(trouble) = trouble {
            (options.tell)(&trouble);
        }
        Tuner {
            backend,
            budget: options.budget,
            tell: options.tell,
            state: Mutex::new(State {
                table,
                hopeless: HashMap::new(),
                spent: Duration::ZERO,
                measured: 0,
                guessed: 0,
                began: Duration::ZERO,
            }),
        }
    }

    /// The answer where no candidate has a time: one that failed its check is not taken.
    fn without(
        &self,
        spec: &KernelSpec,
        h: &Hopeless,
        favourite: usize,
    ) -> Result<(usize, String)> {
        if !h.wrong {
            return Ok((favourite, format!("estimate: measuring failed: {}", h.what)));
        }
        Err(Error::Device {
            device: self.backend.info().name.clone(),
            what: format!(
                "no kernel for {} {} computes what it should: {}; `tallow doctor` checks the device and its driver",
                spec.name(),
                spec.signature(),
                h.what
            ),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Chooser for Tuner {
    fn choose(&self, spec: &KernelSpec, c: &[Candidate]) -> Result<(usize, String)> {
        let (favourite, why) = ByCost.choose(spec, c)?;
        if c.len() < 2 {
            return Ok((favourite, why));
        }
        let mut state = self.state();
        let key = table::key(spec, c);
        if let Some(choice) = state.table.get(&key).and_then(|e| e.best(c, favourite)) {
            return Ok(choice);
        }
        if let Some(known) = state.hopeless.get(&key) {
            return self.without(spec, known, favourite);
        }
        if let Some(reason) = trial::unfit(spec) {
            return Ok((favourite, format!("estimate: {reason}")));
        }
        let left = self.budget.saturating_sub(state.spent);
        if left.is_zero() {
            state.guessed += 1;
            let why = "estimate: the time for measuring is spent, `tallow tune` measures the rest";
            return Ok((favourite, why.to_owned()));
        }
        let start = Instant::now();
        let tried = trial::run(&*self.backend, spec, c, favourite, left);
        state.spent += start.elapsed();
        let entry = tried.map(|tried| Entry::new(c, tried));
        let hopeless = match entry {
            Ok(entry) => match entry.best(c, favourite) {
                Some(choice) => {
                    state.table.put(key, entry);
                    state.measured += 1;
                    return Ok(choice);
                }
                None => entry.none(),
            },
            Err(e) => Hopeless {
                wrong: false,
                what: e.to_string(),
            },
        };
        let answer = self.without(spec, &hopeless, favourite);
        state.hopeless.insert(key, hopeless);
        answer
    }

    fn planned(&self) {
        let mut state = self.state();
        let (measured, guessed) = (state.measured, state.guessed);
        if measured > 0 {
            let took = (state.spent - state.began).as_secs_f64();
            let kept = match state.table.save() {
                Ok(Some(path)) => format!("kept in {}", path.display()),
                Ok(None) => "not kept".to_owned(),
                Err(e) => format!("not kept: {e}"),
            };
            let rest = match guessed {
                0 => String::new(),
                n => format!(", {n} left to estimates (`tallow tune` measures them)"),
            };
            let choices = if measured == 1 { "choice" } else { "choices" };
            (self.tell)(&format!(
                "measured {measured} {choices} of kernel in {took:.2} s{rest}; {kept}"
            ));
        }
        state.began = state.spent;
        (state.measured, state.guessed) = (0, 0);
    }
}
