//! Whole models as works: a forward pass, a prompt, a decoded token, a training step; and the suites `train` and `decode`.
//! Invariant: what runs is what `tallow generate` and `tallow train` run: the same graphs, caches and updates.
//! Models up to [`ORACLE_MOST`] weights are judged by the f64 oracle; larger ones by kernels that share no arithmetic with
//! those under the clock, and the check says so: on the processor by the portable ones on one thread, on any other device by the processor's.

use std::path::Path;

use tallow::cpu::simd::Isa;
use tallow::cpu::{Cpu, CpuOptions};
use tallow::llm::{
    Adapter, AdapterConfig, Cache, ComputeDType, LoadOptions, LoraModule, Model, ModelConfig,
    Targets, peft,
};
use tallow::train::{Optimizer, OptimizerKind, StepGraph, Trained};
use tallow::{DType, Role, Session, TensorType};

use super::{Context, Suite, Task};
use crate::ours::{Again, Fill, Join, Operands, Ours, Reference, Subject};
use crate::peer::{Job, ModelJob};
use crate::probe::Cost;
use crate::work::Judge;
use crate::{Error, Result};

/// Most weights of a model that the oracle can be asked about.
pub const ORACLE_MOST: usize = 20_000_000;
/// Where decoding is timed: the position of the token.
pub const POSITION: usize = 64;
/// Tokens of a prompt.
pub const PROMPT: usize = 128;

/// Of the results and states of a training step of one adapter those that other engines give: loss, norm of the gradient, and
/// the first moments, which show that the optimizer ran. The parameters themselves move by less than tolerances allow.
pub const TRAINED: [usize; 3] = [0, 1, 3];

/// What a model does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// Loss of every token, over rows and tokens a row.
    Forward([usize; 2]),
    /// [`PROMPT`] tokens into an empty cache, and the scores of the next.
    Prefill,
    /// One token at [`POSITION`].
    Decode,
    /// Loss, gradients, AdamW over rows and tokens a row.
    Train([usize; 2]),
    /// The same, with layers computed again on the way back.
    TrainAgain([usize; 2]),
}

impl Doing {
    /// Tokens of one repetition.
    #[must_use]
    pub fn tokens(self) -> usize {
        match self {
            Doing::Prefill => PROMPT,
            Doing::Decode => 1,
            Doing::Forward([b, t]) | Doing::Train([b, t]) | Doing::TrainAgain([b, t]) => b * t,
        }
    }
}

impl std::fmt::Display for Doing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Doing::Forward([b, t]) => write!(f, "forward of {b}x{t} tokens"),
            Doing::Prefill => write!(f, "prompt of {PROMPT} tokens"),
            Doing::Decode => write!(f, "decode of the token at {POSITION}"),
            Doing::Train([b, t]) => write!(f, "training step of {b}x{t} tokens"),
            Doing::TrainAgain([b, t]) => {
                write!(f, "training step of {b}x{t} tokens, layers computed again")
            }
        }
    }
}

/// An adapter to measure.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapted {
    /// Rank.
    pub rank: usize,
    /// Names of projections; empty: all seven.
    pub names: &'static [&'static str],
    /// Only the first layer.
    pub first_layer: bool,
    /// So many adapters side by side, each with an equal part of the rows.
    pub count: usize,
    /// Weight-decomposed.
    pub dora: bool,
}

impl Adapted {
    /// All seven projections of every layer.
    #[must_use]
    pub const fn seven(rank: usize) -> Self {
        Adapted {
            rank,
            names: &[],
            first_layer: false,
            count: 1,
            dora: false,
        }
    }

    fn config(&self) -> AdapterConfig {
        let targets = match self.names {
            [] => Targets::AllLinear,
            names => Targets::Names(names.iter().map(|n| (*n).to_owned()).collect()),
        };
        AdapterConfig {
            layers: self.first_layer.then(|| vec![0]),
            use_dora: self.dora,
            ..AdapterConfig::new(self.rank, 2.0 * self.rank as f64, targets)
        }
    }

    /// All of them: fresh ones to train; to run, ones whose `B` is not zero, through their files like any other.
    fn load(&self, model: &Model, role: Role) -> Result<Vec<Adapter>> {
        let one = |seed: u64| match role {
            Role::State => Ok(Adapter::new(model, &self.config(), seed)?),
            _ => self.read(model, seed),
        };
        (1..=self.count as u64).map(one).collect()
    }

