//! DoRA, PiSSA, dropout and LoRA+, each against another way to the same numbers; and merged models.

use std::fs;
use std::path::Path;

use serde_json::json;
use tallow_core::op::Role;
use tallow_core::tensor::{Tensor, value_and_grad};
use tallow_llm::merge::merge;
use tallow_llm::{Adapter, AdapterConfig, Init, Model, Targets};
use tempfile::TempDir;

use crate::support::*;

const WEIGHTS: &str = "model.safetensors";

fn names(names: &[&str]) -> Targets {
    Targets::Names(names.iter().map(|n| (*n).to_owned()).collect())
}

/// Moves every parameter away from where it started.
fn shake(model: &Model, a: &Adapter, size: f32) {
    let old = model.session.read(&a.params).unwrap();
    let new: Vec<f32> = (0..old.len())
        .map(|i| old[i] + (i as f32 * 1.7).sin() * size)
        .collect();
    model.session.write(&a.params, &new).unwrap();
}

/// The model in `base` with the adapter folded in.
fn merged(base: &Path, model: &Model, a: &Adapter) -> (TempDir, Model) {
    let dir = tempfile::tempdir().unwrap();
    let (adapter, out) = (dir.path().join("adapter"), dir.path().join("deep/out"));
    a.save(model, &adapter, "base").unwrap();
    let done = merge(base, &adapter, &out, &mut |_| {}).unwrap();
    assert_eq!(done.modules, a.modules().count());
    let model = load(&out);
    (dir, model)
}

#[test]
fn merged_models_compute_what_the_adapter_did() {
    for name in GOLDENS {
        let model = load(&golden(name));
        let a = adapter(&model, &golden(name));
        let (_dir, merged) = merged(&golden(name), &model, &a);
        let ids = some_ids(30, model.config.vocab);
        let with = logits(&model, Some(&a), &ids).concat();
        let d = distance(&logits(&merged, None, &ids).concat(), &with);
        assert!(d < 2e-5, "{name}: {d}");
        assert!(distance(&logits(&model, None, &ids).concat(), &with) > 1e-2);
    }
}

#[test]
fn a_magnitude_scales_rows_and_neither_biases_nor_neighbours() {
    // Biases on q, k and v; k and gate are not adapted and share their input with others that are.
    let dir = golden("qwen2");
    let model = load(&dir);
    let mut config = AdapterConfig::new(4, 8.0, names(&["q_proj", "v_proj", "up_proj", "o_proj"]));
    config.use_dora = true;
    let a = Adapter::new(&model, &config, 2).unwrap();
    let ids = some_ids(25, model.config.vocab);
    let bare = logits(&model, None, &ids).concat();
    let fresh = logits(&model, Some(&a), &ids).concat();
    assert!(distance(&fresh, &bare) < 1e-5);
    shake(&model, &a, 0.1);
    let (folder, merged) = merged(&dir, &model, &a);
    let with = logits(&model, Some(&a), &ids).concat();
    let d = distance(&logits(&merged, None, &ids).concat(), &with);
    assert!(d < 2e-5 && distance(&with, &bare) > 1e-2, "{d}");
    // Only run, the factors are made once, and are the same.
    let (frozen, _) = Adapter::load(&model, &folder.path().join("adapter"), Role::Frozen).unwrap();
    assert!(distance(&logits(&model, Some(&frozen), &ids).concat(), &with) < 1e-5);
}

