//! Adapters through mlx-lm's format and back; what it cannot say.

use std::fs;
use std::path::Path;

use super::*;
use crate::config::ModelConfig;
use crate::test_files::{golden, message};

fn base(name: &str) -> Projections {
    ModelConfig::read(&golden(name)).unwrap().projections()
}

fn config(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join(CONFIG_FILE)).unwrap()).unwrap()
}

#[test]
fn adapters_come_back_as_they_went() {
    for name in ["llama", "llama-dora", "qwen2"] {
        let base = base(name);
        let first = Adapter::read(&golden(name).join("adapter"), &base).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for with in [None, Some(&base)] {
            write(&first, dir.path(), with).unwrap();
            let again = read(dir.path(), Some(&base)).unwrap();
            assert_eq!(again.modules, first.modules, "{name}");
            assert_eq!(again.modules, read(dir.path(), None).unwrap().modules);
            assert_eq!(again.config.use_dora, first.config.use_dora);
            // And in PEFT's format it is read as the same adapter.
            let peft = dir.path().join("peft");
            again.write(&peft).unwrap();
            let back = Adapter::read(&peft, &base).unwrap();
            assert_eq!(back.modules, first.modules, "{name}");
        }
        let c = config(dir.path());
        assert_eq!(c["num_layers"], 2);
        assert_eq!(c["lora_parameters"]["keys"].as_array().unwrap().len(), 7);
        assert!(
            c["lora_parameters"]["keys"]
                .as_array()
                .unwrap()
                .contains(&json!("mlp.up_proj"))
        );
    }
}

#[test]
fn shapes_are_those_of_mlx() {
    let base = base("llama");
    let first = Adapter::read(&golden("llama/adapter"), &base).unwrap();
    let dir = tempfile::tempdir().unwrap();
    write(&first, dir.path(), None).unwrap();
    let w = Weights::open_file(&dir.path().join(WEIGHTS_FILE)).unwrap();
    let (a, b) = (
        w.get("model.layers.0.self_attn.k_proj.lora_a").unwrap(),
        w.get("model.layers.0.self_attn.k_proj.lora_b").unwrap(),
    );
    assert_eq!((&a.shape[..], &b.shape[..]), (&[64, 8][..], &[8, 32][..]));
    let k = first
        .modules
        .iter()
        .find(|m| m.module.ends_with("0.self_attn.k_proj"))
        .unwrap();
    // Input 5, rank 2; rank 3, output 7.
    assert_eq!(a.to_f32().unwrap()[5 * 8 + 2], k.a[2 * 64 + 5]);
    assert_eq!(b.to_f32().unwrap()[3 * 32 + 7], k.b[7 * 8 + 3]);
    // Without the model nobody knows which layers are the last.
    let c = config(dir.path());
    assert_eq!(c["num_layers"], -1);
    assert!(
        c["lora_parameters"]["keys"][0]
            .as_str()
            .unwrap()
            .starts_with("model.layers.0.")
    );
}

#[test]
fn one_rank_and_one_scale_are_made_of_several() {
    let base = base("llama");
    let mut c = AdapterConfig::new(
        4,
        8.0,
        Targets::Names(vec!["q_proj".into(), "up_proj".into()]),
    );
    c.rank_pattern = vec![("q_proj".into(), 2)];
    c.alpha_pattern = vec![("up_proj".into(), 6.0)];
    c.layers = Some(vec![1]);
    let mut first = Adapter::init(c, &base, 1).unwrap();
    for m in &mut first.modules {
        m.b = (0..m.b.len()).map(|i| (i as f32).sin()).collect();
    }
    let dir = tempfile::tempdir().unwrap();
    write(&first, dir.path(), Some(&base)).unwrap();
    assert_eq!(config(dir.path())["num_layers"], 1);
    let again = read(dir.path(), Some(&base)).unwrap();
    assert_eq!(again.modules.len(), 2);
    for (old, new) in first.modules.iter().zip(&again.modules) {
        assert_eq!((new.rank, &new.module), (4, &old.module));
        let product = |m: &LoraModule, i: usize, j: usize| -> f64 {
            let each = (0..m.rank)
                .map(|r| f64::from(m.b[i * m.rank + r]) * f64::from(m.a[r * m.projection.k + j]));
            f64::from(m.scale) * each.sum::<f64>()
        };
        for (i, j) in [(0, 0), (3, 17), (31, 63)] {
            assert!((product(old, i, j) - product(new, i, j)).abs() < 1e-6);
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let llama = base("llama");
    let first = Adapter::read(&golden("llama/adapter"), &llama).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let refusal = |base: Option<&Projections>| message(dir.path(), read(dir.path(), base));
    assert!(refusal(None).starts_with("adapter_config.json does not exist; give an mlx-lm"));
    write(&first, dir.path(), Some(&llama)).unwrap();
    let good = fs::read_to_string(dir.path().join(CONFIG_FILE)).unwrap();
    let with = |from: &str, to: &str| {
        assert!(good.contains(from), "{good}");
        fs::write(dir.path().join(CONFIG_FILE), good.replace(from, to)).unwrap();
        refusal(Some(&llama))
    };
    let text = with("\"lora\"", "\"full\"");
    assert!(
        text.contains("fine_tune_type \"full\" is not supported"),
        "{text}"
    );
    let text = with("\"rank\": 8", "\"rank\": 4");
    assert!(text.contains("want shape") && text.contains("4"), "{text}");
    let text = with("\"rank\": 8", "\"rank\": 0");
    assert!(text.contains("lora_parameters.rank"), "{text}");
    let text = with("\"scale\"", "\"alpha\"");
    assert!(
        text.contains("`lora_parameters.scale`: want a number, got nothing"),
        "{text}"
    );
    let text = with("\"lora\"", "\"dora\"");
    assert!(
        text.contains("0 of 14 modules bound") && text.contains("(no m)"),
        "{text}"
    );
    fs::write(dir.path().join(CONFIG_FILE), &good).unwrap();
    let text = refusal(Some(&base("qwen2")));
    assert!(
        text.contains("want shape") || text.contains("modules bound"),
        "{text}"
    );
}
