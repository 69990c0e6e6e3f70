//! Arbitrary and damaged input: nothing read from outside makes the crate panic.
//! Invariant: each case either works or ends in one short line that names the file.
//! Absent on purpose: what the errors say; the unit tests beside the code check that.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tallow_llm::config::ModelConfig;
use tallow_llm::data::Lines;
use tallow_llm::peft::Adapter;
use tallow_llm::sample::{Sampler, Sampling, StopStrings};
use tallow_llm::{Error, Tokenizer, Weights};

#[path = "hostile/by_name.rs"]
mod by_name;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn golden(file: &str) -> PathBuf {
    root().join("tests/goldens").join(file)
}

fn object(path: &Path) -> Map<String, Value> {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// One short line that names something under `dir`, or a setting.
fn is_good(dir: &Path, error: &Error) -> bool {
    let text = error.to_string();
    let named = text.contains(&dir.display().to_string()) || matches!(error, Error::Setting { .. });
    named && !text.contains('\n') && text.len() < 2000
}

/// Values that tend to break readers.
fn nasty() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3_i64..300).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        Just(json!(u64::MAX)),
        Just(json!(1e308)),
        "\\PC{0,12}".prop_map(Value::from),
        "[a-z().*+?|\\[\\]\\\\0-9_]{0,12}".prop_map(Value::from),
        Just(json!([])),
        Just(json!({})),
        Just(json!([1, "x", null])),
        vec(0_i64..400, 0..3).prop_map(Value::from),
        Just(json!({"rope_type": "llama3", "factor": 0, "type": 3})),
        ("[a-z().*|]{0,6}", -1_i64..9).prop_map(|(k, v)| json!({k: v})),
    ]
}

/// An object with some of its keys changed, removed, or added.
fn damaged(object: Map<String, Value>) -> impl Strategy<Value = Map<String, Value>> {
    let keys: Vec<String> = object
        .keys()
        .cloned()
        .chain(["rope_scaling".to_owned()])
        .collect();
    let change = (
        any::<prop::sample::Index>(),
        prop::option::weighted(0.9, nasty()),
    );
    vec(change, 1..4).prop_map(move |changes| {
        let mut object = object.clone();
        for (at, value) in changes {
            let key = &keys[at.index(keys.len())];
            match value {
                Some(value) => object.insert(key.clone(), value),
                None => object.remove(key),
            };
        }
        object
    })
}

fn any_config() -> impl Strategy<Value = Map<String, Value>> {
    prop::sample::select(vec!["llama", "llama3-rope", "qwen2", "mistral-window"])
        .prop_flat_map(|m| damaged(object(&golden(m).join("config.json"))))
}

