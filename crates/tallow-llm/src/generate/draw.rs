//! A token drawn where the logits are: temperature, top-k, top-p and min-p as a graph over one row of them.
//! Invariant: what can be drawn is what the host's sampler keeps, but for values within 2e-6 of an edge, which stay, and tokens
//! less than e^-32 as likely as the likeliest, which no draw would find. A draw is a function of the logits, the seed
//! and the number of the draw, whatever was drawn before it.
//! Absent on purpose: the repetition penalty, which wants all tokens so far; and the random numbers of the host.

use tallow_core::op::{Op, Role};
use tallow_core::session::Session;
use tallow_core::tensor::Tensor;

use crate::error::Result;
use crate::sample::Sampling;

/// How far below the likeliest an edge is looked for, in nats (at temperature 1).
const RANGE: f32 = 32.0;
/// Edges tried side by side, and how often: each time the gap between two of them is what is left.
const TRIED: usize = 16;
const TIMES: u32 = 6;
/// How near an edge is found, in nats.
#[cfg(test)]
const FINEST: f32 = RANGE / (1 << 24) as f32;
/// Identity of the draw: equal in all recordings.
const ID: u32 = 0x7a11_0311;
/// The least number whose logarithm's logarithm is taken: half of the step between two draws.
const LEAST: f32 = 1.0 / (1 << 25) as f32;

/// Settings and random numbers where the device reads them.
pub(super) struct Draw {
    settings: Sampling,
    /// Seed and number of the next draw, `[2]` u32.
    key: Tensor,
    /// Reciprocal of the temperature, `k`, `p` and `ln min_p`, `[4]` f32.
    numbers: Tensor,
    /// Draws so far.
    drawn: u32,
}

impl Draw {
    /// For `settings` that a device can follow by itself: some temperature, no penalty.
    ///
    /// # Errors
    /// No memory.
    pub(super) fn new(session: &Session, settings: &Sampling) -> Result<Option<Self>> {
        let s = *settings;
        if s.temperature == 0.0 || s.repetition_penalty != 1.0 {
            return Ok(None);
        }
        let numbers = [
            (1.0 / s.temperature).min(f64::from(f32::MAX)) as f32,
            s.top_k as f32,
            s.top_p as f32,
            (s.min_p.ln() as f32).max(f32::MIN),
        ];
        Ok(Some(Self {
            settings: s,
            key: session.tensor_u32(&[0, 0], [2], Role::State)?,
            numbers: session.tensor(&numbers, [4], Role::Data)?,
            drawn: 0,
        }))
    }

    /// Begins a sequence: the next draw is the first.
    pub(super) fn restart(&mut self) {
        self.drawn = 0;
    }

    /// Tells the device which draw is next.
    ///
    /// # Errors
    /// What the device reports.
    pub(super) fn write(&self, session: &Session) -> Result<()> {
        // The upper half of a product that every bit of the seed reaches.
        let seed = self.settings.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let seed = (seed >> 32) as u32;
        Ok(session.write_u32(&self.key, &[seed, self.drawn])?)
    }

    /// `n` draws of the device are used.
    pub(super) fn count(&mut self, n: usize) {
        self.drawn = self.drawn.wrapping_add(n as u32);
    }

    /// What makes the draw behind this one the next: a state and its next value.
    ///
    /// # Errors
    /// What the session reports.
    pub(super) fn next(&self, session: &Session) -> Result<(Tensor, Tensor)> {
        let one = session.tensor_u32(&[0, 1], [2], Role::Data)?;
        Ok((self.key.clone(), self.key.add(&one)?))
    }

