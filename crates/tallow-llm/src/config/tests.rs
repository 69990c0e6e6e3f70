//! Configurations of the reference models, of both layouts, and everything that must be refused.

use serde_json::{Map, Value, json};

use super::*;
use crate::test_files::{folder_with, golden, message, object, tiny};

fn base(model: &str) -> Map<String, Value> {
    object(&golden(model).join("config.json"))
}

/// The configuration with some keys changed; a key set to "-" is removed.
fn changed(model: &str, changes: Value) -> Result<ModelConfig> {
    let dir = folder_with("config.json", &edited(model, changes));
    ModelConfig::read(dir.path())
}

fn edited(model: &str, changes: Value) -> Map<String, Value> {
    let mut map = base(model);
    for (key, value) in changes.as_object().unwrap() {
        match value == "-" {
            true => map.remove(key),
            false => map.insert(key.clone(), value.clone()),
        };
    }
    map
}

fn refusal(model: &str, changes: Value) -> String {
    let dir = folder_with("config.json", &edited(model, changes));
    message(dir.path(), ModelConfig::read(dir.path()))
}

#[test]
fn the_reference_models_are_read() {
    let c = ModelConfig::read(&golden("llama")).unwrap();
    assert_eq!(c.family, Family::Llama);
    assert_eq!((c.hidden, c.layers, c.heads, c.kv_heads), (64, 2, 4, 2));
    assert_eq!((c.head_dim, c.mlp, c.vocab), (16, 160, 320));
    assert_eq!((c.max_positions, c.eps), (256, 1e-5));
    assert_eq!((c.bos, c.eos.as_slice(), c.pad), (Some(1), &[2][..], None));
    assert_eq!(
        (c.tied, c.qkv_bias, c.o_bias, c.mlp_bias),
        (false, false, false, false)
    );
    assert_eq!(c.windows, [None, None]);
    assert_eq!(c.stored, Some(StoredDtype::F32));

    let c = ModelConfig::read(&golden("qwen2")).unwrap();
    assert_eq!((c.family, c.head_dim, c.eps), (Family::Qwen2, 16, 1e-6));
    assert_eq!((c.qkv_bias, c.o_bias, c.mlp_bias), (true, false, false));
    assert_eq!((c.bos, c.eos.len()), (None, 0));

    let c = ModelConfig::read(&golden("mistral-window")).unwrap();
    assert_eq!((c.family, c.windows), (Family::Mistral, vec![Some(8); 2]));

    let c = ModelConfig::read(&tiny()).unwrap();
    assert_eq!(
        (c.tied, c.pad, c.stored),
        (true, Some(2), Some(StoredDtype::BF16))
    );
}

