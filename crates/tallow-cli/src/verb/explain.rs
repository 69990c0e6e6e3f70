//! `tallow explain`: the plan of a forward pass, a training step or a decoded token, step by step; or (`--shape`) every
//! kernel that could run one product, measured.
//! Invariant: nothing is hidden: what was decomposed for want of a kernel and what had to be copied is listed.
//! Absent on purpose: opinions. Estimates are the backend's; `--time` measures.
use crate::{
    Outcome,
    open::{self, Global, ModelArgs},
};
use anyhow::{Result, anyhow};
use std::{collections::BTreeMap, path::PathBuf};
use tallow::{
    Compiled, Role, Session, Tensor, TensorType,
    core::{
        backend::Launched,
        kernel::KernelSpec,
        pass::{canonical, expand::expand},
        tensor::lower,
    },
    llm::{Adapter, Cache, ComputeDType, Model, Targets},
    train::{Optimizer, OptimizerKind, StepGraph, Trained, sweep::MOST_RUNS},
};

mod shape;
mod show;

/// Timed replays, after one that warms up.
const TIMED: usize = 5;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Whose plan.
    #[arg(value_enum, required_unless_present = "shape")]
    what: Option<What>,
    /// One product instead, as in "128x512 @ 512x8": every kernel for it, predicted and measured. With --rank: of a
    /// LoRA forward.
    #[arg(long, value_name = "SHAPE", conflicts_with_all = ["what", "model", "adapter", "adapters", "tokens", "batch", "time"])]
    shape: Option<String>,
    /// Folder of the model: config.json, tokenizer.json, model.safetensors.
    #[arg(long, value_name = "DIR", required_unless_present = "shape")]
    model: Option<PathBuf>,
    /// Type of the weight matrices while computing: f32 or bf16.
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = open::dtype)]
    dtype: ComputeDType,
    /// Adapter folder, in PEFT's format.
    #[arg(long, value_name = "DIR", conflicts_with = "rank")]
    adapter: Option<PathBuf>,
    /// A fresh adapter of this rank on all projections [training: 8].
    #[arg(long, value_name = "N")]
    rank: Option<usize>,
    /// Of training: this many adapters side by side, each with its own rows.
    #[arg(long, value_name = "N", default_value_t = 1)]
    adapters: usize,
    /// Tokens of a row; for decode: room in the cache [default: 128].
    #[arg(long, value_name = "N", default_value_t = 128)]
    tokens: usize,
    /// Rows [default: 1; training: 4].
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Run it, and show the seconds of each step.
    #[arg(long)]
    time: bool,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// What is planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// Scores of every token of some rows.
    Forward,
    /// Loss, gradients, AdamW.
    Train,
    /// One token behind a cache.
    Decode,
}

/// Tensors to plan, and what to fill their inputs with before timing.
pub(super) struct Subject {
    pub(super) outs: Vec<Tensor>,
    pub(super) updates: Vec<(Tensor, Tensor)>,
    ints: Vec<(Tensor, Vec<u32>)>,
    floats: Vec<(Tensor, Vec<f32>)>,
}