    fn read(&self, model: &Model, seed: u64) -> Result<Adapter> {
        let dir = tempfile::tempdir().map_err(|source| Error::Io {
            path: std::env::temp_dir(),
            source,
        })?;
        self.write(&model.config, seed, dir.path())?;
        Ok(Adapter::load(model, dir.path(), Role::Frozen)?.0)
    }

    /// The adapter of `seed` for a model, as PEFT's files; its modules, in the order in which an adapter's parameters lie.
    ///
    /// # Errors
    /// A full disk.
    pub fn write(&self, model: &ModelConfig, seed: u64, dir: &Path) -> Result<Vec<Part>> {
        let mut made = peft::Adapter::init(self.config(), &model.projections(), seed)?;
        let mut rng = fastrand::Rng::with_seed(seed + 1);
        for module in &mut made.modules {
            // Large enough that a result without it is outside every tolerance.
            module.b.fill_with(|| 0.06 * (2.0 * rng.f32() - 1.0));
        }
        made.write(dir)?;
        let part = |m: &LoraModule| Part {
            module: m.module.clone(),
            rank: m.rank,
            n: m.projection.n,
            k: m.projection.k,
        };
        Ok(made.modules.iter().map(part).collect())
    }
}

/// One adapted projection: `A [rank, k]`, then `B [n, rank]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// "model.layers.0.self_attn.q_proj".
    pub module: String,
    /// Rank.
    pub rank: usize,
    /// Values out.
    pub n: usize,
    /// Values in.
    pub k: usize,
}

fn load(session: &Session, dir: &Path, dtype: DType) -> Result<Model> {
    let dtype = match dtype {
        DType::BF16 => ComputeDType::BF16,
        _ => ComputeDType::F32,
    };
    Ok(Model::load(session, dir, &LoadOptions { dtype })?)
}

/// Weights that every token is multiplied with.
fn weights(model: &Model) -> usize {
    let c = &model.config;
    let layers: usize = c.projections().values().map(|p| p.n * p.k).sum();
    layers + c.vocab * c.hidden
}

/// A work of the model in `dir`, and its cost.
///
/// # Errors
/// A model that cannot be read; no memory.
pub fn work(
    session: &Session,
    dir: &Path,
    dtype: DType,
    doing: Doing,
    adapted: Option<&Adapted>,
) -> Result<(Ours, Cost)> {
    let mut model = load(session, dir, dtype)?;
    model.recompute = matches!(doing, Doing::TrainAgain(_));
    let role = match doing {
        Doing::Train(_) | Doing::TrainAgain(_) => Role::State,
        _ => Role::Frozen,
    };
    let adapters = match adapted {
        Some(a) => a.load(&model, role)?,
        None => vec![],
    };
    let extra = adapters.iter().map(Adapter::elems).sum();
    let size = Size {
        base: weights(&model),
        extra,
        count: adapters.len().max(1),
    };
    let base = size.base;
    let mut o = Operands::new(session, 21);
    let mut subject = match doing {
        Doing::Forward(shape) => forward(&mut o, &model, &adapters, shape)?,
        Doing::Prefill => cached(&mut o, &model, alone(adapters)?, 0, PROMPT)?,
        Doing::Decode => cached(&mut o, &model, alone(adapters)?, POSITION, 1)?,
        Doing::Train(shape) | Doing::TrainAgain(shape) => {
            training(&mut o, &model, &adapters, shape)?
        }
    };
    if base > ORACLE_MOST {
        let (dir, adapted) = (dir.to_owned(), adapted.cloned());
        let judge = match session.backend().far() {
            true => Judge::Processor,
            false => Judge::Portable,
        };
        let twin = move || {
            let other = kernels_of(judge, dtype)?;
            Ok(self::work(&other, &dir, dtype, doing, adapted.as_ref())?.0)
        };
        subject.reference = Reference::Twin(judge, Box::new(twin));
    }
    let cost = cost(&model, dtype, doing, &size);
    let ours = Ours::new(o, subject)?.over(model.config.layers);
    Ok(match dtype {
        DType::BF16 if session.backend().far() => (ours.all_in_half(), cost),
        DType::BF16 => (ours.in_half(), cost),
        _ => (ours, cost),
    })
}

/// The adapter of a cache, which has one sequence.
fn alone(mut adapters: Vec<Adapter>) -> Result<Option<Adapter>> {
    match adapters.len() {
        0 | 1 => Ok(adapters.pop()),
        n => Err(Error::Setting {
            name: "adapters behind a cache",
            want: "at most one",
            got: n.to_string(),
        }),
    }
}

