//! Bad input for every reader: what a fuzzer calls, and where it begins.
//! Invariant: a target finds panics, hangs and memory without bound; what a reader answers is its own affair.
//! Absent on purpose: the fuzzer. `fuzz/` drives these with libFuzzer, this crate's test with plain mutations.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tallow_llm::data::{Encoder, Example, Lines, LossOn};
use tallow_llm::{ModelConfig, Tokenizer, Weights, mlx, peft};
use tallow_train::checkpoint::Store;
use tallow_train::{Batch, Feed, FeedSettings, Limits, settings, sweep};

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
    Target {
        name: "mlx",
        run: |data| _ = mlx_adapter(data),
        seeds: &[MLX_CONFIG, MLX_WEIGHTS],
    },
    Target {
        name: "chat",
        run: |data| _ = chat(data),
        seeds: &[CHAT, CHAT_MARKED],
    },
    Target {
        name: "settings",
        run: |data| _ = settings_file(data),
        seeds: &[YAML, SWEEP],
    },
    Target {
        name: "checkpoint",
        run: |data| _ = checkpoint(data),
        seeds: &[ABOUT, STATE, MANIFEST],
    },
    Target {
        name: "cursor",
        run: |data| _ = cursor(data),
        seeds: &[CURSOR, CURSOR_STREAM],
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
const TOKENIZER: &[u8] = br#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":0,"content":"<s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":null,"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},"post_processor":null,"decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true},"model":{"type":"BPE","dropout":null,"unk_token":null,"fuse_unk":false,"byte_fallback":false,"ignore_merges":false,"vocab":{"<s>":0,"a":1,"b":2,"ab":3},"merges":[["a","b"]]}}"#;

const SWEEP: &[u8] = b"model: dir\nsteps: 9\nruns:\n  - {name: a, rank: 4}\n  - {lr: 0.1, dora: true}\ngrid:\n  rank: [2, 8]\n  init: [pissa, uniform]\n";
/// Behind a byte that says which file it is: the configuration, or the tensors.
const MLX_CONFIG: &[u8] = br#"0{"fine_tune_type":"lora","model":"base","num_layers":1,"lora_parameters":{"rank":1,"scale":2.0,"dropout":0.1,"keys":["self_attn.q_proj"]}}"#;
const MLX_WEIGHTS: &[u8] = b"1\x90\0\0\0\0\0\0\0{\"a.lora_a\":{\"dtype\":\"F32\",\"shape\":[2,1],\"data_offsets\":[0,8]},\"a.lora_b\":{\"dtype\":\"BF16\",\"shape\":[1,2],\"data_offsets\":[8,12]}}                 \0\0\x80\x3f\0\0\0\x40\x80\x3f\0\x40";
const CHAT: &[u8] = b"{{ bos_token }}{%- for m in messages %}{% if loop.first and m['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}<|{{ m.role }}|>{{ m['content'] | trim | tojson(indent=2) }}\n{% set ns = namespace(n=0) %}{% endfor %}{% if add_generation_prompt %}{{ strftime_now('%d') }}{% endif %}";
const CHAT_MARKED: &[u8] = b"{% macro say(m) %}{{ m.content.split('a')[1:] | join('-') }}{% endmacro %}{% for m in messages %}{%- generation -%}{{ say(m) }}<s>{% endgeneration %}{% endfor %}";
const YAML: &[u8] = b"base_model: \"dir\"\nlr: 1e-3\ndata: [\"a b\", c]\nsteps: null\nrslora: true\nclip: &x 1.0\neps: *x\nout: |\n  x\n";
/// Behind a byte that says which file it is: what is said, the numbers, or the list of both.
const ABOUT: &[u8] = br#"0{"format":1,"version":"0.1.0","step":1,"updates":1,"total":2,"config":{"lr":0.001},"model":7,"feed":{"settings":{}},"threads":2,"kernels":{"4x16":["gemm"]},"tokens":3,"train_seconds":0.5,"skipped":0,"empty":0,"valid":[1,{"loss":1.5,"tokens":2,"lines":1,"seconds":0.1}],"best":[[1.5,1]],"stale":0}"#;
const STATE: &[u8] = b"1\xdf\0\0\0\0\0\0\0{\"params\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"m\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[4,4]},\"v\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[4,4]},\"losses\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[4,4]}}\0\0\x80\x3f";
const MANIFEST: &[u8] = br#"2{"checkpoint.json":{"bytes":1,"crc32":5},"state.safetensors":{"bytes":1,"crc32":6},"../x":{"bytes":0,"crc32":0}}"#;
const CURSOR: &[u8] = br#"{"source":{"parts":[{"epoch":1,"at":2,"told":false}],"draws":"16"},"packer":{"open":[[0,0,1,1,1]],"ended":true}}"#;
const CURSOR_STREAM: &[u8] = br#"{"source":{"parts":[{"epoch":1,"given":1,"file":0,"place":[14,1],"draws":"2","buffer":[[0,14,1,0,1]],"tally":[0,0,0]}],"draws":"0"},"packer":{"open":[[0,28,2,0,1]],"ended":false}}"#;

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

