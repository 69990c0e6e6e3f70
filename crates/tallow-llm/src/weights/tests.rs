//! The reference models' weights, whole, sharded, and damaged in every way that has a name.

use std::collections::HashMap;
use std::fs;

use safetensors::tensor::TensorView as Raw;
use tempfile::TempDir;

use super::*;
use crate::test_files::{golden, message, tiny};

fn llama() -> ModelConfig {
    ModelConfig::read(&golden("llama")).unwrap()
}

type Tensors = BTreeMap<String, (StoredDtype, Vec<usize>, Vec<u8>)>;

fn tensors() -> Tensors {
    let weights = Weights::open_unchecked(&golden("llama")).unwrap();
    let copy = |t: &TensorView| {
        (
            t.name.clone(),
            (t.dtype, t.shape.clone(), t.as_bytes().to_vec()),
        )
    };
    weights.iter().map(copy).collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors
        .iter()
        .map(|(n, (d, s, b))| (n.clone(), Raw::new(*d, s.clone(), b).unwrap()));
    fs::write(
        path,
        safetensors::serialize(views, None::<HashMap<_, _>>).unwrap(),
    )
    .unwrap();
}

/// The refusal of the reference weights after a change.
fn refusal(change: impl FnOnce(&mut Tensors)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut all = tensors();
    change(&mut all);
    write(&dir.path().join("model.safetensors"), &all);
    message(dir.path(), Weights::open(dir.path(), &llama()))
}

#[test]
fn the_reference_models_fit_their_configurations() {
    for model in ["llama", "llama3-rope", "qwen2", "mistral-window"] {
        let config = ModelConfig::read(&golden(model)).unwrap();
        let weights = Weights::open(&golden(model), &config).unwrap();
        let embedding = weights.get("model.embed_tokens.weight").unwrap();
        assert_eq!(embedding.shape, [config.vocab, config.hidden]);
        assert_eq!(embedding.to_f32().unwrap().len(), embedding.elems());
        assert_eq!(weights.iter().count(), expected(&config).len());
    }
    let config = ModelConfig::read(&tiny()).unwrap();
    let weights = Weights::open(&tiny(), &config).unwrap();
    let norm = weights.get("model.norm.weight").unwrap();
    assert_eq!(norm.dtype, StoredDtype::BF16);
    assert!(
        norm.to_f32()
            .unwrap()
            .iter()
            .all(|v| v.is_finite() && *v != 0.0)
    );
    assert!(weights.find("lm_head.weight").is_none());
}

#[test]
fn half_types_widen_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let values = [0.0, -1.5, 65504.0, 6.1035156e-5];
    let f16s = values
        .iter()
        .flat_map(|v| f16::from_f32(*v).to_le_bytes())
        .collect();
    let ids = [3_i64, -1].iter().flat_map(|v| v.to_le_bytes()).collect();
    let all = Tensors::from([
        ("h".to_owned(), (StoredDtype::F16, vec![4], f16s)),
        ("ids".to_owned(), (StoredDtype::I64, vec![2], ids)),
    ]);
    write(&path, &all);
    let file = Weights::open_file(&path).unwrap();
    assert_eq!(file.get("h").unwrap().to_f32().unwrap(), values);
    assert_eq!(file.get("ids").unwrap().to_i64().unwrap(), [3, -1]);
    assert!(
        message(dir.path(), file.get("ids").unwrap().to_f32())
            .contains("is stored as I64, want F32")
    );
    assert!(
        message(dir.path(), file.get("h").unwrap().to_i64()).contains("is stored as F16, want I64")
    );
    assert!(message(dir.path(), file.get("none")).contains("missing tensors (1): \"none\""));
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let got = refusal(|t| drop(t.remove("model.layers.1.mlp.up_proj.weight")));
    assert_eq!(
        got,
        "model.safetensors: missing tensors (1): \"model.layers.1.mlp.up_proj.weight\"; download the weights \
         again, or use the config.json that belongs to them"
    );
    let extra = (StoredDtype::F32, vec![1], vec![0; 4]);
    let got = refusal(|t| drop(t.insert("model.layers.0.self_attn.q_proj.bias".to_owned(), extra)));
    assert!(
        got.contains("tensors that do not belong to this architecture (1): \"model.layers.0"),
        "{got}"
    );
    let got = refusal(|t| t.get_mut("model.norm.weight").unwrap().1 = vec![8, 8]);
    assert!(
        got.contains("tensor \"model.norm.weight\": want shape [64], got [8, 8]"),
        "{got}"
    );
    let got = refusal(|t| {
        *t.get_mut("model.norm.weight").unwrap() = (StoredDtype::U8, vec![64], vec![0; 64])
    });
    assert!(
        got.contains("is stored as U8, want F32, BF16 or F16"),
        "{got}"
    );
}

#[test]
fn harmless_leftovers_are_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let mut all = tensors();
    let buffer = (StoredDtype::F32, vec![8], vec![0; 32]);
    all.insert(
        "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(),
        buffer,
    );
    write(&dir.path().join("model.safetensors"), &all);
    let mut config = llama();
    Weights::open(dir.path(), &config).unwrap();
    // A tied model that stores its output projection too.
    config.tied = true;
    Weights::open(dir.path(), &config).unwrap();
}

