//! A whole training run: data in, adapter folder out, checkpoints on the way.
//! Invariant: the adapter is written after the last step has succeeded; each file is whole or not there; a run
//! that was stopped, killed or failed goes on bit for bit from its newest whole checkpoint.
//! Absent on purpose: printing. What happens is told to an [`Observer`].
use crate::{
    Error, Result, TrainConfig, Trainer,
    checkpoint::{self, Store},
    eval::{Evaluation, Evaluator},
    feed::{Feed, FeedSettings, FeedStats, Line},
    memory,
};
use serde_json::{Value, json};
use std::{ops::ControlFlow, path::PathBuf};
use tallow_core::plan::Memory;
use tallow_llm::{Tokenizer, adapter::Adapter, files, model::Model};

mod resume;
mod steps;

pub use resume::{Past, past};
use steps::{Lane, Run};

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
    /// Training data. Batch, row length, packing, what counts and seed are taken from `config`.
    pub data: &'a FeedSettings,
    /// Text to evaluate on, JSONL.
    pub valid: Option<&'a std::path::Path>,
    /// Where the adapter goes.
    pub out: &'a std::path::Path,
    /// What the base model is called in the adapter's files.
    pub base_name: &'a str,
    /// Every setting.
    pub config: &'a TrainConfig,
    /// Checkpoints; `None` makes none.
    pub keep: Option<Keep>,
    /// Memory the run may take, in bytes: rows a batch, batches a step and recomputation of layers are chosen to
    /// fit; rows a step stay.
    pub memory_bytes: Option<usize>,
    /// CPU threads, for the checkpoints.
    pub threads: Option<usize>,
    /// More lines for the settings file: names and values.
    pub notes: Vec<(&'static str, Value)>,
}

/// When checkpoints are made and which are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// Steps between them.
    pub every: u64,
    /// How many of the newest are kept.
    pub last: usize,
    /// How many of those with the lowest validation loss are kept.
    pub best: usize,
    /// What to do where the folder holds a run already.
    pub start: Start,
}

/// How a run begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Only where there is no checkpoint.
    New,
    /// From the newest whole checkpoint, where there is one.
    Resume,
    /// By removing the checkpoints that are there.
    Overwrite,
}

