//! What this machine reaches: bytes a second by size of the working set, multiply-adds a second by dtype, both by
//! threads. From them the floor of a work: the time that nothing on this machine can be faster than.
//! Invariant: a floor never says more than the machine needs. Every rate is the best of many, a working set is given
//! the rate of a smaller one, and bytes and arithmetic are taken to overlap perfectly.
//! Absent on purpose: data sheets; and when to probe again, which `floors` knows.

use serde::{Deserialize, Serialize};
use tallow::cpu::exec::Exec;
use tallow::cpu::pool::Pool;
use tallow::cpu::probe::{Product, multiply_adds, read};
use tallow::cpu::simd::Isa;
use tallow::{DType, Session};

use crate::Result;
use crate::work::Clock;

mod device;
mod learn;

/// Reading `bytes` again and again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// Threads that share the bytes.
    pub threads: usize,
    /// Size of the working set.
    pub bytes: usize,
    /// Bytes read a second.
    pub bytes_per_s: f64,
    /// The row that showed it, where it was not the probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// Multiply-adds that wait for nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Peak {
    /// Threads.
    pub threads: usize,
    /// `f32`, `bf16`.
    pub dtype: String,
    /// Operations a second; a multiply-add is two.
    pub flops: f64,
    /// The row that showed it, where it was not the probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// What was probed at the start of a run, and what was found out since.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// By threads, then by size.
    pub bandwidth: Vec<Bandwidth>,
    /// By threads and dtype.
    pub peak: Vec<Peak>,
}

/// The least time of a work, and where it comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Floor {
    /// No repetition takes less.
    pub seconds: f64,
    /// Read and written once each.
    pub bytes: usize,
    /// Arithmetic; a multiply-add is two.
    pub flops: f64,
    /// Is it the bytes or the arithmetic that decides?
    pub bound: Bound,
}

/// What a floor is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Bytes.
    Bandwidth,
    /// Multiply-adds.
    Arithmetic,
}

/// Arithmetic and bytes of one repetition, counted by hand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Operands and results, once each.
    pub bytes: usize,
    /// Operations; a multiply-add is two. The least that the definition allows.
    pub flops: f64,
    /// Of the products.
    pub dtype: DType,
}

/// What a work needs at least: its cost, on so many threads, so many times one after another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Need {
    /// Of one.
    pub cost: Cost,
    /// Threads that share it.
    pub threads: usize,
    /// How many, one after another.
    pub times: usize,
}

/// The smallest working set, in bytes; then each twice the one before.
const SMALLEST: usize = 16 << 10;
/// The largest.
const LARGEST: usize = 256 << 20;
/// How long each rate is looked for, in seconds: about two seconds for all.
const PATIENCE_S: f64 = 0.02;
/// And how often at least: one look at the largest working set takes most of that time, and may be disturbed.
const LEAST_RUNS: usize = 12;
/// The largest share of a thread that is hoped to lie in a cache that no other thread uses.
const OWN_CACHE: usize = 512 << 10;
/// How long a rate of several threads is looked for while it is far from theirs alone: at first they may share a core.
const LONG_PATIENCE_S: f64 = 0.5;
/// Of their rates alone, what several threads should reach together.
const SCALING: f64 = 0.9;
/// Least bytes read in one call.
const PASS_BYTES: usize = 32 << 20;
/// Multiply-adds of one probe, in rounds of the kernel.
const STEPS: usize = 20_000;

impl Probe {
    /// The rates of the device behind `session`, whose weights are kept in `dtype`: of a CPU on `threads` threads with the
    /// instructions it has, of everything else through its backend.
    ///
    /// # Errors
    /// What the device reports.
    pub fn of(clock: &dyn Clock, session: &Session, dtype: DType, threads: usize) -> Result<Self> {
        match &*session.backend().info().name {
            "cpu" => Ok(Self::run(clock, Isa::detect()?, threads)),
            _ => Self::device(clock, session, dtype),
        }
    }

