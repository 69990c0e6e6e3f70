//! The binary from outside: figures as JSON, exit codes, and (in `refused.rs`) bad input of every kind.
//! Absent on purpose: how well it computes; the libraries' tests know.
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};
use tempfile::TempDir;

#[path = "cli/adapters.rs"]
mod adapters;
#[path = "cli/bench.rs"]
mod bench;
#[path = "cli/refused.rs"]
mod refused;
#[cfg(unix)]
#[path = "cli/survives.rs"]
mod survives;
#[path = "cli/sweep.rs"]
mod sweep;
#[path = "cli/tune.rs"]
mod tune;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn tiny() -> String {
    root().join("assets/tiny").display().to_string()
}

fn golden(name: &str) -> String {
    root()
        .join("tests/goldens")
        .join(name)
        .display()
        .to_string()
}

fn valid() -> String {
    root()
        .join("assets/wikisql/valid.jsonl")
        .display()
        .to_string()
}

fn tallow(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tallow"))
        .args(args)
        .env("TALLOW_NO_TUNE", "1")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Runs to the end and gives back the JSON printed.
fn json(args: &[&str]) -> Value {
    let out = tallow(args);
    let err = text(&out.stderr);
    assert!(out.status.success(), "{args:?}: {err}");
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}"))
}

/// A copy of a model folder, to be spoilt.
fn copy(from: &str) -> (TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let name = dir.path().display().to_string();
    (dir, name)
}

fn names(dir: &Path) -> Vec<String> {
    let Ok(all) = fs::read_dir(dir) else {
        return vec![];
    };
    let mut names: Vec<String> = all
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn trained_adapters_lower_the_loss_and_change_the_text() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let name = out.display().to_string();
    let (tiny, valid) = (tiny(), valid());
    let report = json(&[
        "train",
        "--model",
        &tiny,
        "--data",
        &valid,
        "--out",
        &name,
        "--steps",
        "12",
        "--lr",
        "5e-3",
        "--batch",
        "2",
        "--seq-len",
        "65",
        "--schedule",
        "cosine",
        "--warmup",
        "2",
        "--json",
    ]);
    assert_eq!(report["losses"].as_array().unwrap().len(), 12);
    assert_eq!(report["dtype"], "f32");
    assert!(report["tokens_per_s"].as_f64().unwrap() > 0.0);
    let files = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoints",
        "metrics.jsonl",
        "report.html",
        "tensorboard",
        "train.yaml",
    ];
    assert_eq!(names(&out), files);
    let settings = fs::read_to_string(out.join("train.yaml")).unwrap();
    assert!(
        settings.contains("dtype: \"f32\"\nrank: 8\nalpha: 16.0\n"),
        "{settings}"
    );
    assert!(
        settings.contains("\nschedule: \"cosine\"\nwarmup: 2\n"),
        "{settings}"
    );

    let loss = |adapter: &[&str]| {
        let base = ["eval", "--model", &tiny, "--data", &valid, "--json"];
        json(&[&base[..], adapter].concat())["loss"]
            .as_f64()
            .unwrap()
    };
    let adapter = ["--adapter", name.as_str()];
    let (bare, tuned) = (loss(&[]), loss(&adapter));
    assert!((bare - 6.8847).abs() < 1e-3, "{bare}");
    assert!(tuned < bare - 0.5, "{tuned} after {bare}");

    let generate = [
        "generate",
        "--model",
        &tiny,
        "--prompt",
        "table: 1",
        "--max-tokens",
        "12",
    ];
    let plain = json(&[&generate[..], &["--json"]].concat());
    let with = json(&[&generate[..], &adapter, &["--json"]].concat());
    assert_ne!(plain["ids"], with["ids"]);
    let streamed = tallow(&[&generate[..], &adapter].concat());
    assert_eq!(
        text(&streamed.stdout),
        format!("{}\n", with["text"].as_str().unwrap())
    );

    let logits = |adapter: &[&str]| {
        let base = ["logits", "--model", &tiny, "--ids", "0,5,9", "--json"];
        json(&[&base[..], adapter].concat())["logits"].clone()
    };
    let (plain, with) = (logits(&[]), logits(&adapter));
    assert_eq!(plain.as_array().unwrap().len(), 3);
    assert_eq!(plain[2].as_array().unwrap().len(), 2048);
    assert_ne!(plain, with);
}

