//! The adapter tax: forward, decode and a training step without and with rank-8 adapters on all seven projections; what
//! DoRA and computing layers again cost a step on top.
//! Invariant: the two take turns, who begins changes every round, every result is read, and ratios are taken inside a
//! round; the sides are shown to compute different things (or, where they must, the same).
//! Absent on purpose: peers (`peers/`) and judgement. The floor printed is arithmetic, not a measurement.
//!
//! `cargo bench -p tallow-llm --bench tax [-- --rounds N] [--only forward|decode|train|dora|recompute] [--dtype bf16]`

use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};
use safetensors::tensor::{Dtype, TensorView};
use tallow_core::op::Role;
use tallow_core::session::{Program, Session};
use tallow_core::tensor::{Tensor, value_and_grad};
use tallow_core::types::{DType, TensorType};
use tallow_cpu::{Cpu, CpuOptions};
use tallow_llm::{
    Adapter, AdapterConfig, Decoder, LoadOptions, Model, ModelConfig, Targets, weights,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Rank and alpha of the adapters.
const RANK: usize = 8;
const ALPHA: f64 = 16.0;
/// Tokens of a forward pass.
const FORWARD: usize = 512;
/// Decode: tokens before, tokens timed; the middle one is at position 64.
const PROMPT: usize = 32;
const DECODED: usize = 64;
/// Rows and tokens a row of a training step.
const BATCH: [usize; 2] = [4, 128];

fn main() -> Result<()> {
    let rounds = argument("--rounds")?.unwrap_or(41);
    let files = tempfile::tempdir()?;
    write_model(files.path())?;
    let dtype = argument::<String>("--dtype")?.unwrap_or_else(|| "f32".into());
    let cpu = Cpu::open(&CpuOptions {
        threads: None,
        weights: match dtype.as_str() {
            "f32" => DType::F32,
            "bf16" => DType::BF16,
            other => return Err(format!("--dtype {other}: f32 or bf16").into()),
        },
        isa: None,
    })?;
    println!("{}", machine(&cpu));
    let session = Session::new(Arc::new(cpu));
    let model = Model::load(&session, files.path(), &LoadOptions::default())?;
    println!(
        "hidden 256, 6 layers, 8 heads (4 kv), MLP 688, vocab 4096, {dtype}; rank {RANK} on all seven"
    );
    let extra = floor(&model.config);
    println!(
        "floor: {:.4} of the bare weights, in bytes and in multiply-adds",
        1.0 + extra
    );
    let seven = frozen(&model, &files.path().join("frozen"))?;
    let only: Option<String> = argument("--only")?;
    let wanted = |name: &str| only.as_deref().is_none_or(|only| only == name);
    if wanted("forward") {
        forward(&model, &seven, rounds)?;
    }
    if wanted("decode") {
        decode(&model, &seven, rounds)?;
    }
    if wanted("train") {
        train(&model, rounds)?;
    }
    if wanted("dora") {
        dora(&model, rounds)?;
    }
    if wanted("recompute") {
        recompute(&model, rounds)?;
    }
    Ok(())
}

/// Nats a token of a pass over [`FORWARD`] tokens, output projection included.
fn forward(model: &Model, adapter: &Adapter, rounds: usize) -> Result<()> {
    let all = random_ids(model, FORWARD + 1, 3);
    let mut sides = [None, Some(adapter)]
        .into_iter()
        .map(|adapter| {
            let data = |v: &[u32]| model.session.tensor_u32(v, [1, FORWARD], Role::Data);
            let pos: Vec<u32> = (0..FORWARD as u32).collect();
            let x = model
                .hidden(&data(&all[..FORWARD])?, &data(&pos)?, adapter, None)?
                .x;
            let nll = model.nll(&x, &data(&all[1..])?)?;
            Ok((model.session.record(&[&nll], &[])?, vec![f32::NAN; FORWARD]))
        })
        .collect::<Result<Vec<(Program, Vec<f32>)>>>()?;
    let times = interleaved(rounds, |side| {
        let (program, nll) = &mut sides[side];
        let start = Instant::now();
        program.replay()?;
        model.session.read_into(&program.outputs[0], nll)?;
        Ok(start.elapsed().as_secs_f64())
    })?;
    differ(&sides[0].1, &sides[1].1)?;
    show(
        &format!("forward of {FORWARD} tokens"),
        ["bare", "adapted"],
        &times,
    );
    Ok(())
}

/// Seconds a token over [`DECODED`] tokens behind a prompt, each fed when the one before it is read. The sides take turns
/// token by token, and a round's figure is its median token: a moment that the machine spends elsewhere is nobody's.
fn decode(model: &Model, adapter: &Adapter, rounds: usize) -> Result<()> {
    let ids = random_ids(model, PROMPT + DECODED, 4);
    let mut sides = [None, Some(adapter)]
        .into_iter()
        .map(|adapter| Ok((Decoder::new(model, adapter, ids.len())?, Vec::new())))
        .collect::<Result<Vec<(Decoder, Vec<f32>)>>>()?;
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..=rounds {
        for (decoder, _) in &mut sides {
            decoder.reset();
            decoder.feed(&ids[..PROMPT])?;
        }
        let mut tokens = [Vec::new(), Vec::new()];
        for (i, id) in ids[PROMPT..].iter().enumerate() {
            for turn in 0..2 {
                let side = (round + i + turn) % 2;
                let (decoder, logits) = &mut sides[side];
                let start = Instant::now();
                let scores = decoder.feed(&[*id])?;
                logits.clear();
                logits.extend_from_slice(scores);
                tokens[side].push(start.elapsed().as_secs_f64());
            }
        }
        for (times, tokens) in times.iter_mut().zip(&tokens) {
            times.extend((round > 0).then(|| percentiles(tokens)[1]));
        }
    }
    differ(&sides[0].1, &sides[1].1)?;
    let what = format!("decode of a token around position {}", PROMPT + DECODED / 2);
    show(&what, ["bare", "adapted"], &times);
    Ok(())
}

/// An optimizer step over all seven, against one that has to go back through the whole model for next to nothing:
/// rank 1 on q of the first layer.
fn train(model: &Model, rounds: usize) -> Result<()> {
    let least = AdapterConfig {
        layers: Some(vec![0]),
        ..AdapterConfig::new(1, 1.0, Targets::Names(vec!["q_proj".to_owned()]))
    };
    let sides = [Side::new(model, &least)?, Side::new(model, &all_seven())?];
    let names = ["forward and input gradients", "all seven"];
    let [bare, seven] = steps(names, sides, rounds.div_ceil(2))?;
    differ(&[bare.loss], &[seven.loss])
}

/// A step of DoRA over one of LoRA, both over all seven.
fn dora(model: &Model, rounds: usize) -> Result<()> {
    let mut config = all_seven();
    let lora = Side::new(model, &config)?;
    config.use_dora = true;
    let [lora, dora] = steps(["LoRA", "DoRA"], [lora, Side::new(model, &config)?], rounds)?;
    differ(&[lora.loss], &[dora.loss])
}

/// A step that computes layers again in its backward pass over one that keeps them, and what each takes: planned, and
/// by how much the process grew.
fn recompute(model: &Model, rounds: usize) -> Result<()> {
    let mut again = model.clone();
    again.recompute = true;
    // What all recordings share is there before either is measured.
    drop(Side::new(model, &all_seven())?);
    let sides = [
        Side::new(model, &all_seven())?,
        Side::new(&again, &all_seven())?,
    ];
    let names = ["layers kept", "layers computed again"];
    let sides = steps(names, sides, rounds)?;
    for (name, side) in names.iter().zip(&sides) {
        let memory = side.program.compiled.plan.memory();
        let own = memory.arena + memory.state + memory.data + memory.outputs;
        let [arena, own] = [memory.arena, own].map(|b| b as f64 / f64::from(1 << 20));
        let grew = side.grew_bytes.map(|b| b / f64::from(1 << 20));
        let grew = grew.map_or("?".to_owned(), |g| format!("{g:.1}"));
        println!(
            "  {name:<28} {arena:.1} MiB of intermediates, {own:.1} with state; the process grew by {grew} MiB"
        );
    }
    match sides[0].loss.to_bits() == sides[1].loss.to_bits() {
        true => Ok(()),
        false => Err(format!("INVALID: {} is not {}", sides[0].loss, sides[1].loss).into()),
    }
}

/// A training step, and what became of it.
struct Side {
    program: Program,
    session: Session,
    loss: f32,
    /// By how much memory grew when it was made and first run.
    grew_bytes: Option<f64>,
}

impl Side {
    fn new(model: &Model, config: &AdapterConfig) -> Result<Self> {
        let before = resident_bytes();
        let mut side = Side {
            program: training_step(model, &trainable(model, config)?)?,
            session: model.session.clone(),
            loss: f32::NAN,
            grew_bytes: None,
        };
        side.run()?;
        side.grew_bytes = resident_bytes().zip(before).map(|(now, then)| now - then);
        Ok(side)
    }

    /// Seconds of a step.
    fn run(&mut self) -> Result<f64> {
        let start = Instant::now();
        self.program.replay()?;
        let loss = std::slice::from_mut(&mut self.loss);
        self.session.read_into(&self.program.outputs[0], loss)?;
        Ok(start.elapsed().as_secs_f64())
    }
}

/// Times two kinds of step.
fn steps(names: [&str; 2], mut sides: [Side; 2], rounds: usize) -> Result<[Side; 2]> {
    let times = interleaved(rounds, |side| sides[side].run())?;
    let what = format!("training step of {} x {} tokens", BATCH[0], BATCH[1]);
    show(&what, names, &times);
    Ok(sides)
}

/// An adapter to train whose `B` is not zero.
fn trainable(model: &Model, config: &AdapterConfig) -> Result<Adapter> {
    let adapter = Adapter::new(model, config, 1)?;
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for (name, part) in adapter.parts()? {
        if name.contains("lora_B") {
            let values: Vec<f32> = (0..part.shape().numel())
                .map(|_| 0.02 * symmetric(&mut rng))
                .collect();
            adapter.set(&model.session, &name, &values)?;
        }
    }
    Ok(adapter)
}

/// Memory this process has now, where the system says so.
fn resident_bytes() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024.0)
}

