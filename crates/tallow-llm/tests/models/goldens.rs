//! What other programs computed, within the tolerances of `tests/goldens/README.md`; and that a comparison
//! notices what it must notice.

use std::fs;

use safetensors::Dtype;
use serde_json::{Map, Value, json};
use tallow_llm::{Check, verify};

use crate::support::*;

/// `config.json` as it was written before transformers 5.
fn old_layout(config: &mut Map<String, Value>) {
    let rope = config.remove("rope_parameters").unwrap();
    let mut rope = rope.as_object().unwrap().clone();
    config.insert("rope_theta".into(), rope.remove("rope_theta").unwrap());
    let scaling = match rope.get("rope_type").unwrap() == "default" {
        true => Value::Null,
        false => json!(rope),
    };
    config.insert("rope_scaling".into(), scaling);
    let dtype = config.remove("dtype").unwrap();
    config.insert("torch_dtype".into(), dtype);
    config.remove("layer_types");
}

fn all_pass(name: &str, checks: &[Check]) {
    assert_eq!(checks.len(), 7, "{name}");
    for c in checks {
        assert!(c.pass && c.measured.is_some(), "{name}: {c:?}");
    }
}

#[test]
fn the_reference_outputs_are_reproduced_in_both_config_layouts() {
    for name in GOLDENS {
        all_pass(name, &verify(&session(), &golden(name)).unwrap());
        let old = with_config(&golden(name), old_layout);
        let checks = verify(&session(), old.path()).unwrap();
        all_pass(&format!("{name}, old layout"), &checks);
    }
}

/// Quantities out of tolerance, after a change of the reference.
fn failing(change: impl FnOnce(&mut Vec<Stored>)) -> Vec<String> {
    let dir = with_config(&golden("llama"), |_| {});
    edit(&dir.path().join("reference.safetensors"), change);
    let checks = verify(&session(), dir.path()).unwrap();
    let failed = checks.into_iter().filter(|c| !c.pass);
    failed.map(|c| c.quantity).collect()
}

/// Multiplies the values of tensors that begin like this.
fn scale(all: &mut [Stored], prefix: &str, by: f32) {
    let mut found = false;
    for t in all.iter_mut().filter(|t| t.name.starts_with(prefix)) {
        let (values, _) = t.bytes.as_chunks_mut::<4>();
        for v in values {
            *v = (f32::from_le_bytes(*v) * by).to_le_bytes();
        }
        found = true;
    }
    assert!(found, "{prefix}");
}

#[test]
fn what_is_out_of_tolerance_fails_by_name() {
    let none: Vec<String> = vec![];
    assert_eq!(failing(|_| {}), none);
    assert_eq!(failing(|r| scale(r, "logits", 1.001)), ["logits"]);
    assert_eq!(failing(|r| scale(r, "logits", f32::NAN)), ["logits"]);
    assert_eq!(
        failing(|r| scale(r, "adapter_logits", 1.001)),
        ["adapter logits"]
    );
    assert_eq!(
        failing(|r| scale(r, "loss", 1.00002)),
        ["loss", "training losses"]
    );
    assert_eq!(
        failing(|r| scale(r, "grad.model.layers.1", 1.001)),
        ["gradients"]
    );
    let after = "after5.model.layers.0.mlp.up_proj.lora_A";
    assert_eq!(failing(|r| scale(r, after, 1.001)), ["trained weights"]);
    let token = |r: &mut Vec<Stored>| {
        let greedy = r.iter_mut().find(|t| t.name == "greedy").unwrap();
        greedy.bytes[8 * 20] ^= 1;
    };
    assert_eq!(failing(token), ["greedy"]);
    // A module that only the reference has, or only the adapter.
    let grad = "grad.model.layers.0.mlp.up_proj.lora_A.weight";
    assert_eq!(failing(|r| r.retain(|t| t.name != grad)), ["gradients"]);
    let other = |r: &mut Vec<Stored>| {
        let mut t = r.iter().find(|t| t.name == grad).unwrap().clone();
        t.name = grad.replace("up_proj", "side_proj");
        r.push(t);
    };
    assert_eq!(failing(other), ["gradients"]);
}

