//! The self-test of `doctor`: two rates, and some ops against the f64 oracle.
//! Invariant: the tolerance is the oracle's own rounding bound of each element, times the constant that all tests share.
//! Absent on purpose: every op; that is the conformance suite's business.
use crate::out;
use anyhow::Result;
use serde_json::{Value, json};
use std::{hint::black_box, time::Instant};
use tallow::{
    Mask, Role, Session, Tensor, TensorType,
    core::{
        oracle::{Value as Reference, bound::eval_bounded},
        tensor::{lower, value_and_grad},
    },
};

/// How long each rate is measured, in seconds.
const PATIENCE: f64 = 0.5;
const READ_BYTES: usize = 256 << 20;

/// What this machine reaches.
pub(super) struct Rates {
    /// Reading memory that no cache holds, all threads.
    pub read_bytes_per_s: f64,
    /// A product of 512 x 1024 by 1024 x 1024 in f32, weights laid out beforehand.
    pub product_flops: f64,
}

/// Measures both; the best of several runs each.
pub(super) fn rates(session: &Session, threads: usize) -> Result<Rates> {
    let words = vec![1_u64; READ_BYTES / 8];
    let read = || {
        std::thread::scope(|s| {
            let part = words.len().div_ceil(threads);
            let sum = |w: &[u64]| w.iter().fold(0_u64, |a, b| a.wrapping_add(*b));
            let all: Vec<_> = words
                .chunks(part)
                .map(|w| s.spawn(move || black_box(sum(w))))
                .collect();
            all.into_iter().for_each(|t| drop(t.join()));
        });
    };
    let read_seconds = best(|| {
        read();
        Ok(())
    })?;
    let [m, k, n] = [512, 1024, 1024];
    let x = session.tensor(&noise(m * k, 1), [m, k], Role::Data)?;
    let w = session.tensor(&noise(n * k, 2), [n, k], Role::Frozen)?;
    let mut program = session.record(&[&x.linear(&w)?], &[])?;
    let mut result = vec![0.0; m * n];
    session.read_into(&program.outputs[0], &mut result)?;
    let product_seconds = best(|| {
        program.replay()?;
        Ok(session.wait()?)
    })?;
    session.read_into(&program.outputs[0], &mut result)?;
    black_box(&result);
    Ok(Rates {
        read_bytes_per_s: READ_BYTES as f64 / read_seconds,
        product_flops: 2.0 * (m * k * n) as f64 / product_seconds,
    })
}

fn best(mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    while begin.elapsed().as_secs_f64() < PATIENCE {
        let start = Instant::now();
        run()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Numbers in ±1 that look random and are the same everywhere.
fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// One op compared.
pub(super) struct Check {
    name: &'static str,
    /// The largest error over its tolerance; infinite where something is not a number.
    worst: f64,
    seconds: f64,
}

impl Check {
    pub(super) fn pass(&self) -> bool {
        self.worst <= 1.0
    }
    pub(super) fn line(&self) -> String {
        format!(
            "{}  {:<28} error {:>5.1} % of what rounding may cause",
            if self.pass() { "ok  " } else { "FAIL" },
            self.name,
            self.worst * 100.0,
        )
    }
    pub(super) fn json(&self) -> Value {
        json!({ "op": self.name, "error_over_tolerance": self.worst, "pass": self.pass(), "seconds": self.seconds })
    }
}

/// Leaves of a check: tensors with the numbers in them.
struct Leaves<'a> {
    session: &'a Session,
    made: Vec<(Tensor, Reference)>,
}

impl Leaves<'_> {
    fn f32(&mut self, shape: &[usize], role: Role) -> Result<Tensor> {
        let seed = self.made.len() as u32 + 3;
        let values = noise(shape.iter().product(), seed);
        let t = self.session.tensor(&values, shape, role)?;
        let data = values.into_iter().map(f64::from).collect();
        let ty = TensorType::f32(shape);
        self.made.push((t.clone(), Reference::new(ty, data)));
        Ok(t)
    }
    fn u32(&mut self, shape: &[usize], below: u32) -> Result<Tensor> {
        let n = shape.iter().product::<usize>() as u32;
        let values: Vec<u32> = (0..n).map(|i| i % below).collect();
        let t = self.session.tensor_u32(&values, shape, Role::Data)?;
        let data = values.into_iter().map(f64::from).collect();
        let ty = TensorType::u32(shape);
        self.made.push((t.clone(), Reference::new(ty, data)));
        Ok(t)
    }
}

