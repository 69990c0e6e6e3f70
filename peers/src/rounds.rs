//! Runs contenders round by round, interleaved, and prints what each did and how they compare.
//! Invariant: within a round everyone gets the same batch and prompt, the order rotates from round to round, and ratios
//! are taken inside a round.
//! Absent on purpose: warm-up as a guess. The first round is run and thrown away.

use std::time::Instant;

use crate::stats::{Summary, ratios};
use crate::weights::{Batch, ModelShape};
use crate::{Contender, Result};

/// How much of what to run.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Measured rounds; one more is run before them.
    pub rounds: usize,
    /// Training steps a contender takes in a round.
    pub steps: usize,
    /// Batch rows and tokens a row.
    pub batch: (usize, usize),
    /// Prompt length and generated tokens.
    pub decode: (usize, usize),
    /// Decodes a contender does in a round.
    pub decodes: usize,
}

/// What one contender did, one entry a round.
#[derive(Clone, Debug, Default)]
pub struct Round {
    pub name: String,
    /// Tokens a second of training.
    pub train_tok_per_s: Vec<f64>,
    /// Generated tokens a second, the prompt's time included.
    pub decode_tok_per_s: Vec<f64>,
    /// Loss of every step, in order, from the same start for everyone.
    pub losses: Vec<f32>,
    /// Tokens of the first decode.
    pub greedy: Vec<u32>,
}

/// Runs all contenders and returns their measurements in the order given.
///
/// # Errors
/// The first error of any contender.
pub fn run(
    shape: &ModelShape,
    contenders: &mut [Box<dyn Contender>],
    settings: &Settings,
) -> Result<Vec<Round>> {
    let mut all: Vec<Round> = contenders
        .iter()
        .map(|c| Round {
            name: c.name().to_owned(),
            ..Round::default()
        })
        .collect();
    let prompt = Batch::random(shape, 1, settings.decode.0, 77).ids;
    // The same in every round, so that they are learnt and a forgotten update shows in the losses.
    let batches: Vec<Batch> = (0..settings.steps as u64)
        .map(|i| Batch::random(shape, settings.batch.0, settings.batch.1, 1000 + i))
        .collect();
    for round in 0..=settings.rounds {
        for turn in 0..contenders.len() {
            let who = (turn + round) % contenders.len();
            let contender = &mut contenders[who];
            let start = Instant::now();
            for batch in &batches {
                all[who].losses.push(contender.train_step(batch)?);
            }
            let tokens: usize = batches.iter().map(Batch::tokens).sum();
            let train = tokens as f64 / start.elapsed().as_secs_f64();
            let start = Instant::now();
            for _ in 0..settings.decodes {
                all[who].greedy = contender.decode(&prompt, settings.decode.1)?;
            }
            let made = settings.decodes * settings.decode.1;
            let decode = made as f64 / start.elapsed().as_secs_f64();
            if round > 0 {
                all[who].train_tok_per_s.push(train);
                all[who].decode_tok_per_s.push(decode);
            }
        }
    }
    Ok(all)
}

/// Prints medians with p10-p90 and the ratio of every contender to the last one.
pub fn print(all: &[Round]) {
    let Some(base) = all.last() else { return };
    for (what, series) in [
        (
            "training step, tokens/s",
            (|r| &r.train_tok_per_s) as fn(&Round) -> &Vec<f64>,
        ),
        ("greedy decode, tokens/s", |r| &r.decode_tok_per_s),
    ] {
        println!("{what}");
        for round in all {
            let Some(s) = Summary::of(series(round)) else {
                continue;
            };
            let Some(r) = Summary::of(&ratios(series(round), series(base))) else {
                continue;
            };
            println!(
                "  {:<28} {:>8.0}  ({:.0} - {:.0})   {:>5.2}x ({:.2} - {:.2}) of {}",
                round.name, s.median, s.p10, s.p90, r.median, r.p10, r.p90, base.name
            );
        }
    }
}

/// Largest relative difference of losses that may be called equal.
const LOSSES_APART: f32 = 1e-5;

/// Prints how far everyone's losses and greedy tokens are from the last contender's.
///
/// # Errors
/// Losses or tokens that differ: the times were not of the same work.
pub fn check(all: &[Round]) -> Result<()> {
    let Some((base, others)) = all.split_last() else {
        return Ok(());
    };
    for round in others {
        let greedy = round.greedy.iter().zip(&base.greedy);
        let same = greedy.take_while(|(a, b)| a == b).count();
        let losses = round.losses.iter().zip(&base.losses);
        let apart = losses
            .map(|(a, b)| ((a - b) / b).abs())
            .fold(
                0.0,
                |most: f32, x| if x > most || x.is_nan() { x } else { most },
            );
        let (name, other, tokens) = (&round.name, &base.name, base.greedy.len());
        let ends =
            [round.losses.first(), round.losses.last()].map(|l| l.copied().unwrap_or(f32::NAN));
        println!(
            "check {name}: losses {:.4} to {:.4}, all {} within {apart:.1e} of {other}, greedy equal for {same} of {tokens}",
            ends[0],
            ends[1],
            round.losses.len()
        );
        if same < tokens || apart.is_nan() || apart > LOSSES_APART {
            return Err(format!("INVALID: {name} and {other} did not compute the same").into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_losses_or_tokens_are_an_error() {
        let base = Round {
            losses: vec![8.0, 7.0],
            greedy: vec![1, 2],
            ..Round::default()
        };
        let against = |change: fn(&mut Round)| {
            let mut other = base.clone();
            change(&mut other);
            check(&[other, base.clone()]).is_ok()
        };
        assert!(against(|r| r.losses[1] = 7.000_01));
        assert!(!against(|r| r.losses[1] = 7.1));
        assert!(!against(|r| r.losses[0] = f32::NAN));
        assert!(!against(|r| r.greedy[1] = 3));
    }
}
