//! Adapters side by side against one adapter, and against one after another: the price of a sweep.
//! `cargo bench -p tallow-train --bench sweep -- [--rounds N] [--threads N] [--model DIR]`, on the built-in model where
//! no other is given.
//! Invariant: the three take turns step by step over the same batches; a ratio is the median of its rounds'.
//! Absent on purpose: absolute claims; times are printed so that ratios can be checked.
use std::{path::Path, sync::Arc, time::Instant};
use tallow_core::{session::Session, types::DType};
use tallow_cpu::{Cpu, CpuOptions};
use tallow_llm::{Adapter, AdapterConfig, LoadOptions, Model, Targets, data::LossOn};
use tallow_train::{Batch, OptimizerKind, Schedule, TrainConfig, Trainer, Turn};

/// Adapters, as the claim has it.
const ADAPTERS: usize = 8;

type Failed = Box<dyn std::error::Error>;

fn settings(batch: usize) -> TrainConfig {
    TrainConfig {
        steps: None,
        epochs: 1.0,
        batch,
        accumulate: 1,
        seq_len: 2,
        packing: false,
        loss_on: LossOn::Everything,
        optimizer: OptimizerKind::AdamW,
        lr: 1e-3,
        schedule: Schedule::Constant,
        warmup: 0,
        weight_decay: 0.01,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        clip: Some(1.0),
        seed: 0,
        eval_every: None,
        patience: None,
        checkpoint_layers: false,
        skip_nonfinite: false,
    }
}

/// `b` rows of `t` inputs.
fn batch(model: &Model, [b, t]: [usize; 2], seed: usize) -> Result<Batch, Failed> {
    let id = |i: usize| ((i + seed * 31) * 7919 % model.config.vocab) as u32;
    let rows: Vec<Vec<u32>> = (0..b)
        .map(|r| (0..=t).map(|i| id(r * t + i)).collect())
        .collect();
    let mut batch = Batch::default();
    batch.fill([b, t], rows.iter().map(Vec::as_slice))?;
    Ok(batch)
}

/// What is compared, at one number of rows and tokens for each adapter.
struct Bench {
    one: Trainer,
    whole: Batch,
    beside: Trainer,
    alone: Vec<Trainer>,
    parts: Vec<Batch>,
}

impl Bench {
    fn new(model: &Model, [b, t]: [usize; 2]) -> Result<Self, Failed> {
        let config = AdapterConfig::new(8, 16.0, Targets::AllLinear);
        let adapters = |n: usize| -> Result<Vec<Adapter>, Failed> {
            let make = |i| Ok(Adapter::new(model, &config, i as u64)?);
            (0..n).map(make).collect()
        };
        let (own, all) = (settings(b), adapters(ADAPTERS)?);
        let members: Vec<_> = all.iter().map(|a| (a, &own)).collect();
        let alone = adapters(ADAPTERS)?.into_iter();
        let parts = (0..ADAPTERS).map(|i| batch(model, [b, t], i));
        Ok(Bench {
            one: Trainer::new(model, &adapters(1)?[0], &settings(b * ADAPTERS))?,
            whole: batch(model, [b * ADAPTERS, t], 99)?,
            beside: Trainer::side_by_side(model, &members)?,
            alone: alone
                .map(|a| Ok(Trainer::new(model, &a, &own)?))
                .collect::<Result<_, Failed>>()?,
            parts: parts.collect::<Result<_, Failed>>()?,
        })
    }

    /// Seconds of one adapter over all rows, of all side by side, of one after another.
    fn round(&mut self) -> Result<[f64; 3], Failed> {
        let timed = |f: &mut dyn FnMut() -> Result<(), Failed>| -> Result<f64, Failed> {
            let start = Instant::now();
            f()?;
            Ok(start.elapsed().as_secs_f64())
        };
        let whole = std::slice::from_ref(&self.whole);
        let one = timed(&mut || Ok(self.one.step(whole, 1e-3).map(drop)?))?;
        let turn = |b| {
            let batches = std::slice::from_ref(b);
            Some(Turn { batches, lr: 1e-3 })
        };
        let turns: Vec<_> = self.parts.iter().map(turn).collect();
        let beside = timed(&mut || Ok(self.beside.step_all(&turns).map(drop)?))?;
        let alone = timed(&mut || {
            for (trainer, b) in self.alone.iter_mut().zip(&self.parts) {
                trainer.step(std::slice::from_ref(b), 1e-3)?;
            }
            Ok(())
        })?;
        Ok([one, beside, alone])
    }
}

/// The value that a share `p` of sorted values is below.
fn percentile(sorted: &[f64], p: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * p).round() as usize]
}

fn show(name: &str, mut values: Vec<f64>) {
    values.sort_by(f64::total_cmp);
    let [low, mid, high] = [0.1, 0.5, 0.9].map(|p| percentile(&values, p));
    println!("  {name:44} {mid:.3} (p10 {low:.3}, p90 {high:.3})");
}

fn main() -> Result<(), Failed> {
    let args: Vec<String> = std::env::args().collect();
    let text = |name: &str| {
        let at = args.iter().position(|a| a == name)?;
        args.get(at + 1)
    };
    let given = |name: &str| text(name)?.parse::<usize>().ok();
    let options = CpuOptions {
        threads: given("--threads"),
        weights: DType::F32,
        isa: None,
    };
    let rounds = given("--rounds").unwrap_or(30);
    let session = Session::new(Arc::new(Cpu::open(&options)?));
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny");
    let dir = text("--model").map_or(tiny.as_path(), Path::new);
    let model = Model::load(&session, dir, &LoadOptions::default())?;
    println!("{}, {rounds} rounds", session.backend().info().name);
    for shape in [[1, 16], [1, 32], [1, 64], [1, 128], [4, 128]] {
        let mut bench = Bench::new(&model, shape)?;
        for _ in 0..3 {
            bench.round()?;
        }
        let mut all = vec![];
        for _ in 0..rounds {
            all.push(bench.round()?);
        }
        let [b, t] = shape;
        println!("{ADAPTERS} adapters, {b} x {t} tokens each");
        for (i, name) in [
            "one adapter, all rows, ms",
            "side by side, ms",
            "one after another, ms",
        ]
        .into_iter()
        .enumerate()
        {
            show(name, all.iter().map(|r| r[i] * 1e3).collect());
        }
        show(
            "a token side by side / of one adapter",
            all.iter().map(|r| r[1] / r[0]).collect(),
        );
        show(
            "one after another / side by side",
            all.iter().map(|r| r[2] / r[1]).collect(),
        );
    }
    Ok(())
}
