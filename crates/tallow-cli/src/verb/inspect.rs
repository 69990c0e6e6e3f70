//! `tallow inspect`: what a model, an adapter or a checkpoint holds, and what it would take to run and train it.
//! Invariant: memory is the plan's own prediction; a time says how it was come by.
//! Absent on purpose: values of tensors.
use super::explain;
use crate::{
    Outcome,
    open::{self, Global, ModelArgs},
    out,
};
use anyhow::{Result, anyhow};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};
use tallow::{
    Compiled, Role, Session, Tensor,
    llm::{Adapter, ComputeDType, ModelConfig, Targets, Weights, mlx, peft},
    train::checkpoint,
};

mod show;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of a model, an adapter or a checkpoint, or one safetensors file.
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// For an adapter or a checkpoint, folder of its base model: adds its share of the parameters, memory and times. A model given as
    /// PATH is planned with a fresh adapter of rank 8 on all projections.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Type of the weight matrices while computing: f32 or bf16.
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = open::dtype)]
    dtype: ComputeDType,
    /// Rows of the training step.
    #[arg(long, value_name = "N", default_value_t = 4)]
    batch: usize,
    /// Tokens of a row; for decoding, room in the cache.
    #[arg(long, value_name = "N", default_value_t = 512)]
    seq_len: usize,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// What lies in a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Model,
    Adapter,
    MlxAdapter,
    /// An adapter with what a run needs to go on.
    Checkpoint,
    Tensors,
}