/// What there is to show.
pub(super) struct Found {
    /// "train of llama, 4 x 128 tokens".
    title: String,
    compiled: Compiled,
    /// What a recording starts on the device, step by step.
    launched: Vec<Launched>,
    /// Composites without a kernel for these operands, and how often.
    decomposed: BTreeMap<String, usize>,
    /// Median seconds of each step.
    times: Option<Vec<f64>>,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    let (what, from) = match (&args.shape, args.what, &args.model) {
        (None, Some(what), Some(dir)) => (
            what,
            ModelArgs {
                model: dir.clone(),
                dtype: args.dtype,
            },
        ),
        (shape, ..) => return shape::run(shape.as_deref().unwrap_or_default(), args, global),
    };
    let model = from.load(global)?;
    let batch = args.batch.unwrap_or(match what {
        What::Train => 4,
        What::Forward | What::Decode => 1,
    });
    check(args, what, &model, batch)?;
    let adapter = adapter(args, what, &model)?;
    let adapter = adapter.as_ref();
    let (subject, shape) = match what {
        What::Forward => (
            forward(&model, adapter, [batch, args.tokens])?,
            format!("{batch} x {}", args.tokens),
        ),
        What::Train => (
            train(&model, adapter, args.adapters, [batch, args.tokens])?,
            match args.adapters {
                1 => format!("{batch} x {}", args.tokens),
                n => format!("{n} x {batch} x {}", args.tokens),
            },
        ),
        What::Decode => {
            let (subject, room) = decode(&model, adapter, args.tokens)?;
            (subject, format!("1 of {room}"))
        }
    };
    let s = &model.session;
    let outs: Vec<&Tensor> = subject.outs.iter().collect();
    let compiled = s.explain(&outs, &subject.updates)?;
    let found = Found {
        title: format!(
            "{} of {} on {}, {shape} tokens, {}, {}",
            format!("{what:?}").to_lowercase(),
            from.model.display(),
            s.backend().info().name,
            from.dtype.name(),
            match adapter {
                None => "no adapter".to_owned(),
                Some(a) => format!("{} modules adapted", a.modules().count()),
            },
        ),
        launched: s.backend().launched(&compiled.plan),
        compiled,
        decomposed: decomposed(s, &subject)?,
        times: match args.time {
            true => Some(time(s, &subject)?),
            false => None,
        },
    };
    match args.json {
        true => crate::out::json(&show::json(&found))?,
        false => show::lines(&found)?,
    }
    Ok(Outcome::Fine)
}

fn check(args: &Args, what: What, model: &Model, batch: usize) -> Result<()> {
    let most = model.config.max_positions;
    if args.tokens == 0 || args.tokens > most {
        let got = args.tokens;
        return Err(anyhow!(
            "--tokens: want 1 to {most}, the model's positions, got {got}"
        ));
    }
    let n = args.adapters;
    if n == 0 || n > MOST_RUNS || (what != What::Train && n > 1) {
        return Err(anyhow!(
            "--adapters: want 1 to {MOST_RUNS} (but for training exactly 1), got {n}"
        ));
    }
    if batch == 0 || (what == What::Decode && batch > 1) {
        return Err(anyhow!(
            "--batch: want 1 or more rows (decode: exactly 1), got {batch}"
        ));
    }
    Ok(())
}

fn adapter(args: &Args, what: What, model: &Model) -> Result<Option<Adapter>> {
    if let Some(dir) = &args.adapter {
        let role = match what {
            What::Train => Role::State,
            What::Forward | What::Decode => Role::Frozen,
        };
        return Ok(Some(Adapter::load(model, dir, role)?.0));
    }
    let rank = args.rank.or((what == What::Train).then_some(8));
    let Some(rank) = rank else {
        return Ok(None);
    };
    let config = open::fresh(rank, None, Targets::AllLinear)?;
    Ok(Some(Adapter::new(model, &config, 0)?))
}

fn iota([b, t]: [usize; 2]) -> Vec<u32> {
    (0..b).flat_map(|_| 0..t as u32).collect()
}

fn some_ids(model: &Model, n: usize) -> Vec<u32> {
    let vocab = model.config.vocab as u64;
    (0..n as u64).map(|i| (i * 7919 % vocab) as u32).collect()
}

pub(super) fn forward(
    model: &Model,
    adapter: Option<&Adapter>,
    [b, t]: [usize; 2],
) -> Result<Subject> {
    let leaf = || model.session.zeros(TensorType::u32([b, t]), Role::Data);
    let (ids, pos) = (leaf()?, leaf()?);
    let x = model.hidden(&ids, &pos, adapter, None)?.x;
    Ok(Subject {
        outs: vec![model.logits_with(&x, adapter)?],
        updates: vec![],
        ints: vec![(ids, some_ids(model, b * t)), (pos, iota([b, t]))],
        floats: vec![],
    })
}