    /// Looks for every rate of a CPU, on one thread and on `threads`. Takes about two seconds.
    #[must_use]
    pub fn run(clock: &dyn Clock, isa: Isa, threads: usize) -> Self {
        let mut probe = Self::default();
        let data = vec![1.0f32; LARGEST / 4];
        let mut counts = vec![1, threads];
        counts.dedup();
        for threads in counts {
            let pool = Pool::new(threads);
            let exec = Exec { isa, pool: &pool };
            let sizes = std::iter::successors(Some(SMALLEST), |b| Some(b * 2));
            for bytes in sizes.take_while(|b| *b <= LARGEST) {
                let part = &data[..bytes / 4];
                // Long enough that handing the work to the threads does not count.
                let passes = (PASS_BYTES / bytes).max(1);
                let hoped = probe.hoped(bytes, threads);
                let bytes_per_s = best(clock, hoped, || read(exec, part, passes) as f64);
                probe.bandwidth.push(Bandwidth {
                    threads,
                    bytes,
                    bytes_per_s,
                    by: None,
                });
            }
            for (product, dtype) in [(Product::F32, DType::F32), (Product::BF16, DType::BF16)] {
                let hoped = probe.hoped_flops(dtype.name(), threads);
                let flops = best(clock, hoped, || multiply_adds(exec, product, STEPS));
                probe.peak.push(Peak {
                    threads,
                    dtype: dtype.name().to_owned(),
                    flops,
                    by: None,
                });
            }
        }
        probe
    }

    /// What several threads should compute a second; 0 for one.
    fn hoped_flops(&self, dtype: &str, threads: usize) -> f64 {
        let mut alone = self.peak.iter().filter(|p| p.threads == 1);
        match alone.find(|p| p.dtype == dtype) {
            Some(p) if threads > 1 => SCALING * p.flops * threads as f64,
            _ => 0.0,
        }
    }

    /// What several threads should read a second where each has its share in a cache of its own.
    fn hoped(&self, bytes: usize, threads: usize) -> f64 {
        let share = bytes / threads;
        let mut alone = self.bandwidth.iter().filter(|b| b.threads == 1);
        match alone.find(|b| b.bytes == share && share <= OWN_CACHE) {
            Some(b) if threads > 1 => SCALING * b.bytes_per_s * threads as f64,
            _ => 0.0,
        }
    }

    /// The floor of what needs so much.
    #[must_use]
    pub fn least(&self, need: &Need) -> Floor {
        let one = self.floor(&need.cost, need.threads);
        Floor {
            seconds: one.seconds * need.times as f64,
            bytes: one.bytes * need.times,
            flops: one.flops * need.times as f64,
            ..one
        }
    }

    /// The floor of a work on `threads` threads (on the nearest number that was probed).
    #[must_use]
    pub fn floor(&self, cost: &Cost, threads: usize) -> Floor {
        let moving = cost.bytes as f64 / self.bytes_per_s(cost.bytes, threads);
        let computing = cost.flops / self.flops(cost.dtype, threads);
        Floor {
            seconds: moving.max(computing),
            bytes: cost.bytes,
            flops: cost.flops,
            bound: match moving > computing {
                true => Bound::Bandwidth,
                false => Bound::Arithmetic,
            },
        }
    }

    /// Bytes a second for a working set: the best of all that are not smaller than the next smaller one probed.
    #[must_use]
    pub fn bytes_per_s(&self, bytes: usize, threads: usize) -> f64 {
        let threads = self.nearest(threads);
        let of = || self.bandwidth.iter().filter(|b| b.threads == threads);
        let from = of().map(|b| b.bytes).filter(|b| *b <= bytes).max();
        let from = from.unwrap_or(0);
        let fits = of().filter(|b| b.bytes >= from);
        fits.map(|b| b.bytes_per_s).fold(0.0, f64::max)
    }

    /// Operations a second. A type without a probe of its own multiplies as f32.
    #[must_use]
    pub fn flops(&self, dtype: DType, threads: usize) -> f64 {
        let threads = self.nearest(threads);
        let of = |name| {
            let all = self.peak.iter().filter(|p| p.threads == threads);
            all.filter(|p| p.dtype == name)
                .map(|p| p.flops)
                .reduce(f64::max)
        };
        of(dtype.name()).or_else(|| of("f32")).unwrap_or(f64::NAN)
    }

    fn nearest(&self, threads: usize) -> usize {
        let all = self.peak.iter().map(|p| p.threads);
        all.min_by_key(|t| t.abs_diff(threads)).unwrap_or(threads)
    }
}