/// Forward, backward and AdamW as one recording; its output is the loss a token.
fn training_step(model: &Model, adapter: &Adapter) -> Result<Program> {
    let s = &model.session;
    let [b, t] = BATCH;
    let ids = random_ids(model, b * t + 1, 5);
    let pos: Vec<u32> = (0..b).flat_map(|_| 0..t as u32).collect();
    let data = |v: &[u32]| s.tensor_u32(v, [b, t], Role::Data);
    let x = model
        .hidden(&data(&ids[..b * t])?, &data(&pos)?, Some(adapter), None)?
        .x;
    let loss = model.nll(&x, &data(&ids[1..])?)?.mean_all()?;
    let parts = adapter.parts()?;
    let made = value_and_grad(&loss, &parts.iter().map(|p| &p.1).collect::<Vec<_>>())?;
    let flat = made.grads.iter().map(|g| g.reshape([g.shape().numel()]));
    let flat = flat.collect::<std::result::Result<Vec<_>, _>>()?;
    let grad = Tensor::concat(0, &flat.iter().collect::<Vec<_>>())?;
    let zeros = || s.zeros(adapter.params.ty().clone(), Role::State);
    let (m, v) = (zeros()?, zeros()?);
    // Bias corrections of a step far from the first.
    let hyper = s.zeros(TensorType::f32([8]), Role::Data)?;
    s.write(&hyper, &[1e-5, 0.9, 0.999, 1e-8, 0.01, 1.0, 1.0, 1.0])?;
    let [p1, m1, v1] = adapter.params.adamw(&grad, &m, &v, &hyper)?;
    let updates = [(adapter.params.clone(), p1), (m, m1), (v, v1)];
    Ok(s.record(&[&made.loss], &updates)?)
}

