//! `tallow train`: fine-tunes an adapter and writes it in PEFT's format.
use crate::{
    Outcome,
    adapter_args::AdapterArgs,
    interrupt,
    open::{self, Global, ModelArgs},
    out,
    progress::{Progress, Show},
};
use anyhow::{Result, anyhow};
use serde_json::{Value, json};
use std::path::PathBuf;
use tallow::{
    llm::{Adapter, AdapterConfig, Model, Targets},
    train::{Error, Job, Schedule, Summary, TrainConfig, train},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to train on: JSON lines, {"text": "..."}; each becomes bos + text + eos.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Folder for the adapter.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Optimizer steps; without it, --epochs decides.
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Passes over the data.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    epochs: f64,
    /// Decides the adapter's start and the order of the rows.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Rank of the adapter.
    #[arg(long, value_name = "N", default_value_t = 8)]
    rank: usize,
    /// The adapter's output is scaled by alpha / rank [default: twice the rank].
    #[arg(long, value_name = "X")]
    alpha: Option<f64>,
    /// Scale by alpha / sqrt(rank) instead.
    #[arg(long)]
    rslora: bool,
    /// What to adapt: all-linear, names with commas (q_proj,v_proj), or a regular expression of module paths.
    #[arg(long, value_name = "WHICH", default_value = "all-linear")]
    targets: String,
    #[command(flatten)]
    variant: AdapterArgs,
    /// Peak learning rate.
    #[arg(long, value_name = "X", default_value_t = 1e-3)]
    lr: f64,
    /// How the learning rate falls: constant, linear or cosine.
    #[arg(long, value_name = "HOW", default_value = "linear")]
    schedule: Schedule,
    /// Steps in which the learning rate rises first.
    #[arg(long, value_name = "N", default_value_t = 0)]
    warmup: u64,
    /// Rows of a step.
    #[arg(long, value_name = "N", default_value_t = 4)]
    batch: usize,
    /// Rows are cut after this many tokens.
    #[arg(long, value_name = "N", default_value_t = 512)]
    seq_len: usize,
    /// Weight decay of AdamW.
    #[arg(long, value_name = "X", default_value_t = 0.01)]
    weight_decay: f64,
    /// Scale the gradient down to this norm; 0 leaves it alone.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    clip: f64,
    /// Text to evaluate on, at the end and every --eval-every steps.
    #[arg(long, value_name = "FILE")]
    valid: Option<PathBuf>,
    /// Steps between evaluations.
    #[arg(long, value_name = "N", requires = "valid")]
    eval_every: Option<u64>,
    /// Print one JSON document at the end, and no progress.
    #[arg(long)]
    json: bool,
}

impl Args {
    fn config(&self) -> TrainConfig {
        TrainConfig {
            steps: self.steps,
            epochs: self.epochs,
            batch: self.batch,
            seq_len: self.seq_len,
            lr: self.lr,
            schedule: self.schedule,
            warmup: self.warmup,
            weight_decay: self.weight_decay,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            clip: (self.clip != 0.0).then_some(self.clip),
            seed: self.seed,
            eval_every: self.eval_every,
        }
    }

    fn adapter_config(&self) -> Result<AdapterConfig> {
        let mut config = open::fresh(self.rank, self.alpha, open::targets(&self.targets))?;
        config.use_rslora = self.rslora;
        Ok(config)
    }
}

/// The adapter's part of the settings file.
pub(crate) fn notes(config: &AdapterConfig, dtype: &str) -> Vec<(&'static str, Value)> {
    let targets = match &config.targets {
        Targets::AllLinear => json!("all-linear"),
        Targets::Names(names) => json!(names),
        Targets::Regex(pattern) => json!(pattern),
    };
    vec![
        ("tallow_version", json!(env!("CARGO_PKG_VERSION"))),
        ("dtype", json!(dtype)),
        ("rank", json!(config.rank)),
        ("alpha", json!(config.alpha)),
        ("rslora", json!(config.use_rslora)),
        ("targets", targets),
    ]
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    let config = args.config();
    config.validate()?;
    let mut adapter_config = args.adapter_config()?;
    let model = args.model.load(global)?;
    args.variant.apply(&mut adapter_config, &model.config)?;
    let tokenizer = args.model.tokenizer()?;
    let adapter = Adapter::new(&model, &adapter_config, args.seed)?;
    let adapter = args.variant.paced(&model.session, adapter)?;
    let mut notes = notes(&adapter_config, args.model.dtype.name());
    notes.extend(args.variant.notes());
    let job = Job {
        model: &model,
        tokenizer: &tokenizer,
        adapter: &adapter,
        data: &args.data,
        valid: args.valid.as_deref(),
        out: &args.out,
        base_name: &args.model.name(),
        config: &config,
        notes,
    };
    let mut progress = Progress::new(match args.json {
        true => Show::Nothing,
        false => Show::Progress,
    });
    let summary = run_job(&job, &mut progress)?;
    report(args, &model, &adapter, &summary, &progress)?;
    Ok(Outcome::Fine)
}

/// Runs a job that Ctrl-C may stop between two steps.
pub(crate) fn run_job(job: &Job, progress: &mut Progress) -> Result<Summary> {
    let _polite = interrupt::polite();
    train(job, progress).map_err(|e| match e {
        Error::Stopped { .. } => interrupt::Interrupted(e.to_string()).into(),
        other => anyhow!(other),
    })
}

fn report(
    args: &Args,
    model: &Model,
    adapter: &Adapter,
    s: &Summary,
    progress: &Progress,
) -> Result<()> {
    let last = s.losses.last().copied().unwrap_or(f32::NAN);
    if args.json {
        return out::json(&json!({
            "steps": s.steps,
            "loss": last,
            "losses": s.losses,
            "valid_loss": s.valid.map(|v| v.loss),
            "valid": progress.evals,
            "tokens": s.tokens,
            "train_seconds": s.train_seconds,
            "tokens_per_s": s.tokens_per_s(),
            "trainable": adapter.elems(),
            "rows": progress.cut.1,
            "rows_cut": progress.cut.0,
            "plans": s.recordings,
            "memory_bytes": s.memory_bytes,
            "dtype": args.model.dtype.name(),
            "device": model.session.backend().info().name,
            "out": args.out.display().to_string(),
        }));
    }
    let valid = s.valid.map_or(String::new(), |v| {
        format!(", {:.4} on the validation text", v.loss)
    });
    out::line(format!("{} steps, last loss {last:.4}{valid}", s.steps))?;
    out::line(format!(
        "{:.0} tokens/s in {}, {} plans, {} of memory, computed in {}",
        s.tokens_per_s(),
        out::seconds(s.train_seconds),
        s.recordings,
        out::bytes(s.memory_bytes),
        args.model.dtype.name(),
    ))?;
    out::line(format!("adapter saved in {}", args.out.display()))
}
