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
        "step {step}: the {what} is {value}, so training stopped and nothing was saved; lower the learning rate or clip the gradient"
    )]
    NotFinite {
        /// Optimizer step, counted from 1.
        step: u64,
        /// "loss" or "gradient norm".
        what: &'static str,
        /// The value.
        value: f32,
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
    #[error("stopped after step {step} of {total}; nothing was saved")]
    Stopped {
        /// Steps done.
        step: u64,
        /// Steps planned.
        total: u64,
    },
}
