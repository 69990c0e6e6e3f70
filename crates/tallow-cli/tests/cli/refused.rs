//! Bad input: missing, truncated and lying files, settings without sense, folders that cannot be written.
//! Invariant: exit code 2, one line on stderr, nothing on stdout, no file left behind.
use super::{copy, golden, names, tallow, text, tiny, valid};
use std::{fs, path::Path};

/// Exit code 2, one line that holds all of `wanted`, an empty stdout.
#[track_caller]
pub(super) fn refused(args: &[&str], wanted: &[&str]) {
    let out = tallow(args);
    let err = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{args:?}: {err}");
    assert_eq!(err.lines().count(), 1, "{args:?}: {err}");
    assert!(err.starts_with("error: "), "{err}");
    assert!(!err.contains("panicked"), "{err}");
    assert_eq!(text(&out.stdout), "", "{args:?}");
    for w in wanted {
        assert!(err.contains(w), "want {w} in {err}");
    }
}

#[test]
fn a_model_that_is_not_there_or_not_whole() {
    let prompt = ["--prompt", "x"];
    let generate = |model: &str, wanted: &[&str]| {
        refused(
            &[&["generate", "--model", model][..], &prompt].concat(),
            wanted,
        );
    };
    generate(
        "/nowhere",
        &["/nowhere/config.json does not exist; give a Hugging Face model folder"],
    );
    let (dir, name) = copy(&tiny());
    let weights = dir.path().join("model.safetensors");
    let whole = fs::read(&weights).unwrap();
    fs::write(&weights, &whole[..whole.len() - 1000]).unwrap();
    generate(
        &name,
        &[
            "model.safetensors: not a usable safetensors file",
            "download or copy it again",
        ],
    );
    // A header that claims to be longer than the file.
    fs::write(
        &weights,
        [&u64::MAX.to_le_bytes()[..], &whole[8..]].concat(),
    )
    .unwrap();
    generate(&name, &["model.safetensors: not a usable safetensors file"]);
    fs::remove_file(&weights).unwrap();
    generate(&name, &["model.safetensors does not exist"]);
    fs::write(&weights, &whole).unwrap();
    fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
    generate(&name, &["tokenizer.json: not a usable tokenizer"]);
}

#[test]
fn a_configuration_that_lies() {
    let (dir, name) = copy(&tiny());
    let config = dir.path().join("config.json");
    let right = fs::read_to_string(&config).unwrap();
    let change = |from: &str, to: &str| {
        assert!(right.contains(from));
        fs::write(&config, right.replace(from, to)).unwrap();
    };
    let eval = |wanted: &[&str]| {
        refused(&["eval", "--model", &name, "--data", &valid()], wanted);
    };
    change("\"vocab_size\": 2048", "\"vocab_size\": 4096");
    eval(&["want shape [4096, 192], got [2048, 192]"]);
    change("\"num_hidden_layers\": 6", "\"num_hidden_layers\": 7");
    eval(&["missing tensors (9): \"model.layers.6."]);
    change("\"num_attention_heads\": 6", "\"num_attention_heads\": 0");
    eval(&["config.json: `num_attention_heads`: want a whole number from 1"]);
    fs::write(&config, "[1, 2").unwrap();
    eval(&["config.json: not valid JSON"]);
}

#[test]
fn other_architectures_are_named_and_the_known_ones_listed() {
    for (folder, found) in [("qwen3", "Qwen3ForCausalLM"), ("bert", "Bert")] {
        let dir = golden(&format!("other/{folder}"));
        let known = "known architectures: LlamaForCausalLM, Qwen2ForCausalLM, MistralForCausalLM";
        refused(&["verify", &dir], &[found, known]);
        refused(&["logits", "--model", &dir, "--ids", "1"], &[found, known]);
    }
}

#[test]
fn an_adapter_that_does_not_fit() {
    let adapter = format!("{}/adapter", golden("llama"));
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().display().to_string();
    for (adapter, wanted) in [
        (&adapter, "adapter"),
        (&empty, "adapter_config.json does not exist"),
    ] {
        let base = ["--model", &tiny(), "--adapter", adapter];
        refused(
            &[&["eval"], &base[..], &["--data", &valid()]].concat(),
            &[wanted],
        );
        refused(
            &[&["generate"], &base[..], &["--prompt", "x"]].concat(),
            &[wanted],
        );
        refused(
            &[&["logits"], &base[..], &["--ids", "1"]].concat(),
            &[wanted],
        );
        refused(&[&["explain", "forward"], &base[..]].concat(), &[wanted]);
    }
}

#[test]
fn a_prompt_longer_than_the_model_allows() {
    let long = "word ".repeat(3000);
    let args = ["generate", "--model", &tiny(), "--prompt", &long];
    refused(&args, &["1024"]);
    let ids = vec!["1"; 1025].join(",");
    refused(
        &["logits", "--model", &tiny(), "--ids", &ids],
        &["1025 tokens", "1024"],
    );
    refused(
        &["logits", "--model", &tiny(), "--ids", "1,2048"],
        &["token 2048"],
    );
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("long.jsonl");
    fs::write(&data, format!("{{\"text\": \"{long}\"}}\n")).unwrap();
    let data = data.display().to_string();
    refused(
        &["eval", "--model", &tiny(), "--data", &data],
        &["line 1: ", "split or shorten"],
    );
}

