//! Everything that can go wrong in this crate, one enum.
//! Invariant: a message is one lower-case sentence that says what, where and what to do.
//! Absent on purpose: error chains; the cause is part of the sentence, so it is never printed twice.

use std::fmt::{self, Write as _};
use std::io;
use std::path::{Path, PathBuf};

/// The result of every fallible function in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong with a file, a setting or a value that came from outside.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}: {cause}; {hint}", path.display())]
    Io {
        /// What was tried, as a verb: "read", "create the folder".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        cause: io::Error,
        /// What to do about it.
        hint: &'static str,
    },
    /// A file that must be there is not.
    #[error("{} does not exist; {hint}", path.display())]
    MissingFile {
        /// The file that was looked for.
        path: PathBuf,
        /// What to do about it.
        hint: String,
    },
    /// A file is not the JSON it should be.
    #[error("{}: not valid JSON: {problem}; correct the file or download it again", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why the parser stopped.
        problem: String,
    },
    /// A key of a JSON file has a value that makes no sense.
    #[error("{}: `{key}`: want {want}, got {got}; correct the file", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The key, with dots for nesting.
        key: String,
        /// What would be right.
        want: String,
        /// What is there.
        got: String,
    },
    /// A model architecture that this version does not know.
    #[error("{}: architecture {found} is not supported; known architectures: {known}", path.display())]
    Architecture {
        /// The configuration file.
        path: PathBuf,
        /// The architecture found, quoted.
        found: String,
        /// The architectures that would work.
        known: String,
    },
    /// A feature of a file format that this version does not have.
    #[error("{}: {what} is not supported; {hint}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The feature, by the name the file gives it.
        what: String,
        /// What to do about it.
        hint: String,
    },
    /// A safetensors file that is truncated or contradicts itself.
    #[error("{}: not a usable safetensors file: {problem}; download or copy it again", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// An index of shards that cannot be followed.
    #[error("{}: {problem}; download the checkpoint again", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A checkpoint does not hold the tensors its configuration calls for.
    #[error("{}: {problem} ({count}): {names}; {hint}", path.display())]
    Tensors {
        /// The file or folder.
        path: PathBuf,
        /// How many tensors are concerned.
        count: usize,
        /// "missing tensors", "tensors that do not belong to ...".
        problem: &'static str,
        /// The first few of them.
        names: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{}: tensor {name}: want shape {want:?}, got {got:?}; use the configuration that belongs to these weights", path.display())]
    TensorShape {
        /// The file.
        path: PathBuf,
        /// The tensor, quoted.
        name: String,
        /// The shape by the configuration.
        want: Vec<usize>,
        /// The shape in the file.
        got: Vec<usize>,
    },
    /// A tensor is stored in a type that cannot be used here.
    #[error("{}: tensor {name} is stored as {got}, want {want}; convert the file first", path.display())]
    TensorType {
        /// The file.
        path: PathBuf,
        /// The tensor, quoted.
        name: String,
        /// The type in the file.
        got: String,
        /// The types that would work.
        want: &'static str,
    },
    /// A tensor holds NaN or infinity.
    #[error("{}: tensor {name} holds {value} at element {index}; the file is damaged or its training diverged, use another", path.display())]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor, quoted.
        name: String,
        /// The first bad value.
        value: f32,
        /// Its place in row-major order.
        index: usize,
    },
    /// An adapter that fits the base model only in part.
    #[error("{}: {bound} of {total} modules bound; these did not: {rest}; use the base model this adapter was trained on", path.display())]
    PartialAdapter {
        /// The adapter folder.
        path: PathBuf,
        /// Modules that found their place.
        bound: usize,
        /// Modules that the adapter has or its configuration asks for.
        total: usize,
        /// The others, each with its reason.
        rest: String,
    },
    /// An adapter that selects nothing of the base model.
    #[error("{}: target_modules {targets} match no projection of the base model; its projections are named like {example}", path.display())]
    NoTargets {
        /// The adapter folder or configuration.
        path: PathBuf,
        /// The selection, as it was given.
        targets: String,
        /// One projection of the base model.
        example: String,
    },
    /// A regular expression that cannot be used.
    #[error("{}: `{key}`: pattern {pattern}: {problem}; correct the pattern", path.display())]
    Pattern {
        /// The file.
        path: PathBuf,
        /// The key that holds the pattern.
        key: &'static str,
        /// The pattern, quoted.
        pattern: String,
        /// What the regex engine said.
        problem: String,
    },
    /// The tokenizer could not be read or used.
    #[error("{}: {problem}; {hint}", path.display())]
    Tokenizer {
        /// `tokenizer.json`.
        path: PathBuf,
        /// What went wrong.
        problem: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// A line of a data file cannot be used.
    #[error("{}, line {line}: {problem}; {hint}", path.display())]
    Data {
        /// The data file.
        path: PathBuf,
        /// The line, counted from 1.
        line: u64,
        /// What is wrong.
        problem: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// A data file without a single example.
    #[error("{}: holds no examples; give a file with a line {{\"text\": \"...\"}} for each", path.display())]
    NoExamples {
        /// The data file.
        path: PathBuf,
    },
    /// A chat template that is missing, cannot be used, or refuses a chat.
    #[error("{}: chat template: {problem}; {hint}", path.display())]
    Chat {
        /// The file it is in, or the model folder.
        path: PathBuf,
        /// What went wrong.
        problem: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// A setting that makes no sense.
    #[error("{name}: want {want}, got {got}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// What would be right.
        want: &'static str,
        /// What was given.
        got: String,
    },
    /// Logits that no token can be drawn from.
    #[error(
        "logits: {problem}; the model or its adapter is damaged, or the compute type overflowed: try --dtype f32"
    )]
    Logits {
        /// What is wrong with them.
        problem: String,
    },
    /// More tokens than a model or its cache can hold.
    #[error(
        "{tokens} tokens are too many: the model, or the cache made for it, holds {limit}; shorten the prompt"
    )]
    TooLong {
        /// Tokens given.
        tokens: usize,
        /// The most that fit.
        limit: usize,
    },
    /// Reference outputs that cannot be compared with.
    #[error("{}: {problem}; lay the folder out as tests/goldens/README.md says", path.display())]
    Reference {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The device refused, or a tensor operation did not fit.
    #[error(transparent)]
    Core(#[from] tallow_core::Error),
}

/// Quotes a name that came from a file: one line, no control characters, at most 80 characters.
pub(crate) fn quote(name: &str) -> String {
    const LONGEST: usize = 80;
    let mut out = String::from("\"");
    for (i, c) in name.chars().enumerate() {
        if i == LONGEST {
            out.push('…');
            break;
        }
        if c == '\'' {
            out.push(c);
        } else {
            let _ = write!(out, "{}", c.escape_debug());
        }
    }
    out.push('"');
    out
}

/// Lists the first six names and counts the rest.
pub(crate) fn list<S: fmt::Display>(names: impl IntoIterator<Item = S>) -> String {
    const SHOWN: usize = 6;
    let mut out = String::new();
    let mut more = 0_usize;
    for (i, name) in names.into_iter().enumerate() {
        if i >= SHOWN {
            more += 1;
        } else {
            let comma = if i == 0 { "" } else { ", " };
            let _ = write!(out, "{comma}{name}");
        }
    }
    if more > 0 {
        let _ = write!(out, " and {more} more");
    }
    out
}

/// An [`Error::Io`] in the making: `io_error("read", path, "check the path")` for `map_err`.
pub(crate) fn io_error(
    action: &'static str,
    path: &Path,
    hint: &'static str,
) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_path_buf();
    move |cause| Error::Io {
        action,
        path,
        cause,
        hint,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_stay_on_one_short_line() {
        let quoted = quote(&format!("a\n\u{1b}[31m'{}", "x".repeat(500)));
        assert!(quoted.starts_with("\"a\\n\\u{1b}[31m'xxx"));
        assert!(quoted.ends_with("x…\""));
        assert!(quoted.chars().count() < 100);
    }

    #[test]
    fn long_lists_are_counted() {
        assert_eq!(list(["a", "b"]), "a, b");
        assert_eq!(list(1..=9), "1, 2, 3, 4, 5, 6 and 3 more");
    }
}
