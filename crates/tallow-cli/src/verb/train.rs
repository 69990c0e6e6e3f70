//! `tallow train`: fine-tunes an adapter and writes it in PEFT's format, with checkpoints on the way.
//! Invariant: every setting is an option, and stands in `train.yaml` under the option's name.
use crate::{
    Outcome,
    adapter_args::AdapterArgs,
    interrupt,
    open::{self, Global, ModelArgs},
    out,
    progress::Progress,
};
use anyhow::{Result, anyhow};
use seen::Seen;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tallow::{
    llm::{
        Adapter, AdapterConfig, Model, Targets, Tokenizer,
        data::{Folder, LossOn, STDIN, Weighted},
    },
    train::{
        Error, FeedSettings, Job, Keep, Observer, OptimizerKind, Schedule, Start, Summary,
        TrainConfig, run::past, train,
    },
};

mod board;
pub(crate) mod config;
mod seen;
mod sweep;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Take settings from a file like the train.yaml of a run; options given here win.
    #[arg(long, value_name = "FILE", conflicts_with = "sweep")]
    config: Option<PathBuf>,
    /// Train several adapters side by side, in the same passes, and compare them: a file of settings like train.yaml
    /// with a list `runs`, or lists of values under `grid`. Each run gets a folder in --out.
    #[arg(long, value_name = "FILE")]
    sweep: Option<PathBuf>,
    /// Of a sweep, keep the adapters and checkpoints of all runs or of the best one.
    #[arg(long, value_name = "WHICH", default_value = "all", requires = "sweep")]
    keep: sweep::Kept,
    /// What to train on: JSON lines with "text", with "prompt" and "completion", or with "messages"; a folder with
    /// train.jsonl (and valid.jsonl); - for standard input. May be given several times; a.jsonl=0.7 b.jsonl=0.3
    /// draws from files in these shares.
    #[arg(long, value_name = "FILE", required = true, action = clap::ArgAction::Append)]
    data: Vec<Weighted>,
    /// Which tokens count: answers (completions, the assistant's words, whole texts) or everything.
    #[arg(long, value_name = "WHICH", default_value = "answers")]
    loss_on: LossOn,
    /// Put several lines into a row, none seeing another, so that rows of --seq-len are full.
    #[arg(long)]
    packing: bool,
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
    /// Rows of a batch.
    #[arg(long, value_name = "N", default_value_t = 4)]
    batch: usize,
    /// Batches of a step: their gradients are added up, each token counting alike.
    #[arg(long, value_name = "N", default_value_t = 1)]
    accumulate: usize,
    /// Memory the run may take, as 3GiB: rows a batch, batches a step and --checkpoint-layers are chosen to
    /// fit; rows a step stay.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<usize>,
    /// Rows are cut after this many tokens.
    #[arg(long, value_name = "N", default_value_t = 512)]
    seq_len: usize,
    /// What makes steps of gradients: adamw, lion (wants a learning rate 3 to 10 times smaller) or sgd.
    #[arg(long, value_name = "WHICH", default_value = "adamw")]
    optimizer: OptimizerKind,
    /// Weight decay: decoupled, but for sgd.
    #[arg(long, value_name = "X", default_value_t = 0.01)]
    weight_decay: f64,
    /// Decay of the first moment; the momentum of sgd.
    #[arg(long, value_name = "X", default_value_t = 0.9)]
    beta1: f64,
    /// Decay of the second moment [default: 0.999; lion: 0.99].
    #[arg(long, value_name = "X")]
    beta2: Option<f64>,
    /// Added to the root of AdamW's second moment.
    #[arg(long, value_name = "X", default_value_t = 1e-8)]
    eps: f64,
    /// Scale the gradient down to this norm; 0 leaves it alone.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    clip: f64,
    /// Text to evaluate on, at the end and every --eval-every steps.
    #[arg(long, value_name = "FILE")]
    valid: Option<PathBuf>,
    /// Steps between evaluations.
    #[arg(long, value_name = "N", requires = "valid")]
    eval_every: Option<u64>,
    /// Stop after this many evaluations without a better one, and take the best adapter.
    #[arg(long, value_name = "N", requires = "eval_every")]
    patience: Option<u64>,
    /// Compute each layer again in the backward pass instead of keeping it: less memory, more time.
    #[arg(long)]
    checkpoint_layers: bool,
    /// Skip and count steps whose loss or gradient is not finite, instead of stopping.
    #[arg(long)]
    skip_nonfinite: bool,
    /// Steps between checkpoints (in OUT/checkpoints; each is also an adapter folder); 0 makes none.
    #[arg(long, value_name = "N", default_value_t = 100)]
    save_every: u64,
    /// How many of the newest checkpoints are kept.
    #[arg(long, value_name = "N", default_value_t = 2)]
    keep_last: usize,
    /// How many of the checkpoints with the lowest validation loss are kept.
    #[arg(long, value_name = "N", default_value_t = 1)]
    keep_best: usize,
    /// Go on from the newest whole checkpoint in --out, bit for bit; begins where there is none.
    #[arg(long, conflicts_with = "overwrite")]
    resume: bool,
    /// Remove the checkpoints in --out and begin anew.
    #[arg(long)]
    overwrite: bool,
    /// Show the run live in a browser, on this machine only, at this port [default: a free one].
    #[arg(long, value_name = "PORT", num_args = 0..=1, default_missing_value = "0")]
    dashboard: Option<u16>,
    /// Lines continued without and with the adapter at the end, for the report.
    #[arg(long, value_name = "N", default_value_t = 2)]
    samples: usize,
    /// Print one JSON document at the end, and no progress.
    #[arg(long)]
    json: bool,
}

