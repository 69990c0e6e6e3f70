//! What a card would do with models of known sizes, planned on a machine that has none.
//! Absent on purpose: time. What a plan computes is the conformance suite's business.
use std::{fs::File, io::Write, path::Path};
use tallow::{
    Choose, Compiled, DType, OpenOptions, Role, Session, TensorType,
    llm::{
        Adapter, AdapterConfig, Cache, ComputeDType, LoadOptions, Model, ModelConfig, Targets,
        weights,
    },
    train::{Optimizer, OptimizerKind, StepGraph, Trained},
};

/// Hidden 896, 24 layers, 14 query heads and 2 for keys and values: 0.5B.
fn half_billion(layers: usize) -> serde_json::Value {
    serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 896,
        "num_hidden_layers": layers, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64,
        "intermediate_size": 4864, "vocab_size": 151_936, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 2048, "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false,
        "bos_token_id": 0, "eos_token_id": 1,
    })
}

/// A model whose weights are a hole in a file.
fn model(session: &Session, dir: &Path, config: &serde_json::Value) -> Model {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, shape) in weights::expected(&ModelConfig::read(dir).unwrap()) {
        let end = at + shape.iter().product::<usize>() * 2;
        let entry =
            serde_json::json!({ "dtype": "BF16", "shape": shape, "data_offsets": [at, end] });
        header.insert(name, entry);
        at = end;
    }
    let mut header = serde_json::Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = File::create(dir.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len((8 + header.len() + at) as u64).unwrap();
    let dtype = ComputeDType::BF16;
    Model::load(session, dir, &LoadOptions { dtype }).unwrap()
}

fn open(device: &str) -> Session {
    let options = OpenOptions {
        device: device.into(),
        threads: None,
        weights: DType::BF16,
        choose: Choose::Estimate,
    };
    tallow::open_with(&options).unwrap()
}

fn adapter(model: &Model) -> Adapter {
    Adapter::new(model, &AdapterConfig::new(8, 16.0, Targets::AllLinear), 0).unwrap()
}

fn train(model: &Model, shape: [usize; 2]) -> Compiled {
    let adapter = adapter(model);
    let optimizer = Optimizer::new(&model.session, &adapter, OptimizerKind::AdamW).unwrap();
    let trained = Trained {
        adapter: &adapter,
        optimizer: &optimizer,
        clip: Some(1.0),
    };
    let step = StepGraph::build(model, &[trained], shape).unwrap();
    step.plan(&model.session).unwrap()
}

/// A token of one sequence behind a cache of `room`, the likeliest token after it.
fn decode(model: &Model, adapter: Option<&Adapter>, room: usize) -> Compiled {
    let cache = Cache::new(model, room).unwrap();
    let one = || {
        model
            .session
            .zeros(TensorType::u32([1, 1]), Role::Data)
            .unwrap()
    };
    let hidden = model.hidden(&one(), &one(), adapter, Some(&cache)).unwrap();
    let x = hidden.x.reshape([1, model.config.hidden]).unwrap();
    let logits = model.logits_with(&x, adapter).unwrap();
    let top = logits.top().unwrap();
    model
        .session
        .explain(&[&logits, &top], &hidden.updates)
        .unwrap()
}

/// What is launched for each part of a plan, and how many steps it does.
fn launched(c: &Compiled, session: &Session) -> Vec<(usize, Vec<String>)> {
    let mut next = 0;
    let all = session.backend().launched(&c.plan).into_iter();
    let found = all.map(|l| {
        // Every step once, in order.
        assert_eq!(*l.steps.start(), next);
        next = l.steps.end() + 1;
        (l.steps.count(), l.launches)
    });
    let found = found.collect();
    assert_eq!(next, c.plan.steps.len());
    found
}

fn names(launches: &[String]) -> Vec<&str> {
    let name = |l: &String| l.split(' ').next().map(str::len).unwrap_or(0);
    launches.iter().map(|l| &l[..name(l)]).collect()
}