#[test]
fn sampling_repeats_with_its_seed_and_stops_where_told() {
    let tiny = tiny();
    let base = [
        "generate",
        "--model",
        &tiny,
        "--prompt",
        "The king",
        "--max-tokens",
        "16",
        "--json",
    ];
    let with = |more: &[&str]| json(&[&base[..], more].concat());
    let hot = [
        "--temperature",
        "1.5",
        "--top-k",
        "50",
        "--top-p",
        "0.95",
        "--seed",
    ];
    let draw = |seed: &str| with(&[&hot[..], &[seed]].concat())["ids"].clone();
    assert_eq!(draw("1"), draw("1"));
    assert_ne!(draw("1"), draw("2"));
    let greedy = with(&[])["text"].as_str().unwrap().to_owned();
    let stop: String = greedy.chars().skip(4).take(2).collect();
    let stopped = with(&["--stop", &stop]);
    let at = greedy.find(&stop).unwrap();
    assert_eq!(stopped["text"], greedy[..at]);
    assert_eq!(stopped["finish"], "stop");
}

#[test]
fn verify_tells_right_from_wrong_by_its_exit_code() {
    let out = tallow(&["verify", &golden("llama")]);
    let lines = text(&out.stdout);
    assert_eq!(out.status.code(), Some(0), "{lines}{}", text(&out.stderr));
    assert!(lines.lines().all(|l| l.starts_with("ok  ")), "{lines}");

    let (dir, name) = copy(&golden("llama"));
    fs::create_dir(dir.path().join("adapter")).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let from = Path::new(&golden("llama")).join("adapter").join(file);
        fs::copy(from, dir.path().join("adapter").join(file)).unwrap();
    }
    let path = dir.path().join("reference.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let (header, about) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let loss = about.info("loss").unwrap().data_offsets.0 + header + 8;
    let value = f32::from_le_bytes(bytes[loss..loss + 4].try_into().unwrap());
    bytes[loss..loss + 4].copy_from_slice(&(value * 1.001).to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let out = tallow(&["verify", &name, "--json"]);
    assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["pass"], false);
    let failed: Vec<&Value> = report["checks"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|c| c["pass"] == false)
        .collect();
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert_eq!(failed[0]["quantity"], "loss");
}

#[test]
fn plans_are_explained_with_kernels_bytes_and_memory() {
    let tiny = tiny();
    for (what, more) in [
        ("forward", &["--rank", "4"][..]),
        ("train", &["--batch", "2"]),
        ("decode", &["--time"]),
    ] {
        let base = [
            "explain", what, "--model", &tiny, "--tokens", "32", "--json",
        ];
        let plan = json(&[&base[..], more].concat());
        let steps = plan["steps"].as_array().unwrap();
        assert!(steps.len() > 20, "{what}: {} steps", steps.len());
        for s in steps {
            assert!(s["kernel"].as_str().is_some_and(|k| !k.is_empty()));
            assert!(s["why"].as_str().is_some_and(|w| !w.is_empty()));
            assert!(s["bytes"].as_u64().is_some());
            assert_eq!(s["seconds"].is_null(), what != "decode");
        }
        let total = plan["memory_bytes"]["total"].as_u64().unwrap();
        assert!(total >= plan["memory_bytes"]["arena"].as_u64().unwrap());
        let out = tallow(&base[..base.len() - 1]);
        assert!(
            text(&out.stdout).contains("memory "),
            "{}",
            text(&out.stderr)
        );
    }
}

