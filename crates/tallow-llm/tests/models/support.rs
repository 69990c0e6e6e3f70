//! A session, the reference folders, and changed copies of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};
use tallow_core::session::Session;
use tallow_core::types::DType;
use tallow_cpu::{Cpu, CpuOptions};
use tempfile::TempDir;

pub(crate) const GOLDENS: [&str; 4] = ["llama", "llama3-rope", "qwen2", "mistral-window"];

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
