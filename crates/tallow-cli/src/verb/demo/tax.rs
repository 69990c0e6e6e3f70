//! What the adapter costs: the same work without and with it.
//! Invariant: the two take turns, and who begins changes every round, so that a machine that gets slower or
//! faster favours neither; every result is waited for; medians.
//! Absent on purpose: floors and peers; that is what benchmarks are for.
use anyhow::Result;
use serde_json::{Value, json};
use std::time::Instant;
use tallow::{
    Program, Role, Session,
    llm::{Adapter, Decoder, Model},
};

const FORWARD_TOKENS: usize = 512;
const FORWARD_ROUNDS: usize = 21;
const PROMPT_TOKENS: usize = 32;
const DECODE_TOKENS: usize = 32;
const DECODE_ROUNDS: usize = 21;

/// Seconds without and with the adapter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tax {
    /// A forward pass of [`Tax::forward_tokens`] tokens, loss included.
    pub forward: [f64; 2],
    /// Tokens of that pass.
    pub forward_tokens: usize,
    /// One token decoded.
    pub decode: [f64; 2],
}

/// Measures forward and decode.
pub(super) fn measure(model: &Model, adapter: Option<&Adapter>) -> Result<Tax> {
    let tokens = FORWARD_TOKENS.min(model.config.max_positions);
    let mut forwards = [
        Forward::new(model, None, tokens)?,
        Forward::new(model, adapter, tokens)?,
    ];
    let forward = interleaved(FORWARD_ROUNDS, |i| forwards[i].run(&model.session))?;
    let room = PROMPT_TOKENS + DECODE_TOKENS;
    let mut decoders = [
        Decoder::new(model, None, room)?,
        Decoder::new(model, adapter, room)?,
    ];
    let prompt = ids(model, PROMPT_TOKENS);
    let decode = interleaved(DECODE_ROUNDS, |i| decode(&mut decoders[i], &prompt))?;
    Ok(Tax {
        forward,
        forward_tokens: tokens,
        decode,
    })
}

impl Tax {
    pub(super) fn show(&self) -> String {
        let line = |what: String, [bare, with]: [f64; 2]| {
            format!(
                "  {what:<24} {:>8.3} ms without, {:>8.3} ms with: {:.3} times",
                bare * 1e3,
                with * 1e3,
                with / bare
            )
        };
        let forward = format!("forward of {} tokens", self.forward_tokens);
        format!(
            "What the adapter costs (rank 8 on all seven projections, medians, in turns):\n{}\n{}",
            line(forward, self.forward),
            line("decoding one token".to_owned(), self.decode)
        )
    }

    pub(super) fn json(&self) -> Value {
        let pair = |[bare, with]: [f64; 2]| json!({ "bare_s": bare, "adapter_s": with, "ratio": with / bare });
        json!({
            "forward": pair(self.forward),
            "forward_tokens": self.forward_tokens,
            "decode": pair(self.decode),
        })
    }
}

/// Medians of the seconds that `run(0)` and `run(1)` report, after a warm-up.
fn interleaved(rounds: usize, mut run: impl FnMut(usize) -> Result<f64>) -> Result<[f64; 2]> {
    let mut times = [vec![], vec![]];
    for round in 0..=rounds {
        for k in 0..2 {
            let who = (round + k) % 2;
            let seconds = run(who)?;
            if round > 0 {
                times[who].push(seconds);
            }
        }
    }
    Ok(times.map(|mut t: Vec<f64>| {
        t.sort_by(f64::total_cmp);
        t[t.len() / 2]
    }))
}

/// Some ids of the vocabulary, no two neighbours alike.
fn ids(model: &Model, n: usize) -> Vec<u32> {
    let vocab = model.config.vocab as u64;
    (0..n as u64).map(|i| (i * 7919 % vocab) as u32).collect()
}

/// A recorded forward pass; its loss a token is small to read back, and nothing of the work can be skipped.
struct Forward {
    program: Program,
    nll: Vec<f32>,
}

impl Forward {
    fn new(model: &Model, adapter: Option<&Adapter>, tokens: usize) -> Result<Self> {
        let s = &model.session;
        let leaf = |v: &[u32]| s.tensor_u32(v, [1, tokens], Role::Data);
        let all = ids(model, tokens + 1);
        let pos: Vec<u32> = (0..tokens as u32).collect();
        let x = model
            .hidden(&leaf(&all[..tokens])?, &leaf(&pos)?, adapter, None)?
            .x;
        let nll = model.nll(&x, &leaf(&all[1..])?)?;
        Ok(Forward {
            program: s.record(&[&nll], &[])?,
            nll: vec![0.0; tokens],
        })
    }

    fn run(&mut self, session: &Session) -> Result<f64> {
        let start = Instant::now();
        self.program.replay()?;
        session.read_into(&self.program.outputs[0], &mut self.nll)?;
        Ok(start.elapsed().as_secs_f64())
    }
}

/// Seconds a token over some tokens behind a prompt; reading the prompt is not counted.
fn decode(decoder: &mut Decoder, prompt: &[u32]) -> Result<f64> {
    decoder.reset();
    decoder.feed(prompt)?;
    let start = Instant::now();
    for i in 0..DECODE_TOKENS {
        decoder.feed(&[prompt[i % prompt.len()]])?;
    }
    Ok(start.elapsed().as_secs_f64() / DECODE_TOKENS as f64)
}
