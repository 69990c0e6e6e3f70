//! Files for this crate's unit tests: the reference models, and folders made of changed copies of them.
//! Invariant: nothing here is compiled into the library. Absent on purpose: anything outside the repository.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tempfile::TempDir;

use crate::error::{Error, Result};

/// A folder of the reference outputs.
pub(crate) fn golden(name: &str) -> PathBuf {
    root().join("tests/goldens").join(name)
}

/// The built-in model.
pub(crate) fn tiny() -> PathBuf {
    root().join("assets/tiny")
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The object in a JSON file.
pub(crate) fn object(path: &Path) -> Map<String, Value> {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A folder that holds one JSON file.
pub(crate) fn folder_with(name: &str, map: &Map<String, Value>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(name), serde_json::to_vec(map).unwrap()).unwrap();
    dir
}

/// The message of an error, with the folder it is about cut out. Every message must be one short line.
pub(crate) fn message<T>(dir: &Path, result: Result<T>) -> String {
    let Err(error) = result else {
        panic!("want an error, got a value");
    };
    check_message(dir, &error)
}

/// See [`message`].
pub(crate) fn check_message(dir: &Path, error: &Error) -> String {
    let text = error.to_string();
    assert!(!text.contains(['\n', '\u{1b}']), "{text}");
    assert!(text.len() < 1200, "{text}");
    text.replace(&format!("{}/", dir.display()), "")
        .replace(&dir.display().to_string(), "DIR")
}