#[test]
fn the_doctor_finds_this_machine_healthy() {
    let report = json(&["doctor", "--json"]);
    assert_eq!(report["pass"], true, "{report}");
    assert!(report["self_test"].as_array().unwrap().len() >= 5);
    assert!(report["read_bytes_per_s"].as_f64().unwrap() > 1e8);
    assert!(report["threads"].as_u64().unwrap() >= 1);
}

#[test]
fn weights_in_bf16_are_close_to_f32_and_it_is_said() {
    let (tiny, valid) = (tiny(), valid());
    let report = json(&[
        "eval", "--model", &tiny, "--data", &valid, "--dtype", "bf16", "--json",
    ]);
    assert_eq!(report["dtype"], "bf16");
    // This model is stored in bf16, so its weights are not rounded.
    assert!(
        (report["loss"].as_f64().unwrap() - 6.8847).abs() < 0.02,
        "{report}"
    );
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_tallow"))
        .args(["explain", "train", "--model", &tiny(), "--tokens", "32"])
        .env("TALLOW_NO_TUNE", "1")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert_eq!(text(&out.stderr), "");
    assert_eq!(out.status.code(), Some(0));
}

#[test]
fn data_shows_what_counts_and_what_would_be_cut() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("train.jsonl");
    let line =
        |prompt: &str| format!("{{\"prompt\": \"{prompt}\", \"completion\": \" \u{1b}yes\"}}\n");
    let lines = [line("sure?"), line("sure?"), line(&"long ".repeat(60))].concat();
    fs::write(&file, lines.replace('\u{1b}', "\\u001b")).unwrap();
    let folder = dir.path().display().to_string();
    let args = ["data", &folder, "--model", &tiny(), "--seq-len", "32"];
    let found = json(&[&args[..], &["--json"]].concat());
    assert_eq!((&found["lines"], &found["rows"]), (&3.into(), &2.into()));
    assert_eq!(
        (&found["duplicates"], &found["cut"]),
        (&1.into(), &1.into())
    );
    assert_eq!(found["no_target"], 1);
    let filled = found["packed_filled"].as_f64().unwrap();
    assert!(filled > 0.0 && filled <= 1.0);
    let out = tallow(&args);
    let shown = text(&out.stdout);
    assert!(
        shown.contains("<|bos|>sure?« \u{fffd}yes<|eos|>»"),
        "{shown}"
    );
    assert!(shown.contains("1 duplicates: ") && shown.contains("1 lines are cut after 32 tokens"));
    assert!(!shown.contains('\u{1b}'));
}

#[test]
fn chats_are_answered_by_the_template() {
    let (dir, name) = copy(&tiny());
    let args = [
        "generate",
        "--model",
        &name,
        "--prompt",
        "how many?",
        "--chat",
        "--json",
    ];
    let out = tallow(&args);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("chat template: this model has none"));
    let template =
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}A:";
    fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    let chat = json(&[&args[..], &["--system", "be brief", "--max-tokens", "4"]].concat());
    let plain = "system: be brief\nuser: how many?\nA:";
    let plain = json(&[
        "generate",
        "--model",
        &name,
        "--prompt",
        plain,
        "--json",
        "--max-tokens",
        "4",
    ]);
    assert_eq!(chat["ids"], plain["ids"]);
    assert_eq!(chat["prompt_tokens"], plain["prompt_tokens"]);
}

