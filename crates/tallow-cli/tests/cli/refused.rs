//! Bad input: missing, truncated and lying files, settings without sense, folders that cannot be written.
//! Invariant: exit code 2, one line on stderr, nothing on stdout, no file left behind.
use super::{copy, golden, names, tallow, text, tiny, valid};
use std::fs;

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
    // What happened stays to be read; no adapter, no settings, no report.
    assert_eq!(names(&out), ["metrics.jsonl", "tensorboard"]);
}