#[test]
fn a_forgotten_weight_decay_is_noticed() {
    let without = |r: &mut Vec<Stored>| {
        let steps = r.iter_mut().find(|t| t.name.starts_with("losses_adamw"));
        steps.unwrap().name = "losses_adamw_lr1e-2_wd0.0".into();
    };
    assert_eq!(failing(without), ["training losses", "trained weights"]);
}

#[test]
fn absent_parts_are_reported_and_nothing_at_all_is_an_error() {
    let dir = with_config(&golden("qwen2"), |_| {});
    let reference = dir.path().join("reference.safetensors");
    let absent = |checks: Vec<Check>| -> Vec<String> {
        assert!(checks.iter().all(|c| c.pass), "{checks:?}");
        let gone = checks.into_iter().filter(|c| c.measured.is_none());
        gone.map(|c| c.quantity).collect()
    };
    edit(&reference, |r| {
        r.retain(|t| t.name != "loss" && t.name != "greedy" && !t.name.starts_with("losses"));
    });
    let found = absent(verify(&session(), dir.path()).unwrap());
    let want = ["greedy", "loss", "training losses", "trained weights"];
    assert_eq!(found, want);
    fs::remove_dir_all(dir.path().join("adapter")).unwrap();
    let found = absent(verify(&session(), dir.path()).unwrap());
    assert_eq!(found.len(), 6, "{found:?}");
    edit(&reference, |r| r.retain(|t| t.name == "input_ids"));
    let text = message(verify(&session(), dir.path()));
    assert!(text.contains("holds nothing to compare with"), "{text}");
}

#[test]
fn unusable_references_and_models_are_one_sentence() {
    let bad = |change: &dyn Fn(&mut Vec<Stored>)| {
        let dir = with_config(&golden("llama"), |_| {});
        edit(&dir.path().join("reference.safetensors"), change);
        message(verify(&session(), dir.path()))
    };
    let find = |r: &mut Vec<Stored>, name: &str| r.iter().position(|t| t.name == name).unwrap();
    let text = bad(&|r| r.retain(|t| t.name != "input_ids"));
    assert!(text.contains("there is no tensor `input_ids`"), "{text}");
    let text = bad(&|r| {
        let i = find(r, "input_ids");
        r[i].bytes[..8].copy_from_slice(&(-1_i64).to_le_bytes());
    });
    assert!(
        text.contains("id -1 is not in a vocabulary of 320"),
        "{text}"
    );
    let text = bad(&|r| {
        let i = find(r, "logits");
        r[i].shape = vec![48, 320];
    });
    assert!(
        text.contains("want shape [2, 24, 320], got [48, 320]"),
        "{text}"
    );
    let text = bad(&|r| {
        let i = find(r, "loss");
        (r[i].dtype, r[i].bytes) = (Dtype::I32, vec![0; 4]);
    });
    assert!(text.contains("is stored as I32"), "{text}");
    let text = bad(&|r| {
        let i = find(r, "losses_adamw_lr1e-2_wd0.01");
        r[i].name = "losses_adamw_lr_wd0.01".into();
    });
    assert!(
        text.contains("want losses_adamw_lr<number>_wd<number>"),
        "{text}"
    );
    let text = message(verify(&session(), &tiny()));
    assert!(
        text.contains("reference.safetensors does not exist"),
        "{text}"
    );
    for (name, architecture) in [("bert", "BertModel"), ("gemma2", "Gemma2ForCausalLM")] {
        let text = message(verify(&session(), &golden("other").join(name)));
        assert!(text.contains(architecture), "{text}");
        assert!(
            text.contains("known architectures: LlamaForCausalLM"),
            "{text}"
        );
    }
}
