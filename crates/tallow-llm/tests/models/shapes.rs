//! Models of other shapes and storage than the reference ones: each against an equal model written differently.

use std::fs;
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::json;
use tallow_llm::{ComputeDType, LoadOptions, Model};
use tempfile::TempDir;

use crate::support::*;

const WEIGHTS: &str = "model.safetensors";

fn compare(a: &Path, b: &Path, at_most: f32) {
    let (a, b) = (load(a), load(b));
    let ids = some_ids(21, a.config.vocab);
    let (a, b) = (
        logits(&a, None, &ids).concat(),
        logits(&b, None, &ids).concat(),
    );
    assert!(a.iter().any(|v| v.abs() > 0.01));
    let d = distance(&a, &b);
    assert!(d <= at_most, "{d}");
}

/// The llama reference with `kv` of its key heads, each written `times` times.
fn key_heads(kv: usize, times: usize) -> TempDir {
    let dir = with_config(&golden("llama"), |c| {
        c.insert("num_key_value_heads".into(), json!(kv * times));
    });
    edit(&dir.path().join(WEIGHTS), |all| {
        let head_bytes = 16 * 64 * 4;
        let is = |name: &str| name.contains("k_proj") || name.contains("v_proj");
        for t in all.iter_mut().filter(|t| is(&t.name)) {
            let heads = t.bytes[..kv * head_bytes].chunks(head_bytes);
            t.bytes = heads.flat_map(|h| h.repeat(times)).collect();
            t.shape[0] = 16 * kv * times;
        }
    });
    dir
}

#[test]
fn shared_key_heads_equal_repeated_ones() {
    // Multi-query and grouped-query against full attention.
    for kv in [1, 2] {
        let (shared, repeated) = (key_heads(kv, 1), key_heads(kv, 4 / kv));
        compare(shared.path(), repeated.path(), 1e-5);
    }
    let (mqa, gqa) = (key_heads(1, 1), key_heads(2, 1));
    let (mqa, gqa) = (load(mqa.path()), load(gqa.path()));
    let ids = some_ids(9, 320);
    let (a, b) = (logits(&mqa, None, &ids), logits(&gqa, None, &ids));
    assert!(distance(&a.concat(), &b.concat()) > 1e-3);
}

