//! Choosing the next token from logits, and stopping at given strings.
//! Invariant: the order and the thresholds are those of transformers (repetition penalty, temperature, top-k,
//! top-p, min-p); the same seed, settings and logits give the same token; ties go to the lowest id.
//! Absent on purpose: typical sampling, beams, penalties by count.

mod stop;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};

pub use stop::StopStrings;

use crate::error::{Error, Result};

/// How tokens are chosen. All fields matter, so there is no default; see [`Sampling::greedy`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f64,
    /// Keeps the `k` likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest likeliest tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f64,
    /// Keeps tokens at least this fraction as likely as the likeliest; 0 keeps all.
    pub min_p: f64,
    /// Makes every token seen before less likely (above 1) or likelier (below 1).
    pub repetition_penalty: f64,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Sampling {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }

    fn validate(&self) -> Result<()> {
        let check = |ok: bool, name, want, got: f64| match ok {
            true => Ok(()),
            false => Err(Error::Setting {
                name,
                want,
                got: got.to_string(),
            }),
        };
        let t = self.temperature;
        check(
            t >= 0.0 && t.is_finite(),
            "temperature",
            "0 (greedy) or a number above 0",
            t,
        )?;
        let p = self.top_p;
        check(
            p > 0.0 && p <= 1.0,
            "top_p",
            "a number above 0 and at most 1",
            p,
        )?;
        let m = self.min_p;
        check((0.0..=1.0).contains(&m), "min_p", "a number from 0 to 1", m)?;
        let r = self.repetition_penalty;
        check(
            r > 0.0 && r.is_finite(),
            "repetition_penalty",
            "a number above 0",
            r,
        )
    }
}

/// Draws tokens; owns the random numbers and its scratch space.
#[derive(Clone, Debug)]
pub struct Sampler {
    settings: Sampling,
    random: ChaCha8Rng,
    /// Candidates: (probability or scaled logit, id), likeliest first.
    kept: Vec<(f64, u32)>,
    seen: Vec<bool>,
}

impl Sampler {
    /// Checks the settings.
    pub fn new(settings: Sampling) -> Result<Self> {
        settings.validate()?;
        Ok(Self {
            settings,
            random: ChaCha8Rng::seed_from_u64(settings.seed),
            kept: Vec::new(),
            seen: Vec::new(),
        })
    }

    /// Is the next token always the likeliest, whatever was said before?
    pub(crate) fn takes_likeliest(&self) -> bool {
        self.settings.temperature == 0.0 && self.settings.repetition_penalty == 1.0
    }

    /// Chooses the next token. `logits: [vocab]` are changed in place; `-inf` forbids a token.
    /// `history`: every token so far, the prompt included, for the repetition penalty.
    pub fn next(&mut self, logits: &mut [f32], history: &[u32]) -> Result<u32> {
        self.penalize(logits, history);
        let best = argmax(logits)?;
        let s = self.settings;
        if s.temperature == 0.0 {
            return Ok(best as u32);
        }
        let max = f64::from(logits[best]);
        self.kept.clear();
        for (id, &logit) in logits.iter().enumerate() {
            if logit > f32::NEG_INFINITY {
                // The largest is subtracted first: a tiny temperature cannot overflow to inf - inf.
                let scaled = (f64::from(logit) - max) / s.temperature;
                self.kept.push((scaled, id as u32));
            }
        }
        self.keep_top_k(s.top_k);
        self.make_probabilities();
        if s.top_p < 1.0 {
            self.keep_top_p(s.top_p);
        }
        if s.min_p > 0.0 {
            let most = self.kept.iter().map(|k| k.0).fold(0.0, f64::max);
            self.kept.retain(|k| k.0 >= s.min_p * most);
        }
        Ok(self.draw())
    }

