//! Order statistics of repeated measurements.
//! Absent on purpose: means. One stall would move them.

use serde::{Deserialize, Serialize};

/// Median, 10th and 90th percentile of some measurements, and the measurements, in the unit they were given in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The 10th percentile.
    pub p10: f64,
    /// The 50th percentile.
    pub median: f64,
    /// The 90th percentile.
    pub p90: f64,
    /// In the order they were taken.
    pub samples: Vec<f64>,
}

impl Summary {
    /// Summary of `samples`; `None` where there are none.
    #[must_use]
    pub fn of(samples: Vec<f64>) -> Option<Self> {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            p10: quantile(&sorted, 0.1)?,
            median: quantile(&sorted, 0.5)?,
            p90: quantile(&sorted, 0.9)?,
            samples,
        })
    }
}

/// The value below which a share `q` of `sorted` lies, interpolated; `None` where there is none.
#[must_use]
pub fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let place = q * sorted.len().checked_sub(1)? as f64;
    let (low, part) = (place.floor() as usize, place.fract());
    let high = (low + 1).min(sorted.len() - 1);
    Some(sorted[low] * (1.0 - part) + sorted[high] * part)
}

/// Middle of `values`; NaN where there are none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile(&sorted, 0.5).unwrap_or(f64::NAN)
}

/// A ratio with an interval.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// Lower end.
    pub low: f64,
    /// The ratio.
    pub middle: f64,
    /// Upper end.
    pub high: f64,
}

/// Ratios of two series taken in the same rounds, round by round: a slow second of the machine hits both sides. The
/// interval is from the 10th to the 90th percentile of the rounds. `None` without a round.
#[must_use]
pub fn by_round(ours: &[f64], theirs: &[f64]) -> Option<Ratio> {
    let ratios = ours.iter().zip(theirs).map(|(a, b)| a / b).collect();
    let s = Summary::of(ratios)?;
    Some(Ratio {
        low: s.p10,
        middle: s.median,
        high: s.p90,
    })
}

/// Resamplings of [`bootstrap`].
const RESAMPLED: usize = 2000;

/// Ratio of the medians of two series that were not taken together, with a 95 % interval: both are drawn anew, with
/// repetition, 2000 times. `None` where either is empty.
#[must_use]
pub fn bootstrap(ours: &[f64], theirs: &[f64]) -> Option<Ratio> {
    if ours.is_empty() || theirs.is_empty() {
        return None;
    }
    let mut rng = fastrand::Rng::with_seed(7);
    let mut drawn = |from: &[f64]| {
        let one = |_| from[rng.usize(..from.len())];
        median(&(0..from.len()).map(one).collect::<Vec<_>>())
    };
    let mut ratios: Vec<f64> = (0..RESAMPLED)
        .map(|_| drawn(ours) / drawn(theirs))
        .collect();
    ratios.sort_by(f64::total_cmp);
    Some(Ratio {
        low: quantile(&ratios, 0.025)?,
        middle: median(ours) / median(theirs),
        high: quantile(&ratios, 0.975)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_interpolate_and_ignore_order() {
        let s = Summary::of(vec![5.0, 1.0, 3.0, 2.0, 4.0]).unwrap();
        assert_eq!(s.median, 3.0);
        assert!((s.p10 - 1.4).abs() < 1e-12 && (s.p90 - 4.6).abs() < 1e-12);
        assert_eq!(s.samples[0], 5.0);
        assert_eq!(Summary::of(vec![]), None);
    }

    #[test]
    fn ratios_inside_a_round_do_not_see_a_slow_round() {
        let r = by_round(&[2.0, 20.0, 2.0], &[1.0, 10.0, 1.0]).unwrap();
        assert_eq!([r.low, r.middle, r.high], [2.0; 3]);
        assert!(by_round(&[], &[1.0]).is_none());
    }

    #[test]
    fn the_bootstrap_interval_holds_the_ratio_and_shrinks_with_the_noise() {
        let noisy = |scale: f64| -> Vec<f64> {
            let mut rng = fastrand::Rng::with_seed(3);
            (0..40).map(|_| 1.0 + scale * rng.f64()).collect()
        };
        let wide = bootstrap(&noisy(1.0), &noisy(1.0)).unwrap();
        let narrow = bootstrap(&noisy(0.01), &noisy(0.01)).unwrap();
        assert!(wide.low < 1.0 && 1.0 < wide.high);
        assert!(narrow.high - narrow.low < 0.1 * (wide.high - wide.low));
        let twice: Vec<f64> = noisy(0.01).iter().map(|x| 2.0 * x).collect();
        let two = bootstrap(&twice, &noisy(0.01)).unwrap();
        assert!(two.low < 2.0 && 2.0 < two.high && two.low > 1.9);
        assert!(bootstrap(&[], &[1.0]).is_none());
    }
}