#[test]
fn shards_keep_their_names_and_types() {
    let dir = with_config(&golden("llama"), |_| {});
    let whole = dir.path().join(WEIGHTS);
    let mut all = tensors(&whole);
    fs::remove_file(&whole).unwrap();
    // Half of it in bf16.
    for t in all.iter_mut().filter(|t| t.name.contains("layers.1")) {
        let (values, _) = t.bytes.as_chunks::<4>();
        let half = values
            .iter()
            .flat_map(|v| half::bf16::from_f32(f32::from_le_bytes(*v)).to_le_bytes());
        (t.bytes, t.dtype) = (half.collect(), safetensors::Dtype::BF16);
    }
    let rest = all.split_off(9);
    let mut map = serde_json::Map::new();
    for (file, part) in [("a-1.safetensors", all), ("a-2.safetensors", rest)] {
        map.extend(part.iter().map(|t| (t.name.clone(), json!(file))));
        write_tensors(&dir.path().join(file), part);
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
    fs::write(dir.path().join("model.safetensors.index.json"), &index).unwrap();
    for (file, text) in [
        ("pytorch_model.bin", "old"),
        (".hidden", "x"),
        ("tokenizer.json", "{}"),
    ] {
        fs::write(dir.path().join(file), text).unwrap();
    }
    let model = load(dir.path());
    let a = adapter(&model, dir.path());
    let (folder, merged) = merged(dir.path(), &model, &a);
    let out = folder.path().join("deep/out");
    let mut found: Vec<String> = fs::read_dir(&out)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    let want = [
        "a-1.safetensors",
        "a-2.safetensors",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "reference.json",
        "tokenizer.json",
    ];
    assert_eq!(found, want);
    assert_eq!(
        fs::read_to_string(out.join("model.safetensors.index.json")).unwrap(),
        index
    );
    for file in ["a-1.safetensors", "a-2.safetensors"] {
        for (old, new) in tensors(&dir.path().join(file))
            .iter()
            .zip(tensors(&out.join(file)))
        {
            assert_eq!(
                (&old.name, old.dtype, &old.shape),
                (&new.name, new.dtype, &new.shape)
            );
            assert_eq!(
                old.bytes != new.bytes,
                old.name.contains("_proj"),
                "{}",
                old.name
            );
        }
    }
    // bf16 keeps eight bits: close, not equal.
    let ids = some_ids(20, 320);
    let d = distance(
        &logits(&merged, None, &ids).concat(),
        &logits(&model, Some(&a), &ids).concat(),
    );
    assert!(d < 0.05, "{d}");
    // Nothing is left beside it.
    assert_eq!(fs::read_dir(folder.path().join("deep")).unwrap().count(), 1);
}

#[test]
fn embedding_and_output_are_adapted_and_merged_tied_or_not() {
    // llama3-rope is tied, llama is not.
    for name in ["llama", "llama3-rope"] {
        let dir = golden(name);
        let model = load(&dir);
        let s = &model.session;
        let ids = some_ids(25, model.config.vocab);
        let bare = logits(&model, None, &ids).concat();
        for on in [
            &["embed_tokens"][..],
            &["lm_head"],
            &["lm_head", "embed_tokens", "v_proj"],
        ] {
            let config = AdapterConfig::new(3, 6.0, names(on));
            let a = Adapter::new(&model, &config, 2).unwrap();
            assert!(distance(&logits(&model, Some(&a), &ids).concat(), &bare) < 1e-5);
            shake(&model, &a, 0.05);
            let with = logits(&model, Some(&a), &ids).concat();
            assert!(distance(&with, &bare) > 1e-2);
            let (folder, merged) = merged(&dir, &model, &a);
            assert!(!merged.config.tied);
            let d = distance(&logits(&merged, None, &ids).concat(), &with);
            assert!(d < 2e-5, "{name}, {on:?}: {d}");
            // The one does not touch the other.
            let weight = |dir: &Path, name: &str| {
                let all = tensors(&dir.join(WEIGHTS));
                all.into_iter().find(|t| t.name == name).unwrap().bytes
            };
            let out = folder.path().join("deep/out");
            let embedding = "model.embed_tokens.weight";
            let kept = weight(&out, embedding) == weight(&dir, embedding);
            assert_eq!(kept, !on.contains(&"embed_tokens"));
            // As text goes on, with a cache.
            let mut decoder = tallow_llm::Decoder::new(&model, Some(&a), 32).unwrap();
            let last = decoder.feed(&ids).unwrap().to_vec();
            assert!(distance(&last, &with[with.len() - last.len()..]) < 2e-5);
            // The gradient: along itself the loss rises by its square.
            let (_, g) = gradients(&model, &a, &ids[..24]);
            let square: f64 = g.iter().map(|g| f64::from(*g).powi(2)).sum();
            let old = s.read(&a.params).unwrap();
            let h = 5e-3 / square.sqrt();
            let loss_at = |h: f64| {
                let step = old
                    .iter()
                    .zip(&g)
                    .map(|(p, g)| p + (h * f64::from(*g)) as f32);
                s.write(&a.params, &step.collect::<Vec<_>>()).unwrap();
                f64::from(gradients(&model, &a, &ids[..24]).0)
            };
            let slope = (loss_at(h) - loss_at(-h)) / (2.0 * h);
            assert!(
                (slope / square - 1.0).abs() < 0.02,
                "{name}, {on:?}: {slope} and {square}"
            );
        }
    }
}

#[test]
fn merging_refuses_what_is_there_and_leaves_nothing_behind() {
    let base = golden("llama");
    let dir = tempfile::tempdir().unwrap();
    let try_merge = |adapter: &Path, out: &Path| message(merge(&base, adapter, out, &mut |_| {}));
    fs::write(dir.path().join("file"), "").unwrap();
    let text = try_merge(&base.join("adapter"), dir.path());
    assert!(text.contains("exists and is not empty"), "{text}");
    let text = try_merge(&base.join("adapter"), &dir.path().join("file"));
    assert!(text.contains("is not a folder"), "{text}");
    // Half precision cannot hold what comes out.
    let halves = with_config(&base, |_| {});
    edit(&halves.path().join(WEIGHTS), |all| {
        let t = all
            .iter_mut()
            .find(|t| t.name.contains("0.mlp.up_proj"))
            .unwrap();
        (t.bytes, t.dtype) = (vec![0; t.bytes.len() / 2], safetensors::Dtype::F16);
    });
    let huge = dir.path().join("huge");
    let model = load(&base);
    let mut a = adapter(&model, &base);
    a.config.alpha = 1e6;
    shake(&model, &a, 100.0);
    a.save(&model, &huge, "base").unwrap();
    let text = message(merge(
        halves.path(),
        &huge,
        &dir.path().join("out"),
        &mut |_| {},
    ));
    assert!(
        text.contains("merged and stored as F16") && text.contains("holds"),
        "{text}"
    );
    let mut left: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["file", "huge"]);
}

