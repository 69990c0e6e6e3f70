//! Adapters that PEFT wrote and adapters for PEFT: bytes, selections, ranks and scales, and all refusals.

use std::fs;
use std::path::PathBuf;

use safetensors::tensor::TensorView as Raw;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::*;
use crate::config::ModelConfig;
use crate::test_files::{golden, message, object};

fn base() -> Projections {
    ModelConfig::read(&golden("llama")).unwrap().projections()
}

fn golden_dir() -> PathBuf {
    golden("llama").join("adapter")
}

fn golden_adapter() -> Adapter {
    Adapter::read(&golden_dir(), &base()).unwrap()
}

type Tensors = BTreeMap<String, (StoredDtype, Vec<usize>, Vec<u8>)>;

/// The reference adapter after changes to its configuration and tensors.
fn changed(config: Value, tensors: impl FnOnce(&mut Tensors)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut map: Map<String, Value> = object(&golden_dir().join(CONFIG_FILE));
    map.extend(config.as_object().unwrap().clone());
    fs::write(
        dir.path().join(CONFIG_FILE),
        serde_json::to_vec(&map).unwrap(),
    )
    .unwrap();
    let file = Weights::open_file(&golden_dir().join(WEIGHTS_FILE)).unwrap();
    let copy = |t: &TensorView| {
        (
            t.name.clone(),
            (t.dtype, t.shape.clone(), t.as_bytes().to_vec()),
        )
    };
    let mut all: Tensors = file.iter().map(copy).collect();
    tensors(&mut all);
    let views = all
        .iter()
        .map(|(n, (d, s, b))| (n.clone(), Raw::new(*d, s.clone(), b).unwrap()));
    let bytes = safetensors::serialize(views, None::<HashMap<_, _>>).unwrap();
    fs::write(dir.path().join(WEIGHTS_FILE), bytes).unwrap();
    dir
}

fn refusal(config: Value, tensors: impl FnOnce(&mut Tensors)) -> String {
    let dir = changed(config, tensors);
    message(dir.path(), Adapter::read(dir.path(), &base()))
}

fn key(rest: &str) -> String {
    format!("base_model.model.model.layers.{rest}.weight")
}

/// Short names of what a configuration selects: "0.q_proj".
fn selected(config: &AdapterConfig) -> Vec<String> {
    let short = |m: &LoraModule| {
        let parts: Vec<&str> = m.module.split('.').collect();
        format!("{}.{}", parts[2], parts[4])
    };
    config.resolve(&base()).unwrap().iter().map(short).collect()
}

fn names(names: &[&str]) -> Targets {
    Targets::Names(names.iter().map(|n| (*n).to_owned()).collect())
}

#[test]
fn the_reference_adapter_is_read() {
    let adapter = golden_adapter();
    assert_eq!(adapter.modules.len(), 14);
    assert!(adapter.warnings.is_empty());
    let m = &adapter.modules[13];
    assert_eq!(m.module, "model.layers.1.self_attn.v_proj");
    assert_eq!(
        (m.rank, m.scale, m.projection),
        (8, 2.0, Projection { n: 32, k: 64 })
    );
    let file = Weights::open_file(&golden_dir().join(WEIGHTS_FILE)).unwrap();
    let b = file.get(&key("1.self_attn.v_proj.lora_B")).unwrap();
    assert_eq!((m.a.len(), &m.b), (8 * 64, &b.to_f32().unwrap()));
}

#[test]
fn an_adapter_is_written_byte_for_byte_as_peft_does() {
    let adapter = golden_adapter();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("new/adapter");
    adapter.write(&out).unwrap();
    for file in [CONFIG_FILE, WEIGHTS_FILE] {
        let (want, got) = (fs::read(golden_dir().join(file)), fs::read(out.join(file)));
        assert!(want.unwrap() == got.unwrap(), "{file} differs");
    }
    assert_eq!(fs::read_dir(&out).unwrap().count(), 2);
}

