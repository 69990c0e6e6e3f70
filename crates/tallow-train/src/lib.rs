//! Fine-tuning adapters: batches, the recorded step, schedules, evaluation, the loop.
//! Invariant: an adapter folder holds a whole adapter or nothing; a run with one seed gives one result.
//! Absent on purpose: devices, and printing. What happens is told to an [`Observer`].
#![forbid(unsafe_code)]

pub mod batch;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod error;
pub mod eval;
pub mod feed;
pub mod memory;
pub mod optim;
pub mod run;
pub mod schedule;
pub mod settings;
pub mod step;
pub mod sweep;
pub mod watch;

pub use batch::{Batch, Buckets, Doc, Rows, Tally};
pub use config::TrainConfig;
pub use data::Limits;
pub use error::{Error, Result};
pub use eval::{Evaluation, Evaluator};
pub use feed::{Drawn, Feed, FeedSettings, FeedStats, Line};
pub use optim::{Optimizer, OptimizerKind};
pub use run::{Event, Job, Keep, Observer, Start, Summary, train, train_all};
pub use schedule::Schedule;
pub use step::{Snapshot, StepGraph, StepResult, Trained, Trainer, Turn};
