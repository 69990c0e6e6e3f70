//! Checkpoints: everything a run needs to go on bit for bit, in folders `step-000123` that are whole or not there.
//! Invariant: a checkpoint is read only if every file of it has the length and the CRC-32 that its manifest names;
//! the newest whole one is never removed before a newer one is whole.
//! Absent on purpose: a state between two steps of accumulation; checkpoints are made at the end of steps.
use crate::{Error, Evaluation, Result, step::Snapshot};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};
use tallow_llm::{files, model::Model, weights::Weights};

/// The folder of checkpoints inside a run's folder.
pub const FOLDER: &str = "checkpoints";
/// Version of the format.
const FORMAT: u32 = 1;
/// Parameters, moments and losses, in a checkpoint's folder.
pub const STATE: &str = "state.safetensors";
const ABOUT: &str = "checkpoint.json";
const MANIFEST: &str = "manifest.json";
/// No JSON file of a checkpoint may be longer.
const LONGEST_JSON_BYTES: u64 = 1 << 30;
/// Bytes of each end of a weight that tell a model from another.
const SAMPLED_BYTES: usize = 4096;

/// What a checkpoint says about its run, beside the numbers in its tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct About {
    /// Version of the format.
    pub format: u32,
    /// Version of tallow.
    pub version: String,
    /// Steps done.
    pub step: u64,
    /// Steps that changed the parameters: what AdamW counts.
    pub updates: u64,
    /// Steps planned, which the schedule needs.
    pub total: u64,
    /// Every setting.
    pub config: Map<String, Value>,
    /// The base model, see [`fingerprint`].
    pub model: u32,
    /// The data's cursor.
    pub feed: Value,
    /// CPU threads, where the device counts them.
    pub threads: Option<usize>,
    /// Kernels of the plan of each batch shape, in order.
    pub kernels: BTreeMap<String, Vec<String>>,
    /// Those of them that won over others, by spec: a run that goes on takes them again.
    #[serde(default)]
    pub choices: BTreeMap<String, String>,
    /// Targets counted.
    pub tokens: u64,
    /// Time in steps, in seconds.
    pub train_seconds: f64,
    /// Steps skipped because the loss or gradient was not finite.
    pub skipped: u64,
    /// Batches left out because they had no target.
    pub empty: u64,
    /// The last evaluation, and the step after which it was made.
    pub valid: Option<(u64, Evaluation)>,
    /// The best evaluations: loss and step, the best first.
    pub best: Vec<(f64, u64)>,
    /// Evaluations since the best one.
    pub stale: u64,
}

/// A whole checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// About its run.
    pub about: About,
    /// Parameters and moments.
    pub state: Snapshot,
    /// Loss of each step so far.
    pub losses: Vec<f32>,
}

/// Length and checksum of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Sum {
    bytes: u64,
    crc32: u32,
}

/// A checkpoint that cannot be used, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damaged {
    /// Its folder.
    pub dir: PathBuf,
    /// What is wrong.
    pub why: String,
}