/// A file with some bytes changed, and perhaps cut.
fn damaged_bytes(bytes: Vec<u8>, within: usize) -> impl Strategy<Value = Vec<u8>> {
    let change = (0..within, any::<u8>());
    let cut = prop::option::weighted(0.2, 0..bytes.len());
    (vec(change, 0..6), cut).prop_map(move |(changes, cut)| {
        let mut bytes = bytes.clone();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        bytes.truncate(cut.unwrap_or(bytes.len()));
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn configurations_are_consistent_or_refused(map in any_config()) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), serde_json::to_vec(&map).unwrap()).unwrap();
        match ModelConfig::read(dir.path()) {
            Err(e) => prop_assert!(is_good(dir.path(), &e), "{e}"),
            Ok(c) => {
                prop_assert!(c.hidden > 0 && c.layers > 0 && c.vocab > 0 && c.mlp > 0);
                prop_assert!(c.heads % c.kv_heads == 0 && c.head_dim % 2 == 0);
                prop_assert_eq!(c.rope.inv_freq.len(), c.head_dim / 2);
                prop_assert!(c.rope.inv_freq.iter().all(|f| f.is_finite() && *f >= 0.0));
                prop_assert_eq!(c.windows.len(), c.layers);
                prop_assert!(c.eps > 0.0);
                prop_assert!(c.eos.iter().chain(&c.bos).all(|id| (*id as usize) < c.vocab));
            }
        }
    }

    #[test]
    fn arbitrary_bytes_are_no_file_of_ours(bytes in vec(any::<u8>(), 0..400)) {
        let dir = tempfile::tempdir().unwrap();
        let base = ModelConfig::read(&golden("llama")).unwrap();
        let at = |name: &str| fs::write(dir.path().join(name), &bytes).unwrap();
        at("config.json");
        at("model.safetensors");
        at("adapter_config.json");
        at("tokenizer.json");
        at("data.jsonl");
        let d = dir.path();
        for error in [
            ModelConfig::read(d).unwrap_err(),
            Weights::open(d, &base).unwrap_err(),
            Adapter::read(d, &base.projections()).unwrap_err(),
            Tokenizer::open(d).unwrap_err(),
            Lines::open(&d.join("data.jsonl")).unwrap().find_map(Result::err).unwrap(),
        ] {
            prop_assert!(is_good(d, &error), "{error}");
        }
    }

    #[test]
    fn damaged_weights_are_whole_or_refused(bytes in {
        let bytes = fs::read(golden("llama/model.safetensors")).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
        damaged_bytes(bytes, header)
    }) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        let config = ModelConfig::read(&golden("llama")).unwrap();
        match Weights::open(dir.path(), &config) {
            Err(e) => prop_assert!(is_good(dir.path(), &e), "{e}"),
            Ok(w) => for t in w.iter() {
                prop_assert_eq!(t.to_f32().unwrap().len(), t.elems());
            }
        }
    }

    #[test]
    fn damaged_adapters_are_bound_or_refused(
        map in damaged(object(&golden("llama/adapter/adapter_config.json"))),
        bytes in {
            let bytes = fs::read(golden("llama/adapter/adapter_model.safetensors")).unwrap();
            let len = bytes.len();
            prop_oneof![3 => Just(bytes.clone()), 1 => damaged_bytes(bytes, len)]
        },
    ) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("adapter_config.json"), serde_json::to_vec(&map).unwrap()).unwrap();
        fs::write(dir.path().join("adapter_model.safetensors"), bytes).unwrap();
        let base = ModelConfig::read(&golden("llama")).unwrap().projections();
        match Adapter::read(dir.path(), &base) {
            Err(e) => prop_assert!(is_good(dir.path(), &e), "{e}"),
            Ok(adapter) => for m in &adapter.modules {
                prop_assert_eq!(m.a.len(), m.rank * m.projection.k);
                prop_assert_eq!(m.b.len(), m.rank * m.projection.n);
                prop_assert!(m.scale.is_finite());
            }
        }
    }

    #[test]
    fn lines_are_text_or_refused(lines in vec(prop_oneof![
        Just(br#"{"text": "a"}"#.to_vec()),
        vec(any::<u8>(), 0..20),
        "\\PC{0,20}".prop_map(|t| json!({"text": t}).to_string().into_bytes()),
    ], 0..6)) {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), lines.join(&b'\n')).unwrap();
        for line in Lines::open(file.path()).unwrap() {
            if let Err(e) = line {
                prop_assert!(is_good(file.path(), &e), "{e}");
            }
        }
    }

    #[test]
    fn sampled_tokens_are_possible_ones(
        mut logits in vec(prop_oneof![9 => -50.0_f32..50.0, 1 => any::<f32>()], 0..40),
        history in vec(0_u32..60, 0..10),
        temperature in prop_oneof![Just(0.0), 0.0..3.0, Just(1e-300)],
        (top_k, top_p, min_p) in (0_usize..50, 1e-6..=1.0, 0.0..=1.0),
        repetition_penalty in 0.1..3.0,
        seed in any::<u64>(),
    ) {
        let settings = Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed };
        let before = logits.clone();
        if let Ok(id) = Sampler::new(settings).unwrap().next(&mut logits, &history) {
            prop_assert!(before[id as usize] > f32::NEG_INFINITY);
            prop_assert!(logits.iter().all(|l| *l < f32::INFINITY));
        }
    }

    #[test]
    fn stop_strings_cut_the_joined_text(
        pieces in vec("[abé]{0,4}", 0..8),
        stops in vec("[abé]{0,3}", 0..3),
    ) {
        let mut watch = StopStrings::new(stops.clone());
        let mut shown: String = pieces.iter().map(|p| watch.push(p)).collect();
        shown += &watch.finish();
        let whole = pieces.concat();
        let ends = stops.iter().filter(|s| !s.is_empty()).filter_map(|s| whole.find(s.as_str()));
        // The first stop string to be complete counts, so its start is at or after the earliest start.
        let earliest = ends.min();
        prop_assert_eq!(watch.stopped(), earliest.is_some());
        prop_assert!(whole.starts_with(&shown));
        prop_assert!(shown.len() >= earliest.unwrap_or(whole.len()));
        for stop in stops.iter().filter(|s| !s.is_empty()) {
            prop_assert!(!shown.contains(stop.as_str()));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(150) })]

    #[test]
    fn streamed_text_is_the_decoded_text(
        ids in vec(prop_oneof![1 => 0_u32..3, 6 => 60_u32..260, 2 => 3_u32..2100], 0..40),
    ) {
        let tokenizer = Tokenizer::open(&root().join("assets/tiny")).unwrap();
        let mut stream = tokenizer.decode_stream();
        let mut text = String::new();
        for id in &ids {
            text += &stream.push(*id).unwrap();
        }
        text += &stream.finish().unwrap();
        prop_assert_eq!(text, tokenizer.decode(&ids).unwrap());
    }

    #[test]
    fn any_text_comes_back_and_holds_no_special_token(text in "(\\PC|<\\|eos\\|>|\n| ){0,30}") {
        let tokenizer = Tokenizer::open(&root().join("assets/tiny")).unwrap();
        let ids = tokenizer.encode_text(&text).unwrap();
        prop_assert!(ids.iter().all(|id| *id > 2));
        prop_assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }

    #[test]
    fn damaged_tokenizers_work_or_are_refused(text in prop_oneof![tokenizer_bytes(), tokenizer_values()]) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("tokenizer.json"), &text.0).unwrap();
        match Tokenizer::open(dir.path()) {
            Err(e) => prop_assert!(is_good(dir.path(), &e), "{e}"),
            Ok(t) => if let Ok(ids) = t.encode_text("The <|eos|> é🙂 fox") {
                let mut stream = t.decode_stream();
                for id in ids {
                    let _ = stream.push(id);
                }
            }
        }
    }
}