/// "3GiB", "500 MB" or a number of bytes.
fn size(text: &str) -> Result<usize, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024.0 * 1024.0,
        "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
        _ => f64::NAN,
    };
    let bytes = digits.trim().parse::<f64>().unwrap_or(f64::NAN) * unit;
    match bytes.is_finite() && bytes >= 1.0 {
        true => Ok(bytes as usize),
        false => Err("want a size like 3GiB or 500MB".to_owned()),
    }
}

impl Args {
    fn config(&self) -> TrainConfig {
        TrainConfig {
            steps: self.steps,
            epochs: self.epochs,
            batch: self.batch,
            accumulate: self.accumulate,
            seq_len: self.seq_len,
            packing: self.packing,
            loss_on: self.loss_on,
            optimizer: self.optimizer,
            lr: self.lr,
            schedule: self.schedule,
            warmup: self.warmup,
            weight_decay: self.weight_decay,
            beta1: self.beta1,
            beta2: self.beta2.unwrap_or(match self.optimizer {
                OptimizerKind::Lion => 0.99,
                _ => 0.999,
            }),
            eps: self.eps,
            clip: (self.clip != 0.0).then_some(self.clip),
            seed: self.seed,
            eval_every: self.eval_every,
            patience: self.patience,
            checkpoint_layers: self.checkpoint_layers,
            skip_nonfinite: self.skip_nonfinite,
        }
    }

    fn adapter_config(&self) -> Result<AdapterConfig> {
        let mut config = open::fresh(self.rank, self.alpha, open::targets(&self.targets))?;
        config.use_rslora = self.rslora;
        Ok(config)
    }

    fn keep(&self) -> Option<Keep> {
        (self.save_every > 0).then_some(Keep {
            every: self.save_every,
            last: self.keep_last,
            best: self.keep_best,
            start: match (self.resume, self.overwrite) {
                (true, _) => Start::Resume,
                (false, true) => Start::Overwrite,
                (false, false) => Start::New,
            },
        })
    }

    /// Where rows come from, and the text to evaluate on: the one asked for, or the one beside the training data.
    fn data(&self, config: &TrainConfig) -> Result<(FeedSettings, Option<PathBuf>)> {
        Weighted::check(&self.data)?;
        let (mut paths, mut valid) = (vec![], self.valid.clone());
        for one in &self.data {
            match Folder::find(&one.path)? {
                None => paths.push(one.path.clone()),
                Some(folder) => {
                    valid = valid.or(folder.valid);
                    paths.push(folder.train);
                }
            }
        }
        let weights = self.data.iter().filter_map(|w| w.weight).collect();
        let (seq_len, batch, seed) = (config.seq_len, config.batch, config.seed);
        let data = FeedSettings {
            weights,
            ..FeedSettings::new(paths, seq_len, batch, seed)
        };
        Ok((data, valid))
    }

    /// Threads to compute on: those asked for, those of the run in `out` to go on with, or the usual ones.
    fn threads(&self, out: &Path, global: &Global) -> Result<usize> {
        let past = || past(out).and_then(|p| p.threads);
        match (global.threads, self.resume) {
            (Some(n), _) => Ok(n),
            (None, true) if let Some(n) = past() => Ok(n.clamp(1, tallow::cpu::pool::MAX_THREADS)),
            _ => Ok(tallow::cpu::pool::threads_from_env()?),
        }
    }

    /// How the run is kept, for the settings file.
    fn keeping(&self, threads: usize) -> Vec<(&'static str, Value)> {
        vec![
            ("out", json!(self.out.display().to_string())),
            ("threads", json!(threads)),
            ("memory", json!(self.memory)),
            ("save_every", json!(self.save_every)),
            ("keep_last", json!(self.keep_last)),
            ("keep_best", json!(self.keep_best)),
            ("samples", json!(self.samples)),
        ]
    }
}

