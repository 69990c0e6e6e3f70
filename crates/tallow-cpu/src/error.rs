//! What can go wrong in the CPU backend: bad environment variables.
//! Invariant: each message says what was found, where, and what would be accepted.
//! Absent on purpose: kernel errors. A kernel is given checked shapes and cannot fail.

/// Errors of this crate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `TALLOW_ISA` names an instruction set that is unknown or that this machine lacks.
    #[error("TALLOW_ISA: want one of {valid} on this machine, got \"{value}\"")]
    Isa {
        /// What the variable held.
        value: String,
        /// The accepted values, separated by commas.
        valid: String,
    },
    /// `TALLOW_THREADS` is not a usable number of threads.
    #[error("TALLOW_THREADS: want a whole number from 1 to {max}, got \"{value}\"")]
    Threads {
        /// What the variable held.
        value: String,
        /// The largest accepted number.
        max: usize,
    },
}