#[test]
fn pissa_starts_at_the_base_and_is_saved_as_plain_lora_of_twice_the_rank() {
    let dir = golden("qwen2");
    let model = load(&dir);
    for rslora in [false, true] {
        let mut config = AdapterConfig::new(6, 9.0, Targets::AllLinear);
        config.use_rslora = rslora;
        config.init = Init::Pissa;
        config.rank_pattern = vec![("o_proj".into(), 3)];
        let a = Adapter::new(&model, &config, 5).unwrap();
        let ids = some_ids(20, model.config.vocab);
        let bare = logits(&model, None, &ids).concat();
        let d = distance(&logits(&model, Some(&a), &ids).concat(), &bare);
        assert!(d < 1e-5, "{d}");
        // The start is the best of its rank: what it leaves of W has no larger direction.
        let s = &model.session;
        let name = "model.layers.0.self_attn.q_proj";
        let part = |which: &str| a.get(s, &format!("{name}.lora_{which}.weight")).unwrap();
        let norm = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        assert!(norm(&part("A")) > 0.0 && (norm(&part("A")) / norm(&part("B")) - 1.0).abs() < 1e-3);
        shake(&model, &a, 0.02);
        let with = logits(&model, Some(&a), &ids).concat();
        assert!(distance(&with, &bare) > 1e-2);
        let folder = tempfile::tempdir().unwrap();
        a.save(&model, folder.path(), "base").unwrap();
        let (plain, _) = Adapter::load(&model, folder.path(), Role::Frozen).unwrap();
        let ranks: Vec<usize> = plain.modules().map(|m| m.1).collect();
        assert!(ranks.iter().all(|r| [12, 6].contains(r)), "{ranks:?}");
        let d = distance(&logits(&model, Some(&plain), &ids).concat(), &with);
        assert!(d < 2e-5, "{d}");
    }
    let mut config = AdapterConfig::new(33, 9.0, names(&["k_proj"]));
    config.init = Init::Pissa;
    let text = message(Adapter::new(&model, &config, 1));
    assert!(text.contains("no more than the smaller side"), "{text}");
    config.use_dora = true;
    let text = message(Adapter::new(&model, &config, 1));
    assert!(text.starts_with("init: want another start"), "{text}");
}