    /// The token drawn from `logits [1, v]` and the score it won by, as [`Tensor::top`] gives them: `[1, 2]`.
    /// Where a logit is NaN or no token is possible, the score is not finite or there is no such token.
    ///
    /// # Errors
    /// Logits of another shape.
    pub(super) fn of(&self, logits: &Tensor) -> Result<Tensor> {
        let most = logits.max(1)?;
        let scaled = logits.sub(&most)?.mul(&self.number(0)?)?;
        let mut edge = self.number(3)?;
        let wide = logits.shape().last();
        let mut floor = None;
        if self.settings.top_k > 0 && self.settings.top_k < wide {
            let one = Tensor::scalar(1.0);
            let found = lowest(&scaled, &one, &self.number(1)?)?;
            edge = edge.maximum(&found)?;
            floor = Some(found);
        }
        if self.settings.top_p < 1.0 {
            // Shares of what top-k has left.
            let zero = Tensor::scalar(0.0);
            let mut weights = scaled.exp()?;
            if let Some(floor) = &floor {
                weights = scaled.less(floor)?.select(&zero, &weights)?;
            }
            let wanted = weights.sum(1)?.mul(&self.number(2)?)?;
            edge = edge.maximum(&lowest(&scaled, &weights, &wanted)?)?;
        }
        // The largest of these comes up as often as its token is likely (Gumbel).
        let shape = logits.shape().clone();
        let unit = Tensor::apply(Op::Random { id: ID, shape }, &[&self.key])?;
        let noise = unit.maximum(&Tensor::scalar(LEAST))?;
        let noise = noise.log()?.neg()?.log()?.neg()?;
        let never = Tensor::scalar(f32::MIN);
        // NaN is below nothing, so it is seen.
        let scores = scaled.less(&edge)?.select(&never, &scaled.add(&noise)?)?;
        Ok(scores.top()?)
    }

    fn number(&self, i: usize) -> Result<Tensor> {
        Ok(self.numbers.slice(0, i, 1)?.reshape([1, 1])?)
    }
}

