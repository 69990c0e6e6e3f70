//! Variants of adapters, and what is done with finished ones: merge, convert, inspect.
use super::*;

/// Trains for a few steps with these options; the folder of the adapter.
fn train(dir: &Path, name: &str, options: &[&str]) -> (String, Value) {
    let out = dir.join(name).display().to_string();
    let (tiny, valid) = (tiny(), valid());
    let base = [
        "train",
        "--model",
        &tiny,
        "--data",
        &valid,
        "--out",
        &out,
        "--steps",
        "6",
        "--batch",
        "2",
        "--seq-len",
        "65",
        "--lr",
        "5e-3",
        "--rank",
        "4",
        "--json",
    ];
    let report = json(&[&base[..], options].concat());
    (out, report)
}

fn adapter_config(dir: &str) -> Value {
    let bytes = fs::read(Path::new(dir).join("adapter_config.json")).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

fn logits(model: &str, adapter: Option<&str>) -> Vec<f64> {
    let mut args = vec![
        "logits",
        "--model",
        model,
        "--ids",
        "5,77,300,12,9",
        "--json",
    ];
    args.extend(adapter.iter().flat_map(|a| ["--adapter", a]));
    let rows = json(&args)["logits"].take();
    let rows: Vec<Vec<f64>> = serde_json::from_value(rows).unwrap();
    rows.concat()
}

fn apart(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f64::max)
}

#[test]
fn variants_train_and_say_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let losses =
        |report: &Value| -> Vec<f64> { serde_json::from_value(report["losses"].clone()).unwrap() };
    let (_, plain) = train(dir.path(), "plain", &[]);
    let plain = losses(&plain);
    let falls = |l: &[f64]| l[4] + l[5] < l[0] + l[1];
    assert!(falls(&plain), "{plain:?}");

    let (dora, report) = train(dir.path(), "dora", &["--dora"]);
    let l = losses(&report);
    // The same start; the magnitudes make the difference.
    assert!(
        (l[0] - plain[0]).abs() < 1e-5 && l[3] != plain[3] && falls(&l),
        "{l:?}"
    );
    assert_eq!(adapter_config(&dora)["use_dora"], true);

    let (_, report) = train(dir.path(), "dropout", &["--dropout", "0.5"]);
    let l = losses(&report);
    // With B at zero there is nothing to drop yet.
    assert!((l[0] - plain[0]).abs() < 1e-5 && l[2] != plain[2], "{l:?}");
    let (_, again) = train(dir.path(), "dropout2", &["--dropout", "0.5"]);
    assert_eq!(losses(&again), l);

    let (_, report) = train(dir.path(), "plus", &["--loraplus", "4"]);
    let l = losses(&report);
    assert!(
        (l[0] - plain[0]).abs() < 1e-5 && l[1] < plain[1],
        "{l:?} and {plain:?}"
    );

    let outside = ["--targets", "lm_head,embed_tokens"];
    let (both, report) = train(dir.path(), "both", &outside);
    let l = losses(&report);
    // Both are trained: neither gradient is lost on the way.
    assert!((l[0] - plain[0]).abs() < 1e-4 && falls(&l), "{l:?}");
    let found = json(&["inspect", &both, "--model", &tiny(), "--json"]);
    assert_eq!(found["trained"]["parameters"], report["trainable"]);
    for only in ["lm_head", "embed_tokens"] {
        let (_, report) = train(dir.path(), only, &["--targets", only]);
        let l = losses(&report);
        assert!(falls(&l), "{only}: {l:?}");
    }

    let (pissa, report) = train(dir.path(), "pissa", &["--init", "pissa"]);
    let l = losses(&report);
    assert!((l[0] - plain[0]).abs() < 1e-3 && falls(&l), "{l:?}");
    let c = adapter_config(&pissa);
    assert_eq!(
        (&c["r"], &c["lora_alpha"]),
        (&Value::from(8), &Value::from(16))
    );

    let options = ["--layers", "1-2", "--rank-pattern", "q_proj=6", "--rslora"];
    let (some, report) = train(dir.path(), "some", &options);
    let c = adapter_config(&some);
    assert_eq!(c["layers_to_transform"], serde_json::json!([1, 2]));
    assert_eq!(c["rank_pattern"]["q_proj"], 6);
    assert_eq!(c["target_modules"].as_array().unwrap().len(), 7);
    let found = json(&["inspect", &some, "--model", &tiny(), "--json"]);
    assert_eq!(found["trained"]["parameters"], report["trainable"]);
    let settings = fs::read_to_string(Path::new(&some).join("train.yaml")).unwrap();
    assert!(
        settings.contains("layers: \"1,2\"\nrank_pattern: [\"q_proj=6\"]\n"),
        "{settings}"
    );
}

