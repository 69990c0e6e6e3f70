//! What a contender must show beside its times: that they grow with the work, and that every timed result was right and whole.
//! Invariant: what is tried again is tried a bounded number of times, and only because another program may have disturbed it.
//! Absent on purpose: limits; those are in `doubt`.

use super::{Bench, Doubt, Reason, doubt};
use crate::work::Looped;

/// Loops of each length behind one measurement of growth,
const GROWTHS: usize = 5;
/// and of those on the same operands, which only a memory of results could shorten.
const GROWTHS_QUEUED: usize = 3;
/// Repetitions of a checked loop that are run again.
const RERUN: usize = 8;

impl Bench<'_> {
    /// Four times as many repetitions take about four times as long: dependent ones, outside and inside a plan, and those of a
    /// queue where each must be computed.
    pub(super) fn growth(&mut self) -> Result<(), Doubt> {
        let n = self.track.n;
        let times = [1, 4];
        let waited = |b: &mut Self, k: usize| Ok(b.waited(n * times[k], 7)?.seconds);
        self.track.growth = self.grown("waited", GROWTHS, waited)?;
        if !self.who.lazy {
            let queued = |b: &mut Self, k: usize| {
                b.who.work.renew(8)?;
                // Also before a single start, or that would be cold and four of them not.
                b.warm(8)?;
                Ok(b.queue_of(n * times[k], 8)?.seconds)
            };
            self.grown("queued", GROWTHS_QUEUED, queued)?;
        }
        if self.track.chains.is_some() {
            self.grown("in plan", GROWTHS, |b, k| {
                Ok(b.in_plan(k, 7)?.map_or(f64::NAN, |(seconds, _)| seconds))
            })?;
        }
        Ok(())
    }

    fn grown(
        &mut self,
        column: &'static str,
        loops: usize,
        mut run: impl FnMut(&mut Self, usize) -> Result<f64, Doubt>,
    ) -> Result<f64, Doubt> {
        let mut growth = f64::NAN;
        for _ in 0..self.settings.tries {
            let mut times = [vec![], vec![]];
            let since = self.clock.now();
            for i in 0..loops {
                // Longer loops are also less disturbed.
                if i > 0 && self.settings.enough(self.clock, since, 1) {
                    break;
                }
                for (k, times) in times.iter_mut().enumerate() {
                    times.push(run(self, k)?);
                }
            }
            // The least of each: nothing makes work faster than it is, and much makes it slower.
            let [one, four] = times.map(|t| t.into_iter().fold(f64::INFINITY, f64::min));
            growth = four / one;
            if doubt::GROWTH.contains(&growth) {
                return Ok(growth);
            }
        }
        Err(doubt::growth(column, growth).into())
    }

    /// A timed result against the oracle, and some repetitions of its loop again.
    pub(super) fn checked(&mut self) -> Result<(), Doubt> {
        let n = match self.who.work.remembers() {
            true => 1,
            false => self.track.n,
        };
        let done = self.whole(n)?;
        let Some((_, last)) = done.links.last().copied() else {
            return Err(Reason::Poisoned.into());
        };
        let check = self.who.work.check(last)?;
        doubt::check("result", &check)?;
        if n > 1 {
            let mut rng = fastrand::Rng::with_seed(99);
            for _ in 0..RERUN.min(n) {
                let (fed, came) = done.links[rng.usize(..n)];
                self.who.work.feed(fed)?;
                self.who.work.start()?;
                let again = self.who.work.finish()?;
                if !doubt::alike(came, again) {
                    return Err(doubt::changed(came, again).into());
                }
            }
        }
        if let Some((_, chains)) = &mut self.track.chains {
            for chain in chains {
                chain.renew(99)?;
                chain.start()?;
                chain.wait()?;
                doubt::check("result of the plan", &chain.check()?)?;
            }
        }
        self.track.check = Some(check);
        Ok(())
    }

    /// A loop behind which all of its result was there: reading it the first time takes no longer than the second, as it would
    /// if only what the clock looks at had been computed.
    fn whole(&mut self, n: usize) -> Result<Looped, Doubt> {
        let mut later_s = 0.0;
        for _ in 0..self.settings.tries {
            // Nothing is run before: what is compared was poisoned a moment ago.
            self.who.work.renew(99)?;
            // The way of the result to the host has been walked once.
            self.who.work.fetch(self.clock)?;
            let done = self.loop_of(n, 99)?;
            let first = self.who.work.fetch(self.clock)?;
            let second = self.who.work.fetch(self.clock)?;
            later_s = first - second;
            if doubt::still_running(later_s, done.seconds / n as f64).is_none() {
                return Ok(done);
            }
        }
        Err(Reason::PutOff { more_s: later_s }.into())
    }
}