/// The adapter's part of the settings file.
pub(crate) fn notes(config: &AdapterConfig, dtype: &str) -> Vec<(&'static str, Value)> {
    let targets = match &config.targets {
        Targets::AllLinear => json!("all-linear"),
        Targets::Names(names) => json!(names.join(",")),
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

/// A run that is ready to begin.
struct Ready {
    config: TrainConfig,
    adapter: Adapter,
    data: FeedSettings,
    valid: Option<PathBuf>,
    out: PathBuf,
    base_name: String,
    keep: Option<Keep>,
    memory_bytes: Option<usize>,
    threads: usize,
    notes: Vec<(&'static str, Value)>,
}

impl Ready {
    fn new(args: &Args, model: &Model, threads: usize) -> Result<Self> {
        let config = args.config();
        let mut adapter_config = args.adapter_config()?;
        args.variant.apply(&mut adapter_config, &model.config)?;
        let adapter = Adapter::new(model, &adapter_config, args.seed)?;
        let mut notes = notes(&adapter_config, args.model.dtype.name());
        notes.extend(args.variant.notes());
        notes.extend(args.keeping(threads));
        let (data, valid) = args.data(&config)?;
        Ok(Ready {
            adapter: args.variant.paced(&model.session, adapter)?,
            config,
            data,
            valid,
            out: args.out.clone(),
            base_name: args.model.name(),
            keep: args.keep(),
            memory_bytes: args.memory,
            threads,
            notes,
        })
    }

    fn job<'a>(&'a self, model: &'a Model, tokenizer: &'a Tokenizer) -> Job<'a> {
        Job {
            model,
            tokenizer,
            adapter: &self.adapter,
            data: &self.data,
            valid: self.valid.as_deref(),
            out: &self.out,
            base_name: &self.base_name,
            config: &self.config,
            keep: self.keep,
            memory_bytes: self.memory_bytes,
            threads: Some(self.threads),
            notes: self.notes.clone(),
        }
    }
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    if let Some(file) = &args.sweep {
        return sweep::run(args, file, global);
    }
    args.config().validate()?;
    let threads = args.threads(&args.out, global)?;
    let global = &Global {
        threads: Some(threads),
        ..global.clone()
    };
    let model = args.model.load(global)?;
    let tokenizer = args.model.tokenizer()?;
    let ready = Ready::new(args, &model, threads)?;
    let job = ready.job(&model, &tokenizer);
    if job.data.reads_stdin() {
        out::warn("standard input is read: a stopped run can go on only with the same input again");
    }
    let mut seen = Seen::new(args, facts(&job))?;
    let summary = run_job(&job, &mut seen)?;
    let first = job.data.paths.first();
    let shown = job.valid.or(first.map(PathBuf::as_path));
    let samples = match shown.filter(|p| p.as_os_str() != STDIN) {
        Some(file) => {
            let with = (&model, &ready.adapter, &tokenizer);
            seen::samples(with, (file, args.loss_on), args.samples)?
        }
        None => vec![],
    };
    seen.finish(&args.out, samples)?;
    report(args, &model, &ready.adapter, &summary, &seen.progress)?;
    Ok(Outcome::Fine)
}

/// What the page says of a run beside its settings.
fn facts(job: &Job) -> Vec<(String, String)> {
    let device = job.model.session.backend().info().name.clone();
    let config = &job.model.config;
    let model = format!(
        "{}, {} layers, hidden {}, vocabulary {}",
        config.family.model_type(),
        config.layers,
        config.hidden,
        job.tokenizer.vocab(),
    );
    vec![
        ("base_model".to_owned(), job.base_name.to_owned()),
        ("architecture".to_owned(), model),
        ("device".to_owned(), device),
        (
            "parameters_trained".to_owned(),
            out::count(job.adapter.elems() as u64),
        ),
    ]
}

/// Runs a job that Ctrl-C or SIGTERM may stop between two steps.
pub(crate) fn run_job(job: &Job, observer: &mut dyn Observer) -> Result<Summary> {
    let _polite = interrupt::polite();
    train(job, observer).map_err(stopped)
}

/// A run that was asked to stop is no failure.
fn stopped(e: Error) -> anyhow::Error {
    match e {
        Error::Stopped { .. } => interrupt::Interrupted(e.to_string()).into(),
        other => anyhow!(other),
    }
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
            "resumed_from": s.resumed_from,
            "skipped": s.skipped,
            "empty_batches": s.empty,
            "best": s.best,
            "early": s.early,
            "valid_loss": s.valid.map(|v| v.loss),
            "valid": progress.evals,
            "tokens": s.tokens,
            "train_seconds": s.train_seconds,
            "tokens_per_s": s.tokens_per_s(),
            "trainable": adapter.elems(),
            "rows": s.data.rows,
            "rows_cut": s.data.cut,
            "lines_too_short": s.data.too_short,
            "rows_without_target": s.data.no_target,
            "filled": s.data.filled,
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
    // Of data read as it is needed this is known only now.
    if s.data.rows.is_none() {
        let d = &s.data;
        out::line(format!(
            "{} rows were cut to --seq-len, {} had fewer than two tokens, {} nothing to learn",
            d.cut, d.too_short, d.no_target,
        ))?;
    }
    let dir = args.out.display();
    out::line(format!(
        "adapter saved in {dir}; the run is drawn in {dir}/{}",
        seen::REPORT_FILE
    ))
}
