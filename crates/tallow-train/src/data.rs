//! Rows from files: read whole where they are small, else as they are needed; shuffled, mixed, packed.
//! Invariant: memory does not grow with the size of the files; what comes next depends on the files, the settings
//! and a state of a few numbers for each row in hand, which can be written down and restored.
//! Absent on purpose: batches and devices.

mod draw;
pub mod pack;
mod resident;
pub(crate) mod source;
pub(crate) mod spool;
mod stream;

pub(crate) use source::Source;
pub(crate) use spool::Spool;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};
use tallow_llm::data::{Place, Row};

use crate::{Error, Result};

/// How much is held in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Files of up to this size together are read whole and shuffled completely.
    pub resident_bytes: u64,
    /// Rows from which the next one is drawn where files are larger.
    pub buffer_rows: usize,
    /// Tokens of these rows, at most (and a row more).
    pub buffer_tokens: usize,
}

impl Limits {
    /// 64 MiB of files; buffers of about 25 MiB at most.
    pub const USUAL: Self = Self {
        resident_bytes: 64 << 20,
        buffer_rows: 1 << 14,
        buffer_tokens: 4 << 20,
    };
}

/// A file to read, and its name for people.
#[derive(Clone, Debug)]
pub(crate) struct Input {
    pub(crate) path: PathBuf,
    pub(crate) shown: PathBuf,
    /// Where the file comes from that is still being written: standard input.
    pub(crate) spool: Option<Arc<Mutex<Spool>>>,
}

impl Input {
    /// A file as it is.
    pub(crate) fn file(path: PathBuf) -> Self {
        Self {
            shown: path.clone(),
            path,
            spool: None,
        }
    }

    /// What comes from elsewhere, of which up to `first_bytes` and a little more are read now.
    pub(crate) fn spooled(
        spool: io::Result<Spool>,
        shown: PathBuf,
        first_bytes: u64,
    ) -> Result<Self> {
        let read = spool.and_then(|mut spool| {
            spool.reach(first_bytes)?;
            Ok(spool)
        });
        match read {
            Ok(spool) => Ok(Self {
                path: spool.path().to_path_buf(),
                shown,
                spool: Some(Arc::new(Mutex::new(spool))),
            }),
            Err(cause) => Err(Error::ReadData { path: shown, cause }),
        }
    }

    /// Is there anything behind this many bytes that was not there before, but is now?
    pub(crate) fn grow(&self, offset: u64) -> Result<bool> {
        let Some(spool) = &self.spool else {
            return Ok(false);
        };
        let mut spool = spool.lock().unwrap_or_else(PoisonError::into_inner);
        spool.reach(offset).map_err(|cause| Error::ReadData {
            path: self.shown.clone(),
            cause,
        })
    }

    /// An error about this file, by the name people know.
    pub(crate) fn named(&self, mut e: tallow_llm::Error) -> tallow_llm::Error {
        use tallow_llm::Error::{Data, NoExamples};
        if let Data { path, .. } | NoExamples { path } = &mut e
            && *path == self.path
        {
            path.clone_from(&self.shown);
        }
        e
    }
}

/// Where a row comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    /// Number of the file.
    pub(crate) file: usize,
    /// Where its line begins.
    pub(crate) place: Place,
    /// Its number among the rows in memory, where they all are.
    pub(crate) row: usize,
    /// Pass over the data, from 0.
    pub(crate) epoch: u64,
}

impl Origin {
    pub(crate) fn state(&self) -> Value {
        json!([
            self.file,
            self.place.offset,
            self.place.line,
            self.row,
            self.epoch
        ])
    }

    pub(crate) fn restore(state: &Value) -> Option<Self> {
        let n = |i: usize| state[i].as_u64();
        Some(Self {
            file: n(0)? as usize,
            place: Place {
                offset: n(1)?,
                line: n(2)?,
            },
            row: n(3)? as usize,
            epoch: n(4)?,
        })
    }
}

/// A row with where it comes from.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sample {
    pub(crate) row: Row,
    pub(crate) origin: Origin,
}

/// Origins as a list, and back.
pub(crate) fn origins(samples: &[Sample]) -> Value {
    samples.iter().map(|s| s.origin.state()).collect()
}

pub(crate) fn read_origins(state: &Value) -> Option<Vec<Origin>> {
    state.as_array()?.iter().map(Origin::restore).collect()
}