/// Most work a second, of many runs; each run says how much it did. Less than `hoped` for is looked into for longer.
pub(crate) fn best(clock: &dyn Clock, hoped: f64, mut run: impl FnMut() -> f64) -> f64 {
    let (begin, mut most, mut runs) = (clock.now(), 0.0f64, 0);
    let patience = |most: f64| match most < hoped {
        true => LONG_PATIENCE_S,
        false => PATIENCE_S,
    };
    while runs < LEAST_RUNS || clock.now() - begin < patience(most) {
        let start = clock.now();
        let done = run();
        most = most.max(done / (clock.now() - start));
        runs += 1;
    }
    most
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// 90 and 100 GB/s up to 1 MiB, 10 GB/s beyond; 1 and 2 TFLOP/s in f32.
    pub(super) fn probe() -> Probe {
        let mut p = Probe::default();
        for threads in [1, 2] {
            for (bytes, rate) in [(16 << 10, 90e9), (1 << 20, 100e9), (2 << 20, 10e9)] {
                let bytes_per_s = rate * threads as f64;
                p.bandwidth.push(Bandwidth {
                    threads,
                    bytes,
                    bytes_per_s,
                    by: None,
                });
            }
            p.peak.push(Peak {
                threads,
                dtype: "f32".into(),
                flops: 1e12 * threads as f64,
                by: None,
            });
        }
        p
    }

    #[test]
    fn the_floor_is_the_larger_of_bytes_and_arithmetic() {
        let cost = |bytes, flops| Cost {
            bytes,
            flops,
            dtype: DType::F32,
        };
        let f = probe().floor(&cost(1 << 20, 1e3), 1);
        assert_eq!(f.bound, Bound::Bandwidth);
        assert!((f.seconds - (1 << 20) as f64 / 100e9).abs() < 1e-15);
        let f = probe().floor(&cost(1 << 10, 2e9), 2);
        assert_eq!((f.bound, f.seconds), (Bound::Arithmetic, 1e-3));
    }

    #[test]
    fn between_two_sizes_the_faster_rate_counts() {
        let p = probe();
        assert_eq!(p.bytes_per_s((2 << 20) - 1, 1), 100e9);
        assert_eq!(p.bytes_per_s(2 << 20, 1), 10e9);
        // A disturbed probe of a small size says nothing against what a larger one reached.
        assert_eq!(p.bytes_per_s(20 << 10, 1), 100e9);
        assert_eq!(p.bytes_per_s(1 << 40, 2), 20e9);
        assert_eq!(p.flops(DType::BF16, 7), 2e12);
    }

    #[test]
    fn threads_with_caches_of_their_own_are_hoped_to_scale() {
        let p = probe();
        let close = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-9, "{a} {b}");
        close(p.hoped(32 << 10, 2), SCALING * 180e9);
        // Beyond the caches, between two sizes that were probed, and of one thread nothing is.
        for (bytes, threads) in [(2 << 20, 2), (24 << 10, 2), (16 << 10, 1)] {
            assert_eq!(p.hoped(bytes, threads), 0.0);
        }
    }

    #[test]
    fn the_best_of_many_runs_counts() {
        /// Each look at the clock costs one of these.
        struct Steps(std::cell::Cell<usize>);
        impl Clock for Steps {
            fn now(&self) -> f64 {
                let i = self.0.get();
                self.0.set(i + 1);
                let steps = [0.0, 0.0, 1.0, 1.0, 1.5, 1.5, 2.5];
                steps.get(i).copied().unwrap_or(i as f64)
            }
        }
        let clock = Steps(std::cell::Cell::new(0));
        assert_eq!(best(&clock, 0.0, || 3.0), 6.0);
    }

    #[test]
    fn what_is_hoped_for_is_waited_for() {
        struct Even(std::cell::Cell<f64>);
        impl Clock for Even {
            fn now(&self) -> f64 {
                self.0.set(self.0.get() + 0.001);
                self.0.get()
            }
        }
        let rate = |hoped: f64| {
            let mut runs = 0;
            // The fifteenth run is the first on two cores.
            let work = || {
                runs += 1;
                if runs < 15 { 1.0 } else { 10.0 }
            };
            best(&Even(std::cell::Cell::new(0.0)), hoped, work).round()
        };
        assert_eq!(rate(0.0), 1000.0);
        assert_eq!(rate(9000.0), 10_000.0);
        // What never comes is not waited for without end.
        assert_eq!(rate(1e9), 10_000.0);
    }
}
