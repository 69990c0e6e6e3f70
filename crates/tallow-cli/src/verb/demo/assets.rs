//! The built-in model and text, part of the binary, written out so that they can be used like any others.
//! Invariant: every file is whole or not there.
use anyhow::Result;
use std::path::{Path, PathBuf};
use tallow::llm::files;

macro_rules! asset {
    ($path:literal) => {
        include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/", $path))
    };
}

const MODEL: [(&str, &[u8]); 5] = [
    ("config.json", asset!("tiny/config.json")),
    (
        "generation_config.json",
        asset!("tiny/generation_config.json"),
    ),
    ("model.safetensors", asset!("tiny/model.safetensors")),
    ("tokenizer.json", asset!("tiny/tokenizer.json")),
    (
        "tokenizer_config.json",
        asset!("tiny/tokenizer_config.json"),
    ),
];
const DATA: [(&str, &[u8]); 3] = [
    ("train.jsonl", asset!("wikisql/train.jsonl")),
    ("valid.jsonl", asset!("wikisql/valid.jsonl")),
    ("test.jsonl", asset!("wikisql/test.jsonl")),
];

/// Where things lie.
pub(in crate::verb) struct Unpacked {
    /// Model folder.
    pub model: PathBuf,
    /// 1000 lines to train on.
    pub train: PathBuf,
    /// 100 lines to judge by.
    pub valid: PathBuf,
    /// 100 lines to take prompts from.
    pub test: PathBuf,
}

/// Writes model and text into `out`, replacing what an earlier demo left there.
pub(in crate::verb) fn unpack(out: &Path) -> Result<Unpacked> {
    let (model, data) = (out.join("model"), out.join("data"));
    for (dir, list) in [(&model, &MODEL[..]), (&data, &DATA[..])] {
        files::prepare_output_dir(dir)?;
        for (name, bytes) in list {
            files::write_atomic(&dir.join(name), |w| w.write_all(bytes))?;
        }
    }
    Ok(Unpacked {
        model,
        train: data.join("train.jsonl"),
        valid: data.join("valid.jsonl"),
        test: data.join("test.jsonl"),
    })
}
