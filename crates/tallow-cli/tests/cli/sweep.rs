//! Sweeps from outside: each run is what it is alone, in a folder of its own; the best is kept.
use super::{json, names, root, tallow, text, tiny, valid};
use serde_json::Value;
use std::{fs, path::Path};

/// How far a run's losses may be from those of the run alone, relatively.
const NEAR: f64 = 1e-4;

fn file(dir: &Path, runs: &str) -> String {
    let text = format!(
        "model: {:?}\ndata: [{:?}]\nvalid: {:?}\nsteps: 6\nbatch: 2\nseq_len: 40\nsave_every: 3\n{runs}",
        tiny(),
        root()
            .join("assets/wikisql/train.jsonl")
            .display()
            .to_string(),
        valid(),
    );
    let path = dir.join("sweep.yaml");
    fs::write(&path, text).unwrap();
    path.display().to_string()
}

const RUNS: &str = "runs:\n  - {name: plain, rank: 4}\n  - {name: dora, dora: true, seed: 3, lr: 0.002}\n\
                    grid:\n  rank: [2, 9]\n  optimizer: [sgd, lion]\n";

fn losses(report: &Value) -> Vec<f64> {
    let all = report["losses"].as_array().unwrap();
    all.iter().map(|l| l.as_f64().unwrap()).collect()
}

#[test]
fn each_run_is_what_it_is_alone() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let (config, to) = (file(dir.path(), RUNS), out.display().to_string());
    let report = json(&["train", "--sweep", &config, "--out", &to, "--json"]);
    let runs = report["runs"].as_array().unwrap();
    let all: Vec<&str> = runs.iter().map(|r| r["name"].as_str().unwrap()).collect();
    assert_eq!(all[..2], ["plain", "dora"]);
    assert_eq!(all.len(), 6);
    for run in runs {
        let folder = run["out"].as_str().unwrap();
        // Its own settings file repeats it.
        let config = format!("{folder}/train.yaml");
        let again = dir.path().join(run["name"].as_str().unwrap());
        let again = again.display().to_string();
        let alone = json(&["train", "--config", &config, "--out", &again, "--json"]);
        let (beside, alone) = (losses(run), losses(&alone));
        assert_eq!(beside.len(), 6);
        for (step, (b, a)) in beside.iter().zip(&alone).enumerate() {
            assert!(
                (b / a - 1.0).abs() < NEAR,
                "{folder}, step {step}: {b} for {a}"
            );
        }
        let kept = names(Path::new(folder));
        for name in [
            "adapter_model.safetensors",
            "checkpoints",
            "metrics.jsonl",
            "report.html",
        ] {
            assert!(kept.iter().any(|n| n == name), "{folder}: {kept:?}");
        }
    }
    let best = runs.iter().min_by(|a, b| {
        let loss = |r: &Value| r["valid_loss"].as_f64().unwrap();
        loss(a).total_cmp(&loss(b))
    });
    assert_eq!(report["best"], best.unwrap()["name"]);
    assert!(
        fs::read_to_string(out.join("sweep.html"))
            .unwrap()
            .contains("\"differ\"")
    );
}

#[test]
fn a_finished_sweep_resumes_to_nothing_and_keeps_the_best() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let runs = "grid: {rank: [2, 4], lr: [1e-4, 5e-3]}\n";
    let (config, to) = (file(dir.path(), runs), out.display().to_string());
    let sweep = |more: &[&str]| {
        let base = ["train", "--sweep", &config, "--out", &to];
        json(&[&base[..], more, &["--json"]].concat())
    };
    let first = sweep(&["--steps", "3"]);
    let more = sweep(&["--resume", "--keep", "best"]);
    let best = more["best"].as_str().unwrap();
    for (run, before) in more["runs"]
        .as_array()
        .unwrap()
        .iter()
        .zip(first["runs"].as_array().unwrap())
    {
        assert_eq!(run["resumed_from"], 3);
        assert_eq!(losses(run)[..3], losses(before));
        assert_eq!(run["steps"], 6);
        let name = run["name"].as_str().unwrap();
        let kept = names(&out.join(name));
        let whole = kept.iter().any(|n| n == "adapter_model.safetensors");
        assert_eq!(whole, name == best, "{name}: {kept:?}");
        assert!(kept.iter().any(|n| n == "train.yaml"), "{name}: {kept:?}");
    }
}

#[test]
fn what_cannot_be_a_sweep_is_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("out").display().to_string();
    for (runs, want) in [
        ("", "no run; list some under `runs`"),
        ("runs: [{rank: 0}]\n", "rank"),
        (
            "runs: [{name: a, rank: x}]\n",
            "run `a`: invalid value 'x' for '--rank <N>'",
        ),
        ("runs: [{batch: 3}]\n", "`batch` is one for all runs"),
        ("runs: [{name: a}, {name: a}]\n", "two runs are called `a`"),
    ] {
        let config = file(dir.path(), runs);
        let got = tallow(&["train", "--sweep", &config, "--out", &to]);
        let err = text(&got.stderr);
        assert_eq!(got.status.code(), Some(2), "{runs}: {err}");
        let last = err.lines().last().unwrap();
        assert!(
            last.starts_with("error: ") && last.contains(want),
            "{runs}: {err}"
        );
        assert!(!dir.path().join("out").exists(), "{runs}");
    }
}
