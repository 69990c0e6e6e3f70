//! Everything that can go wrong while training, one enum.
//! Invariant: a message is one lower-case sentence that says what, where and what to do.
//! Absent on purpose: wrapping; errors of the crates below keep their own sentences.
use std::path::PathBuf;

/// The result of every fallible function in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A graph could not be built, planned or run.
    #[error(transparent)]
    Core(#[from] tallow_core::Error),
    /// A model, adapter, tokenizer or data file.
    #[error(transparent)]
    Llm(#[from] tallow_llm::Error),
    /// The loss or the gradient's norm is NaN or infinite.
    #[error(
        "step {step}: the {what} is {value} on {lines}; the adapter was not touched by it{}; lower the learning rate, mend the lines, or give --skip-nonfinite", last_good(.last)
    )]
    NotFinite {
        /// Optimizer step, counted from 1.
        step: u64,
        /// "loss" or "gradient norm".
        what: &'static str,
        /// The value.
        value: f32,
        /// The lines of the batches.
        lines: String,
        /// The newest checkpoint.
        last: Option<PathBuf>,
    },
    /// A checkpoint that could not be written.
    #[error("the checkpoint of step {step} was not saved: {cause}{}", last_good(.last))]
    CheckpointNotSaved {
        /// Steps done.
        step: u64,
        /// Why.
        cause: String,
        /// The newest checkpoint.
        last: Option<PathBuf>,
    },
    /// A checkpoint that is not what was written.
    #[error("{}: the checkpoint is damaged: {why}; delete it to go on without it", dir.display())]
    CheckpointDamaged {
        /// Its folder.
        dir: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// There are checkpoints, and none of them is whole.
    #[error("{}: none of {count} checkpoints is whole (the newest: {why}); give --overwrite to start anew", dir.display())]
    NoWholeCheckpoint {
        /// The folder of checkpoints.
        dir: PathBuf,
        /// How many there are.
        count: usize,
        /// What is wrong with the newest.
        why: String,
    },
    /// The folder holds a run already.
    #[error("{}: holds a run of {step} steps; go on with --resume, start anew with --overwrite, or choose another --out", dir.display())]
    HoldsARun {
        /// The run's folder.
        dir: PathBuf,
        /// Its newest checkpoint.
        step: u64,
    },
    /// A checkpoint of other settings or of another model.
    #[error("{}: not a checkpoint of this run: {what}; give what it was made with, or choose another --out", dir.display())]
    OtherRun {
        /// The checkpoint.
        dir: PathBuf,
        /// What differs.
        what: String,
    },
    /// Memory that is not there.
    #[error("{what} needs {need} of memory, and {have} {is}; {hint}")]
    TooLarge {
        /// What would be run.
        what: String,
        /// Predicted need.
        need: String,
        /// What there is.
        have: String,
        /// "is free", "is allowed".
        is: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// A line that the model has no positions for.
    #[error(
        "{}, line {line}: {tokens} tokens, the model has positions for {most}; split or shorten the line", path.display()
    )]
    LineTooLong {
        /// The data file.
        path: PathBuf,
        /// The line, counted from 1.
        line: u64,
        /// Its length with `<bos>` and `<eos>`.
        tokens: usize,
        /// What the model allows.
        most: usize,
    },
    /// A data file in which no token follows another.
    #[error("{}: no line has two tokens, so there is nothing to predict; give longer lines", path.display())]
    NothingToPredict {
        /// The data file.
        path: PathBuf,
    },
    /// A data file that cannot be read.
    #[error("cannot read {}: {cause}; check the path and its permissions", path.display())]
    ReadData {
        /// The file, as it was named.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// Data that is not what it was when a checkpoint was made.
    #[error("{}: not the data of the checkpoint: {what}; give the same data, or start anew in another folder", path.display())]
    OtherData {
        /// The (first) data file.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// A setting that makes no sense.
    #[error("{name}: want {want}, got {got}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// What would be right.
        want: String,
        /// What was given.
        got: String,
    },
    /// A file of settings that is none.
    #[error("{}: {problem}; correct the file", path.display())]
    Settings {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A batch that a recorded step has no room for.
    #[error("batch: want at most {want_rows} rows of {want_len} tokens, got {rows} of {len}")]
    BatchShape {
        /// Rows of the recording.
        want_rows: usize,
        /// Tokens of a row of the recording.
        want_len: usize,
        /// Rows given.
        rows: usize,
        /// Tokens of the longest row given.
        len: usize,
    },
    /// The observer asked to stop.
    #[error("stopped after step {step} of {total}; {}", go_on(.saved))]
    Stopped {
        /// Steps done.
        step: u64,
        /// Steps planned.
        total: u64,
        /// The checkpoint to go on from.
        saved: Option<PathBuf>,
    },
}

fn last_good(last: &Option<PathBuf>) -> String {
    match last {
        Some(dir) => format!("; the last good checkpoint is {}", dir.display()),
        None => "; there is no checkpoint yet".to_owned(),
    }
}

fn go_on(saved: &Option<PathBuf>) -> String {
    match saved {
        Some(dir) => {
            let dir = dir.display();
            format!("saved in {dir}; the same command with --resume goes on from there")
        }
        None => "nothing was saved".to_owned(),
    }
}