#[test]
fn the_old_layout_means_the_same() {
    for (model, scaling) in [
        ("llama", Value::Null),
        ("qwen2", Value::Null),
        ("mistral-window", json!({})),
        (
            "llama3-rope",
            json!({"type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 64}),
        ),
    ] {
        let theta = base(model)["rope_parameters"]["rope_theta"].clone();
        let mut old = edited(
            model,
            json!({"rope_parameters": "-", "rope_theta": theta, "rope_scaling": scaling,
                "torch_dtype": "float32", "dtype": "-"}),
        );
        if model != "qwen2" {
            old.insert("head_dim".to_owned(), Value::Null);
        }
        let dir = folder_with("config.json", &old);
        let mut got = ModelConfig::read(dir.path()).unwrap();
        let want = ModelConfig::read(&golden(model)).unwrap();
        got.path.clone_from(&want.path);
        assert_eq!(got, want, "{model}");
    }
}

#[test]
fn absent_head_counts_and_widths_are_derived() {
    for absent in [json!("-"), Value::Null] {
        let c = changed(
            "llama",
            json!({"num_key_value_heads": absent, "head_dim": absent}),
        )
        .unwrap();
        assert_eq!((c.kv_heads, c.head_dim), (4, 16));
    }
    let c = changed("llama", json!({"head_dim": 24, "hidden_size": 50})).unwrap();
    assert_eq!((c.head_dim, c.rope.inv_freq.len()), (24, 12));
    assert_eq!(
        c.projections()["model.layers.1.self_attn.o_proj"],
        Projection { n: 50, k: 96 }
    );
    assert_eq!(
        c.projections()["model.layers.0.self_attn.k_proj"],
        Projection { n: 48, k: 50 }
    );
    assert_eq!(c.projections().len(), 14);
}

#[test]
fn biases_belong_to_families() {
    let on = json!({"attention_bias": true, "mlp_bias": true});
    let c = changed("llama", on.clone()).unwrap();
    assert_eq!((c.qkv_bias, c.o_bias, c.mlp_bias), (true, true, true));
    let c = changed("mistral-window", on).unwrap();
    assert_eq!((c.qkv_bias, c.o_bias, c.mlp_bias), (false, false, false));
    let c = changed("qwen2", json!({"attention_bias": false})).unwrap();
    assert_eq!((c.qkv_bias, c.o_bias), (true, false));
}

#[test]
fn windows_follow_the_family() {
    let windows = |model, changes| changed(model, changes).unwrap().windows;
    let on = |more: Value| {
        let mut all = json!({"use_sliding_window": true, "sliding_window": 6, "layer_types": "-"});
        let more = more.as_object().unwrap().clone();
        all.as_object_mut().unwrap().extend(more);
        all
    };
    assert_eq!(
        windows("qwen2", on(json!({"max_window_layers": 1}))),
        [None, Some(6)]
    );
    assert_eq!(
        windows("qwen2", on(json!({"max_window_layers": 0}))),
        [Some(6), Some(6)]
    );
    assert_eq!(
        windows("qwen2", on(json!({"max_window_layers": 9}))),
        [None, None]
    );
    let types =
        json!({"layer_types": ["sliding_attention", "full_attention"], "max_window_layers": 1});
    assert_eq!(windows("qwen2", on(types)), [Some(6), None]);
    let off = json!({"use_sliding_window": false, "max_window_layers": 0});
    assert_eq!(windows("qwen2", on(off)), [None, None]);
    let null = json!({"sliding_window": null, "max_window_layers": 0});
    assert_eq!(windows("qwen2", on(null)), [None, None]);
    assert_eq!(
        windows("mistral-window", json!({"sliding_window": null})),
        [None, None]
    );
    assert_eq!(
        windows("mistral-window", json!({"sliding_window": "-"})),
        [Some(4096), Some(4096)]
    );
    assert_eq!(windows("llama", json!({"sliding_window": 4})), [None, None]);
    let clash = json!({"layer_types": ["sliding_attention", "full_attention"]});
    assert!(refusal("qwen2", clash).contains("`layer_types`: want \"full_attention\" where"));
    assert!(refusal("qwen2", on(json!({"sliding_window": 0}))).contains("`sliding_window`: want"));
    assert!(
        refusal("qwen2", json!({"layer_types": ["full_attention"]})).contains("a list of 2 times")
    );
}

#[test]
fn plain_and_linear_frequencies_are_those_of_numpy() {
    let c = changed("llama", json!({})).unwrap();
    let plain: [f32; 8] = [
        1.0,
        0.31622776,
        0.1,
        0.031_622_78,
        0.01,
        0.0031622779,
        0.001,
        0.000_316_227_8,
    ];
    assert_eq!(c.rope.inv_freq, plain);
    let scaling = json!({"rope_parameters": "-", "rope_scaling": {"type": "linear", "factor": 4}});
    let c = changed("llama", scaling).unwrap();
    assert_eq!(c.rope.kind, RopeKind::Linear { factor: 4.0 });
    assert_eq!(c.rope.inv_freq, plain.map(|f| f / 4.0));
}

#[test]
fn llama3_frequencies_are_those_of_numpy_in_f32() {
    let c = ModelConfig::read(&golden("llama3-rope")).unwrap();
    // transformers' formula evaluated step by step on float32 arrays.
    let want: [f32; 8] = [
        1.0,
        0.079_403_01,
        0.004_700_754,
        0.000_911_583_13,
        0.000_176_776_68,
        3.428_102_4e-5,
        6.647_870_6e-6,
        1.289_173_2e-6,
    ];
    for (got, want) in c.rope.inv_freq.iter().zip(want) {
        // Two roundings apart at most: numpy's float32 power is not correctly rounded.
        assert!((got - want).abs() <= 2e-7 * want, "want {want}, got {got}");
    }
    // Llama 3.2: 32 frequencies, of which three lie in the smooth change.
    let kind = RopeKind::Llama3 {
        factor: 32.0,
        low_freq: 1.0,
        high_freq: 4.0,
        original: 8192.0,
    };
    let got = Rope::new(kind, 5e5, 64).inv_freq;
    let want: [(usize, f32); 6] = [
        (1, 0.663_601_2),
        (14, 0.003_211_446),
        (15, 0.001_290_548),
        (16, 0.000_429_556_7),
        (17, 9.708_286e-5),
        (31, 9.418_307e-8),
    ];
    for (i, want) in want {
        assert!(
            (got[i] - want).abs() <= 2e-7 * want,
            "{i}: want {want}, got {}",
            got[i]
        );
    }
}

#[test]
fn ids_may_be_numbers_lists_or_null() {
    let eos = |v| changed("llama", json!({"eos_token_id": v})).unwrap().eos;
    assert_eq!(eos(json!(7)), [7]);
    assert_eq!(eos(json!([9, 7, 9])), [9, 7]);
    assert!(eos(Value::Null).is_empty());
    assert!(eos(json!([])).is_empty());
    assert_eq!(eos(json!("-")), [2]);
    let bos = |v| changed("llama", json!({"bos_token_id": v})).unwrap().bos;
    assert_eq!(
        (bos(Value::Null), bos(json!("-")), bos(json!(5))),
        (None, Some(1), Some(5))
    );
    let pad = |v| changed("llama", json!({"pad_token_id": v})).unwrap().pad;
    assert_eq!(
        (pad(json!(-1)), pad(json!(320)), pad(json!(0))),
        (None, None, Some(0))
    );
}

#[test]
fn generation_config_adds_ends_of_text() {
    let read = |eos: Value, generation: &str| {
        let dir = folder_with(
            "config.json",
            &edited("llama", json!({"eos_token_id": eos})),
        );
        std::fs::write(dir.path().join("generation_config.json"), generation).unwrap();
        let read = ModelConfig::read(dir.path());
        read.map(|c| c.eos).map_err(|e| e.to_string())
    };
    assert_eq!(
        read(json!(2), r#"{"eos_token_id": [5, 2]}"#).unwrap(),
        [2, 5]
    );
    assert_eq!(read(Value::Null, r#"{"eos_token_id": 5}"#).unwrap(), [5]);
    assert_eq!(read(json!("-"), r#"{"eos_token_id": 5}"#).unwrap(), [5]);
    assert_eq!(read(json!(2), "{}").unwrap(), [2]);
    assert!(
        read(json!(2), "{")
            .unwrap_err()
            .contains("generation_config.json: not valid JSON")
    );
    assert!(
        read(json!(2), r#"{"eos_token_id": 320}"#)
            .unwrap_err()
            .contains("`eos_token_id`")
    );
}

#[test]
fn other_architectures_are_named_with_the_known_ones() {
    for (folder, name) in [
        ("bert", "BertModel"),
        ("gemma2", "Gemma2ForCausalLM"),
        ("gemma3", "Gemma3ForCausalLM"),
        ("phi3", "Phi3ForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
    ] {
        let dir = golden("other").join(folder);
        let got = message(&dir, ModelConfig::read(&dir));
        let model_type = folder.replace("gemma3", "gemma3_text");
        assert_eq!(
            got,
            format!(
                "config.json: architecture \"{name}\" (model_type \"{model_type}\") is not supported; \
                 known architectures: LlamaForCausalLM, Qwen2ForCausalLM, MistralForCausalLM"
            )
        );
    }
    let nameless = json!({"architectures": "-", "model_type": "-"});
    assert!(refusal("llama", nameless).contains("architecture without a name"));
    assert!(refusal("llama", json!({"model_type": "qwen2"})).contains("is not supported"));
    assert!(changed("llama", json!({"architectures": null})).is_ok());
    assert!(changed("llama", json!({"model_type": "-"})).is_ok());
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let rope =
        |kind: &str| json!({"rope_parameters": "-", "rope_scaling": {"type": kind, "factor": 2.0}});
    for kind in ["yarn", "dynamic", "longrope", "su", "mrope"] {
        let want = format!(
            "config.json: rope scaling \"{kind}\" is not supported; this version computes default, linear and llama3"
        );
        assert_eq!(refusal("llama", rope(kind)), want);
    }
    for (changes, want) in [
        (
            json!({"hidden_act": "gelu"}),
            "hidden_act \"gelu\" is not supported",
        ),
        (
            json!({"partial_rotary_factor": 0.5}),
            "partial_rotary_factor 0.5 is not supported",
        ),
        (
            json!({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}),
            "partial_rotary_factor 0.25 is not supported",
        ),
        (
            json!({"quantization_config": {"quant_method": "gptq"}}),
            "quantization_config (\"gptq\") is not supported; use the model in f32, bf16 or f16",
        ),
        (
            json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
            "rope_parameters.* by layer type is not supported",
        ),
    ] {
        let got = refusal("llama", changes);
        assert!(got.contains(want), "want {want}, got {got}");
    }
}

#[test]
fn absurd_values_name_the_file_and_the_key() {
    for (changes, key) in [
        (json!({"num_attention_heads": 0}), "num_attention_heads"),
        (json!({"num_attention_heads": "-"}), "num_attention_heads"),
        (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
        (json!({"num_key_value_heads": 8}), "num_key_value_heads"),
        (json!({"hidden_size": 0}), "hidden_size"),
        (json!({"hidden_size": -64}), "hidden_size"),
        (json!({"hidden_size": 1e300}), "hidden_size"),
        (json!({"hidden_size": "64"}), "hidden_size"),
        (json!({"hidden_size": 65, "head_dim": null}), "hidden_size"),
        (json!({"head_dim": 15}), "head_dim"),
        (json!({"num_hidden_layers": 1_000_000}), "num_hidden_layers"),
        (json!({"intermediate_size": [160]}), "intermediate_size"),
        (json!({"vocab_size": 0.5}), "vocab_size"),
        (json!({"rms_norm_eps": 0}), "rms_norm_eps"),
        (json!({"rms_norm_eps": "NaN"}), "rms_norm_eps"),
        (json!({"rms_norm_eps": 1e-60}), "rms_norm_eps"),
        (
            json!({"max_position_embeddings": 0}),
            "max_position_embeddings",
        ),
        (json!({"tie_word_embeddings": "yes"}), "tie_word_embeddings"),
        (json!({"bos_token_id": 320}), "bos_token_id"),
        (json!({"eos_token_id": [1, "x"]}), "eos_token_id"),
        (json!({"rope_parameters": {"rope_theta": 0}}), "rope_theta"),
        (json!({"rope_parameters": 3}), "rope_parameters"),
        (
            json!({"rope_parameters": {"rope_type": "linear"}}),
            "rope_parameters.factor",
        ),
        (
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}}),
            "rope_scaling.high_freq_factor",
        ),
    ] {
        let got = refusal("llama", changes);
        let want = format!("config.json: `{key}`: want ");
        assert!(got.starts_with(&want), "want {want}, got {got}");
    }
}

#[test]
fn a_file_that_is_no_object_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let read = |text: &str| {
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        message(dir.path(), ModelConfig::read(dir.path()))
    };
    let got = read("{\n \"rms_norm_eps\": NaN\n}");
    assert!(
        got.contains("line 2") && got.contains("rms_norm_eps"),
        "{got}"
    );
    assert!(read("[]").contains("want an object"));
    assert!(read("\u{0}\u{1}").contains("not valid JSON"));
    assert!(read(&"[".repeat(100_000)).contains("not valid JSON"));
    let none = dir.path().join("none");
    let got = message(&none, ModelConfig::read(&none));
    assert!(
        got.starts_with("config.json does not exist; give a Hugging Face model folder"),
        "{got}"
    );
}
