//! Bad input for every reader: what a fuzzer calls, and where it begins.
//! Invariant: a target finds panics, hangs and memory without bound; what a reader answers is its own affair.
//! Absent on purpose: the fuzzer. `fuzz/` drives these with libFuzzer, this crate's test with plain mutations.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

use tallow_llm::{ModelConfig, Tokenizer, Weights, data::Lines, peft};

/// A reader under attack.
pub struct Target {
    /// Its name, and that of its program under `fuzz/`.
    pub name: &'static str,
    /// Reads some bytes.
    pub run: fn(&[u8]),
    /// Sound inputs to begin with.
    pub seeds: &'static [&'static [u8]],
}

/// Every reader.
pub const TARGETS: &[Target] = &[
    Target {
        name: "safetensors",
        run: safetensors,
        seeds: &[SAFETENSORS, INDEX],
    },
    Target {
        name: "config",
        run: config,
        seeds: &[LLAMA, QWEN2, MISTRAL, LLAMA3],
    },
    Target {
        name: "adapter_config",
        run: adapter_config,
        seeds: &[ADAPTER],
    },
    Target {
        name: "adapter_weights",
        run: adapter_weights,
        seeds: &[SAFETENSORS],
    },
    Target {
        name: "jsonl",
        run: jsonl,
        seeds: &[b"{\"text\": \"a\\u00e9b\"}\r\n\n{\"id\": 1, \"text\": \"\xc3\xa9\"}\n"],
    },
    Target {
        name: "tokenizer",
        run: tokenizer,
        seeds: &[TOKENIZER],
    },
];

/// Runs the target of a name.
///
/// # Panics
/// If there is none, or if the reader does.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|t| t.name == name);
    (target.unwrap_or_else(|| panic!("no target {name}")).run)(data);
}

const LLAMA: &[u8] = include_bytes!("../../../tests/goldens/llama/config.json");
const LLAMA3: &[u8] = include_bytes!("../../../tests/goldens/llama3-rope/config.json");
const QWEN2: &[u8] = include_bytes!("../../../tests/goldens/qwen2/config.json");
const MISTRAL: &[u8] = include_bytes!("../../../tests/goldens/mistral-window/config.json");
const ADAPTER: &[u8] = include_bytes!("../../../tests/goldens/llama/adapter/adapter_config.json");
/// Two tensors, one empty.
const SAFETENSORS: &[u8] = b"\x90\0\0\0\0\0\0\0{\"__metadata__\":{\"format\":\"pt\"},\"w\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[0,8]},\"e\":{\"dtype\":\"BF16\",\"shape\":[0],\"data_offsets\":[8,8]}}        \0\0\x80\x3f\0\0\0\x40";
const INDEX: &[u8] =
    br#"{"metadata":{"total_size":8},"weight_map":{"w":"model-00001-of-00002.safetensors"}}"#;
const TOKENIZER: &[u8] = br#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":0,"content":"<s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":null,"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},"post_processor":null,"decoder":{"type":"ByteLevel"},"model":{"type":"BPE","dropout":null,"unk_token":null,"fuse_unk":false,"byte_fallback":false,"ignore_merges":false,"vocab":{"<s>":0,"a":1,"b":2,"ab":3},"merges":[["a","b"]]}}"#;

/// Writes files into a folder of this process, in memory where there is such a place, and returns it.
fn folder(files: &[(&str, &[u8])]) -> PathBuf {
    let memory = Path::new("/dev/shm");
    let root = match memory.is_dir() {
        true => memory.to_path_buf(),
        false => std::env::temp_dir(),
    };
    let dir = root.join(format!("tallow-fuzz-{}", std::process::id()));
    let written = fs::create_dir_all(&dir).and_then(|()| {
        files
            .iter()
            .try_for_each(|(name, b)| fs::write(dir.join(name), b))
    });
    assert!(written.is_ok(), "{}: {written:?}", dir.display());
    dir
}

/// One file of tensors, then the same bytes as a model's index.
fn safetensors(data: &[u8]) {
    let dir = folder(&[
        ("one.safetensors", data),
        ("model.safetensors.index.json", data),
    ]);
    let _ = Weights::open_file(&dir.join("one.safetensors"));
    let _ = Weights::open_unchecked(&dir);
}

fn config(data: &[u8]) {
    let dir = folder(&[("config.json", data)]);
    if let Ok(config) = ModelConfig::read(&dir) {
        drop(config.projections());
    }
}

/// The base model of the adapters.
fn model() -> ModelConfig {
    let dir = folder(&[("config.json", LLAMA)]);
    ModelConfig::read(&dir).unwrap_or_else(|e| panic!("a sound configuration: {e}"))
}

fn adapter_config(data: &[u8]) {
    let model = model();
    let dir = folder(&[(peft::CONFIG_FILE, data), (peft::WEIGHTS_FILE, SAFETENSORS)]);
    let _ = peft::Adapter::read(&dir, &model.projections());
}

fn adapter_weights(data: &[u8]) {
    let model = model();
    let dir = folder(&[(peft::CONFIG_FILE, ADAPTER), (peft::WEIGHTS_FILE, data)]);
    let _ = peft::Adapter::read(&dir, &model.projections());
}

fn jsonl(data: &[u8]) {
    let dir = folder(&[("data.jsonl", data)]);
    if let Ok(lines) = Lines::open(&dir.join("data.jsonl")) {
        lines.for_each(drop);
    }
}

fn tokenizer(data: &[u8]) {
    let dir = folder(&[("tokenizer.json", data)]);
    if let Ok(tokenizer) = Tokenizer::open(&dir) {
        let _ = tokenizer.encode_text("ab \u{e9}\u{1f600}<s>");
        let _ = tokenizer.decode(&[0, 1, 2, u32::MAX]);
    }
}
