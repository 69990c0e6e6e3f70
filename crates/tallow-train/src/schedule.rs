//! The learning rate by step.
//! Invariant: a pure function of the step, so a resumed run continues exactly.
//! Absent on purpose: schedules that look at the loss.
use std::fmt;
use std::str::FromStr;

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Schedule {
    /// It does not.
    Constant,
    /// In a straight line to 0 after the last step.
    Linear,
    /// Along half a cosine to 0 after the last step.
    Cosine,
}

impl Schedule {
    /// Every schedule.
    pub const ALL: [Schedule; 3] = [Schedule::Constant, Schedule::Linear, Schedule::Cosine];

    /// Lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            Schedule::Constant => "constant",
            Schedule::Linear => "linear",
            Schedule::Cosine => "cosine",
        }
    }

    /// The factor of the peak learning rate at `step` (from 0) of `total`, dimensionless. The first
    /// `warmup` steps rise in a straight line and reach 1 at step `warmup - 1`: no step is wasted on 0.
    pub fn factor(self, step: u64, warmup: u64, total: u64) -> f64 {
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let rest = total.saturating_sub(warmup).max(1) as f64;
        let done = ((step - warmup) as f64 / rest).min(1.0);
        match self {
            Schedule::Constant => 1.0,
            Schedule::Linear => 1.0 - done,
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Schedule {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let known = Schedule::ALL.map(Schedule::name).join(", ");
        let found = Schedule::ALL.into_iter().find(|k| k.name() == s);
        found.ok_or_else(|| format!("want one of {known}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_rises_to_the_peak_and_decay_starts_there() {
        for s in Schedule::ALL {
            assert_eq!(s.factor(0, 4, 100), 0.25);
            assert_eq!(s.factor(3, 4, 100), 1.0);
            assert_eq!(s.factor(4, 4, 100), 1.0);
            assert_eq!(s.factor(0, 0, 100), 1.0);
        }
    }

    #[test]
    fn decay_ends_just_above_zero() {
        assert_eq!(Schedule::Constant.factor(99, 0, 100), 1.0);
        assert!((Schedule::Linear.factor(99, 0, 100) - 0.01).abs() < 1e-12);
        assert!((Schedule::Linear.factor(50, 0, 100) - 0.5).abs() < 1e-12);
        assert!((Schedule::Cosine.factor(50, 0, 100) - 0.5).abs() < 1e-12);
        let last = Schedule::Cosine.factor(99, 0, 100);
        assert!(last > 0.0 && last < 0.001);
        assert_eq!(Schedule::Linear.factor(200, 0, 100), 0.0);
    }

    #[test]
    fn a_warm_up_as_long_as_the_run_is_allowed() {
        assert_eq!(Schedule::Cosine.factor(9, 10, 10), 1.0);
    }

    #[test]
    fn names_are_read_back() {
        for s in Schedule::ALL {
            assert_eq!(s.name().parse(), Ok(s));
        }
        let bad = "step".parse::<Schedule>();
        assert_eq!(bad, Err("want one of constant, linear, cosine".to_owned()));
    }
}