#[test]
fn everything_a_configuration_holds_survives_writing() {
    let mut config = AdapterConfig::new(4, 2.5, names(&["q_proj", "down_proj"]));
    config.use_rslora = true;
    config.dropout = 0.05;
    config.exclude = Some(Targets::Regex(r".*\.0\..*down_proj".to_owned()));
    config.layers = Some(vec![0, 1]);
    config.layers_pattern = vec!["layers".to_owned()];
    config.rank_pattern = vec![("down_proj".to_owned(), 6)];
    config.alpha_pattern = vec![("q_proj".to_owned(), 3.0)];
    config.base_model = Some("someone/model".to_owned());
    let dir = tempfile::tempdir().unwrap();
    let adapter = Adapter::init(config.clone(), &base(), 1).unwrap();
    adapter.write(dir.path()).unwrap();
    let got = Adapter::read(dir.path(), &base()).unwrap();
    config.path = dir.path().join(CONFIG_FILE);
    assert_eq!(got.config, config);
    assert_eq!(got.modules, adapter.modules);
    let ranks: Vec<(usize, f32)> = got.modules.iter().map(|m| (m.rank, m.scale)).collect();
    let scale = |alpha: f64, r: f64| (alpha / r.sqrt()) as f32;
    assert_eq!(
        ranks,
        [
            (4, scale(3.0, 4.0)),
            (6, scale(2.5, 6.0)),
            (4, scale(3.0, 4.0))
        ]
    );
}

#[test]
fn targets_select_as_peft_does() {
    let with = |targets| AdapterConfig::new(8, 16.0, targets);
    let regex = |p: &str| with(Targets::Regex(p.to_owned()));
    assert_eq!(selected(&with(Targets::AllLinear)).len(), 14);
    assert_eq!(
        selected(&with(names(&["q_proj"]))),
        ["0.q_proj", "1.q_proj"]
    );
    assert_eq!(
        selected(&with(names(&["model.layers.1.mlp.up_proj"]))),
        ["1.up_proj"]
    );
    assert_eq!(
        selected(&with(names(&["mlp.up_proj", "none"]))),
        ["0.up_proj", "1.up_proj"]
    );
    assert_eq!(
        selected(&regex(r".*\.(q|v)_proj")),
        ["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"]
    );
    assert_eq!(
        selected(&regex(r"model\.layers\.1\.mlp\.(?!up).*")),
        ["1.down_proj", "1.gate_proj"]
    );
    // A whole match, also with an alternative at the top.
    assert_eq!(selected(&regex(r".*0.*k_proj|q_proj")), ["0.k_proj"]);
    let mut config = with(names(&["q_proj", "k_proj"]));
    config.exclude = Some(names(&["0.self_attn.q_proj"]));
    assert_eq!(selected(&config), ["0.k_proj", "1.k_proj", "1.q_proj"]);
    config.exclude = Some(Targets::Regex(".*k_proj".to_owned()));
    assert_eq!(selected(&config), ["0.q_proj", "1.q_proj"]);
}

#[test]
fn layers_count_only_where_the_end_of_a_path_matched() {
    let mut config = AdapterConfig::new(8, 16.0, names(&["q_proj", "model.layers.0.mlp.up_proj"]));
    config.layers = Some(vec![1]);
    assert_eq!(selected(&config), ["0.up_proj", "1.q_proj"]);
    config.layers_pattern = vec!["layers".to_owned()];
    assert_eq!(selected(&config), ["0.up_proj", "1.q_proj"]);
    config.layers_pattern = vec!["blocks".to_owned()];
    assert_eq!(selected(&config), ["0.up_proj"]);
}

#[test]
fn patterns_give_ranks_and_alphas_to_whole_ends_of_paths() {
    let mut config = AdapterConfig::new(8, 16.0, names(&["q_proj", "up_proj"]));
    let at = |config: &AdapterConfig| {
        let modules = config.resolve(&base()).unwrap();
        modules
            .iter()
            .map(|m| (m.rank, m.scale))
            .collect::<Vec<_>>()
    };
    assert_eq!(at(&config), [(8, 2.0); 4]);
    // Order: 0.up, 0.q, 1.up, 1.q. "proj" is no whole part of a path and matches nothing.
    let pattern = |p: &str, r| (p.to_owned(), r);
    config.rank_pattern = vec![
        pattern("proj", 3),
        pattern(r"^model\.layers\.0\.mlp\.up_proj", 2),
        pattern(r"layers\.\d+\.self_attn\.q_proj", 4),
        pattern("q_proj", 32),
    ];
    config.alpha_pattern = vec![("up_proj".to_owned(), 1.0)];
    assert_eq!(at(&config), [(2, 0.5), (4, 4.0), (8, 0.125), (4, 4.0)]);
    config.use_rslora = true;
    assert_eq!(at(&config)[1], (4, 8.0));
}

