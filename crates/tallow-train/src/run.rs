//! A whole training run: rows in, adapter folder out.
//! Invariant: nothing is written before the last step has succeeded, except the empty output folder, which
//! is tried first; each file is whole or not there.
//! Absent on purpose: checkpoints and printing.
use crate::{
    Error, Result, TrainConfig, Trainer,
    batch::Batch,
    config::to_yaml,
    eval::{Evaluation, Evaluator},
    feed::{Feed, FeedSettings},
};
use serde_json::{Value, json};
use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Instant,
};
use tallow_llm::{Tokenizer, adapter::Adapter, files, model::Model};

/// The settings of the run, beside the adapter.
pub const SETTINGS_FILE: &str = "train.yaml";

/// What to train on what.
pub struct Job<'a> {
    /// The base model.
    pub model: &'a Model,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The adapter; its parameters must be state.
    pub adapter: &'a Adapter,
    /// Training text, JSONL.
    pub data: &'a Path,
    /// Text to evaluate on, JSONL.
    pub valid: Option<&'a Path>,
    /// Where the adapter goes.
    pub out: &'a Path,
    /// What the base model is called in the adapter's files.
    pub base_name: &'a str,
    /// Every setting.
    pub config: &'a TrainConfig,
    /// More lines for the settings file: names and values.
    pub notes: Vec<(&'static str, Value)>,
}

/// What happens in a run.
#[derive(Clone, Debug)]
pub enum Event {
    /// Rows are read; training begins.
    Start {
        /// Rows to train on.
        rows: usize,
        /// Rows cut to the longest allowed length.
        cut: usize,
        /// Lines without two tokens, left out.
        too_short: usize,
        /// Tokens of all rows.
        tokens: usize,
        /// Steps planned.
        total: u64,
        /// Parameters trained.
        trainable: usize,
    },
    /// A recording was made for a batch shape, in the seconds given.
    Planned {
        /// Rows and tokens.
        shape: [usize; 2],
        /// Predicted memory of this recording, in bytes.
        memory_bytes: usize,
        /// Time taken, in seconds.
        seconds: f64,
    },
    /// A step is done.
    Step {
        /// Its number, from 1.
        step: u64,
        /// Steps planned.
        total: u64,
        /// Pass over the data, from 0.
        epoch: u64,
        /// Mean loss a token, in nats, before the update.
        loss: f32,
        /// Gradient norm before clipping.
        grad_norm: f32,
        /// Learning rate.
        lr: f64,
        /// Tokens predicted.
        tokens: usize,
        /// Time taken, in seconds.
        seconds: f64,
    },
    /// The validation file was evaluated after a step.
    Eval {
        /// Steps done.
        step: u64,
        /// The result.
        result: Evaluation,
    },
    /// The adapter is on disk.
    Saved {
        /// The folder.
        dir: PathBuf,
    },
}

/// Is told everything; may stop the run.
pub trait Observer {
    /// Called after each event; `Break` ends the run with [`Error::Stopped`].
    fn event(&mut self, event: &Event) -> ControlFlow<()>;
}

/// What a run comes to.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Steps done.
    pub steps: u64,
    /// Loss of each step, in nats a token.
    pub losses: Vec<f32>,
    /// Tokens predicted.
    pub tokens: u64,
    /// Time in steps, without planning, evaluation and files, in seconds.
    pub train_seconds: f64,
    /// Recordings made.
    pub recordings: usize,
    /// Predicted memory of the largest recording, in bytes.
    pub memory_bytes: usize,
    /// The last evaluation.
    pub valid: Option<Evaluation>,
}

impl Summary {
    /// Tokens a second of step time.
    pub fn tokens_per_s(&self) -> f64 {
        self.tokens as f64 / self.train_seconds.max(1e-9)
    }
}