/// A few ops, each through the whole compiler.
pub(super) fn checks(session: &Session) -> Result<Vec<Check>> {
    type Build = fn(&mut Leaves) -> Result<Vec<Tensor>>;
    let all: [(&'static str, Build); 5] = [
        ("linear with adapter", |l| {
            let x = l.f32(&[13, 96], Role::Data)?;
            let (w, a) = (
                l.f32(&[80, 96], Role::Frozen)?,
                l.f32(&[8, 96], Role::Frozen)?,
            );
            let b = l.f32(&[80, 8], Role::Frozen)?;
            Ok(vec![x.lora_linear(&w, &a, &b, 2.0)?])
        }),
        ("gradient of the adapter", |l| {
            let x = l.f32(&[13, 96], Role::Data)?;
            let (w, a) = (
                l.f32(&[80, 96], Role::Frozen)?,
                l.f32(&[8, 96], Role::State)?,
            );
            let b = l.f32(&[80, 8], Role::State)?;
            let y = x.lora_linear(&w, &a, &b, 2.0)?;
            let loss = y.mul(&y)?.sum_all()?;
            Ok(value_and_grad(&loss, &[&a, &b])?.grads)
        }),
        ("norm", |l| {
            let (x, w) = (l.f32(&[17, 192], Role::Data)?, l.f32(&[192], Role::Frozen)?);
            Ok(vec![x.rms_norm(&w, 1e-5)?])
        }),
        ("attention", |l| {
            let q = l.f32(&[2, 19, 4, 32], Role::Data)?;
            let (k, v) = (
                l.f32(&[2, 19, 2, 32], Role::Data)?,
                l.f32(&[2, 19, 2, 32], Role::Data)?,
            );
            let pos = l.u32(&[2, 19], 19)?;
            let mask = Mask::Causal { window: None };
            Ok(vec![q.attention(&k, &v, &pos, 0.18, mask)?])
        }),
        ("cross entropy", |l| {
            let (x, w) = (
                l.f32(&[11, 64], Role::Data)?,
                l.f32(&[301, 64], Role::Frozen)?,
            );
            let target = l.u32(&[11], 301)?;
            Ok(vec![x.cross_entropy(&w, &target)?])
        }),
    ];
    all.into_iter()
        .map(|(name, build)| check(session, name, build))
        .collect()
}

fn check(
    session: &Session,
    name: &'static str,
    build: impl FnOnce(&mut Leaves) -> Result<Vec<Tensor>>,
) -> Result<Check> {
    let start = Instant::now();
    let mut leaves = Leaves {
        session,
        made: vec![],
    };
    let outs = build(&mut leaves)?;
    let low = lower(&outs, &[])?;
    let raw = |t: &Tensor| t.buffer().map(|b| b.raw);
    let value = |leaf: &Tensor| {
        let found = leaves.made.iter().find(|(t, _)| raw(t) == raw(leaf));
        found.map(|(_, v)| v.clone())
    };
    let inputs: Vec<Reference> = low.leaves.iter().filter_map(value).collect();
    let want = eval_bounded(&low.graph, &inputs)?;
    let got = session.eval(&outs)?;
    let mut worst = 0.0_f64;
    for (got, want) in got.iter().zip(&want) {
        let wanted = want.value.data.iter().zip(want.tolerances());
        for (g, (w, tolerance)) in session.read(got)?.iter().zip(wanted) {
            let off = (f64::from(*g) - w).abs() / tolerance;
            worst = if off.is_nan() {
                f64::INFINITY
            } else {
                worst.max(off)
            };
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    tracing::info!("{name}: checked in {}", out::seconds(seconds));
    Ok(Check {
        name,
        worst,
        seconds,
    })
}