/// Seconds of both sides, one entry a round; the first round warms up and is not kept.
fn interleaved(rounds: usize, mut run: impl FnMut(usize) -> Result<f64>) -> Result<[Vec<f64>; 2]> {
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..=rounds {
        for turn in 0..2 {
            let side = (round + turn) % 2;
            let seconds = run(side)?;
            if round > 0 {
                times[side].push(seconds);
            }
        }
    }
    Ok(times)
}

fn show(what: &str, names: [&str; 2], times: &[Vec<f64>; 2]) {
    println!("{what}");
    for (name, times) in names.iter().zip(times) {
        let [p10, median, p90] = percentiles(times).map(|s| s * 1e3);
        println!("  {name:<28} {median:>8.3} ms  ({p10:.3} - {p90:.3})");
    }
    let ratios: Vec<f64> = times[1].iter().zip(&times[0]).map(|(a, b)| a / b).collect();
    let [p10, median, p90] = percentiles(&ratios);
    println!(
        "  {:<28} {median:>8.3}     ({p10:.3} - {p90:.3})",
        "ratio, round by round"
    );
}

/// The 10th, 50th and 90th percentile; the nearest measurement, none in between.
fn percentiles(samples: &[f64]) -> [f64; 3] {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    [0.1, 0.5, 0.9].map(|q| {
        let place = (q * sorted.len().saturating_sub(1) as f64).round() as usize;
        sorted.get(place).copied().unwrap_or(f64::NAN)
    })
}

