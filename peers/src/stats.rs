//! Order statistics of repeated measurements. Means are absent on purpose: one stall would move them.

/// Median and the 10th and 90th percentile of a set of measurements, in the unit they were given in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    pub p10: f64,
    pub median: f64,
    pub p90: f64,
}

impl Summary {
    /// Summary of `samples`; `None` where there are none.
    #[must_use]
    pub fn of(samples: &[f64]) -> Option<Self> {
        if samples.is_empty() {
            return None;
        }
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |q: f64| {
            let place = q * (sorted.len() - 1) as f64;
            let (low, part) = (place.floor() as usize, place.fract());
            let high = (low + 1).min(sorted.len() - 1);
            sorted[low] * (1.0 - part) + sorted[high] * part
        };
        Some(Self {
            p10: at(0.1),
            median: at(0.5),
            p90: at(0.9),
        })
    }
}

/// Ratios of two series measured in the same rounds, round by round: a slow minute of the machine hits both sides.
#[must_use]
pub fn ratios(ours: &[f64], theirs: &[f64]) -> Vec<f64> {
    ours.iter().zip(theirs).map(|(a, b)| a / b).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_interpolate_and_ignore_order() {
        let summary = Summary::of(&[5.0, 1.0, 3.0, 2.0, 4.0]).unwrap();
        assert_eq!(summary.median, 3.0);
        assert!((summary.p10 - 1.4).abs() < 1e-12);
        assert!((summary.p90 - 4.6).abs() < 1e-12);
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        assert_eq!(ratios(&[6.0, 9.0], &[2.0, 3.0]), vec![3.0, 3.0]);
    }
}