    fn penalize(&mut self, logits: &mut [f32], history: &[u32]) {
        let penalty = self.settings.repetition_penalty as f32;
        if penalty == 1.0 {
            return;
        }
        self.seen.clear();
        self.seen.resize(logits.len(), false);
        for &id in history {
            let Some(seen) = self.seen.get_mut(id as usize) else {
                continue;
            };
            if !std::mem::replace(seen, true) {
                let logit = &mut logits[id as usize];
                *logit = if *logit < 0.0 {
                    *logit * penalty
                } else {
                    *logit / penalty
                };
            }
        }
    }

    /// Tokens as likely as the last one kept stay too, as in transformers.
    fn keep_top_k(&mut self, k: usize) {
        if k == 0 || k >= self.kept.len() {
            return;
        }
        let mut values: Vec<f64> = self.kept.iter().map(|c| c.0).collect();
        let (_, &mut least, _) = values.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
        self.kept.retain(|c| c.0 >= least);
    }

    /// Scaled logits (the largest is 0) to probabilities.
    fn make_probabilities(&mut self) {
        let mut sum = 0.0;
        for candidate in &mut self.kept {
            candidate.0 = candidate.0.exp();
            sum += candidate.0;
        }
        for candidate in &mut self.kept {
            candidate.0 /= sum;
        }
    }

    /// Drops the unlikeliest tokens as long as what is dropped sums to at most `1 - p`.
    fn keep_top_p(&mut self, p: f64) {
        self.kept
            .sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut dropped = 0.0;
        let mut keep = self.kept.len();
        while keep > 1 && dropped + self.kept[keep - 1].0 <= 1.0 - p {
            keep -= 1;
            dropped += self.kept[keep].0;
        }
        self.kept.truncate(keep);
    }

