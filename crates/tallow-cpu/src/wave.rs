//! Small steps that do not touch one another's memory, run side by side: one a thread, instead of one after another on
//! all of them. The gradients of many small adapters are hundreds of such steps.
//! Invariant: steps of a wave are neighbours in the plan, and none writes what another reads or writes; so what
//! is computed is what they compute in order, bit for bit.
//! Absent on purpose: moving steps. The plan's order is kept.

use std::ops::Range;

/// A step that takes one thread longer than this is worth splitting between all of them.
const SMALL_SECONDS: f64 = 20e-6;

/// What a step needs and touches.
pub(crate) struct Reach {
    /// Estimated seconds of one thread.
    pub(crate) cost: f64,
    /// Scratch memory belongs to one step at a time.
    pub(crate) has_workspace: bool,
    /// Addresses.
    pub(crate) reads: Vec<Range<usize>>,
    pub(crate) writes: Vec<Range<usize>>,
}

impl Reach {
    fn is_small(&self) -> bool {
        self.cost < SMALL_SECONDS && !self.has_workspace
    }

    fn disturbs(&self, other: &Reach) -> bool {
        let meet = |a: &Range<usize>, b: &Range<usize>| a.start < b.end && b.start < a.end;
        let any =
            |a: &[Range<usize>], b: &[Range<usize>]| a.iter().any(|a| b.iter().any(|b| meet(a, b)));
        any(&self.writes, &other.writes)
            || any(&self.writes, &other.reads)
            || any(&self.reads, &other.writes)
    }
}

/// The most steps of a wave: each new one is compared with all of them.
const MOST: usize = 128;

/// All steps in order, cut into waves.
pub(crate) fn waves(steps: &[Reach]) -> Vec<Range<usize>> {
    let mut all: Vec<Range<usize>> = vec![];
    for (i, step) in steps.iter().enumerate() {
        let joins = |wave: &Range<usize>| {
            wave.len() < MOST
                && step.is_small()
                && steps[wave.clone()]
                    .iter()
                    .all(|s| s.is_small() && !s.disturbs(step))
        };
        match all.last_mut().filter(|w| joins(w)) {
            Some(wave) => wave.end = i + 1,
            None => all.push(i..i + 1),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(reads: Range<usize>, writes: Range<usize>) -> Reach {
        Reach {
            cost: 1e-6,
            has_workspace: false,
            reads: vec![reads],
            writes: vec![writes],
        }
    }

    #[test]
    fn what_meets_in_memory_does_not_run_side_by_side() {
        let free = || step(0..8, 16..24);
        let after = |other: Reach| waves(&[free(), other]).len();
        assert_eq!(after(step(0..8, 24..32)), 1, "both only read the same");
        assert_eq!(after(step(20..28, 32..40)), 2, "it reads what was written");
        assert_eq!(after(step(40..48, 4..12)), 2, "it writes what was read");
        assert_eq!(after(step(40..48, 23..30)), 2, "both write the same");
        assert_eq!(after(step(0..0, 0..0)), 1);
        let large = Reach {
            cost: 1e-3,
            ..step(0..8, 24..32)
        };
        assert_eq!(after(large), 2);
        let scratch = Reach {
            has_workspace: true,
            ..step(0..8, 24..32)
        };
        assert_eq!(after(scratch), 2);
    }

    #[test]
    fn every_step_is_in_one_wave_and_in_order() {
        // Each third step reads what the one before it wrote.
        let make = |i: usize| match i % 3 {
            2 => step(100 * i - 100..100 * i, 100 * i..100 * i + 100),
            _ => step(0..0, 100 * i..100 * i + 100),
        };
        let steps: Vec<Reach> = (1..400).map(make).collect();
        let all = waves(&steps);
        let flat: Vec<usize> = all.iter().cloned().flatten().collect();
        assert_eq!(flat, (0..steps.len()).collect::<Vec<_>>());
        assert!(all.iter().all(|w| w.len() <= MOST));
        for wave in &all {
            for i in wave.clone() {
                assert!((wave.start..i).all(|j| !steps[i].disturbs(&steps[j])));
            }
        }
        assert!(all.len() > 100 && all.len() < 300, "{}", all.len());
    }
}
