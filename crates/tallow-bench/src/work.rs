//! What can be measured: something that is fed a number, started, and waited for, and that can be shown to be right.
//! Invariant: the clock (`measure`) knows nothing else, so that tests can hand it liars.
//! Absent on purpose: time.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::Result;

/// Where seconds come from.
pub trait Clock {
    /// Seconds since some moment.
    fn now(&self) -> f64;
}

/// The machine's clock.
pub struct Wall(Instant);

impl Wall {
    /// Starts at 0.
    #[must_use]
    pub fn new() -> Self {
        Self(Instant::now())
    }
}

impl Default for Wall {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for Wall {
    fn now(&self) -> f64 {
        self.0.elapsed().as_secs_f64()
    }
}

/// How far a result is from what it should be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// The largest error over what rounding may cause; at most 1 passes. [`f64::MAX`] where something is not a number.
    pub worst: f64,
    /// Elements compared.
    pub compared: usize,
    /// Elements there are.
    pub of: usize,
    /// Who said what is right.
    pub by: Judge,
    /// Where the largest error is; none where nothing was compared element by element.
    #[serde(default)]
    pub at: Option<Furthest>,
}

/// The element that is furthest off, in tolerances.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Furthest {
    /// Which of the compared results and states, from 0.
    pub result: usize,
    /// Which of its elements, row-major.
    pub element: usize,
    /// What is there.
    pub got: f64,
    /// What should be.
    pub want: f64,
}

impl std::fmt::Display for Furthest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "result {}, element {}: {:e} for {:e}",
            self.result, self.element, self.got, self.want
        )
    }
}

/// Who knows what is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Judge {
    /// The f64 interpreter.
    Oracle,
    /// The portable kernels on one thread, for models that are too large for the interpreter.
    Portable,
    /// The processor's own kernels, for such a model on another device.
    Processor,
}

impl Check {
    /// Is the result right?
    #[must_use]
    pub fn pass(&self) -> bool {
        self.worst <= 1.0 && self.compared > 0
    }
}

/// A loop of dependent repetitions that was timed.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Looped {
    /// All of it.
    pub seconds: f64,
    /// What was fed into each repetition, and what came out.
    pub links: Vec<(f32, f32)>,
}

/// Many starts and one wait.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Queued {
    /// Seconds to start them.
    #[serde(rename = "built")]
    pub built_s: f64,
    /// Seconds until the last was done.
    pub seconds: f64,
    /// One element of the last result.
    pub last: f32,
}

/// The next number to feed: in `[0.1, 1)`, and another one for the smallest change of `y`.
#[must_use]
pub fn link(y: f32, i: usize) -> f32 {
    let mixed = (u64::from(y.to_bits()) << 20 ^ i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    0.1 + 0.9 * ((mixed >> 41) as f32 / (1u64 << 23) as f32)
}

/// One engine with one work, its operands in place.
pub trait Work {
    /// Fills what varies with new random numbers, the same for the same seed, and poisons every result.
    ///
    /// # Errors
    /// What the engine reports; so below.
    fn renew(&mut self, seed: u64) -> Result<()>;

    /// Puts `link`, in `[0.1, 1)`, into an operand that the result depends on.
    fn feed(&mut self, link: f32) -> Result<()>;

    /// Starts the work once. May return before anything is computed.
    fn start(&mut self) -> Result<()>;

    /// Waits for all that was started. Returns one element of the newest result.
    fn finish(&mut self) -> Result<f32>;

    /// Reads all of the newest results, not only what [`Work::finish`] looks at; the seconds that took. What an engine has put
    /// off it must do here.
    fn fetch(&mut self, clock: &dyn Clock) -> Result<f64>;

    /// Compares the newest result with the oracle on the operands as they were last fed. `returned` is what
    /// [`Work::finish`] said: it must be in the result. Where a run changes its operands ([`Work::remembers`]) there has
    /// been exactly one since [`Work::renew`].
    fn check(&mut self, returned: f32) -> Result<Check>;

    /// `n` repetitions, each waited for and fed from the one before, the first with `first`. An engine in another
    /// process runs the loop there.
    fn waited(&mut self, clock: &dyn Clock, n: usize, first: f32) -> Result<Looped> {
        let mut links = Vec::with_capacity(n);
        let mut next = first;
        let start = clock.now();
        for i in 0..n {
            self.feed(next)?;
            self.start()?;
            let y = self.finish()?;
            links.push((next, y));
            next = link(y, i);
        }
        let seconds = clock.now() - start;
        Ok(Looped { seconds, links })
    }

    /// `n` repetitions on the same operands, started one after another, and one wait.
    fn queued(&mut self, clock: &dyn Clock, n: usize, first: f32) -> Result<Queued> {
        self.feed(first)?;
        let start = clock.now();
        for _ in 0..n {
            self.start()?;
        }
        let built_s = clock.now() - start;
        let last = self.finish()?;
        Ok(Queued {
            built_s,
            seconds: clock.now() - start,
            last,
        })
    }

    /// Waits once more: what it finds, and the seconds that took.
    fn again(&mut self, clock: &dyn Clock) -> Result<(f32, f64)> {
        let start = clock.now();
        let y = self.finish()?;
        Ok((y, clock.now() - start))
    }

    /// Does a run change its own operands (an optimizer step)?
    fn remembers(&self) -> bool {
        false
    }

    /// `n` repetitions inside one replayed plan, each on the result of the one before, where there is such a thing.
    fn chain(&mut self, n: usize) -> Result<Chained> {
        let _ = n;
        Ok(Chained::No("it has no plans"))
    }
}

/// See [`Work::chain`].
pub enum Chained {
    /// A plan.
    Plan(Box<dyn Chain>),
    /// There is none; why.
    No(&'static str),
}

/// Dependent repetitions inside one plan.
pub trait Chain {
    /// As [`Work::renew`].
    fn renew(&mut self, seed: u64) -> Result<()>;
    /// Replays once. May return before anything is computed.
    fn start(&mut self) -> Result<()>;
    /// Waits for all replays that were started.
    fn wait(&mut self) -> Result<()>;
    /// The share of the plan's time that is the work, and not what joins one repetition to the next; in `(0, 1]`.
    fn share(&mut self) -> Result<f64>;
    /// Compares the last repetition with the oracle on the result of the last but one.
    fn check(&mut self) -> Result<Check>;
}