#[test]
fn data_that_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("data.jsonl");
    let data = file.display().to_string();
    let out = dir.path().join("out");
    let out_name = out.display().to_string();
    let train = |wanted: &[&str]| {
        refused(
            &[
                "train",
                "--model",
                &tiny(),
                "--data",
                &data,
                "--out",
                &out_name,
            ],
            wanted,
        );
        assert_eq!(names(&out), Vec::<String>::new());
    };
    train(&["data.jsonl does not exist"]);
    for (bytes, wanted) in [
        (&b""[..], "holds no examples"),
        (
            b"{\"text\": \"a b\"}\n{\"text\": \"a",
            "line 2: not valid JSON",
        ),
        (
            b"{\"prompt\": \"a\"}",
            "line 1: `prompt` without `completion`",
        ),
        (b"{\"x\": \"a\"}", "line 1: no key `text`"),
        (b"{\"text\": \"\xff\"}", "is not UTF-8"),
    ] {
        fs::write(&file, bytes).unwrap();
        train(&[wanted]);
        refused(&["eval", "--model", &tiny(), "--data", &data], &[wanted]);
    }
}

#[test]
fn an_output_folder_that_cannot_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "mine").unwrap();
    for out in [file.clone(), file.join("below")] {
        let out = out.display().to_string();
        let train = [
            "train",
            "--model",
            &tiny(),
            "--data",
            &valid(),
            "--out",
            &out,
            "--steps",
            "1",
        ];
        refused(
            &train,
            &["cannot create the folder", "choose another output folder"],
        );
        refused(&["demo", "--out", &out], &["cannot create the folder"]);
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    assert_eq!(names(dir.path()), ["file"]);
}

#[test]
fn settings_that_make_no_sense() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out").display().to_string();
    let (tiny, valid) = (tiny(), valid());
    let train = ["train", "--model", &tiny, "--data", &valid, "--out", &out];
    for (option, value, wanted) in [
        ("--lr", "nan", "lr: want a number above 0"),
        ("--batch", "0", "batch: want 1 or more"),
        ("--rank", "0", "rank: want a whole number"),
        ("--schedule", "step", "want one of constant, linear, cosine"),
        ("--targets", "wq", "match no projection"),
        ("--dtype", "f64", "want f32 or bf16"),
        ("--threads", "0", "want a whole number from 1"),
        ("--device", "tpu", "unknown device"),
        ("--eval-every", "2", "--valid"),
        ("--no-such-option", "1", "--no-such-option"),
    ] {
        refused(&[&train[..], &[option, value]].concat(), &[wanted]);
    }
    let generate = ["generate", "--model", &tiny, "--prompt", "x"];
    for (option, value, wanted) in [
        ("--temperature", "-1", "temperature"),
        ("--top-p", "0", "top_p: want"),
        ("--min-p", "2", "min_p: want"),
    ] {
        let option = format!("{option}={value}");
        refused(&[&generate[..], &[&option]].concat(), &[wanted]);
    }
    refused(&["fly"], &["fly", "tallow help"]);
    refused(
        &["explain", "forward", "--model", &tiny, "--tokens", "0"],
        &["--tokens: want 1 to 1024"],
    );
    assert_eq!(names(dir.path()), Vec::<String>::new());
}

#[test]
fn a_diverging_run_saves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let name = out.display().to_string();
    let args = [
        "train",
        "--model",
        &tiny(),
        "--data",
        &valid(),
        "--out",
        &name,
        "--lr",
        "1e30",
        "--clip",
        "0",
        "--schedule",
        "constant",
        "--batch",
        "1",
        "--seq-len",
        "17",
        "--steps",
        "50",
        "--json",
    ];
    refused(
        &args,
        &[
            "step ",
            "valid.jsonl:",
            "there is no checkpoint yet; lower the learning rate",
        ],
    );
    // What was asked and what happened stay to be read; no adapter, no report.
    assert_eq!(names(&out), ["metrics.jsonl", "tensorboard", "train.yaml"]);
}

/// A folder with the built-in model, where these tensors are changed.
fn spoilt(change: impl Fn(&str, &mut [u8])) -> (tempfile::TempDir, String) {
    let (dir, name) = copy(&tiny());
    let path = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let about: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    for (tensor, info) in about.as_object().unwrap() {
        let at = |i: usize| {
            info["data_offsets"][i]
                .as_u64()
                .map(|n| n as usize + 8 + header)
        };
        if let (Some(from), Some(to)) = (at(0), at(1)) {
            change(tensor, &mut bytes[from..to]);
        }
    }
    fs::write(path, bytes).unwrap();
    (dir, name)
}