/// The highest edge, `[1, 1]`, for which the `weights` of all `scaled [1, v]` not below it sum to `wanted [1, 1]`;
/// -[`RANGE`] where there is none.
fn lowest(scaled: &Tensor, weights: &Tensor, wanted: &Tensor) -> Result<Tensor> {
    let mut edge = Tensor::scalar(-RANGE).reshape([1, 1])?;
    let steps = Tensor::iota([TRIED, 1], 0)?;
    let zero = Tensor::scalar(0.0);
    let mut gap = RANGE;
    for _ in 0..TIMES {
        gap /= TRIED as f32;
        let tried = steps.mul_scalar(gap)?.add(&edge)?;
        let sums = scaled.less(&tried)?.select(&zero, weights)?.sum(1)?;
        // The sums fall; the last that is enough is the one.
        let enough = sums.less(wanted)?.select(&zero, &Tensor::scalar(1.0))?;
        let last = enough.sum(0)?.add_scalar(-1.0)?.maximum(&zero)?;
        edge = edge.add(&last.mul_scalar(gap)?)?;
    }
    Ok(edge)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tallow_core::types::DType;
    use tallow_cpu::{Cpu, CpuOptions};

    use super::*;
    use crate::sample::Sampler;

    const V: usize = 41;

    fn session() -> Session {
        let options = CpuOptions {
            threads: Some(1),
            weights: DType::F32,
            isa: None,
        };
        Session::new(Arc::new(Cpu::open(&options).unwrap()))
    }

    fn some_logits() -> Vec<f32> {
        (0..V).map(|i| 3.0 * (i as f32 * 1.7).sin()).collect()
    }

    fn with(change: impl Fn(&mut Sampling)) -> Sampling {
        let mut s = Sampling {
            temperature: 1.0,
            ..Sampling::greedy()
        };
        change(&mut s);
        s
    }

    /// Frequencies of `n` draws on the device.
    fn frequencies(settings: &Sampling, logits: &[f32], n: usize) -> Vec<f64> {
        let s = session();
        let draw = Draw::new(&s, settings).unwrap().unwrap();
        let leaf = s.tensor(logits, [1, V], Role::Data).unwrap();
        let top = draw.of(&leaf).unwrap();
        let mut program = s.record(&[&top], &[draw.next(&s).unwrap()]).unwrap();
        draw.write(&s).unwrap();
        let mut counts = vec![0.0; V];
        for _ in 0..n {
            program.replay().unwrap();
            let found = s.read(&program.outputs[0]).unwrap();
            counts[found[0] as usize] += 1.0 / n as f64;
        }
        counts
    }

    /// The same on the host.
    fn on_the_host(settings: &Sampling, logits: &[f32], n: usize) -> Vec<f64> {
        let mut sampler = Sampler::new(*settings).unwrap();
        let mut counts = vec![0.0; V];
        for _ in 0..n {
            let id = sampler.next(&mut logits.to_vec(), &[]).unwrap();
            counts[id as usize] += 1.0 / n as f64;
        }
        counts
    }

    #[test]
    fn draws_are_as_frequent_as_those_of_the_host() {
        let mut logits = some_logits();
        logits[7] = f32::NEG_INFINITY;
        let all = [
            with(|_| {}),
            with(|s| s.temperature = 0.4),
            with(|s| s.temperature = 2.5),
            with(|s| s.top_k = 1),
            with(|s| s.top_k = 5),
            with(|s| s.top_k = 400),
            with(|s| s.top_p = 0.5),
            with(|s| s.top_p = 1e-6),
            with(|s| s.min_p = 0.3),
            with(|s| (s.top_k, s.top_p, s.min_p, s.temperature) = (9, 0.8, 0.05, 1.3)),
        ];
        for settings in all {
            let (here, there) = (
                frequencies(&settings, &logits, 3000),
                on_the_host(&settings, &logits, 30_000),
            );
            for (id, (a, b)) in here.iter().zip(&there).enumerate() {
                assert!(
                    (a - b).abs() < 0.035,
                    "{settings:?} token {id}: {a} for {b}"
                );
                assert!(
                    *b > 0.0 || *a == 0.0,
                    "{settings:?} token {id} was not kept"
                );
            }
        }
    }

    #[test]
    fn a_draw_is_known_by_its_seed_and_number() {
        let s = session();
        let leaf = s.tensor(&some_logits(), [1, V], Role::Data).unwrap();
        let drawn = |seed: u64, from: usize, n: usize| -> Vec<u32> {
            let mut draw = Draw::new(&s, &with(|w| w.seed = seed)).unwrap().unwrap();
            let mut program = s
                .record(&[&draw.of(&leaf).unwrap()], &[draw.next(&s).unwrap()])
                .unwrap();
            draw.count(from);
            draw.write(&s).unwrap();
            let one = |_| {
                program.replay().unwrap();
                s.read(&program.outputs[0]).unwrap()[0] as u32
            };
            (0..n).map(one).collect()
        };
        let all = drawn(5, 0, 40);
        assert_eq!(all[13..], drawn(5, 13, 27));
        assert_ne!(all, drawn(6, 0, 40));
        assert_ne!(all, drawn(5 << 32, 0, 40)[..]);
    }

    #[test]
    fn values_near_an_edge_stay_and_those_below_go() {
        // Two tokens, the second between two edges, and one just below: before the next edge, and further.
        let second = -1.0 - FINEST / 2.0;
        for (below, kept) in [(FINEST / 4.0, 3), (1e-3, 2)] {
            let mut logits = vec![-20.0; V];
            (logits[3], logits[4], logits[5]) = (0.0, second, second - below);
            let found = frequencies(&with(|s| s.top_k = 2), &logits, 400);
            assert_eq!(
                found.iter().filter(|f| **f > 0.0).count(),
                kept,
                "{found:?}"
            );
        }
    }

    #[test]
    fn scores_that_are_no_numbers_are_seen() {
        for bad in [f32::NAN, f32::INFINITY] {
            let s = session();
            let draw = Draw::new(&s, &with(|s| (s.top_k, s.top_p) = (3, 0.9))).unwrap();
            let draw = draw.unwrap();
            let mut logits = some_logits();
            logits[11] = bad;
            let leaf = s.tensor(&logits, [1, V], Role::Data).unwrap();
            let found = s.read(&draw.of(&leaf).unwrap()).unwrap();
            assert!(!found[1].is_finite() || found[0] as usize >= V, "{found:?}");
        }
    }

    #[test]
    fn a_device_follows_neither_greed_nor_a_penalty() {
        let s = session();
        for not in [Sampling::greedy(), with(|s| s.repetition_penalty = 1.1)] {
            assert!(Draw::new(&s, &not).unwrap().is_none());
        }
    }
}
