//! What can go wrong in a benchmark. A figure that cannot be trusted is no error: it is a row without figures.

use std::path::PathBuf;

/// Result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The compiler or the device refused.
    #[error(transparent)]
    Core(#[from] tallow::Error),
    /// The processor, or what the environment says of it, is not what kernels are made for.
    #[error(transparent)]
    Cpu(#[from] tallow::cpu::Error),
    /// A model or an adapter could not be had.
    #[error(transparent)]
    Llm(#[from] tallow::llm::Error),
    /// A training step could not be built.
    #[error(transparent)]
    Train(#[from] tallow::train::Error),
    /// A work needs more memory than is free.
    #[error(
        "{what}: want {need} of memory, {have} is free; take a smaller --shape or --dtype bf16"
    )]
    Memory {
        /// Which work.
        what: String,
        /// Bytes it takes, printed.
        need: String,
        /// Bytes there are, printed.
        have: String,
    },
    /// A peer did not do what it was asked.
    #[error("{peer}: {what}")]
    Peer {
        /// Its name.
        peer: String,
        /// What happened, and what to do.
        what: String,
    },
    /// A setting that means nothing.
    #[error("{name}: want {want}, got \"{got}\"")]
    Setting {
        /// What is set.
        name: &'static str,
        /// What it accepts.
        want: &'static str,
        /// What it was given.
        got: String,
    },
    /// A report that cannot be read.
    #[error("{path}: {what}; want a file that `tallow bench --json` wrote")]
    Report {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A file that cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}