/// What there is to show.
pub(super) struct Found {
    kind: Kind,
    /// Names and values, in order.
    about: Vec<(&'static str, Value)>,
    /// Tensors of one kind of module: how many, shape, type.
    groups: BTreeMap<(String, Vec<usize>, String), usize>,
    /// Parameters and bytes of all tensors.
    elems: usize,
    bytes: usize,
    /// JSON files beside them, for a checkpoint.
    beside: Vec<String>,
    /// Trainable parameters and those of the base.
    share: Option<(usize, usize)>,
    costs: Vec<Cost>,
}

/// What one kind of work would take.
pub(super) struct Cost {
    what: String,
    memory_bytes: usize,
    arena_bytes: usize,
    state_bytes: usize,
    seconds: f64,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    let kind = kind(&args.path)?;
    let mut found = tensors(args, kind)?;
    found.about = about(args, kind)?;
    let base = match kind {
        Kind::Model => Some(args.path.clone()),
        Kind::Adapter | Kind::Checkpoint => args.model.clone(),
        Kind::MlxAdapter | Kind::Tensors => None,
    };
    if base.is_none() && args.model.is_some() {
        return Err(anyhow!(
            "--model goes with an adapter in PEFT's format; `tallow convert` makes one"
        ));
    }
    if let Some(base) = base {
        predict(args, global, kind, base, &mut found)?;
    }
    match args.json {
        true => out::json(&show::json(args, &found))?,
        false => show::lines(args, &found)?,
    }
    Ok(Outcome::Fine)
}

fn kind(path: &Path) -> Result<Kind> {
    let has = |name: &str| path.join(name).is_file();
    let weights = || weight_files(path).is_ok_and(|files| !files.is_empty());
    match () {
        () if path.is_file() => Ok(Kind::Tensors),
        () if checkpoint::is_folder(path) => Ok(Kind::Checkpoint),
        () if has(mlx::WEIGHTS_FILE) && has(peft::CONFIG_FILE) => Ok(Kind::MlxAdapter),
        () if has(peft::CONFIG_FILE) || has(peft::WEIGHTS_FILE) => Ok(Kind::Adapter),
        () if has("config.json") => Ok(Kind::Model),
        () if weights() => Ok(Kind::Tensors),
        () => Err(anyhow!(
            "{}: neither a model (config.json), nor an adapter (adapter_config.json), nor a folder with safetensors files",
            path.display()
        )),
    }
}

/// The safetensors files of a folder, sorted.
fn weight_files(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = vec![];
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "safetensors") && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn tensors(args: &Args, kind: Kind) -> Result<Found> {
    let path = &args.path;
    let mut beside = vec![];
    let all = match kind {
        Kind::Model => {
            let config = ModelConfig::read(path)?;
            vec![Weights::open(path, &config)?]
        }
        Kind::Adapter => vec![Weights::open_file(&path.join(peft::WEIGHTS_FILE))?],
        Kind::Checkpoint => vec![
            Weights::open_file(&path.join(peft::WEIGHTS_FILE))?,
            Weights::open_file(&path.join(checkpoint::STATE))?,
        ],
        Kind::MlxAdapter => vec![Weights::open_file(&path.join(mlx::WEIGHTS_FILE))?],
        Kind::Tensors if path.is_file() => vec![Weights::open_file(path)?],
        Kind::Tensors => {
            for entry in std::fs::read_dir(path)? {
                let entry = entry?.path();
                let name = entry.file_name().map(|n| n.to_string_lossy().into_owned());
                let json = entry
                    .extension()
                    .is_some_and(|e| e == "json" || e == "yaml");
                beside.extend(name.filter(|_| json));
            }
            beside.sort();
            let files = weight_files(path)?;
            files
                .iter()
                .map(|f| Ok(Weights::open_file(f)?))
                .collect::<Result<_>>()?
        }
    };
    let mut groups: BTreeMap<(String, Vec<usize>, String), usize> = BTreeMap::new();
    let (mut elems, mut bytes) = (0, 0);
    for t in all.iter().flat_map(Weights::iter) {
        elems += t.elems();
        bytes += t.bytes.len();
        let key = (starred(&t.name), t.shape.clone(), t.dtype.to_string());
        *groups.entry(key).or_default() += 1;
    }
    Ok(Found {
        kind,
        about: vec![],
        groups,
        elems,
        bytes,
        beside,
        share: None,
        costs: vec![],
    })
}

/// A tensor's name with the numbers in its path as stars, so that layers are one line.
fn starred(name: &str) -> String {
    let part = |p: &str| match p.chars().all(|c| c.is_ascii_digit()) && !p.is_empty() {
        true => "*".to_owned(),
        // Names come from files: nothing in them may steer a terminal.
        false => p.escape_debug().collect(),
    };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

fn about(args: &Args, kind: Kind) -> Result<Vec<(&'static str, Value)>> {
    Ok(match kind {
        Kind::Model => {
            let c = ModelConfig::read(&args.path)?;
            vec![
                ("family", json!(c.family.model_type())),
                ("layers", json!(c.layers)),
                ("hidden", json!(c.hidden)),
                ("heads", json!(c.heads)),
                ("kv_heads", json!(c.kv_heads)),
                ("mlp", json!(c.mlp)),
                ("vocabulary", json!(c.vocab)),
                ("positions", json!(c.max_positions)),
                ("tied", json!(c.tied)),
            ]
        }
        Kind::Adapter => config_lines(&peft::AdapterConfig::read(&args.path)?, "peft"),
        Kind::Checkpoint => {
            let mut all = run_lines(&checkpoint::open(&args.path)?);
            let config = peft::AdapterConfig::read(&args.path)?;
            all.extend(config_lines(&config, "peft"));
            all
        }
        Kind::MlxAdapter => config_lines(&mlx::read(&args.path, None)?.config, "mlx-lm"),
        Kind::Tensors => vec![],
    })
}

/// How far a run had come.
fn run_lines(c: &checkpoint::Checkpoint) -> Vec<(&'static str, Value)> {
    let about = &c.about;
    vec![
        ("step", json!(about.step)),
        ("steps", json!(about.total)),
        ("loss", json!(c.losses.last())),
        ("valid_loss", json!(about.valid.map(|(_, v)| v.loss))),
        ("best", json!(about.best)),
        ("tokens", json!(about.tokens)),
        ("seconds", json!(about.train_seconds)),
        ("skipped", json!(about.skipped)),
        (
            "optimizer",
            about.config.get("optimizer").cloned().unwrap_or_default(),
        ),
        ("threads", json!(about.threads)),
        ("written_by", json!(about.version)),
    ]
}

fn config_lines(c: &peft::AdapterConfig, format: &str) -> Vec<(&'static str, Value)> {
    let targets = match &c.targets {
        Targets::AllLinear => json!("all-linear"),
        Targets::Names(names) => json!(names),
        Targets::Regex(pattern) => json!(pattern),
    };
    vec![
        ("format", json!(format)),
        ("rank", json!(c.rank)),
        ("alpha", json!(c.alpha)),
        ("rslora", json!(c.use_rslora)),
        ("dora", json!(c.use_dora)),
        ("dropout", json!(c.dropout)),
        ("targets", targets),
        ("layers", json!(c.layers)),
        ("base_model", json!(c.base_model)),
    ]
}

/// Adds share, memory and times to `found`.
fn predict(
    args: &Args,
    global: &Global,
    kind: Kind,
    base: PathBuf,
    found: &mut Found,
) -> Result<()> {
    if args.batch == 0 || args.seq_len == 0 {
        return Err(anyhow!("--batch and --seq-len: want 1 or more"));
    }
    let model = ModelArgs {
        model: base.clone(),
        dtype: args.dtype,
    };
    let model = model.load(global)?;
    let adapter = |role| -> Result<Adapter> {
        Ok(match kind {
            Kind::Adapter | Kind::Checkpoint => Adapter::load(&model, &args.path, role)?.0,
            _ => Adapter::new(&model, &open::fresh(8, None, Targets::AllLinear)?, 0)?,
        })
    };
    let trained = adapter(Role::State)?;
    let of_base = match kind {
        Kind::Model => found.elems,
        _ => {
            let weights = Weights::open(&base, &model.config)?;
            weights.iter().map(|t| t.elems()).sum()
        }
    };
    found.share = Some((trained.elems(), of_base));
    let s = &model.session;
    let t = args.seq_len.min(model.config.max_positions);
    let speed = Speed::measure(s)?;
    let mut cost = |what: String, subject: &explain::Subject| -> Result<()> {
        let outs: Vec<&Tensor> = subject.outs.iter().collect();
        let compiled = s.explain(&outs, &subject.updates)?;
        let memory = compiled.plan.memory();
        found.costs.push(Cost {
            what,
            memory_bytes: memory.total(),
            arena_bytes: memory.arena,
            state_bytes: memory.state,
            seconds: speed.seconds(&compiled),
        });
        Ok(())
    };
    let train = explain::train(&model, Some(&trained), 1, [args.batch, t])?;
    cost(
        format!("training step, {} x {t} tokens", args.batch),
        &train,
    )?;
    let run = adapter(Role::Frozen)?;
    let (decode, room) = explain::decode(&model, Some(&run), t)?;
    cost(format!("decoding a token, cache of {room}"), &decode)
}

/// What this machine just did, a second ago.
struct Speed {
    flops_per_s: f64,
    bytes_per_s: f64,
}

impl Speed {
    /// A product of many rows for arithmetic, one row for reading.
    fn measure(s: &Session) -> Result<Self> {
        // 64 MiB of weights: more than a cache holds.
        const SIDE: usize = 4096;
        const ROWS: usize = 256;
        let noise = |n: usize| -> Vec<f32> { (0..n).map(|i| (i % 97) as f32 * 0.01).collect() };
        let w = s.tensor(&noise(SIDE * SIDE), [SIDE, SIDE], Role::Frozen)?;
        let best = |rows: usize| -> Result<f64> {
            let x = s.tensor(&noise(rows * SIDE), [rows, SIDE], Role::Data)?;
            let mut program = s.record(&[&x.linear(&w)?], &[])?;
            let mut least = f64::INFINITY;
            for _ in 0..8 {
                let start = std::time::Instant::now();
                program.replay()?;
                s.read_into(&program.outputs[0], &mut vec![0.0; rows * SIDE])?;
                least = least.min(start.elapsed().as_secs_f64());
            }
            Ok(least)
        };
        Ok(Self {
            flops_per_s: 2.0 * (ROWS * SIDE * SIDE) as f64 / best(ROWS)?,
            bytes_per_s: 4.0 * (SIDE * SIDE) as f64 / best(1)?,
        })
    }

    /// Each launch at the speed of arithmetic or of memory, whichever is slower.
    fn seconds(&self, c: &Compiled) -> f64 {
        let one = |step: &tallow::core::plan::Step| {
            let arithmetic = step.spec.flops() / self.flops_per_s;
            arithmetic.max(step.spec.bytes() as f64 / self.bytes_per_s)
        };
        c.plan.steps.iter().map(one).sum()
    }
}