#[test]
fn a_merged_model_is_the_model_with_its_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = tiny();
    for (name, options) in [("lora", &[][..]), ("dora", &["--dora"][..])] {
        let (adapter, _) = train(dir.path(), name, options);
        let out = dir
            .path()
            .join(format!("{name}-merged"))
            .display()
            .to_string();
        let args = [
            "merge",
            "--model",
            &tiny,
            "--adapter",
            &adapter,
            "--out",
            &out,
        ];
        let report = json(&[&args[..], &["--json"]].concat());
        assert!(
            report["drift"]["max_logit"].as_f64().unwrap() < 0.1,
            "{report}"
        );
        assert!(
            report["drift"]["mean_kl"].as_f64().unwrap().abs() < 0.1,
            "{report}"
        );
        assert!(names(Path::new(&out)).contains(&"tokenizer.json".to_owned()));
        let with = logits(&tiny, Some(&adapter));
        let d = apart(&logits(&out, None), &with);
        assert!(
            d < 0.1 && apart(&logits(&tiny, None), &with) > 3.0 * d,
            "{d}"
        );
        // Not twice into one folder.
        let again = tallow(&args);
        assert_eq!(again.status.code(), Some(2));
        let err = text(&again.stderr);
        assert!(
            err.contains("exists and is not empty") && err.lines().count() == 1,
            "{err}"
        );
    }
}

#[test]
fn adapters_go_to_mlx_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (model, mlx, back) = (golden("llama-dora"), path("mlx"), path("back"));
    let adapter = format!("{model}/adapter");
    let convert = ["convert", "--model", &model, "--json"];
    let there = ["--from", "peft", "--to", "mlx-lm", &adapter, &mlx];
    let report = json(&[&convert[..], &there].concat());
    assert_eq!(
        (&report["modules"], &report["dora"]),
        (&Value::from(14), &Value::from(true))
    );
    assert_eq!(
        names(Path::new(&mlx)),
        ["adapter_config.json", "adapters.safetensors"]
    );
    json(
        &[
            &convert[..],
            &["--from", "mlx-lm", "--to", "peft", &mlx, &back],
        ]
        .concat(),
    );
    let (before, after) = (logits(&model, Some(&adapter)), logits(&model, Some(&back)));
    assert_eq!(before, after);
    let found = json(&["inspect", &mlx, "--json"]);
    assert_eq!(
        (&found["about"]["format"], &found["about"]["dora"]),
        (&"mlx-lm".into(), &true.into())
    );
    let wrong = tallow(&[
        "convert",
        "--from",
        "mlx-lm",
        "--to",
        "peft",
        &adapter,
        &path("x"),
    ]);
    assert_eq!(wrong.status.code(), Some(2), "{}", text(&wrong.stderr));
}