/// The folder of a model without weights, the base of the adapters, with more files.
fn model_folder(files: &[(&str, &[u8])]) -> (PathBuf, Tokenizer, ModelConfig) {
    folder(&[("config.json", LLAMA), ("tokenizer.json", TOKENIZER)]);
    let dir = folder(files);
    let tokenizer = Tokenizer::open(&dir).unwrap_or_else(|e| panic!("a sound tokenizer: {e}"));
    (dir, tokenizer, model())
}

/// A byte that says which, and what is behind it.
fn tagged(data: &[u8]) -> (u8, &[u8]) {
    match data.split_first() {
        Some((tag, rest)) => (tag.wrapping_sub(b'0'), rest),
        None => (0, data),
    }
}

fn mlx_adapter(data: &[u8]) -> bool {
    let model = model();
    let (which, data) = tagged(data);
    let (config, weights) = match which {
        0 => (data, &MLX_WEIGHTS[1..]),
        _ => (&MLX_CONFIG[1..], data),
    };
    let dir = folder(&[(peft::CONFIG_FILE, config), (mlx::WEIGHTS_FILE, weights)]);
    let _ = mlx::read(&dir, Some(&model.projections()));
    mlx::read(&dir, None).is_ok()
}

/// A chat through a template: its text, its ids, and which of them the assistant said.
fn chat(data: &[u8]) -> bool {
    let (_, tokenizer, config) = model_folder(&[("chat_template.jinja", data)]);
    let chat = json!({"messages": [
        {"role": "system", "content": "ab"},
        {"role": "user", "content": "a <s> \u{e9}"},
        {"role": "assistant", "content": "b", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
    ]});
    let Ok(example) = Example::parse(&chat.to_string()) else {
        panic!("a sound chat");
    };
    let both = [LossOn::Answers, LossOn::Everything].map(|loss_on| {
        let row = Encoder::new(&tokenizer, &config, loss_on).encode(&example);
        row.is_ok_and(|row| row.ids.len() == row.counted.len())
    });
    both == [true; 2]
}

fn settings_file(data: &[u8]) -> bool {
    let dir = folder(&[("train.yaml", data)]);
    let path = dir.join("train.yaml");
    settings::read(&path).is_ok() | sweep::read(&path).is_ok()
}

/// One of a checkpoint's files; its manifest fits it, unless it is the manifest.
fn checkpoint(data: &[u8]) -> bool {
    let (which, data) = tagged(data);
    let (about, state) = match which {
        0 => (data, &STATE[1..]),
        _ => (&ABOUT[1..], data),
    };
    let sum = |b: &[u8]| json!({"bytes": b.len(), "crc32": crc32c::crc32c(b)});
    let sums = json!({"checkpoint.json": sum(about), "state.safetensors": sum(state)});
    let sums = sums.to_string();
    let manifest = match which {
        2 => data,
        _ => sums.as_bytes(),
    };
    let run = folder(&[]).join("run");
    let store = Store::new(&run);
    let dir = store.path(1);
    let write = |name: &str, bytes: &[u8]| fs::write(dir.join(name), bytes);
    let written = fs::create_dir_all(&dir)
        .and_then(|()| write("checkpoint.json", about))
        .and_then(|()| write("state.safetensors", state))
        .and_then(|()| write("manifest.json", manifest));
    assert!(written.is_ok(), "{}: {written:?}", dir.display());
    store.newest().0.is_some()
}

/// Where a run was in its data, read whole and as needed; then it goes on from there.
fn cursor(data: &[u8]) -> bool {
    let Ok(Value::Object(mut state)) = serde_json::from_slice(data) else {
        return false;
    };
    let mut any = false;
    let lines = b"{\"text\":\"ab\"}\n{\"text\":\"ba\"}\n{\"text\":\"aab\"}\n";
    let (dir, tokenizer, config) = model_folder(&[("data.jsonl", lines)]);
    for resident_bytes in [Limits::USUAL.resident_bytes, 0] {
        let mut settings = FeedSettings::new(vec![dir.join("data.jsonl")], 8, 2, 3);
        settings.packing = true;
        settings.limits.resident_bytes = resident_bytes;
        let feed = Feed::open(&settings, &tokenizer, &config);
        let mut feed = feed.unwrap_or_else(|e| panic!("a sound file: {e}"));
        let own = feed.state();
        for name in ["settings", "data"] {
            state.insert(name.to_owned(), own[name].clone());
        }
        let mut batch = Batch::default();
        if feed.restore(&Value::Object(state.clone())).is_ok() {
            any |= (0..4).all(|_| feed.next(&mut batch).is_ok());
        }
    }
    any
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_read_whole() {
        let dir = folder(&[("tokenizer.json", TOKENIZER)]);
        assert_eq!(Tokenizer::open(&dir).map(|t| t.vocab()).ok(), Some(4));
        assert!(mlx_adapter(MLX_CONFIG) && mlx_adapter(MLX_WEIGHTS));
        assert!(chat(CHAT_MARKED), "its template is sound");
        assert!(settings_file(YAML));
        assert!(checkpoint(ABOUT) && checkpoint(STATE) && !checkpoint(MANIFEST));
        assert!(cursor(CURSOR) && cursor(CURSOR_STREAM));
    }
}