/// What happens in a run.
#[derive(Clone, Debug)]
pub enum Event {
    /// Data is open; training begins.
    Start {
        /// What is known about the data.
        data: FeedStats,
        /// Steps planned.
        total: u64,
        /// Parameters trained.
        trainable: usize,
        /// Rows of a batch.
        batch: usize,
        /// Batches of a step.
        accumulate: usize,
        /// Are layers computed again in the backward pass?
        checkpoint_layers: bool,
        /// Predicted memory of the largest batch, in bytes; of all runs side by side together.
        memory: Memory,
        /// All settings: names and values.
        settings: Vec<(&'static str, Value)>,
    },
    /// The run goes on from a checkpoint.
    Resumed {
        /// Steps done already.
        step: u64,
        /// The checkpoint.
        dir: PathBuf,
        /// Newer checkpoints that are not whole, and other things worth a word.
        remarks: Vec<String>,
        /// Losses so far.
        losses: Vec<f32>,
        /// Time it took to read and restore, in seconds.
        seconds: f64,
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
        /// Time taken, in seconds; that of all runs side by side together.
        seconds: f64,
        /// Steps skipped so far because their loss or gradient was not finite.
        skipped: u64,
        /// Batches left out so far because nothing in them is to be predicted.
        empty: u64,
    },
    /// A step was skipped: its loss or gradient was not finite. Follows its [`Event::Step`].
    Skipped {
        /// Its number, from 1.
        step: u64,
        /// The lines of its batches.
        lines: Vec<Line>,
    },
    /// The validation file was evaluated after a step.
    Eval {
        /// Steps done.
        step: u64,
        /// The result.
        result: Evaluation,
        /// Is it the best so far?
        best: bool,
    },
    /// A checkpoint is on disk.
    Checkpoint {
        /// Steps done.
        step: u64,
        /// Its folder.
        dir: PathBuf,
        /// Its size, in bytes.
        bytes: u64,
        /// Time taken, in seconds.
        seconds: f64,
    },
    /// A run beside others has failed, and ends alone.
    Failed {
        /// The step that failed, from 1.
        step: u64,
        /// Why.
        why: String,
    },
    /// The validation loss has not fallen for as long as patience lasts; the best adapter is taken.
    EarlyStop {
        /// Steps done.
        step: u64,
        /// Step and loss of the best evaluation.
        best: (u64, f64),
    },
    /// The adapter is on disk.
    Saved {
        /// The folder.
        dir: PathBuf,
    },
}

/// Is told everything; may stop the run.
pub trait Observer {
    /// Called after each event. `Break` ends the run after the step being computed: with a checkpoint, where
    /// checkpoints are made, and with [`Error::Stopped`].
    fn event(&mut self, event: &Event) -> ControlFlow<()>;
}

/// What a run comes to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Steps done.
    pub steps: u64,
    /// The step this process began after, where it resumed a run.
    pub resumed_from: Option<u64>,
    /// Loss of each step, in nats a token.
    pub losses: Vec<f32>,
    /// Tokens predicted.
    pub tokens: u64,
    /// Time in steps, without planning, evaluation and files, in seconds.
    pub train_seconds: f64,
    /// Steps skipped because their loss or gradient was not finite.
    pub skipped: u64,
    /// Batches left out because nothing in them is to be predicted.
    pub empty: u64,
    /// Recordings made.
    pub recordings: usize,
    /// Predicted memory of the largest recording, in bytes.
    pub memory_bytes: usize,
    /// The last evaluation.
    pub valid: Option<Evaluation>,
    /// The best evaluations: loss and step, the best first.
    pub best: Vec<(f64, u64)>,
    /// Did the run end because patience did?
    pub early: bool,
    /// What is known about the data now.
    pub data: FeedStats,
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
/// Settings, data, memory or an output folder that cannot be used (before the first step); a checkpoint of
/// another run; a loss that is not finite; an observer that stops; a full disk.
pub fn train(job: &Job, observer: &mut dyn Observer) -> Result<Summary> {
    train_all(vec![(job, observer)])?.remove(0)
}

/// Trains several adapters of one model side by side, in the same passes, and saves each in its own folder. Each is
/// what it would be if it were trained alone, up to rounding. All take rows a batch, batches a step, row length,
/// packing and memory from settings that must be equal.
///
/// # Errors
/// As [`train`]. A run whose data or numbers fail ends alone: its error is among the results.
pub fn train_all(jobs: Vec<(&Job, &mut dyn Observer)>) -> Result<Vec<Result<Summary>>> {
    let mut feeds = vec![];
    for (job, _) in &jobs {
        job.config.validate()?;
        check_patience(job)?;
        let settings = FeedSettings {
            seq_len: job.config.seq_len,
            batch: job.config.batch,
            seed: job.config.seed,
            packing: job.config.packing,
            loss_on: job.config.loss_on,
            ..job.data.clone()
        };
        feeds.push(Feed::open(&settings, job.tokenizer, &job.model.config)?);
        if let Some(keep) = job.keep {
            resume::check_start(job, &Store::new(job.out), keep.start)?;
        }
    }
    let all: Vec<&Job> = jobs.iter().map(|(job, _)| *job).collect();
    if all.is_empty() {
        return Ok(vec![]);
    }
    let (configs, sparing) = memory::fit(&all, &mut feeds)?;
    let members: Vec<_> = all.iter().map(|j| j.adapter).zip(&configs).collect();
    let mut trainer = Trainer::side_by_side(all[0].model, &members)?;
    if sparing {
        trainer.spare();
    }
    let memory = memory::check(&mut trainer, &feeds)?;
    let fingerprint = checkpoint::fingerprint(all[0].model)?;
    let mut lanes = vec![];
    let each = jobs.into_iter().zip(feeds).zip(configs);
    for (member, (((job, observer), feed), config)) in each.enumerate() {
        lanes.push(Lane {
            store: prepare_folder(job)?,
            total: config.total_steps(feed.stats().batches)?,
            evaluator: Evaluator::new(job.model, Some(job.adapter)).counting(config.loss_on),
            job,
            observer,
            member,
            config,
            feed,
            fingerprint,
            summary: Summary::default(),
            batches: vec![],
            epoch: 0,
            lines: vec![],
            evaluated: None,
            saved: None,
            stale: 0,
            stopping: false,
            ended: None,
        });
    }
    let mut run = Run { trainer, lanes };
    run.begin(memory)?;
    run.steps()
}

/// Makes the run's folder, and that of its checkpoints, where it makes any.
fn prepare_folder(job: &Job) -> Result<Option<(Store, Keep)>> {
    files::prepare_output_dir(job.out)?;
    let Some(keep) = job.keep else {
        return Ok(None);
    };
    let store = Store::new(job.out);
    store.prepare()?;
    if keep.start == Start::Overwrite {
        for step in store.steps() {
            files::remove_folder(&store.path(step))?;
        }
    }
    Ok(Some((store, keep)))
}

impl Run<'_> {
    /// Goes on where checkpoints are, writes the settings, and says what is about to happen.
    fn begin(&mut self, memory: Memory) -> Result<()> {
        let limit = resume::common_step(&self.lanes);
        for lane in &mut self.lanes {
            lane.resume(&mut self.trainer, limit)?;
            lane.write_settings(&[])?;
            let c = &lane.config;
            let (batch, accumulate, checkpoint_layers) =
                (c.batch, c.accumulate, c.checkpoint_layers);
            lane.tell(Event::Start {
                data: lane.feed.stats(),
                total: lane.total,
                trainable: lane.job.adapter.elems(),
                batch,
                accumulate,
                checkpoint_layers,
                memory,
                settings: lane.settings(),
            });
        }
        Ok(())
    }
}

fn check_patience(job: &Job) -> Result<()> {
    let usable = job.valid.is_some()
        && job.config.eval_every.is_some()
        && job.keep.is_some_and(|k| k.best > 0);
    match job.config.patience {
        Some(n) if !usable => Err(Error::Setting {
            name: "patience",
            want: "a validation file, evaluations every few steps, and at least one best checkpoint to go with it"
                .into(),
            got: n.to_string(),
        }),
        _ => Ok(()),
    }
}