/// A step of `count` adapters like `adapter`, over `b` rows of `t` tokens each.
pub(super) fn train(
    model: &Model,
    adapter: Option<&Adapter>,
    count: usize,
    [b, t]: [usize; 2],
) -> Result<Subject> {
    let first = adapter.ok_or_else(|| anyhow!("training needs an adapter; give --rank"))?;
    let mut adapters = vec![first.clone()];
    for seed in 1..count {
        adapters.push(Adapter::new(model, &first.config, seed as u64)?);
    }
    let optimizer = |a| Optimizer::new(&model.session, a, OptimizerKind::AdamW);
    let optimizers = adapters.iter().map(optimizer);
    let optimizers = optimizers.collect::<Result<Vec<_>, _>>()?;
    let trained = adapters.iter().zip(&optimizers);
    let trained = trained.map(|(adapter, optimizer)| Trained {
        adapter,
        optimizer,
        clip: Some(1.0),
    });
    let g = StepGraph::build(model, &trained.collect::<Vec<_>>(), [b, t])?;
    // Learning rate 0: timing changes no parameter.
    let hyper = [0.0, 0.9, 0.999, 1e-8, 0.0, 0.1, 0.0316, 1.0].repeat(2);
    let mut floats = vec![(g.inv_counts, vec![1.0 / (b * t) as f32; count])];
    floats.extend(optimizers.iter().map(|o| (o.hyper.clone(), hyper.clone())));
    let rows = count * b;
    Ok(Subject {
        outs: vec![g.losses, g.norms],
        updates: g.updates,
        ints: vec![
            (g.inputs.ids, some_ids(model, rows * t)),
            (g.inputs.pos, iota([rows, t])),
            (g.inputs.targets, some_ids(model, rows * t)),
        ],
        floats,
    })
}

/// One token at the end of a cache with room for `tokens`; also returns how many it has room for.
pub(super) fn decode(
    model: &Model,
    adapter: Option<&Adapter>,
    tokens: usize,
) -> Result<(Subject, usize)> {
    let cache = Cache::new(model, tokens)?;
    let leaf = || model.session.zeros(TensorType::u32([1, 1]), Role::Data);
    let (ids, pos) = (leaf()?, leaf()?);
    let hidden = model.hidden(&ids, &pos, adapter, Some(&cache))?;
    let x = hidden.x.reshape([1, model.config.hidden])?;
    let subject = Subject {
        outs: vec![model.logits_with(&x, adapter)?],
        updates: hidden.updates,
        ints: vec![(ids, vec![0]), (pos, vec![tokens as u32 - 1])],
        floats: vec![],
    };
    Ok((subject, cache.capacity()))
}

/// Composites that the backend has no kernel for, where they stand.
fn decomposed(s: &Session, subject: &Subject) -> Result<BTreeMap<String, usize>> {
    let graph = lower(&subject.outs, &subject.updates)?.graph;
    let mut found = BTreeMap::new();
    expand(&canonical(&graph)?.0, |c| {
        let spec = KernelSpec::composite(c.op, c.ins, c.frozen, c.live)?;
        let kept = !s.backend().candidates(&spec)?.is_empty();
        if !kept {
            let name = format!("{} {}", c.op.name(), spec.signature());
            *found.entry(name).or_default() += 1;
        }
        Ok(kept)
    })?;
    Ok(found)
}

/// Median seconds of each step.
fn time(s: &Session, subject: &Subject) -> Result<Vec<f64>> {
    for (leaf, values) in &subject.ints {
        s.write_u32(leaf, values)?;
    }
    for (leaf, values) in &subject.floats {
        s.write(leaf, values)?;
    }
    let outs: Vec<&Tensor> = subject.outs.iter().collect();
    let mut program = s.record(&outs, &subject.updates)?;
    program.replay()?;
    let mut runs = vec![];
    for _ in 0..TIMED {
        runs.push(program.replay_timed()?);
    }
    let median = |i: usize| {
        let mut of: Vec<f64> = runs.iter().map(|r| r[i]).collect();
        of.sort_by(f64::total_cmp);
        of[of.len() / 2]
    };
    Ok((0..runs[0].len()).map(median).collect())
}