#[test]
fn training_half_a_billion_weights_fits_into_five_gib() {
    let dir = tempfile::tempdir().unwrap();
    let session = open("cuda:paper");
    let step = train(&model(&session, dir.path(), &half_billion(24)), [8, 512]);
    let memory = step.plan.memory();
    assert!(memory.total() <= 5 << 30, "{memory:?}");
    // The weights themselves are there, once as they were loaded.
    assert!(memory.frozen > 900 << 20, "{memory:?}");
    // Norms and gates are computed again, but for those of the last layer, whose gradients come at once.
    let count = |name: &str| {
        step.plan
            .steps
            .iter()
            .filter(|s| s.spec.name() == name)
            .count()
    };
    assert_eq!(
        (count("swiglu"), count("rms_norm")),
        (24 + 23, 2 * 24 + 1 + 2 * 23)
    );
    assert_eq!(count("attention"), 24);
    // Gradients of adapters that read the same rows are made side by side.
    let parts = launched(&step, &session);
    let outer = |(n, l): &&(usize, Vec<String>)| *n > 1 && names(l) == ["outer"];
    assert!(parts.iter().filter(outer).count() >= 4 * 23, "{parts:?}");
    // One launch stands in front of each of the four products of a layer with their adapters, and it is the norm or the
    // gate too. What is computed again for gradients, and the last norm, have launches of their own.
    let joined = |name: &str| -> Vec<usize> {
        let starts = |l: &[String]| names(l).first() == Some(&name);
        let found = parts.iter().filter(|(_, l)| starts(l));
        found.map(|(n, _)| *n).collect()
    };
    let steps = joined("framed");
    let two = steps.iter().filter(|n| **n == 2).count();
    assert_eq!((steps.len(), two), (4 * 24, 3 * 24), "{parts:?}");
    assert_eq!(
        (joined("rms_norm").len(), joined("swiglu").len()),
        (1 + 2 * 23, 23)
    );
    let all: Vec<&str> = parts.iter().flat_map(|(_, l)| names(l)).collect();
    let launches = |name: &str| all.iter().filter(|n| **n == name).count();
    // Backward alone: the first layer's queries, keys and values need no gradient of their input.
    assert_eq!((launches("small"), launches("frame")), (95, 95), "{all:?}");
}

#[test]
fn a_token_of_a_large_enough_model_is_one_launch_and_one_of_a_small_model_six_a_layer() {
    let dir = tempfile::tempdir().unwrap();
    let session = open("cuda:paper");
    let large = model(&session, dir.path(), &half_billion(24));
    let a = adapter(&large);
    for (adapter, first) in [(None, vec!["chain"]), (Some(&a), vec!["down", "chain"])] {
        let c = decode(&large, adapter, 256);
        let parts = launched(&c, &session);
        let [(1, embed), (rest, all)] = &parts[..] else {
            panic!("{parts:?}")
        };
        assert_eq!(
            (names(embed), *rest),
            (vec!["gather"], c.plan.steps.len() - 1)
        );
        assert_eq!(names(all), first);
    }
    let mut config = half_billion(6);
    config["hidden_size"] = 256.into();
    config["intermediate_size"] = 688.into();
    config["vocab_size"] = 4096.into();
    let small = model(&session, dir.path(), &config);
    let parts = launched(&decode(&small, None, 256), &session);
    let layer: Vec<_> = parts[1..7].iter().flat_map(|(_, l)| names(l)).collect();
    let want = [
        "pairs", "decode", "join", "pairs", "pairs", "pairs", "pairs",
    ];
    assert_eq!(layer, want, "{parts:?}");
}

#[test]
fn nothing_runs_on_paper() {
    let session = open("cuda:paper");
    let x = session.tensor(&[1.0, 2.0], [2], Role::Data).unwrap();
    for refused in [
        session.read(&x).unwrap_err(),
        session.read(&x.add(&x).unwrap()).unwrap_err(),
    ] {
        let said = refused.to_string();
        assert!(
            said.contains("cuda:paper") && said.contains("cuda:0"),
            "{said}"
        );
    }
}