/// The mean loss of `ids`, and its gradient by part.
fn gradients(model: &Model, a: &Adapter, ids: &[u32]) -> (f32, Vec<f32>) {
    let (id, pos) = rows(model, ids, 2);
    let targets: Vec<u32> = ids[1..].iter().chain(&[NONE]).copied().collect();
    let (targets, _) = rows(model, &targets, 2);
    let hidden = model.hidden(&id, &pos, Some(a), None).unwrap();
    let loss = model
        .nll_with(&hidden.x, &targets, Some(a))
        .unwrap()
        .mean_all()
        .unwrap();
    let parts = a.parts().unwrap();
    let wrt: Vec<&Tensor> = parts.iter().map(|p| &p.1).collect();
    let g = value_and_grad(&loss, &wrt).unwrap();
    let mut all = vec![g.loss];
    all.extend(g.grads);
    let values = model.session.eval(&all).unwrap();
    let read = |t: &Tensor| model.session.read(t).unwrap();
    (
        read(&values[0])[0],
        values[1..].iter().flat_map(read).collect(),
    )
}

#[test]
fn dropout_is_on_in_training_only_and_repeats_with_its_key() {
    let model = load(&golden("qwen2"));
    let s = &model.session;
    let mut config = AdapterConfig::new(4, 8.0, names(&["q_proj", "v_proj", "down_proj"]));
    config.dropout = 0.25;
    let a = Adapter::new(&model, &config, 2).unwrap();
    shake(&model, &a, 0.1);
    let ids = some_ids(24, model.config.vocab);
    let mut plain = a.clone();
    plain.config.dropout = 0.0;
    let still = gradients(&model, &plain, &ids);
    assert_eq!(gradients(&model, &a, &ids), still);
    assert_eq!(
        gradients(&model, &plain.for_training(s).unwrap(), &ids),
        still
    );
    let t = a.for_training(s).unwrap();
    let at = |seed, step| {
        t.draw(s, seed, step).unwrap();
        gradients(&model, &t, &ids)
    };
    let first = at(7, 1);
    assert_ne!(first, still);
    assert_ne!(at(7, 2).0, first.0);
    assert_ne!(at(8, 1).0, first.0);
    assert_ne!(at(7 << 32, 1).0, first.0);
    assert_eq!(at(7, 1), first);
    // The gradient is that of the masks drawn: along itself the loss rises by its square.
    let old = s.read(&a.params).unwrap();
    let square: f64 = first.1.iter().map(|g| f64::from(*g).powi(2)).sum();
    let h = 1e-2 / square.sqrt();
    let loss_at = |h: f64| {
        let step = old
            .iter()
            .zip(&first.1)
            .map(|(p, g)| p + (h * f64::from(*g)) as f32);
        s.write(&a.params, &step.collect::<Vec<_>>()).unwrap();
        f64::from(at(7, 1).0)
    };
    let slope = (loss_at(h) - loss_at(-h)) / (2.0 * h);
    assert!((slope / square - 1.0).abs() < 0.02, "{slope} and {square}");
}

#[test]
fn b_goes_its_own_multiple_of_the_way() {
    let model = load(&golden("llama"));
    let s = &model.session;
    let config = AdapterConfig::new(2, 4.0, names(&["q_proj"]));
    let a = Adapter::new(&model, &config, 1).unwrap();
    let next = s
        .tensor(&vec![0.5; a.elems()], [a.elems()], Role::Data)
        .unwrap();
    assert!(a.pace(&next).unwrap().buffer().is_some());
    let fast = a.with_b_rate(s, 16.0).unwrap();
    let paced = s.read(&fast.pace(&next).unwrap()).unwrap();
    let mut at = 0;
    for (name, part) in fast.parts().unwrap() {
        let old = s.read(&part).unwrap();
        let ratio = if name.ends_with("lora_B.weight") {
            16.0
        } else {
            1.0
        };
        for (new, old) in paced[at..].iter().zip(&old) {
            assert!((new - (old + ratio * (0.5 - old))).abs() < 1e-5, "{name}");
        }
        at += old.len();
    }
    assert_eq!(at, a.elems());
    let text = message(a.with_b_rate(s, f64::NAN));
    assert!(text.contains("want a number above 0, got NaN"), "{text}");
}