/// The checkpoints of one run.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// Of the run in `out`; nothing is created yet.
    pub fn new(out: &Path) -> Self {
        Store {
            dir: out.join(FOLDER),
        }
    }

    /// The folder of the checkpoint after a step.
    pub fn path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("step-{step:06}"))
    }

    /// Steps that have a checkpoint, whole or not, the newest first.
    pub fn steps(&self) -> Vec<u64> {
        let Ok(all) = fs::read_dir(&self.dir) else {
            return vec![];
        };
        let step = |e: fs::DirEntry| e.file_name().to_str()?.strip_prefix("step-")?.parse().ok();
        let mut steps: Vec<u64> = all.filter_map(|e| step(e.ok()?)).collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        steps
    }

    /// Removes what a killed run left half-made. The folder is only made with its first checkpoint.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn prepare(&self) -> Result<()> {
        if self.dir.is_dir() {
            files::prepare_output_dir(&self.dir)?;
            files::sweep(&self.dir)?;
        }
        Ok(())
    }

    /// Writes a checkpoint; `more` may put further files into its folder. Returns the folder and its size in bytes.
    ///
    /// # Errors
    /// [`Error::CheckpointNotSaved`]; the checkpoints before are as they were.
    pub fn save(
        &self,
        checkpoint: &Checkpoint,
        more: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<(PathBuf, u64)> {
        let step = checkpoint.about.step;
        let dir = self.path(step);
        let mut bytes = 0;
        let ready = match self.dir.is_dir() {
            true => Ok(()),
            false => files::prepare_output_dir(&self.dir),
        };
        let fill = |temp: &Path| -> Result<()> {
            more(temp)?;
            files::write_synced(&temp.join(STATE), &tensors(checkpoint)?)?;
            let about = serde_json::to_vec_pretty(&checkpoint.about).map_err(bug)?;
            files::write_synced(&temp.join(ABOUT), &about)?;
            let sums = sums(temp)?;
            bytes = sums.values().map(|s| s.bytes).sum();
            let manifest = serde_json::to_vec_pretty(&sums).map_err(bug)?;
            Ok(files::write_synced(&temp.join(MANIFEST), &manifest)?)
        };
        let made = ready.map_err(Error::from);
        let made = made.and_then(|()| files::write_folder_atomic(&dir, fill));
        made.map_err(|cause| Error::CheckpointNotSaved {
            step,
            cause: cause.to_string(),
            last: self.steps().first().map(|s| self.path(*s)),
        })?;
        Ok((dir, bytes))
    }

    /// Reads the checkpoint after a step.
    ///
    /// # Errors
    /// [`Error::CheckpointDamaged`].
    pub fn load(&self, step: u64) -> Result<Checkpoint> {
        open(&self.path(step))
    }

    /// The newest whole checkpoint, and the newer ones that are not.
    pub fn newest(&self) -> (Option<Checkpoint>, Vec<Damaged>) {
        self.newest_up_to(u64::MAX)
    }

    /// As [`Store::newest`], of checkpoints after step `last` or before it.
    pub fn newest_up_to(&self, last: u64) -> (Option<Checkpoint>, Vec<Damaged>) {
        let mut damaged = vec![];
        for step in self.steps().into_iter().filter(|s| *s <= last) {
            let dir = self.path(step);
            match read(&dir) {
                Ok(found) => return (Some(found), damaged),
                Err(why) => damaged.push(Damaged { dir, why }),
            }
        }
        (None, damaged)
    }

    /// Removes all but the newest `last` and those of `best`.
    ///
    /// # Errors
    /// A folder that cannot be removed.
    pub fn prune(&self, last: usize, best: &BTreeSet<u64>) -> Result<()> {
        for step in self.steps().into_iter().skip(last.max(1)) {
            if !best.contains(&step) {
                files::remove_folder(&self.path(step))?;
            }
        }
        Ok(())
    }
}

/// Reads the checkpoint in a folder, wherever it lies.
///
/// # Errors
/// [`Error::CheckpointDamaged`].
pub fn open(dir: &Path) -> Result<Checkpoint> {
    read(dir).map_err(|why| Error::CheckpointDamaged {
        dir: dir.to_path_buf(),
        why,
    })
}

/// Is this the folder of a checkpoint, whole or not?
pub fn is_folder(dir: &Path) -> bool {
    dir.join(MANIFEST).is_file() && dir.join(ABOUT).is_file()
}

/// Tells a base model from another: CRC-32C of names, types, and both ends of every weight.
///
/// # Errors
/// A device that fails.
pub fn fingerprint(model: &Model) -> Result<u32> {
    let mut sum = 0;
    let mut bytes = vec![0; SAMPLED_BYTES];
    for (name, t) in model.tensors() {
        sum = crc32c::crc32c_append(sum, format!("{name} {};", t.ty()).as_bytes());
        let Some(buffer) = t.buffer() else { continue };
        let n = buffer.bytes.min(SAMPLED_BYTES);
        for at in [0, buffer.bytes - n] {
            let backend = model.session.backend();
            backend.download(buffer, at, &mut bytes[..n])?;
            sum = crc32c::crc32c_append(sum, &bytes[..n]);
        }
    }
    Ok(sum)
}