#[test]
fn the_first_pattern_of_the_file_counts() {
    let dir = changed(json!({}), |_| ());
    let path = dir.path().join(CONFIG_FILE);
    let text = fs::read_to_string(&path).unwrap();
    let write = |pattern: &str| {
        let with = format!("\"rank_pattern\":{pattern}");
        fs::write(&path, text.replace("\"rank_pattern\":{}", &with)).unwrap();
        AdapterConfig::read(dir.path()).map(|c| c.rank_pattern)
    };
    let got = write(r#"{"z.*": 4, "a.*": 2, "z.*": 5}"#).unwrap();
    assert_eq!(got, [("z.*".to_owned(), 5), ("a.*".to_owned(), 2)]);
    assert!(
        message(dir.path(), write(r#"{"a": 0}"#))
            .contains("`rank_pattern`: want patterns with ranks")
    );
    assert!(
        message(dir.path(), write("[1]")).contains("`rank_pattern`: want an object of patterns")
    );
}

#[test]
fn stored_halves_are_widened() {
    let name = key("0.mlp.up_proj.lora_A");
    let dir = changed(json!({}), |t| {
        let halves = [0x80, 0x3f].repeat(8 * 64);
        *t.get_mut(&name).unwrap() = (StoredDtype::BF16, vec![8, 64], halves);
    });
    let adapter = Adapter::read(dir.path(), &base()).unwrap();
    let up = adapter
        .modules
        .iter()
        .find(|m| m.module.ends_with("0.mlp.up_proj"))
        .unwrap();
    assert_eq!(up.a, vec![1.0; 8 * 64]);
}

#[test]
fn a_partly_bound_adapter_is_refused() {
    let got = refusal(json!({}), |t| {
        t.retain(|n, _| !n.contains("1.self_attn.q_proj"));
        t.remove(&key("0.mlp.up_proj.lora_B"));
    });
    assert_eq!(
        got,
        "DIR: 12 of 14 modules bound; these did not: model.layers.0.mlp.up_proj (no lora_B), \
         model.layers.1.self_attn.q_proj (no tensors); use the base model this adapter was trained on"
    );
    let got = refusal(json!({}), |t| {
        let copy = t[&key("1.mlp.up_proj.lora_A")].clone();
        t.insert(key("2.mlp.up_proj.lora_A"), copy);
    });
    assert!(got.contains("14 of 15 modules bound; these did not: \"model.layers.2.mlp.up_proj\" (not in the base model)"), "{got}");
    let got = refusal(json!({"target_modules": ["q_proj"]}), |_| ());
    assert!(
        got.contains("2 of 14 modules bound")
            && got.contains("(not selected by adapter_config.json)"),
        "{got}"
    );
}

#[test]
fn foreign_and_damaged_tensors_are_named() {
    let one = |t: &mut Tensors, name: &str, shape: Vec<usize>, value: f32| {
        let count = shape.iter().product::<usize>();
        let bytes = value.to_le_bytes().repeat(count);
        t.insert(name.to_owned(), (StoredDtype::F32, shape, bytes));
    };
    let a = key("0.mlp.up_proj.lora_A");
    for (name, shape, value, want) in [
        (
            a.as_str(),
            vec![4, 64],
            1.0,
            "want shape [8, 64], got [4, 64]",
        ),
        (
            a.as_str(),
            vec![8, 64],
            f32::NAN,
            "up_proj.lora_A.weight\" holds NaN at element 0; the file is damaged",
        ),
        (
            a.as_str(),
            vec![8, 64],
            f32::NEG_INFINITY,
            "holds -inf at element 0",
        ),
        (
            "base_model.model.x.bias",
            vec![1],
            1.0,
            "tensors that do not belong to a LoRA adapter (1): \"base_model.model.x.bias\"",
        ),
        (
            "model.layers.0.mlp.up_proj.lora_A.weight",
            vec![1],
            1.0,
            "do not belong to a LoRA adapter (1)",
        ),
        (
            &key("0.mlp.up_proj.lora_magnitude_vector"),
            vec![1],
            1.0,
            "do not belong to a LoRA adapter (1)",
        ),
        (
            "base_model.model.lm_head.lora_A.weight",
            vec![1],
            1.0,
            "14 of 15 modules bound; these did not: \"lm_head\" (not in the base model)",
        ),
        (
            "base_model.model.model.embed_tokens.lora_embedding_A",
            vec![1],
            1.0,
            "14 of 15 modules bound; these did not: \"model.embed_tokens\" (not in the base model)",
        ),
    ] {
        let got = refusal(json!({}), |t| one(t, name, shape, value));
        assert!(got.contains(want), "want {want}, got {got}");
    }
    let got = refusal(json!({}), |t| t.get_mut(&a).unwrap().0 = StoredDtype::I32);
    assert!(
        got.contains("is stored as I32, want F32, BF16 or F16"),
        "{got}"
    );
}

#[test]
fn variants_are_refused_by_name() {
    for (change, want) in [
        (
            json!({"peft_type": "IA3"}),
            "peft_type \"IA3\" is not supported",
        ),
        (
            json!({"bias": "lora_only"}),
            "bias \"lora_only\" is not supported",
        ),
        (
            json!({"modules_to_save": ["score"]}),
            "modules_to_save is not supported",
        ),
        (json!({"lora_bias": true}), "lora_bias is not supported"),
        (
            json!({"fan_in_fan_out": true}),
            "fan_in_fan_out is not supported",
        ),
        (
            json!({"layer_replication": [[0, 2]]}),
            "layer_replication is not supported",
        ),
        (
            json!({"trainable_token_indices": [1]}),
            "trainable_token_indices is not supported",
        ),
        (json!({"use_qalora": true}), "use_qalora is not supported"),
        (
            json!({"alora_invocation_tokens": [1]}),
            "alora_invocation_tokens is not supported",
        ),
        (
            json!({"megatron_config": {"a": 1}}),
            "megatron_config is not supported",
        ),
        (
            json!({"target_parameters": ["w"]}),
            "target_parameters is not supported",
        ),
        (
            json!({"velora_config": {"a": 1}}),
            "velora_config is not supported",
        ),
        (
            json!({"init_lora_weights": "pissa"}),
            "init_lora_weights \"pissa\" is not supported",
        ),
        (
            json!({"use_new_trick": true}),
            "the unknown setting \"use_new_trick\" (true) is not supported",
        ),
    ] {
        let got = refusal(change, |_| ());
        assert!(got.contains(want), "want {want}, got {got}");
    }
    let off = json!({"use_new_trick": false, "other": null, "loftq_config": {"a": 1}, "init_lora_weights": "eva"});
    assert!(Adapter::read(changed(off, |_| ()).path(), &base()).is_ok());
}

#[test]
fn nonsense_settings_name_their_key() {
    for (change, want) in [
        (json!({"r": 0}), "`r`: want a whole number from 1"),
        (json!({"lora_alpha": "16"}), "`lora_alpha`: want a number"),
        (
            json!({"lora_dropout": 1.0}),
            "`lora_dropout`: want a number from 0 to below 1, got 1",
        ),
        (
            json!({"target_modules": null}),
            "`target_modules`: want module names or a pattern, got nothing",
        ),
        (
            json!({"target_modules": []}),
            "`target_modules`: want module names or a pattern, got nothing",
        ),
        (
            json!({"target_modules": [1]}),
            "`target_modules`: want a string or a list of strings, got 1",
        ),
        (
            json!({"target_modules": ["nope"]}),
            "target_modules \"nope\" match no projection of the base model; its projections are named like model.layers.0.",
        ),
        (
            json!({"target_modules": "("}),
            "`target_modules`: pattern \"(\": ",
        ),
        (
            json!({"rank_pattern": {")(": 3}}),
            "`rank_pattern`: pattern \")(\": ",
        ),
        (
            json!({"target_modules": "q", "layers_to_transform": [1]}),
            "`layers_to_transform`: want null where target_modules is a string",
        ),
        (
            json!({"layers_pattern": "layers"}),
            "`layers_pattern`: want null without layers_to_transform",
        ),
        (
            json!({"layers_to_transform": [-1]}),
            "`layers_to_transform`: want a layer's number",
        ),
        (
            json!({"lora_alpha": 1e300}),
            "alpha: want a number whose scale fits f32",
        ),
        (
            json!({"peft_type": null}),
            "`peft_type`: want \"LORA\", got nothing",
        ),
    ] {
        let got = refusal(change, |_| ());
        assert!(got.contains(want), "want {want}, got {got}");
    }
    // Backtracking without end is an error, not a hang.
    let evil = json!({"target_modules": r"(?=(.*.*.*.*.*.*)*\1x)y"});
    let got = refusal(evil, |_| ());
    assert!(got.contains("target_modules"), "{got}");
}

#[test]
fn a_rank_above_a_dimension_is_a_warning() {
    let config = AdapterConfig::new(40, 16.0, names(&["k_proj", "q_proj"]));
    let adapter = Adapter::init(config, &base(), 0).unwrap();
    assert_eq!(adapter.warnings.len(), 2);
    assert!(
        adapter.warnings[0].starts_with("model.layers.0.self_attn.k_proj: rank 40 is above 32")
    );
}

#[test]
fn fresh_adapters_are_uniform_and_depend_on_seed_and_name_only() {
    let init =
        |seed, targets| Adapter::init(AdapterConfig::new(8, 16.0, targets), &base(), seed).unwrap();
    let all = init(3, Targets::AllLinear);
    for m in &all.modules {
        let bound = 1.0 / (m.projection.k as f32).sqrt();
        assert!(m.a.iter().all(|v| v.abs() <= bound));
        let square = m.a.iter().map(|v| v * v).sum::<f32>() / m.a.len() as f32;
        let ratio = square / (bound * bound / 3.0);
        assert!((0.8..1.2).contains(&ratio), "{}: {ratio}", m.module);
        assert!(m.b.iter().all(|v| *v == 0.0) && m.b.len() == m.projection.n * 8);
    }
    assert_ne!(all.modules[0].a, all.modules[7].a);
    let some = init(3, names(&["q_proj"]));
    let same = all
        .modules
        .iter()
        .find(|m| m.module == some.modules[1].module);
    assert_eq!(same.unwrap(), &some.modules[1]);
    assert_ne!(init(4, names(&["q_proj"])).modules[1].a, some.modules[1].a);
}

#[test]
fn a_diverged_adapter_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut adapter = golden_adapter();
    adapter.modules[2].b[5] = f32::NAN;
    let got = message(dir.path(), adapter.write(dir.path()));
    assert!(got.contains("holds NaN at element 5"), "{got}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn dora_wants_its_magnitudes_finite_and_whole() {
    let magnitude = "base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector";
    let dora = golden("llama-dora").join("adapter");
    let refusal = |change: &dyn Fn(&mut Vec<u8>)| {
        let dir = tempfile::tempdir().unwrap();
        fs::copy(dora.join(CONFIG_FILE), dir.path().join(CONFIG_FILE)).unwrap();
        let mut bytes = fs::read(dora.join(WEIGHTS_FILE)).unwrap();
        change(&mut bytes);
        fs::write(dir.path().join(WEIGHTS_FILE), bytes).unwrap();
        message(dir.path(), Adapter::read(dir.path(), &base()))
    };
    let rename = |bytes: &mut Vec<u8>| {
        let at = bytes
            .windows(magnitude.len())
            .position(|w| w == magnitude.as_bytes());
        let end = at.unwrap() + magnitude.len();
        bytes[end - 1] = b'x';
    };
    let got = refusal(&rename);
    assert!(got.contains("do not belong to a LoRA adapter (1)"), "{got}");
    let adapter = Adapter::read(&dora, &base()).unwrap();
    let value = adapter.modules[0].magnitude.as_ref().unwrap()[3].to_le_bytes();
    let spoil = |bytes: &mut Vec<u8>| {
        let at = bytes.windows(4).rposition(|w| w == value).unwrap();
        bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    };
    let got = refusal(&spoil);
    assert!(
        got.contains("lora_magnitude_vector\" holds NaN at element 3"),
        "{got}"
    );
    // Without the magnitudes the rest is another adapter, and without `use_dora` they are foreign.
    let dir = tempfile::tempdir().unwrap();
    fs::copy(dora.join(CONFIG_FILE), dir.path().join(CONFIG_FILE)).unwrap();
    fs::copy(
        golden_dir().join(WEIGHTS_FILE),
        dir.path().join(WEIGHTS_FILE),
    )
    .unwrap();
    let got = message(dir.path(), Adapter::read(dir.path(), &base()));
    assert!(
        got.contains("0 of 14 modules bound") && got.contains("(no lora_magnitude_vector)"),
        "{got}"
    );
}

#[test]
fn embedding_and_output_are_adapted_by_name_only() {
    let all = ModelConfig::read(&golden("llama")).unwrap().adaptable();
    let select = |targets| {
        let config = AdapterConfig::new(2, 4.0, targets);
        Adapter::init(config, &all, 1).map(|a| a.modules)
    };
    let layers = select(Targets::AllLinear).unwrap();
    assert_eq!(layers.len(), 14);
    assert!(layers.iter().all(|m| m.module.starts_with("model.layers.")));
    let both = select(names(&["lm_head", "embed_tokens"])).unwrap();
    let [head, embedding] = &both[..] else {
        panic!("{both:?}")
    };
    // B starts at zero for the one, A for the other.
    assert_eq!((head.a.len(), head.b.len()), (2 * 64, 320 * 2));
    assert!(head.b.iter().all(|v| *v == 0.0) && head.a.iter().all(|v| *v != 0.0));
    assert_eq!((embedding.a.len(), embedding.b.len()), (2 * 320, 64 * 2));
    assert!(embedding.a.iter().all(|v| *v == 0.0) && embedding.b.iter().all(|v| *v != 0.0));
    let dir = tempfile::tempdir().unwrap();
    let adapter = Adapter {
        config: AdapterConfig::new(2, 4.0, names(&["lm_head", "embed_tokens"])),
        modules: both,
        warnings: vec![],
    };
    adapter.write(dir.path()).unwrap();
    let back = Adapter::read(dir.path(), &all).unwrap();
    assert_eq!(back.modules, adapter.modules);
    let file = Weights::open_file(&dir.path().join(WEIGHTS_FILE)).unwrap();
    let shape = |name: &str| {
        file.get(&format!("base_model.model.{name}"))
            .unwrap()
            .shape
            .clone()
    };
    assert_eq!(shape("model.embed_tokens.lora_embedding_A"), [2, 320]);
    assert_eq!(shape("model.embed_tokens.lora_embedding_B"), [64, 2]);
    assert_eq!(shape("lm_head.lora_B.weight"), [320, 2]);
    for change in [
        |c: &mut AdapterConfig| c.use_dora = true,
        |c: &mut AdapterConfig| c.init = Init::Pissa,
    ] {
        let mut config = AdapterConfig::new(2, 4.0, names(&["embed_tokens"]));
        change(&mut config);
        let got = message(dir.path(), Adapter::init(config, &all, 1));
        assert!(got.contains("on the embedding is not supported"), "{got}");
    }
}

#[test]
fn a_config_nested_10_000_deep_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = format!("{}1{}", open.repeat(10_000), close.repeat(10_000));
        let text = format!("{{\"peft_type\": \"LORA\", \"rank_pattern\": {deep}}}");
        fs::write(dir.path().join(CONFIG_FILE), text).unwrap();
        let got = message(dir.path(), Adapter::read(dir.path(), &base()));
        assert!(
            got.contains("not valid JSON") && got.contains("recursion"),
            "{got}"
        );
    }
}

#[test]
fn folders_without_an_adapter_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let read = || message(dir.path(), Adapter::read(dir.path(), &base()));
    assert!(read().starts_with("adapter_config.json does not exist; give a PEFT adapter folder"));
    fs::copy(golden_dir().join(CONFIG_FILE), dir.path().join(CONFIG_FILE)).unwrap();
    assert!(
        read().starts_with("adapter_model.safetensors does not exist; give a PEFT adapter folder")
    );
    fs::write(dir.path().join("adapter_model.bin"), b"").unwrap();
    assert!(read().contains("adapter_model.bin: a pickle file"));
}
