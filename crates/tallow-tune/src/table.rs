//! What was measured, by device: one file for each.
//! Invariant: a file is whole and of this device and format, or it counts as empty; it is written beside, synced and
//! renamed, with what others wrote meanwhile, so that processes at work together only ever lose an entry, never a file.
//! Absent on purpose: locks.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tallow_core::kernel::{Candidate, KernelSpec};

use crate::CLEARLY;
use crate::trial::Tried;

/// Of the file. Others are not read.
const FORMAT: u32 = 1;

/// What became of the candidates of one spec, in the backend's order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Entry {
    tried: Vec<(String, Tried)>,
}

impl Entry {
    pub(crate) fn new(c: &[Candidate], tried: Vec<Tried>) -> Self {
        let names = c.iter().map(|c| c.name.to_owned());
        Entry {
            tried: names.zip(tried).collect(),
        }
    }

    /// The fastest of those that passed, and why; `favourite` unless another one is clearly faster. `None` if none
    /// passed, or these are not the candidates.
    pub(crate) fn best(&self, c: &[Candidate], favourite: usize) -> Option<(usize, String)> {
        let same = self
            .tried
            .iter()
            .map(|t| &*t.0)
            .eq(c.iter().map(|c| c.name));
        if !same {
            return None;
        }
        let mut passed: Vec<(usize, f64)> = vec![];
        for (i, (_, tried)) in self.tried.iter().enumerate() {
            if let Tried::Seconds(s) = tried {
                passed.push((i, *s));
            }
        }
        passed.sort_by(|a, b| a.1.total_cmp(&b.1));
        let first = *passed.first()?;
        let kept = passed.iter().find(|p| p.0 == favourite);
        let won = *kept.filter(|p| first.1 >= CLEARLY * p.1).unwrap_or(&first);
        let mut why = format!("measured: {}", micros(won.1));
        if let Some(next) = passed.iter().find(|p| p.0 != won.0) {
            why += &format!(", next {}", micros(next.1));
        }
        for (name, tried) in &self.tried {
            if let Tried::Wrong(what) | Tried::Refused(what) = tried {
                why += &format!("; {name} is out: {what}");
            }
        }
        Some((won.0, why))
    }

    /// Why there is no best one.
    pub(crate) fn none(self) -> Hopeless {
        let wrong = self.tried.iter().all(|t| matches!(t.1, Tried::Wrong(_)));
        let mut all = vec![];
        for (name, tried) in self.tried {
            if let Tried::Wrong(what) | Tried::Refused(what) = tried {
                all.push(format!("{name} {what}"));
            }
        }
        let what = all.join(", ");
        Hopeless { wrong, what }
    }
}

/// What is known of a spec that has no candidate with a time.
#[derive(Clone, Debug)]
pub(crate) struct Hopeless {
    /// Every candidate ran and failed its check.
    pub(crate) wrong: bool,
    /// What each candidate did, in one line.
    pub(crate) what: String,
}

fn micros(seconds: f64) -> String {
    let us = seconds * 1e6;
    match us {
        ..100.0 => format!("{us:.1} µs"),
        100.0..10_000.0 => format!("{us:.0} µs"),
        _ => format!("{:.1} ms", us / 1e3),
    }
}

/// What an entry is found by: the spec, and whose times they are.
pub(crate) fn key(spec: &KernelSpec, c: &[Candidate]) -> String {
    let names: Vec<&str> = c.iter().map(|c| c.name).collect();
    format!("{} | {}", spec.key(), names.join(" "))
}

/// The file.
#[derive(Serialize, Deserialize)]
struct File {
    format: u32,
    device: String,
    entries: BTreeMap<String, Entry>,
}

/// The entries of one device.
pub(crate) struct Table {
    path: Option<PathBuf>,
    device: String,
    entries: BTreeMap<String, Entry>,
}

impl Table {
    /// The table of `device` in `folder`; a word about a file that is there and is not used.
    pub(crate) fn open(folder: Option<&Path>, device: &str) -> (Self, Option<String>) {
        let path = folder.map(|f| f.join(name(device)));
        let (entries, trouble) = match path.as_deref().map(|p| read(p, device)) {
            Some(Ok(entries)) => (entries, None),
            Some(Err(what)) => (BTreeMap::new(), Some(what)),
            None => (BTreeMap::new(), None),
        };
        let device = device.to_owned();
        let table = Table {
            path,
            device,
            entries,
        };
        (table, trouble)
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Entry> {
        self.entries.get(key)
    }

    pub(crate) fn put(&mut self, key: String, entry: Entry) {
        self.entries.insert(key, entry);
    }

    /// Writes what is known, with what others wrote since. Where to; `None`: tables are not kept.
    pub(crate) fn save(&mut self) -> std::io::Result<Option<PathBuf>> {
        let Some(path) = self.path.clone() else {
            return Ok(None);
        };
        // What cannot be read is replaced.
        for (key, entry) in read(&path, &self.device).unwrap_or_default() {
            self.entries.entry(key).or_insert(entry);
        }
        let file = File {
            format: FORMAT,
            device: self.device.clone(),
            entries: self.entries.clone(),
        };
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder)?;
        let mut beside = tempfile::NamedTempFile::new_in(folder)?;
        beside.write_all(serde_json::to_string_pretty(&file)?.as_bytes())?;
        beside.as_file().sync_all()?;
        beside.persist(&path)?;
        Ok(Some(path))
    }
}

/// A file name that says which device, and a number that tells all of them apart.
fn name(device: &str) -> String {
    let word: String = device
        .chars()
        .take_while(char::is_ascii_alphanumeric)
        .collect();
    let step = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
    let number = device.bytes().fold(0xcbf2_9ce4_8422_2325, step);
    format!("{word}-{number:016x}.json")
}

/// The entries of a file; none if it is not there. What is wrong with it, in one line.
fn read(path: &Path, device: &str) -> Result<BTreeMap<String, Entry>, String> {
    let wrong = |what: String| {
        let one_line = what.replace(char::is_control, " ");
        format!(
            "{}: {one_line}; kernels are measured anew, and the file is replaced",
            path.display()
        )
    };
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(e) => return Err(wrong(e.to_string())),
    };
    let file: File = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
    if file.format != FORMAT {
        return Err(wrong(format!("want format {FORMAT}, got {}", file.format)));
    }
    if file.device != device {
        return Err(wrong(format!("of another device, {}", file.device)));
    }
    let sane = |t: &(String, Tried)| match t.1 {
        Tried::Seconds(s) => s.is_finite() && s > 0.0,
        Tried::Wrong(_) | Tried::Refused(_) => true,
    };
    match file.entries.values().all(|e| e.tried.iter().all(sane)) {
        true => Ok(file.entries),
        false => Err(wrong(
            "holds a time that could not have happened".to_owned(),
        )),
    }
}