/// Trains an adapter and saves it.
///
/// # Errors
/// Settings, data or an output folder that cannot be used (before the first step), a loss that is not
/// finite, an observer that stops. Nothing is saved then.
pub fn train(job: &Job, observer: &mut dyn Observer) -> Result<Summary> {
    let config = job.config;
    config.validate()?;
    let settings = FeedSettings {
        paths: vec![job.data.to_path_buf()],
        seq_len: config.seq_len,
        batch: config.batch,
        seed: config.seed,
    };
    let mut feed = Feed::open(&settings, job.tokenizer, &job.model.config)?;
    let stats = feed.stats();
    files::prepare_output_dir(job.out)?;
    let mut run = Run {
        job,
        observer,
        total: config.total_steps(stats.rows.unwrap_or(0)),
        trainer: Trainer::new(job.model, job.adapter, config)?,
        evaluator: Evaluator::new(job.model, Some(job.adapter)),
        summary: Summary {
            steps: 0,
            losses: vec![],
            tokens: 0,
            train_seconds: 0.0,
            recordings: 0,
            memory_bytes: 0,
            valid: None,
        },
    };
    run.tell(Event::Start {
        rows: stats.rows.unwrap_or(0),
        cut: stats.cut,
        too_short: stats.too_short,
        tokens: stats.tokens.unwrap_or(0),
        total: run.total,
        trainable: job.adapter.elems(),
    })?;
    let mut batch = Batch::default();
    while run.trainer.done() < run.total {
        let drawn = feed.next(&mut batch)?;
        run.step(&batch, drawn.epoch)?;
    }
    run.finish()
}

struct Run<'a> {
    job: &'a Job<'a>,
    observer: &'a mut dyn Observer,
    total: u64,
    trainer: Trainer,
    evaluator: Evaluator,
    summary: Summary,
}

impl Run<'_> {
    fn tell(&mut self, event: Event) -> Result<()> {
        match self.observer.event(&event) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Stopped {
                step: self.trainer.done(),
                total: self.total,
            }),
        }
    }

    fn step(&mut self, batch: &Batch, epoch: u64) -> Result<()> {
        let config = self.job.config;
        self.plan([batch.b, batch.t])?;
        let start = Instant::now();
        let done = self.trainer.done();
        let factor = config.schedule.factor(done, config.warmup, self.total);
        let lr = config.lr * factor;
        let got = self.trainer.step(batch, lr)?;
        let seconds = start.elapsed().as_secs_f64();
        self.summary.train_seconds += seconds;
        self.summary.tokens += batch.counted as u64;
        self.summary.losses.push(got.loss);
        let step = done + 1;
        self.tell(Event::Step {
            step,
            total: self.total,
            epoch,
            loss: got.loss,
            grad_norm: got.grad_norm,
            lr,
            tokens: batch.counted,
            seconds,
        })?;
        match config.eval_every {
            Some(every) if step.is_multiple_of(every) && step < self.total => self.evaluate(),
            _ => Ok(()),
        }
    }

    fn plan(&mut self, shape: [usize; 2]) -> Result<()> {
        let before = self.trainer.recordings();
        let start = Instant::now();
        let made = self.trainer.recording(shape)?;
        let memory_bytes = made.program.compiled.plan.memory().total();
        if self.trainer.recordings() == before {
            return Ok(());
        }
        self.tell(Event::Planned {
            shape,
            memory_bytes,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    fn evaluate(&mut self) -> Result<()> {
        let Some(valid) = self.job.valid else {
            return Ok(());
        };
        let result = self.evaluator.run(valid, self.job.tokenizer)?;
        self.summary.valid = Some(result);
        let step = self.trainer.done();
        self.tell(Event::Eval { step, result })
    }

    fn finish(mut self) -> Result<Summary> {
        self.evaluate()?;
        self.summary.steps = self.trainer.done();
        self.summary.recordings = self.trainer.recordings();
        self.summary.memory_bytes = self.trainer.memory_bytes();
        self.save()?;
        let dir = self.job.out.to_path_buf();
        // The adapter is saved: what the observer says no longer matters.
        let _ = self.observer.event(&Event::Saved { dir });
        Ok(self.summary)
    }

    fn save(&self) -> Result<()> {
        let job = self.job;
        job.adapter.save(job.model, job.out, job.base_name)?;
        let mut entries = job.notes.clone();
        entries.push(("base_model", json!(job.base_name)));
        entries.push(("data", json!(job.data.display().to_string())));
        entries.push(("valid", json!(job.valid.map(|v| v.display().to_string()))));
        entries.extend(job.config.entries());
        entries.push(("steps_done", json!(self.summary.steps)));
        entries.push(("last_loss", json!(self.summary.losses.last())));
        let text = to_yaml(&entries);
        files::write_atomic(&job.out.join(SETTINGS_FILE), |w| {
            w.write_all(text.as_bytes())
        })?;
        Ok(())
    }
}