/// An adapter that changes nothing has not run.
fn differ(bare: &[f32], adapted: &[f32]) -> Result<()> {
    let apart = bare.iter().zip(adapted).map(|(a, b)| (a - b).abs());
    let most = apart.fold(0.0, f32::max);
    match bare.iter().chain(adapted).all(|v| v.is_finite()) && most > 1e-4 {
        true => Ok(()),
        false => Err(format!("INVALID: results are not finite, or the same ({most:e})").into()),
    }
}

/// Weights of the adapter at exact rank over those that a token reads without it.
fn floor(config: &ModelConfig) -> f64 {
    let (mut bare, mut extra) = (config.vocab * config.hidden, 0);
    for p in config.projections().values() {
        bare += p.n * p.k;
        extra += RANK * (p.n + p.k);
    }
    extra as f64 / bare as f64
}

fn all_seven() -> AdapterConfig {
    AdapterConfig::new(RANK, ALPHA, Targets::AllLinear)
}

/// An adapter to run whose `B` is not zero, through its files like any other.
fn frozen(model: &Model, dir: &Path) -> Result<Adapter> {
    trainable(model, &all_seven())?.save(model, dir, "bench")?;
    Ok(Adapter::load(model, dir, Role::Frozen)?.0)
}

/// A Llama of the facts' size with seeded weights.
fn write_model(dir: &Path) -> Result<()> {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 32, "intermediate_size": 688, "vocab_size": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": false,
        "attention_bias": false, "mlp_bias": false, "torch_dtype": "float32",
        "bos_token_id": 0, "eos_token_id": 1,
    });
    fs::write(dir.join("config.json"), serde_json::to_vec_pretty(&config)?)?;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, shape) in weights::expected(&ModelConfig::read(dir)?) {
        let mean = if shape.len() == 1 { 1.0 } else { 0.0 };
        let value = |_| (mean + 0.035 * symmetric(&mut rng)).to_le_bytes();
        let bytes = (0..shape.iter().product()).flat_map(value).collect();
        tensors.push((name, shape, bytes));
    }
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<HashMap<_, _>>>()?;
    fs::write(
        dir.join("model.safetensors"),
        safetensors::serialize(views, None)?,
    )?;
    Ok(())
}

/// Uniform in (-1, 1).
fn symmetric(rng: &mut ChaCha8Rng) -> f32 {
    rng.next_u32() as f32 / u32::MAX as f32 * 2.0 - 1.0
}

fn random_ids(model: &Model, n: usize, seed: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n)
        .map(|_| rng.next_u32() % model.config.vocab as u32)
        .collect()
}

/// The processor's name, its instructions, the threads used.
fn machine(cpu: &Cpu) -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(':'))
        .map_or("unknown processor", |(_, name)| name.trim());
    format!("{model}, {}, {} threads", cpu.isa().name(), cpu.threads())
}

/// Value of `--name` on the command line.
fn argument<T: FromStr<Err: Error + 'static>>(name: &str) -> Result<Option<T>> {
    let mut args = std::env::args().skip_while(|a| a != name).skip(1);
    Ok(args.next().map(|v| v.parse()).transpose()?)
}