/// A file's content that is not printed when a case fails.
#[derive(Clone)]
struct Content(Vec<u8>);

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

fn tokenizer_bytes() -> impl Strategy<Value = Content> {
    let bytes = fs::read(root().join("assets/tiny/tokenizer.json")).unwrap();
    let len = bytes.len();
    prop_oneof![
        damaged_bytes(bytes.clone(), 4000),
        damaged_bytes(bytes, len)
    ]
    .prop_map(Content)
}

/// The built-in tokenizer with one value changed, anywhere but in the long lists.
fn tokenizer_values() -> impl Strategy<Value = Content> {
    let whole = Value::Object(object(&root().join("assets/tiny/tokenizer.json")));
    let mut paths = Vec::new();
    pointers(&whole, String::new(), &mut paths);
    (prop::sample::select(paths), nasty()).prop_map(move |(path, value)| {
        let mut changed = whole.clone();
        *changed.pointer_mut(&path).unwrap() = value;
        Content(changed.to_string().into_bytes())
    })
}

fn pointers(value: &Value, at: String, out: &mut Vec<String>) {
    match value {
        Value::Object(map) if map.len() < 50 => {
            for (key, inner) in map {
                pointers(
                    inner,
                    format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")),
                    out,
                );
            }
        }
        Value::Array(items) => {
            for (i, inner) in items.iter().take(4).enumerate() {
                pointers(inner, format!("{at}/{i}"), out);
            }
        }
        _ => {}
    }
    out.push(at);
}