/// The reference weights in two shards, with an index that is changed before it is written.
fn sharded(change: impl FnOnce(&mut serde_json::Value)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let names = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ];
    let (mut first, mut second) = (tensors(), Tensors::new());
    second.extend(first.split_off("model.layers.1"));
    let mut index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": {}});
    for (name, part) in names.iter().zip([&first, &second]) {
        write(&dir.path().join(name), part);
        for tensor in part.keys() {
            index["weight_map"][tensor] = (*name).into();
        }
    }
    change(&mut index);
    let text = serde_json::to_vec(&index).unwrap();
    fs::write(dir.path().join("model.safetensors.index.json"), text).unwrap();
    dir
}

#[test]
fn shards_are_one_collection() {
    let dir = sharded(|_| ());
    let weights = Weights::open(dir.path(), &llama()).unwrap();
    let whole = Weights::open_unchecked(&golden("llama")).unwrap();
    for tensor in whole.iter() {
        let same = weights.get(&tensor.name).unwrap();
        assert_eq!(same.as_bytes(), tensor.as_bytes());
    }
    assert_eq!(weights.total_bytes(), whole.total_bytes());
}

#[test]
fn a_lying_index_is_refused() {
    let refusal = |change: fn(&mut serde_json::Value)| {
        let dir = sharded(change);
        message(dir.path(), Weights::open(dir.path(), &llama()))
    };
    for name in [
        "../model.safetensors",
        "/etc/passwd",
        "a\\\\b.safetensors",
        "C:x.safetensors",
        "..",
        "",
    ] {
        let dir = sharded(|i| i["weight_map"]["lm_head.weight"] = name.into());
        let got = message(dir.path(), Weights::open(dir.path(), &llama()));
        assert!(
            got.contains("is not a plain file name, so it is not opened"),
            "{name}: {got}"
        );
    }
    let got = refusal(|i| i["weight_map"]["lm_head.weight"] = "none.safetensors".into());
    assert!(
        got.starts_with("none.safetensors does not exist; a shard is missing"),
        "{got}"
    );
    let got = refusal(|i| i["weight_map"]["x"] = "model-00001-of-00002.safetensors".into());
    assert!(
        got.contains("tensor \"x\" is not in \"model-00001-of-00002.safetensors\""),
        "{got}"
    );
    let got = refusal(|i| i["weight_map"]["x"] = 3.into());
    assert!(
        got.contains("the file of tensor \"x\" is not a string"),
        "{got}"
    );
    let got = refusal(|i| *i = serde_json::json!({}));
    assert!(got.contains("no object `weight_map` in it"), "{got}");
    // A tensor that its shard has and the index forgot is still there.
    let forget = |i: &mut serde_json::Value| {
        i["weight_map"]
            .as_object_mut()
            .unwrap()
            .remove("lm_head.weight");
    };
    Weights::open(sharded(forget).path(), &llama()).unwrap();
}

#[test]
fn damaged_files_are_explained() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let good = fs::read(golden("llama").join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let read = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        message(dir.path(), Weights::open(dir.path(), &llama()))
    };
    let with_header = |text: &str, data: usize| {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    };
    for (bytes, want) in [
        (Vec::new(), "it is shorter than its first eight bytes"),
        (
            good[..4].to_vec(),
            "it is shorter than its first eight bytes",
        ),
        (good[..100].to_vec(), "its header is longer than the file"),
        (
            good[..8 + header].to_vec(),
            "it is shorter or longer than its header says (truncated?)",
        ),
        (
            good[..good.len() - 1].to_vec(),
            "it is shorter or longer than its header says (truncated?)",
        ),
        (
            u64::MAX.to_le_bytes().to_vec(),
            "its header claims more than 100 MB",
        ),
        (with_header("{", 0), "its header is not valid"),
        (with_header("{\"a\":1}", 0), "its header is not valid"),
        (
            with_header(
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
                12,
            ),
            "the bytes of tensor \"b\" overlap others or leave a gap",
        ),
        (
            with_header(
                r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#,
                8,
            ),
            "a tensor's bytes do not match its shape and type",
        ),
        (
            with_header(
                r#"{"a":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,8]}}"#,
                8,
            ),
            "a tensor's size overflows",
        ),
    ] {
        let got = read(&bytes);
        let want = format!("model.safetensors: not a usable safetensors file: {want}");
        assert!(got.starts_with(&want), "want {want}, got {got}");
    }
}

#[test]
fn a_folder_without_usable_weights_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let got = message(dir.path(), Weights::open(dir.path(), &llama()));
    assert!(
        got.starts_with("model.safetensors does not exist; give a Hugging Face model folder"),
        "{got}"
    );
    fs::write(dir.path().join("pytorch_model.bin"), b"").unwrap();
    let got = message(dir.path(), Weights::open(dir.path(), &llama()));
    assert!(
        got.contains("a pickle file, which can run code when it is read, is not supported; save"),
        "{got}"
    );
}