/// Weights that every token meets, parameters of all adapters, and how many adapters share the rows.
struct Size {
    base: usize,
    extra: usize,
    count: usize,
}

/// Bytes and arithmetic from the weights alone: attention, norms and caches come on top and are left out.
fn cost(model: &Model, dtype: DType, doing: Doing, size: &Size) -> Cost {
    let Size { base, extra, count } = *size;
    let head = model.config.vocab * model.config.hidden;
    let t = doing.tokens() as f64;
    // A token meets one adapter.
    let own = extra as f64 / count as f64;
    let all = base as f64 + own;
    let flops = match doing {
        Doing::Forward(_) | Doing::Decode => 2.0 * t * all,
        // Scores of the last token only.
        Doing::Prefill => 2.0 * (t * (all - head as f64) + head as f64),
        // Forward and the gradient of the inputs; of the adapter's weights as well.
        Doing::Train(_) => 2.0 * t * (2.0 * all + own),
        // All but the output projection once more.
        Doing::TrainAgain(_) => 2.0 * t * (3.0 * all + own - head as f64),
    };
    let parameters = match doing {
        Doing::Train(_) | Doing::TrainAgain(_) => 7 * 4 * extra,
        _ => 4 * extra,
    };
    Cost {
        bytes: base * dtype.bytes() + parameters,
        flops,
        dtype,
    }
}

fn kernels_of(judge: Judge, dtype: DType) -> Result<Session> {
    let (threads, isa) = match judge {
        Judge::Processor => (None, None),
        _ => (Some(1), Some(Isa::Portable)),
    };
    let cpu = Cpu::open(&CpuOptions {
        threads,
        weights: dtype,
        isa,
    })?;
    Ok(Session::new(std::sync::Arc::new(cpu)))
}

fn forward(
    o: &mut Operands<'_>,
    model: &Model,
    adapters: &[Adapter],
    shape: [usize; 2],
) -> Result<Subject> {
    let ids = Fill::Below(model.config.vocab as u32);
    let x = o.data(TensorType::u32(shape), ids.clone())?;
    let targets = o.data(TensorType::u32(shape), ids)?;
    let pos = o.data(TensorType::u32(shape), Fill::Positions)?;
    let hidden = model.hidden(&x, &pos, adapters, None)?;
    let nll = model.nll(&hidden.x, &targets)?;
    Ok(subject(x, Box::new(move |_| Ok(vec![nll.clone()])), vec![]))
}

/// `rows` tokens from position `from` on, behind a cache that holds random keys and values.
fn cached(
    o: &mut Operands<'_>,
    model: &Model,
    adapter: Option<Adapter>,
    from: usize,
    rows: usize,
) -> Result<Subject> {
    let cache = Cache::new(model, from + rows)?;
    let ids = Fill::Below(model.config.vocab as u32);
    let x = o.data(TensorType::u32([1, rows]), ids)?;
    let pos = (from..from + rows).map(|p| p as f64).collect();
    let pos = o.data(TensorType::u32([1, rows]), Fill::Fixed(pos))?;
    let hidden = model.hidden(&x, &pos, adapter.as_ref(), Some(&cache))?;
    for (state, _) in &hidden.updates {
        o.leaf(state, Fill::Signed(1.0))?;
    }
    let last = hidden.x.reshape([rows, model.config.hidden])?;
    let last = last.slice(0, rows - 1, 1)?;
    let logits = model.logits_with(&last, adapter.as_ref())?;
    let again: Again = Box::new(move |_| Ok(vec![logits.clone()]));
    Ok(subject(x, again, hidden.updates))
}