/// A copy stored in another type, and one in f32 with the numbers rounded to it.
fn stored_as(dtype: Dtype) -> (TempDir, TempDir) {
    let round = |v: f32| match dtype {
        Dtype::BF16 => (bf16::from_f32(v).to_le_bytes(), bf16::from_f32(v).to_f32()),
        _ => (f16::from_f32(v).to_le_bytes(), f16::from_f32(v).to_f32()),
    };
    let (small, wide) = (
        with_config(&golden("qwen2"), |_| {}),
        with_config(&golden("qwen2"), |_| {}),
    );
    let values = |t: &Stored| -> Vec<f32> {
        let (chunks, _) = t.bytes.as_chunks::<4>();
        chunks.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    edit(&small.path().join(WEIGHTS), |all| {
        for t in all {
            t.bytes = values(t).into_iter().flat_map(|v| round(v).0).collect();
            t.dtype = dtype;
        }
    });
    edit(&wide.path().join(WEIGHTS), |all| {
        for t in all {
            let rounded = values(t).into_iter().map(|v| round(v).1);
            t.bytes = rounded.flat_map(f32::to_le_bytes).collect();
        }
    });
    (small, wide)
}

#[test]
fn weights_stored_in_half_the_bytes_are_the_rounded_ones() {
    for dtype in [Dtype::BF16, Dtype::F16] {
        let (small, wide) = stored_as(dtype);
        compare(small.path(), wide.path(), 0.0);
    }
}

#[test]
fn bf16_on_request_rounds_matrices_only() {
    let options = LoadOptions {
        dtype: "bf16".parse::<ComputeDType>().unwrap(),
    };
    let asked = Model::load(&session(), &golden("qwen2"), &options).unwrap();
    let ids = some_ids(11, 320);
    let got = logits(&asked, None, &ids).concat();
    let exact = logits(&load(&golden("qwen2")), None, &ids).concat();
    let (all, _) = stored_as(Dtype::BF16);
    // There norms and biases are rounded too.
    let rounded = logits(&load(all.path()), None, &ids).concat();
    let d = [distance(&got, &exact), distance(&got, &rounded)];
    assert!(d[0] > 1e-5 && d.iter().all(|d| *d < 2e-2), "{d:?}");
    assert_eq!(
        message("int8".parse::<ComputeDType>()),
        "dtype: want f32 or bf16, got \"int8\""
    );
}

#[test]
fn shards_are_one_model() {
    let dir = with_config(&golden("llama"), |_| {});
    let whole = dir.path().join(WEIGHTS);
    let mut all = tensors(&whole);
    fs::remove_file(&whole).unwrap();
    let rest = all.split_off(7);
    let mut map = serde_json::Map::new();
    for (file, part) in [("a.safetensors", all), ("b.safetensors", rest)] {
        map.extend(part.iter().map(|t| (t.name.clone(), json!(file))));
        write_tensors(&dir.path().join(file), part);
    }
    let index = dir.path().join("model.safetensors.index.json");
    fs::write(index, json!({"weight_map": map}).to_string()).unwrap();
    compare(dir.path(), &golden("llama"), 0.0);
}

#[test]
fn a_tied_model_reads_its_embedding_twice() {
    let tied = with_config(&golden("llama3-rope"), |_| {});
    let untied = with_config(&golden("llama3-rope"), |c| {
        c.insert("tie_word_embeddings".into(), json!(false));
    });
    edit(&untied.path().join(WEIGHTS), |all| {
        let embedding = |t: &&Stored| t.name == "model.embed_tokens.weight";
        let mut head = all.iter().find(embedding).unwrap().clone();
        head.name = "lm_head.weight".into();
        all.push(head);
    });
    compare(tied.path(), untied.path(), 0.0);
}

/// How far back a change of one token is felt: logits at positions `0..24` that differ after token 4 changed.
fn felt(dir: &Path) -> Vec<usize> {
    let model = load(dir);
    let mut ids = some_ids(24, 320);
    let before = logits(&model, None, &ids);
    ids[4] = (ids[4] + 1) % 320;
    let after = logits(&model, None, &ids);
    (0..24).filter(|i| before[*i] != after[*i]).collect()
}

#[test]
fn a_window_ends_where_it_should() {
    let mistral = |window: serde_json::Value| {
        with_config(&golden("mistral-window"), |c| {
            c.insert("sliding_window".into(), window);
        })
    };
    // Two layers with a window of w: a token reaches 2 (w - 1) further.
    for w in [1, 2, 8] {
        let want: Vec<usize> = (4..24.min(5 + 2 * (w - 1))).collect();
        assert_eq!(felt(mistral(json!(w)).path()), want, "window {w}");
    }
    let all: Vec<usize> = (4..24).collect();
    assert_eq!(felt(mistral(json!(24)).path()), all);
    assert_eq!(felt(mistral(json!(null)).path()), all);
    let qwen = |first: usize| {
        let dir = with_config(&golden("qwen2"), |c| {
            c.remove("layer_types");
            c.insert("use_sliding_window".into(), json!(true));
            c.insert("sliding_window".into(), json!(3));
            c.insert("max_window_layers".into(), json!(first));
        });
        felt(dir.path())
    };
    assert_eq!(qwen(0), (4..9).collect::<Vec<_>>());
    assert_eq!(qwen(1), all);
}

#[test]
fn biases_are_added_where_the_model_has_them() {
    let biased = with_config(&golden("llama"), |c| {
        c.insert("attention_bias".into(), json!(true));
        c.insert("mlp_bias".into(), json!(true));
    });
    let plain = load(&golden("llama"));
    edit(&biased.path().join(WEIGHTS), |all| {
        let projections = |t: &&Stored| t.name.contains("_proj.weight");
        let new: Vec<Stored> = all
            .iter()
            .filter(projections)
            .map(|t| Stored {
                name: t.name.replace(".weight", ".bias"),
                dtype: t.dtype,
                shape: vec![t.shape[0]],
                bytes: vec![0; t.shape[0] * 4],
            })
            .collect();
        all.extend(new);
    });
    compare(biased.path(), &golden("llama"), 0.0);
    let ids = some_ids(5, 320);
    let want = logits(&plain, None, &ids).concat();
    for name in [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ] {
        let set = |value: f32| {
            edit(&biased.path().join(WEIGHTS), |all| {
                let bias = format!(
                    "layers.1.{}.{name}.bias",
                    if name.len() > 6 { "mlp" } else { "self_attn" }
                );
                let t = all.iter_mut().find(|t| t.name.ends_with(&bias)).unwrap();
                // Not the same for all: a constant on every key changes no softmax.
                for (i, v) in t.bytes.chunks_exact_mut(4).enumerate() {
                    v.copy_from_slice(&(value * (i as f32).cos()).to_le_bytes());
                }
            });
        };
        set(0.5);
        let got = logits(&load(biased.path()), None, &ids).concat();
        let d = distance(&got, &want);
        // A bias on the keys adds the same to all scores of a query, but for the rotation.
        assert!(d > 1e-5, "{name}: {d}");
        set(0.0);
    }
}