#[test]
fn files_are_evaluated_each_and_together() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, lines: &[&str]| {
        let path = dir.path().join(name);
        fs::write(&path, lines.join("\n")).unwrap();
        path.display().to_string()
    };
    let halves = write(
        "halves.jsonl",
        &[r#"{"prompt": "table: 1 columns: a, b", "completion": " SELECT a FROM 1"}"#],
    );
    let lines = fs::read_to_string(valid()).unwrap();
    let lines: Vec<&str> = lines.lines().collect();
    write("valid.jsonl", &lines[..9]);
    let folder = dir.path().display().to_string();
    let eval = |more: &[&str]| {
        let base = ["eval", "--model", &tiny(), "--json"];
        json(&[&base[..], more].concat())
    };
    let both = eval(&["--data", &folder, "--data", &halves]);
    let files = both["files"].as_array().unwrap();
    assert!(files[0]["file"].as_str().unwrap().ends_with("valid.jsonl"));
    let number = |v: &Value, key: &str| v[key].as_f64().unwrap();
    let (sum, tokens) = files.iter().fold((0.0, 0.0), |(sum, tokens), f| {
        let n = number(f, "tokens");
        (sum + n * number(f, "loss"), tokens + n)
    });
    assert_eq!(number(&both, "tokens"), tokens);
    assert!((number(&both, "loss") - sum / tokens).abs() < 1e-12);
    assert_eq!(files[1]["lines"], 1);
    // Only the completion counts, unless everything does.
    let all = eval(&["--data", &halves, "--loss-on", "everything"]);
    assert!(
        number(&all, "tokens") > number(&files[1], "tokens"),
        "{all}"
    );
    let packed = eval(&["--data", &folder, "--data", &halves, "--packing"]);
    assert!((number(&packed, "loss") / number(&both, "loss") - 1.0).abs() < 1e-6);
    // A folder's test file comes before its validation file.
    write("test.jsonl", &lines[9..12]);
    assert_eq!(eval(&["--data", &folder])["lines"], 3);
    let shown = tallow(&[
        "eval",
        "--model",
        &tiny(),
        "--data",
        &folder,
        "--data",
        &halves,
    ]);
    let shown = text(&shown.stdout);
    assert_eq!(shown.matches("perplexity").count(), 3, "{shown}");
    assert!(shown.contains("halves.jsonl: loss "), "{shown}");
    let empty = tempfile::tempdir().unwrap();
    let empty = empty.path().display().to_string();
    let refused = tallow(&["eval", "--model", &tiny(), "--data", &empty]);
    let err = text(&refused.stderr);
    assert!(err.contains("neither test.jsonl nor valid.jsonl"), "{err}");
}

#[test]
fn a_run_without_a_terminal_says_all_figures_in_plain_lines() {
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
        "--steps",
        "2",
        "--batch",
        "1",
        "--seq-len",
        "17",
        "--samples",
        "0",
        "--save-every",
        "1",
    ]);
    let err = text(&done.stderr);
    assert!(done.status.success() && !err.contains('\u{1b}'), "{err}");
    let line = err.lines().find(|l| l.starts_with("step 1/2  loss "));
    let line = line.unwrap_or_else(|| panic!("{err}"));
    for part in ["  lr 1.00e-3  ", " tokens/s  ", " MiB  ", " s left"] {
        assert!(line.contains(part), "{line}");
    }

    let checkpoint = format!("{out}/checkpoints/step-000002");
    let found = json(&["inspect", &checkpoint, "--model", &tiny(), "--json"]);
    assert_eq!(found["kind"], "checkpoint");
    for (key, want) in [("step", 2), ("steps", 2), ("rank", 8)] {
        assert_eq!(found["about"][key], want, "{found}");
    }
    assert!(found["about"]["loss"].as_f64().unwrap() > 1.0);
    let trained = found["trained"]["parameters"].as_u64().unwrap();
    let tensors = found["tensors"].as_array().unwrap();
    let params = tensors.iter().find(|t| t["name"] == "params").unwrap();
    assert_eq!(params["shape"][0], trained);
    assert_eq!(found["predictions"].as_array().unwrap().len(), 2);
    fs::write(format!("{checkpoint}/state.safetensors"), "").unwrap();
    let err = text(&tallow(&["inspect", &checkpoint]).stderr);
    assert!(err.contains("state.safetensors"), "{err}");
}