/// A step of all adapters, each over an equal part of the `b` rows.
fn training(
    o: &mut Operands<'_>,
    model: &Model,
    adapters: &[Adapter],
    [b, t]: [usize; 2],
) -> Result<Subject> {
    let n = adapters.len();
    if n == 0 || !b.is_multiple_of(n) {
        return Err(Error::Setting {
            name: "training",
            want: "an adapter, or several that share the rows evenly",
            got: format!("{n} for {b} rows"),
        });
    }
    let s = &model.session;
    let optimizers = adapters
        .iter()
        .map(|a| Ok(Optimizer::new(s, a, OptimizerKind::AdamW)?));
    let optimizers = optimizers.collect::<Result<Vec<_>>>()?;
    let trained = adapters.iter().zip(&optimizers);
    let trained = trained.map(|(adapter, optimizer)| Trained {
        adapter,
        optimizer,
        clip: Some(1.0),
    });
    let g = StepGraph::build(model, &trained.collect::<Vec<_>>(), [b / n, t])?;
    let ids = Fill::Below(model.config.vocab as u32);
    o.leaf(&g.inputs.ids, ids.clone())?;
    o.leaf(&g.inputs.targets, ids)?;
    o.leaf(&g.inputs.pos, Fill::Positions)?;
    let inv = 1.0 / (b / n * t) as f64;
    o.leaf(&g.inv_counts, Fill::Fixed(vec![inv; n]))?;
    // Corrections of a step far from the first; the second row changes nothing, for gradients that are not finite.
    let hyper = [1e-4, 0.9, 0.999, 1e-8, 0.01, 1.0, 1.0, 1.0];
    let idle = [0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0];
    let both = hyper.into_iter().chain(idle);
    let both: Vec<f64> = both.map(|v: f32| f64::from(v)).collect();
    for (adapter, optimizer) in adapters.iter().zip(&optimizers) {
        o.leaf(&optimizer.hyper, Fill::Fixed(both.clone()))?;
        o.leaf(&adapter.params, Fill::Signed(0.05))?;
        o.leaf(&optimizer.m, Fill::Signed(1e-3))?;
        if let Some(v) = &optimizer.v {
            o.leaf(v, Fill::Positive(1e-3))?;
        }
    }
    let (loss, norm) = (g.losses, g.norms);
    let again: Again = Box::new(move |_| Ok(vec![loss.clone(), norm.clone()]));
    Ok(subject(g.inputs.ids, again, g.updates))
}

fn subject(
    fed: tallow::Tensor,
    again: Again,
    updates: Vec<(tallow::Tensor, tallow::Tensor)>,
) -> Subject {
    Subject {
        carried: vec![fed],
        again,
        updates,
        join: Join::None("a repetition is the whole plan: what is queued runs in it"),
        reference: Reference::Deep,
    }
}

/// Rows and tokens a row of a training step.
#[must_use]
pub fn batch(cx: &Context) -> [usize; 2] {
    cx.batch
        .unwrap_or(if cx.quick { [2, 32] } else { [4, 128] })
}

/// A training step of every model of the run.
///
/// # Errors
/// None now; a model that cannot be had is a row that says so.
pub fn train(cx: &Context) -> Result<Vec<Task>> {
    let doing = Doing::Train(batch(cx));
    let adapters = [
        (
            "q and v, rank 8",
            Adapted {
                names: &["q_proj", "v_proj"],
                ..Adapted::seven(8)
            },
        ),
        ("all seven, rank 8", Adapted::seven(8)),
    ];
    let mut all = vec![];
    for (model, dir) in &cx.models {
        for (what, adapted) in adapters.clone() {
            all.push(task(Suite::Train, model, dir, doing, Some((what, adapted))));
        }
    }
    Ok(all)
}

/// A prompt and a token of every model of the run, without and with an adapter.
///
/// # Errors
/// None now.
pub fn decode(cx: &Context) -> Result<Vec<Task>> {
    let mut all = vec![];
    for (model, dir) in &cx.models {
        for doing in [Doing::Prefill, Doing::Decode] {
            all.push(task(Suite::Decode, model, dir, doing, None));
        }
        let seven = ("all seven, rank 8", Adapted::seven(8));
        all.push(task(Suite::Decode, model, dir, Doing::Decode, Some(seven)));
    }
    Ok(all)
}

fn task(
    suite: Suite,
    model: &str,
    dir: &Path,
    doing: Doing,
    adapted: Option<(&str, Adapted)>,
) -> Task {
    let with = adapted.as_ref().map_or("bare", |a| a.0);
    let (dir, name) = (dir.to_owned(), format!("{doing}, {model}, {with}"));
    let adapted = adapted.map(|a| a.1);
    let job = ModelJob {
        dir: dir.clone(),
        doing,
        adapted: adapted.clone(),
    };
    Task {
        suite,
        name,
        tokens: Some(doing.tokens()),
        peers: vec![(String::new(), Job::Model(job))],
        make: Box::new(move |cx| {
            let (work, cost) = work(&cx.session, &dir, cx.dtype, doing, adapted.as_ref())?;
            Ok(vec![cx.model("tallow", work, &cost)])
        }),
    }
}

#[cfg(test)]
mod tests;
