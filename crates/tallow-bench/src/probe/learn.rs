//! What a probe is told later: by another probe, or by rows that reached more than it did.
//! Invariant: rates only rise. A row raises them by no more than the floor forgives, counted from what was probed, so that rows
//! which are wrong by a little cannot lift each other.
//! Absent on purpose: which rows may be believed.

use super::{Bandwidth, Need, Peak, Probe};

/// What is more by less than this factor is the same.
const MORE: f64 = 1.01;

impl Probe {
    /// The better of both, rate by rate.
    pub fn better_of(&mut self, other: &Self) {
        for new in &other.bandwidth {
            let same = |b: &&mut Bandwidth| {
                b.by.is_none() && (b.threads, b.bytes) == (new.threads, new.bytes)
            };
            match self.bandwidth.iter_mut().find(same) {
                Some(old) => old.bytes_per_s = old.bytes_per_s.max(new.bytes_per_s),
                None => self.bandwidth.push(new.clone()),
            }
        }
        for new in &other.peak {
            let same = |p: &&mut Peak| {
                p.by.is_none() && (p.threads, &p.dtype) == (new.threads, &new.dtype)
            };
            match self.peak.iter_mut().find(same) {
                Some(old) => old.flops = old.flops.max(new.flops),
                None => self.peak.push(new.clone()),
            }
        }
    }

    /// Were several threads slower than their rates alone promise? Something else may have run beside them.
    #[must_use]
    pub fn short(&self) -> bool {
        let slow = |b: &Bandwidth| b.bytes_per_s < self.hoped(b.bytes, b.threads);
        let weak = |p: &Peak| p.flops < self.hoped_flops(&p.dtype, p.threads);
        self.bandwidth.iter().any(slow) || self.peak.iter().any(weak)
    }

    /// `who` did what `need` says in so many seconds, checked. Where that is more than was probed it counts from here on, up to
    /// `most` times what was probed. Says what rose, and from what to what a second.
    pub fn learn(&mut self, who: &str, need: &Need, seconds: f64, most: f64) -> Vec<Raised> {
        let mut all = vec![];
        let one_s = seconds / need.times as f64;
        let threads = self.nearest(need.threads);
        let (bytes, dtype) = (need.cost.bytes, need.cost.dtype);
        let probed = self.probed();
        let (from, to) = (
            self.bytes_per_s(bytes, threads),
            (bytes as f64 / one_s).min(most * probed.bytes_per_s(bytes, threads)),
        );
        if to > MORE * from {
            self.bandwidth.push(Bandwidth {
                threads,
                bytes,
                bytes_per_s: to,
                by: Some(who.to_owned()),
            });
            all.push(Raised {
                what: format!("bytes a second of {} KiB", bytes >> 10),
                from,
                to,
            });
        }
        let (from, to) = (
            self.flops(dtype, threads),
            (need.cost.flops / one_s).min(most * probed.flops(dtype, threads)),
        );
        let known = |p: &Peak| p.threads == threads && p.dtype == dtype.name();
        if to > MORE * from && self.peak.iter().any(known) {
            self.peak.push(Peak {
                threads,
                dtype: dtype.name().to_owned(),
                flops: to,
                by: Some(who.to_owned()),
            });
            all.push(Raised {
                what: format!("operations a second in {}", dtype.name()),
                from,
                to,
            });
        }
        all
    }

    /// Without what rows showed.
    fn probed(&self) -> Self {
        let mut all = self.clone();
        all.bandwidth.retain(|b| b.by.is_none());
        all.peak.retain(|p| p.by.is_none());
        all
    }
}

/// A rate that rose.
#[derive(Clone, Debug, PartialEq)]
pub struct Raised {
    /// Of what.
    pub what: String,
    /// A second, before.
    pub from: f64,
    /// A second, now.
    pub to: f64,
}

#[cfg(test)]
mod tests {
    use tallow::DType;

    use super::super::Cost;
    use super::super::tests::probe;
    use super::*;

    fn need(bytes: usize, flops: f64) -> Need {
        Need {
            cost: Cost {
                bytes,
                flops,
                dtype: DType::F32,
            },
            threads: 1,
            times: 1,
        }
    }

    #[test]
    fn the_better_rate_of_two_probes_counts() {
        let (mut p, mut other) = (probe(), probe());
        other.bandwidth[2].bytes_per_s = 20e9;
        other.bandwidth[1].bytes_per_s = 50e9;
        other.peak[1].flops = 3e12;
        p.better_of(&other);
        assert_eq!(p.bandwidth.len(), 6);
        assert_eq!(p.bytes_per_s(4 << 20, 1), 20e9);
        assert_eq!(p.bytes_per_s(1 << 20, 1), 100e9);
        assert_eq!(
            [p.flops(DType::F32, 1), p.flops(DType::F32, 2)],
            [1e12, 3e12]
        );
    }

    #[test]
    fn threads_below_their_promise_are_noticed() {
        assert!(!probe().short());
        let mut p = probe();
        p.peak[1].flops = 1.2e12;
        assert!(p.short());
    }

    #[test]
    fn a_row_that_reached_more_raises_the_rate_of_its_size_but_not_of_the_next_that_was_probed() {
        let mut p = probe();
        p.bandwidth.push(Bandwidth {
            bytes: 8 << 20,
            ..p.bandwidth[2].clone()
        });
        // 4 MiB at 10.5 GB/s, 10 were probed.
        let rose = p.learn("it", &need(4 << 20, 1.0), (4 << 20) as f64 / 10.5e9, 1.2);
        assert_eq!(rose.len(), 1);
        assert!((rose[0].to / 10.5e9 - 1.0).abs() < 1e-9 && rose[0].from == 10e9);
        assert!(p.bytes_per_s(4 << 20, 1) > 10.4e9);
        assert!(p.bytes_per_s(3 << 20, 1) > 10.4e9);
        assert_eq!(p.bytes_per_s(8 << 20, 1), 10e9);
        assert_eq!(p.bytes_per_s(4 << 20, 2), 20e9);
        // What is slower teaches nothing.
        assert!(p.learn("it", &need(4 << 20, 1.0), 1.0, 1.2).is_empty());
        let rose = p.learn("it", &need(16, 1.1e9), 1e-3, 1.2);
        assert_eq!(rose.len(), 1, "{rose:?}");
        assert!((p.flops(DType::F32, 1) / 1.1e12 - 1.0).abs() < 1e-9);
        assert_eq!(p.flops(DType::F32, 2), 2e12);
    }

    #[test]
    fn rows_do_not_lift_each_other() {
        let mut p = probe();
        for faster in [1.1, 1.2, 1.3, 2.0] {
            p.learn("it", &need(16, 1e9 * faster), 1e-3, 1.1);
        }
        assert!((p.flops(DType::F32, 1) / 1.1e12 - 1.0).abs() < 1e-9);
    }
}