    fn draw(&mut self) -> u32 {
        // By id, so that a draw does not depend on which filters happened to sort.
        self.kept.sort_unstable_by_key(|c| c.1);
        let total: f64 = self.kept.iter().map(|c| c.0).sum();
        let unit = (self.random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        let mut left = unit * total;
        let mut chosen = 0;
        for &(p, id) in &self.kept {
            if p > 0.0 {
                chosen = id;
                if left < p {
                    break;
                }
            }
            left -= p;
        }
        chosen
    }
}

/// The place of the largest logit, the first of equals. Refuses NaN, +inf, and logits that forbid everything.
fn argmax(logits: &[f32]) -> Result<usize> {
    let mut best = None;
    let mut most = f32::NEG_INFINITY;
    for (id, &logit) in logits.iter().enumerate() {
        if logit.is_nan() || logit == f32::INFINITY {
            let problem = format!("token {id} has {logit}");
            return Err(Error::Logits { problem });
        }
        if logit > most {
            most = logit;
            best = Some(id);
        }
    }
    best.ok_or_else(|| Error::Logits {
        problem: format!("none of {} tokens is possible", logits.len()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(change: impl Fn(&mut Sampling)) -> Sampler {
        let mut s = Sampling {
            temperature: 1.0,
            ..Sampling::greedy()
        };
        change(&mut s);
        Sampler::new(s).unwrap()
    }

    /// Ids that come up in 2000 draws, with their frequencies.
    fn frequencies(sampler: &mut Sampler, logits: &[f32], history: &[u32]) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..2000 {
            let id = sampler.next(&mut logits.to_vec(), history).unwrap();
            counts[id as usize] += 1.0 / 2000.0;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let mut sampler = Sampler::new(Sampling::greedy()).unwrap();
        assert_eq!(sampler.next(&mut [0.0, 3.0, -1.0, 3.0], &[]).unwrap(), 1);
        let mut all_negative = [f32::NEG_INFINITY, -3.0e38, -3.2e38];
        assert_eq!(sampler.next(&mut all_negative, &[]).unwrap(), 1);
    }

    #[test]
    fn the_penalty_divides_positive_and_multiplies_negative_logits_once() {
        let mut sampler = with(|s| s.repetition_penalty = 2.0);
        let mut logits = [4.0, -1.0, 1.0];
        sampler.next(&mut logits, &[0, 1, 0, 99]).unwrap();
        assert_eq!(logits, [2.0, -2.0, 1.0]);
    }

    #[test]
    fn frequencies_are_the_softmax_at_that_temperature() {
        let logits = [0.0, 1.0, f32::NEG_INFINITY, 2.0];
        for t in [0.5, 1.0, 3.0] {
            let got = frequencies(&mut with(|s| s.temperature = t), &logits, &[]);
            let weights: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / t).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for (g, w) in got.iter().zip(&weights) {
                assert!(
                    (g - w / sum).abs() < 0.04,
                    "t {t}: {got:?} against {weights:?}"
                );
            }
            assert_eq!(got[2], 0.0);
        }
    }

    #[test]
    fn filters_keep_what_transformers_keeps() {
        let ln = |p: [f32; 5]| p.map(f32::ln);
        let kept = |sampler: &mut Sampler, logits: &[f32]| -> Vec<usize> {
            let f = frequencies(sampler, logits, &[]);
            (0..f.len()).filter(|&i| f[i] > 0.0).collect()
        };
        let p = ln([0.1, 0.4, 0.05, 0.25, 0.2]);
        assert_eq!(kept(&mut with(|s| s.top_k = 2), &p), [1, 3]);
        // Ties with the k-th stay.
        assert_eq!(kept(&mut with(|s| s.top_k = 1), &[1.0, 2.0, 2.0]), [1, 2]);
        assert_eq!(kept(&mut with(|s| s.top_p = 0.6), &p), [1, 3]);
        assert_eq!(kept(&mut with(|s| s.top_p = 0.7), &p), [1, 3, 4]);
        assert_eq!(kept(&mut with(|s| s.top_p = 1e-9), &p), [1]);
        assert_eq!(kept(&mut with(|s| s.min_p = 0.49), &p), [1, 3, 4]);
        assert_eq!(kept(&mut with(|s| s.min_p = 1.0), &p), [1]);
        // top-p counts what top-k left: 0.4 of 0.65 is below 0.62, so both stay.
        let both = |s: &mut Sampling| (s.top_k, s.top_p) = (2, 0.62);
        assert_eq!(kept(&mut with(both), &p), [1, 3]);
        let both = |s: &mut Sampling| (s.top_k, s.top_p) = (2, 0.61);
        assert_eq!(kept(&mut with(both), &p), [1]);
    }

    #[test]
    fn a_seed_repeats_and_seeds_differ() {
        let draw = |seed| {
            let mut sampler = with(|s| s.seed = seed);
            let one = |_| sampler.next(&mut [0.0; 1000], &[]).unwrap();
            (0..8).map(one).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn tiny_temperatures_do_not_overflow() {
        let mut sampler = with(|s| s.temperature = f64::MIN_POSITIVE);
        assert_eq!(sampler.next(&mut [1.0, 3.0e38, -3.0e38], &[]).unwrap(), 1);
    }

    #[test]
    fn bad_logits_and_settings_are_named() {
        let mut sampler = Sampler::new(Sampling::greedy()).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            let error = sampler.next(&mut [0.0, bad], &[]).unwrap_err().to_string();
            assert!(error.starts_with("logits: token 1 has "), "{error}");
        }
        assert!(sampler.next(&mut [], &[]).is_err());
        assert!(sampler.next(&mut [f32::NEG_INFINITY], &[]).is_err());
        let refuse = |change: fn(&mut Sampling), want: &str| {
            let mut s = Sampling::greedy();
            change(&mut s);
            assert_eq!(Sampler::new(s).unwrap_err().to_string(), want);
        };
        refuse(
            |s| s.temperature = -1.0,
            "temperature: want 0 (greedy) or a number above 0, got -1",
        );
        refuse(
            |s| s.top_p = 0.0,
            "top_p: want a number above 0 and at most 1, got 0",
        );
        refuse(
            |s| s.min_p = f64::NAN,
            "min_p: want a number from 0 to 1, got NaN",
        );
        refuse(
            |s| s.repetition_penalty = 0.0,
            "repetition_penalty: want a number above 0, got 0",
        );
    }
}
