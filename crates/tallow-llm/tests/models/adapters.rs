//! Adapters on a model: views of one buffer, in and out of files, whole or refused.

use std::fs;

use tallow_core::op::Role;
use tallow_core::tensor::{Tensor, value_and_grad};
use tallow_llm::{Adapter, AdapterConfig, Targets};

use crate::support::*;

#[test]
fn the_parts_cover_the_parameters_once_and_in_order() {
    let model = load(&golden("llama3-rope"));
    let a = adapter(&model, &golden("llama3-rope"));
    let s = &model.session;
    let mut all = vec![];
    for (name, view) in a.parts().unwrap() {
        let values = s.read(&view).unwrap();
        assert_eq!(a.get(s, &name).unwrap(), values, "{name}");
        all.extend(values);
    }
    assert_eq!(all, s.read(&a.params).unwrap());
    // And they are the file's.
    for t in tensors(&golden("llama3-rope/adapter/adapter_model.safetensors")) {
        let name = t.name.strip_prefix("base_model.model.").unwrap();
        let (chunks, _) = t.bytes.as_chunks::<4>();
        let want: Vec<f32> = chunks.iter().map(|b| f32::from_le_bytes(*b)).collect();
        assert_eq!(a.get(s, name).unwrap(), want, "{name}");
    }
    assert_eq!(a.modules().count(), 4);
    assert!(
        a.modules()
            .all(|(_, rank, scale)| (rank, scale) == (4, 2.0))
    );
}

#[test]
fn saved_and_loaded_again_it_is_the_same_bytes() {
    for name in GOLDENS {
        let model = load(&golden(name));
        let first = adapter(&model, &golden(name));
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        first.save(&model, &one, "base").unwrap();
        let (again, warnings) = Adapter::load(&model, &one, Role::Frozen).unwrap();
        assert!(warnings.is_empty(), "{warnings:?}");
        again.save(&model, &two, "base").unwrap();
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            let read = |dir: &std::path::Path| fs::read(dir.join(file)).unwrap();
            assert_eq!(read(&one), read(&two), "{name}: {file}");
        }
        let values = |a: &Adapter| model.session.read(&a.params).unwrap();
        assert_eq!(values(&first), values(&again));
        assert_eq!(
            object(&one.join("adapter_config.json"))["base_model_name_or_path"],
            "base"
        );
        // State and frozen adapters compute the same.
        let ids = some_ids(9, model.config.vocab);
        let frozen = logits(&model, Some(&again), &ids).concat();
        let state = logits(&model, Some(&first), &ids).concat();
        assert!(distance(&frozen, &state) < 1e-5);
    }
}

#[test]
fn a_fresh_adapter_changes_nothing_until_b_does() {
    let model = load(&golden("qwen2"));
    let config = AdapterConfig::new(8, 16.0, Targets::AllLinear);
    let a = Adapter::new(&model, &config, 7).unwrap();
    let ids = some_ids(12, model.config.vocab);
    let bare = logits(&model, None, &ids).concat();
    assert_eq!(logits(&model, Some(&a), &ids).concat(), bare);
    let same = Adapter::new(&model, &config, 7).unwrap();
    let other = Adapter::new(&model, &config, 8).unwrap();
    let values = |a: &Adapter| model.session.read(&a.params).unwrap();
    assert_eq!(values(&a), values(&same));
    assert_ne!(values(&a), values(&other));
    let name = "model.layers.1.mlp.down_proj.lora_B.weight";
    let b = a.get(&model.session, name).unwrap();
    assert!(b.iter().all(|v| *v == 0.0));
    a.set(&model.session, name, &vec![0.1; b.len()]).unwrap();
    assert!(distance(&logits(&model, Some(&a), &ids).concat(), &bare) > 1e-3);
    let text = message(a.set(&model.session, name, &[0.0]));
    assert!(
        text.starts_with("values of an adapter's part: want"),
        "{text}"
    );
    assert!(a.get(&model.session, "lm_head.lora_A.weight").is_err());
}