#[test]
fn weights_that_are_nan() {
    // NaN in bf16, which is how this model is stored.
    let (_dir, model) = spoilt(|tensor, bytes| {
        if tensor == "model.layers.3.mlp.down_proj.weight" {
            bytes[..2].copy_from_slice(&[0xc0, 0x7f]);
        }
    });
    let out = tempfile::tempdir().unwrap();
    let out_name = out.path().join("out").display().to_string();
    let data = ["--data", &valid()];
    refused(
        &[&["eval", "--model", &model], &data[..]].concat(),
        &["valid.jsonl: the loss is NaN; the model or the adapter holds"],
    );
    let train = ["train", "--model", &model, "--out", &out_name, "--json"];
    refused(
        &[&train, &data[..]].concat(),
        &["step 1: the loss is NaN on ", "the adapter was not touched"],
    );
    assert!(!out.path().join("out/adapter_model.safetensors").exists());
    let prompt = ["--prompt", "x"];
    refused(
        &[&["generate", "--model", &model], &prompt[..]].concat(),
        &["NaN"],
    );
}

/// Weights on paper: a file that says it is terabytes long, and takes no room.
#[cfg(unix)]
#[test]
fn a_model_larger_than_memory() {
    let (dir, model) = copy(&golden("llama"));
    let path = dir.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let (v, c, mlp, layers) = (2048, 65_536, 262_144, 8);
    for (key, value) in [
        ("vocab_size", v),
        ("hidden_size", c),
        ("intermediate_size", mlp),
        ("num_hidden_layers", layers),
        ("num_attention_heads", 512),
        ("num_key_value_heads", 512),
        ("head_dim", 128),
    ] {
        config[key] = value.into();
    }
    config["tie_word_embeddings"] = false.into();
    fs::write(&path, config.to_string()).unwrap();
    let (mut header, mut end) = (serde_json::Map::new(), 0_u64);
    let mut add = |name: String, shape: &[u64]| {
        let from = end;
        end += 4 * shape.iter().product::<u64>();
        let info = serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [from, end]});
        header.insert(name, info);
    };
    let [v, c, mlp] = [v, c, mlp].map(|n: u64| n);
    add("model.embed_tokens.weight".into(), &[v, c]);
    for i in 0..layers {
        let at = format!("model.layers.{i}");
        for name in ["input_layernorm", "post_attention_layernorm"] {
            add(format!("{at}.{name}.weight"), &[c]);
        }
        for name in ["q", "k", "v", "o"] {
            add(format!("{at}.self_attn.{name}_proj.weight"), &[c, c]);
        }
        add(format!("{at}.mlp.gate_proj.weight"), &[mlp, c]);
        add(format!("{at}.mlp.up_proj.weight"), &[mlp, c]);
        add(format!("{at}.mlp.down_proj.weight"), &[c, mlp]);
    }
    add("model.norm.weight".into(), &[c]);
    add("lm_head.weight".into(), &[v, c]);
    let mut text = serde_json::Value::Object(header).to_string();
    // Aligned, so that the file is mapped as it is.
    while !(text.len() + 8).is_multiple_of(64) {
        text.push(' ');
    }
    let mut start = (text.len() as u64).to_le_bytes().to_vec();
    start.extend(text.as_bytes());
    let weights = fs::File::create(dir.path().join("model.safetensors")).unwrap();
    std::io::Write::write_all(&mut &weights, &start).unwrap();
    weights.set_len(start.len() as u64 + end).unwrap();
    let tokenizer = fs::read(Path::new(&tiny()).join("tokenizer.json")).unwrap();
    fs::write(dir.path().join("tokenizer.json"), tokenizer).unwrap();

    let wanted = [
        "needs ",
        " GiB of memory, and ",
        "is free; use a smaller model",
    ];
    let model = ["--model", &model];
    let data = ["--data", &valid()];
    refused(&[&["eval"], &model[..], &data[..]].concat(), &wanted);
    refused(
        &[&["generate"], &model[..], &["--prompt", "x"]].concat(),
        &wanted,
    );
    refused(
        &[&["logits"], &model[..], &["--ids", "1"]].concat(),
        &wanted,
    );
    let out = dir.path().join("out").display().to_string();
    let more = [
        "--out",
        &out,
        "--rank",
        "1",
        "--targets",
        "q_proj",
        "--layers",
        "0",
    ];
    refused(
        &[&["train"], &model[..], &data[..], &more[..]].concat(),
        &[
            "a step over 4 x ",
            " GiB of memory, and ",
            "is free; use a smaller --batch",
        ],
    );
    assert!(!Path::new(&out).exists());
}

#[test]
fn a_rank_above_the_dimension_trains_and_warns() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out").display().to_string();
    let done = tallow(&[
        "train",
        "--model",
        &tiny(),
        "--data",
        &valid(),
        "--out",
        &out,
        "--rank",
        "200",
        "--targets",
        "q_proj",
        "--layers",
        "0",
        "--steps",
        "1",
        "--batch",
        "1",
        "--seq-len",
        "17",
        "--samples",
        "0",
    ]);
    let err = text(&done.stderr);
    assert!(done.status.success(), "{err}");
    assert!(err.contains("rank 200"), "{err}");
}
