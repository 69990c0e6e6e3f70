//! A session, the reference folders, changed copies of them, and short ways to whole results.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::{Dtype, View};
use serde_json::{Map, Value};
use tallow_core::op::Role;
use tallow_core::session::Session;
use tallow_core::tensor::Tensor;
use tallow_core::types::DType;
use tallow_cpu::{Cpu, CpuOptions};
use tallow_llm::{Adapter, LoadOptions, Model, Weights};
use tempfile::TempDir;

pub(crate) const GOLDENS: [&str; 5] = [
    "llama",
    "llama-dora",
    "llama3-rope",
    "qwen2",
    "mistral-window",
];
/// A position that means padding, a target that is not counted.
pub(crate) const NONE: u32 = u32::MAX;

pub(crate) fn session() -> Session {
    let options = CpuOptions {
        threads: Some(2),
        weights: DType::F32,
        isa: None,
    };
    Session::new(Arc::new(Cpu::open(&options).unwrap()))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub(crate) fn golden(name: &str) -> PathBuf {
    root().join("tests/goldens").join(name)
}

pub(crate) fn tiny() -> PathBuf {
    root().join("assets/tiny")
}

pub(crate) fn load(dir: &Path) -> Model {
    Model::load(&session(), dir, &LoadOptions::default()).unwrap()
}

pub(crate) fn adapter(model: &Model, dir: &Path) -> Adapter {
    Adapter::load(model, &dir.join("adapter"), Role::State)
        .unwrap()
        .0
}

pub(crate) fn object(path: &Path) -> Map<String, Value> {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A copy of a folder with its `config.json` changed.
pub(crate) fn with_config(from: &Path, change: impl FnOnce(&mut Map<String, Value>)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy(from, dir.path());
    let path = dir.path().join("config.json");
    let mut config = object(&path);
    change(&mut config);
    fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
    dir
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            // Not `fs::copy`: the original may be read-only.
            fs::write(&target, fs::read(entry.path()).unwrap()).unwrap();
        }
    }
}

/// A tensor on its way into a file.
#[derive(Clone)]
pub(crate) struct Stored {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl View for Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// The tensors of a safetensors file.
pub(crate) fn tensors(path: &Path) -> Vec<Stored> {
    let file = Weights::open_file(path).unwrap();
    let one = |t: &tallow_llm::TensorView| Stored {
        name: t.name.clone(),
        dtype: t.dtype,
        shape: t.shape.clone(),
        bytes: t.as_bytes().to_vec(),
    };
    file.iter().map(one).collect()
}

pub(crate) fn write_tensors(path: &Path, tensors: Vec<Stored>) {
    let named = tensors.into_iter().map(|t| (t.name.clone(), t));
    fs::write(path, safetensors::serialize(named, None).unwrap()).unwrap();
}

/// Rewrites a safetensors file in place.
pub(crate) fn edit(path: &Path, change: impl FnOnce(&mut Vec<Stored>)) {
    let mut all = tensors(path);
    change(&mut all);
    write_tensors(path, all);
}

/// Token ids that look random, below `vocab`.
pub(crate) fn some_ids(n: usize, vocab: usize) -> Vec<u32> {
    let one = |i: usize| (i * 7919 + 13) * 104_729 % 65_537 % vocab;
    (0..n).map(|i| one(i) as u32).collect()
}

/// Rows of one length with positions from 0, as tensors.
pub(crate) fn rows(model: &Model, ids: &[u32], b: usize) -> (Tensor, Tensor) {
    let t = ids.len() / b;
    let pos: Vec<u32> = (0..b).flat_map(|_| 0..t as u32).collect();
    leaves(model, ids, &pos, b)
}

/// Ids and positions `[b, t]` as tensors.
pub(crate) fn leaves(model: &Model, ids: &[u32], pos: &[u32], b: usize) -> (Tensor, Tensor) {
    let s = &model.session;
    let shape = [b, ids.len() / b];
    let leaf = |v: &[u32]| s.tensor_u32(v, shape, Role::Data).unwrap();
    (leaf(ids), leaf(pos))
}

/// Logits of one row of ids, `t` times `vocab`.
pub(crate) fn logits(model: &Model, adapter: Option<&Adapter>, ids: &[u32]) -> Vec<Vec<f32>> {
    let (id, pos) = rows(model, ids, 1);
    let hidden = model.hidden(&id, &pos, adapter, None).unwrap();
    let all = model
        .session
        .read(&model.logits_with(&hidden.x, adapter).unwrap());
    let all = all.unwrap();
    all.chunks(model.config.vocab)
        .map(<[f32]>::to_vec)
        .collect()
}

/// The largest difference.
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let each = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    each.fold(0.0, |m, d| if d > m || d.is_nan() { d } else { m })
}

/// The message of an error: one short line.
pub(crate) fn message<T>(result: tallow_llm::Result<T>) -> String {
    let Err(error) = result else {
        panic!("want an error, got a value");
    };
    let text = error.to_string();
    assert!(!text.contains('\n') && text.len() < 1200, "{text}");
    text
}