#[test]
fn a_model_an_adapter_and_tensors_are_described() {
    let model = golden("llama");
    let found = json(&[
        "inspect",
        &model,
        "--seq-len",
        "64",
        "--batch",
        "2",
        "--json",
    ]);
    assert_eq!(
        (&found["kind"], &found["about"]["layers"]),
        (&"model".into(), &2.into())
    );
    let elems: u64 = found["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| {
            let shape: Vec<u64> = serde_json::from_value(t["shape"].clone()).unwrap();
            shape.iter().product::<u64>() * t["count"].as_u64().unwrap()
        })
        .sum();
    assert_eq!(found["parameters"], elems);
    // What `explain` says of the same step.
    let explain = [
        "explain", "train", "--model", &model, "--tokens", "64", "--batch", "2", "--json",
    ];
    let plan = json(&explain);
    let train = &found["predictions"][0];
    assert_eq!(
        train["arena_bytes"], plan["memory_bytes"]["arena"],
        "{plan}"
    );
    assert!(train["estimated_seconds"].as_f64().unwrap() > 0.0);
    assert!(
        found["predictions"][1]["what"]
            .as_str()
            .unwrap()
            .starts_with("decoding")
    );

    let adapter = format!("{model}/adapter");
    let found = json(&["inspect", &adapter, "--model", &model, "--json"]);
    assert_eq!(
        (&found["kind"], &found["about"]["rank"]),
        (&"adapter".into(), &8.into())
    );
    assert_eq!(found["trained"]["parameters"], found["parameters"]);
    assert_eq!(found["trained"]["base_parameters"], elems);

    let found = json(&[
        "inspect",
        &format!("{model}/reference.safetensors"),
        "--json",
    ]);
    assert_eq!(found["kind"], "tensors");
    let shown = tallow(&["inspect", &model]);
    let shown = text(&shown.stdout);
    assert!(
        shown.contains("model.layers.*.mlp.up_proj.weight") && shown.contains(" x 2"),
        "{shown}"
    );
    assert!(shown.contains("estimates"), "{shown}");
}

#[test]
fn variants_that_cannot_be_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out").display().to_string();
    let (tiny, valid) = (tiny(), valid());
    let base = ["train", "--model", &tiny, "--data", &valid, "--out", &out];
    let cases: [(&[&str], &str); 10] = [
        (&["--dropout", "1"], "--dropout: want a number from 0"),
        (&["--layers", "4-99"], "there is no layer"),
        (&["--layers", "5-2"], "want layers like 8-15"),
        (
            &["--layers", "0", "--targets", ".*q_proj"],
            "want names or all-linear",
        ),
        (&["--rank-pattern", "q_proj"], "want NAME=NUMBER"),
        (&["--rank-pattern", "q_proj=0"], "want a rank from 1"),
        (&["--rank-pattern", "wq=4"], "no adapted module"),
        (&["--loraplus=-3"], "want a number above 0"),
        (&["--init", "pissa", "--dora"], "another start than pissa"),
        (
            &["--init", "pissa", "--rank", "4096"],
            "no more than the smaller side",
        ),
    ];
    for (options, wanted) in cases {
        let done = tallow(&[&base[..], options].concat());
        let err = text(&done.stderr);
        assert_eq!(done.status.code(), Some(2), "{options:?}: {err}");
        assert!(
            err.contains(wanted) && err.lines().count() == 1,
            "{options:?}: {err}"
        );
        assert_eq!(names(dir.path()), Vec::<String>::new());
    }
}

#[test]
fn plans_are_made_for_a_card_that_is_not_there() {
    let model = tiny();
    let paper = ["--device", "cuda:paper", "--dtype", "bf16"];
    let explain = ["explain", "decode", "--model", &model, "--json"];
    let plan = json(&[&explain[..], &paper].concat());
    let launches = plan["launches"].as_array().unwrap();
    let step = |l: &Value, which: &str| l[which].as_u64().unwrap() as usize;
    let last = step(launches.last().unwrap(), "last_step");
    assert_eq!(last + 1, plan["steps"].as_array().unwrap().len());
    let several = launches
        .iter()
        .filter(|l| step(l, "last_step") > step(l, "first_step"));
    assert!(several.count() > 1, "{plan}");
    let logits = ["logits", "--model", &model, "--ids", "1,2"];
    refused::refused(
        &[&logits[..], &paper].concat(),
        &["cuda:paper", "it makes plans"],
    );
}
