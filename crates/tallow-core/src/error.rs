//! The crate's one error enum: fields, not sentences, so that callers can act on them.
//! Absent on purpose: input/output errors of files, which belong to the crates that read them.
use crate::types::{DType, Shape};
use std::panic::Location;

/// Result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, where, and what was wanted.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Operand shapes or dtypes do not fit the op.
    #[error("{op}: want {want}, got {}{}", list(got), at.map(|l| format!(" (built at {}:{})", l.file(), l.line())).unwrap_or_default())]
    Shape {
        /// Op that refused.
        op: &'static str,
        /// What it accepts.
        want: String,
        /// Operand types, printed.
        got: Vec<String>,
        /// Line of the caller that built the op.
        at: Option<&'static Location<'static>>,
    },
    /// A number inside an op is out of its range.
    #[error("{op}: want {want}, got {got}")]
    Number {
        /// Op that refused.
        op: &'static str,
        /// What it accepts.
        want: &'static str,
        /// The number.
        got: f32,
    },
    /// No backend kernel and no decomposition.
    #[error("no kernel for {op} on {device}")]
    NoKernel {
        /// The kernel's name and operand types.
        op: String,
        /// Device that was asked.
        device: String,
    },
    /// A gradient was asked of something that has none.
    #[error("gradient of {op}: {why}")]
    NoGradient {
        /// Op or value.
        op: String,
        /// Reason.
        why: String,
    },
    /// Bytes or values do not match a tensor.
    #[error("{what}: want {want}, got {got}")]
    Size {
        /// Transfer or binding.
        what: &'static str,
        /// Expected amount with unit.
        want: String,
        /// Given amount with unit.
        got: String,
    },
    /// A value was read as another type than it has.
    #[error("{what}: want {want}, got {got}")]
    DType {
        /// Transfer or binding.
        what: &'static str,
        /// Expected dtype.
        want: DType,
        /// Given dtype.
        got: DType,
    },
    /// The device refused or failed.
    #[error("{device}: {what}")]
    Device {
        /// Device name.
        device: String,
        /// What happened and what to do.
        what: String,
    },
    /// `Plan::verify` found a step that would corrupt memory. Always a bug in `plan`.
    #[error("plan step {step}: {what} (bug in tallow)")]
    PlanInvariant {
        /// Index of the step.
        step: usize,
        /// Broken rule.
        what: String,
    },
}

fn list(got: &[String]) -> String {
    got.join(", ")
}

impl Error {
    /// A shape error without a call site.
    pub fn shape(
        op: &'static str,
        want: impl Into<String>,
        got: &[&crate::types::TensorType],
    ) -> Self {
        Error::Shape {
            op,
            want: want.into(),
            got: got.iter().map(|t| t.to_string()).collect(),
            at: None,
        }
    }
    /// The same error with the line that built the op.
    pub fn located(self, loc: &'static Location<'static>) -> Self {
        match self {
            Error::Shape { op, want, got, .. } => Error::Shape {
                op,
                want,
                got,
                at: Some(loc),
            },
            other => other,
        }
    }
    /// A size mismatch, printed with `unit`.
    pub fn size(what: &'static str, want: usize, got: usize, unit: &str) -> Self {
        Error::Size {
            what,
            want: format!("{want} {unit}"),
            got: format!("{got} {unit}"),
        }
    }
}

impl From<Shape> for String {
    fn from(s: Shape) -> String {
        s.to_string()
    }
}