#[test]
fn an_adapter_that_fits_in_part_is_refused() {
    let dir = with_config(&golden("llama"), |_| {});
    let model = load(dir.path());
    let folder = dir.path().join("adapter");
    edit(&folder.join("adapter_model.safetensors"), |all| {
        all.retain(|t| !t.name.contains("layers.1.mlp.up_proj.lora_B"));
    });
    let text = message(Adapter::load(&model, &folder, Role::State).map(|_| ()));
    assert!(text.contains("13 of 14 modules bound"), "{text}");
    assert!(
        text.contains("model.layers.1.mlp.up_proj (no lora_B)"),
        "{text}"
    );
    // One made for another model, whose MLP is wider.
    let other = load(&golden("qwen2"));
    let a = adapter(&other, &golden("qwen2"));
    let (ids, pos) = rows(&model, &some_ids(4, 320), 1);
    let text = message(model.hidden(&ids, &pos, Some(&a), None).map(|_| ()));
    assert!(text.contains("8 of 14 modules bound"), "{text}");
}

#[test]
fn a_rank_above_a_dimension_is_a_warning() {
    let model = load(&golden("llama"));
    let mut config = AdapterConfig::new(40, 40.0, Targets::Names(vec!["k_proj".into()]));
    config.dropout = 0.1;
    let dir = tempfile::tempdir().unwrap();
    let a = Adapter::new(&model, &config, 1).unwrap();
    a.save(&model, dir.path(), "base").unwrap();
    let (_, warnings) = Adapter::load(&model, dir.path(), Role::State).unwrap();
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(warnings[0].contains("rank 40 is above 32"), "{warnings:?}");
}

/// Each gradient of the mean loss, by part.
fn gradients(model: &tallow_llm::Model, a: &Adapter, ids: &[u32]) -> Vec<(String, Vec<f32>)> {
    let (id, pos) = rows(model, ids, 2);
    let targets: Vec<u32> = ids[1..].iter().chain(&[NONE]).copied().collect();
    let (targets, _) = rows(model, &targets, 2);
    let hidden = model.hidden(&id, &pos, Some(a), None).unwrap();
    let loss = model.nll(&hidden.x, &targets).unwrap().mean_all().unwrap();
    let parts = a.parts().unwrap();
    let wrt: Vec<&Tensor> = parts.iter().map(|p| &p.1).collect();
    let g = value_and_grad(&loss, &wrt).unwrap().grads;
    let values = model.session.eval(&g).unwrap();
    let read = |(name, g): (String, &Tensor)| (name, model.session.read(g).unwrap());
    let names = parts.into_iter().map(|p| p.0);
    names.zip(&values).map(read).collect()
}

#[test]
fn every_trainable_has_a_gradient_once_b_is_not_zero() {
    for name in GOLDENS {
        let model = load(&golden(name));
        let config = AdapterConfig::new(3, 6.0, Targets::AllLinear);
        let a = Adapter::new(&model, &config, 3).unwrap();
        let ids = some_ids(20, model.config.vocab);
        for (part, g) in gradients(&model, &a, &ids) {
            // With B at zero, A cannot matter yet.
            let zero = g.iter().all(|v| *v == 0.0);
            assert_eq!(zero, part.ends_with("lora_A.weight"), "{name}: {part}");
        }
        let all: Vec<f32> = (0..a.elems()).map(|i| (i as f32).sin() * 0.1).collect();
        model.session.write(&a.params, &all).unwrap();
        for (part, g) in gradients(&model, &a, &ids) {
            assert!(g.iter().all(|v| v.is_finite()), "{name}: {part}");
            let alive = g.iter().filter(|v| **v != 0.0).count();
            assert!(
                alive * 10 > g.len() * 9,
                "{name}: {part}: {alive} of {}",
                g.len()
            );
        }
    }
}
