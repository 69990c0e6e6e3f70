//! Is the machine ours at this moment? A virtual machine's two cores may be one core's worth for seconds, and nothing on it says so.
//! Invariant: what is measured has no say. A round is judged by multiply-adds of our own, before and behind it, and is run
//! again for all contenders or kept for all; how often, and what was kept in spite of it, is told.
//! Absent on purpose: memory. A look at it would drive the operands of the next round out of the caches.

use std::thread::sleep;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tallow::cpu::exec::Exec;
use tallow::cpu::pool::Pool;
use tallow::cpu::probe::{Product, multiply_adds};
use tallow::cpu::simd::Isa;
use tallow::{DType, Session};

use crate::probe::Probe;
use crate::work::Clock;
use crate::{Result, work::Wall};

/// Says whether the machine is ours.
pub trait Calm {
    /// A task begins: patience is new.
    fn begin(&mut self) {}
    /// Is it, now? With `wait` it may become so.
    fn is(&mut self, wait: bool) -> bool;
}

/// Somebody who does not look.
pub struct Unwatched;

impl Calm for Unwatched {
    fn is(&mut self, _: bool) -> bool {
        true
    }
}

/// What became of the rounds of a task.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rounds {
    /// Thrown away and run again, because the machine was not ours before or behind them.
    pub again: usize,
    /// Kept although it was not: patience had an end.
    pub disturbed: usize,
}

impl Rounds {
    /// Were all of them as they should be?
    #[must_use]
    pub fn fine(&self) -> bool {
        *self == Self::default()
    }
}

impl std::fmt::Display for Rounds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "rounds run again because the processor did less than {:.0} % of what was probed just before or behind them: {}",
            100.0 * ENOUGH,
            self.again
        )?;
        match self.disturbed {
            0 => Ok(()),
            n => write!(f, "; kept all the same: {n}, TRUST THEM LESS"),
        }
    }
}

/// Of the probed rate, what a calm machine reaches.
const ENOUGH: f64 = 0.9;
/// Multiply-adds of a burst, in rounds of the kernel: some tens of microseconds.
const STEPS: usize = 10_000;
/// Bursts of a look: a millisecond or two.
const STAY: usize = 32;
/// How long the first fast burst is waited for, in seconds.
const WAKE_S: f64 = 0.01;
/// Between two looks of one who waits,
const PAUSE: Duration = Duration::from_millis(50);
/// and how long all waiting of a task may take, in seconds.
const PATIENCE_S: f64 = 5.0;

/// Multiply-adds on as many threads as are measured.
pub struct Canary {
    clock: Wall,
    isa: Isa,
    pool: Pool,
    /// Of all threads, a second.
    flops: f64,
    /// Seconds that all waiting of a task may take,
    patience: f64,
    /// and what is left of them.
    left: f64,
}

impl Canary {
    /// Watches the processor behind `session`, which reached what `probe` says; something else is not watched.
    ///
    /// # Errors
    /// An instruction set that this machine lacks.
    pub fn of(session: &Session, probe: &Probe, threads: usize) -> Result<Box<dyn Calm>> {
        if &*session.backend().info().name != "cpu" {
            return Ok(Box::new(Unwatched));
        }
        let flops = probe.flops(DType::F32, threads);
        Ok(Box::new(Self::new(
            Isa::detect()?,
            threads,
            flops,
            PATIENCE_S,
        )))
    }

    fn new(isa: Isa, threads: usize, flops: f64, patience: f64) -> Self {
        Self {
            clock: Wall::new(),
            isa,
            pool: Pool::new(threads),
            flops,
            patience,
            left: patience,
        }
    }

    /// Threads wake up, and others go to sleep, before they are as fast as they can be; then they must stay so for a while.
    fn look(&self) -> bool {
        let start = self.clock.now();
        while self.rate(1) < ENOUGH * self.flops {
            if self.clock.now() - start > WAKE_S {
                return false;
            }
        }
        self.rate(STAY) >= ENOUGH * self.flops
    }

    /// Operations a second in so many bursts.
    fn rate(&self, bursts: usize) -> f64 {
        let exec = Exec {
            isa: self.isa,
            pool: &self.pool,
        };
        let start = self.clock.now();
        let one = |_| multiply_adds(exec, Product::F32, STEPS);
        let done: f64 = (0..bursts).map(one).sum();
        done / (self.clock.now() - start)
    }
}

impl Calm for Canary {
    fn begin(&mut self) {
        self.left = self.patience;
    }

    fn is(&mut self, wait: bool) -> bool {
        loop {
            if self.look() {
                return true;
            }
            if !wait || self.left <= 0.0 {
                return false;
            }
            sleep(PAUSE);
            self.left -= PAUSE.as_secs_f64() + WAKE_S;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_that_reaches_what_was_probed_is_ours_and_a_slower_one_is_not() {
        let canary = |flops| Canary::new(Isa::best(), 1, flops, 0.2);
        assert!(canary(1.0).is(false));
        let mut slow = canary(1e18);
        assert!(!slow.is(false) && slow.left == 0.2);
        assert!(!slow.is(true) && slow.left <= 0.0, "it waits");
        assert!(!slow.is(true), "and does not wait for ever");
        slow.begin();
        assert!(slow.left == 0.2);
    }
}