fn bug(e: serde_json::Error) -> Error {
    Error::CheckpointNotSaved {
        step: 0,
        cause: format!("bug in tallow: {e}"),
        last: None,
    }
}

/// All tensors as one safetensors file.
fn tensors(c: &Checkpoint) -> Result<Vec<u8>> {
    struct Flat<'a>(&'a [f32], [usize; 1]);
    impl safetensors::View for Flat<'_> {
        fn dtype(&self) -> safetensors::Dtype {
            safetensors::Dtype::F32
        }
        fn shape(&self) -> &[usize] {
            &self.1
        }
        fn data(&self) -> Cow<'_, [u8]> {
            Cow::Owned(self.0.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        fn data_len(&self) -> usize {
            size_of_val(self.0)
        }
    }
    let all = [
        ("params", &c.state.params),
        ("m", &c.state.m),
        ("v", &c.state.v),
        ("losses", &c.losses),
    ];
    let views = all.map(|(name, v)| (name, Flat(v, [v.len()])));
    safetensors::serialize(views, None).map_err(|e| Error::CheckpointNotSaved {
        step: c.about.step,
        cause: e.to_string(),
        last: None,
    })
}

/// Length and checksum of every file in a folder.
fn sums(dir: &Path) -> Result<BTreeMap<String, Sum>> {
    let fail = |cause| tallow_llm::Error::Io {
        action: "read",
        path: dir.to_path_buf(),
        cause,
        hint: "check the disk",
    };
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let bytes = fs::read(entry.path()).map_err(fail)?;
        let sum = Sum {
            bytes: bytes.len() as u64,
            crc32: crc32c::crc32c(&bytes),
        };
        all.insert(entry.file_name().to_string_lossy().into_owned(), sum);
    }
    Ok(all)
}

/// A checkpoint, or what is wrong with it.
fn read(dir: &Path) -> Result<Checkpoint, String> {
    let text = |e: tallow_llm::Error| e.to_string();
    let json = |name: &str| {
        let hint = "it is part of every checkpoint";
        files::read_bounded(&dir.join(name), LONGEST_JSON_BYTES, hint).map_err(text)
    };
    let wanted: BTreeMap<String, Sum> = serde_json::from_slice(&json(MANIFEST)?)
        .map_err(|e| format!("{MANIFEST} is not readable ({e})"))?;
    for name in [STATE, ABOUT] {
        if !wanted.contains_key(name) {
            return Err(format!("{MANIFEST} does not name {name}"));
        }
    }
    let mut found = sums(dir).map_err(|e| e.to_string())?;
    for (name, want) in &wanted {
        match found.remove(name) {
            None => return Err(format!("{name} is missing")),
            Some(got) if got.bytes != want.bytes => {
                return Err(format!("{name} has {} bytes of {}", got.bytes, want.bytes));
            }
            Some(got) if got != *want => {
                return Err(format!("{name} was changed: its checksum is wrong"));
            }
            Some(_) => {}
        }
    }
    let about: About = serde_json::from_slice(&json(ABOUT)?)
        .map_err(|e| format!("{ABOUT} is not readable ({e})"))?;
    if about.format != FORMAT {
        let got = about.format;
        return Err(format!("it has format {got}, this version reads {FORMAT}"));
    }
    let weights = Weights::open_file(&dir.join(STATE)).map_err(text)?;
    let tensor = |name: &str| weights.get(name).and_then(|t| t.to_f32()).map_err(text);
    Ok(Checkpoint {
        state: Snapshot {
            params: tensor("params")?,
            m: tensor("m")?,
            v: tensor("v")?,
            done: about.step,
            updates: about.updates,
        },
        losses: tensor("losses")?,
        about,
    })
}

impl About {
    /// The version of the format that is written.
    pub const FORMAT: u32 = FORMAT;
}
