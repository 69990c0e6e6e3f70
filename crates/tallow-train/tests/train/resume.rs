//! Runs that are broken off and go on: bit for bit, or with a word on why not.
use super::support::*;
use std::{fs, path::PathBuf};
use tallow_train::{Error, Event, OptimizerKind, Start, TrainConfig};

fn settings() -> TrainConfig {
    TrainConfig {
        steps: Some(8),
        batch: 2,
        seq_len: 32,
        clip: Some(1.0),
        schedule: tallow_train::Schedule::Cosine,
        warmup: 2,
        ..config()
    }
}

/// A run of eight steps that is stopped after five, and goes on.
fn broken_off(config: &TrainConfig, meddle: impl FnOnce(&Bench)) -> (Bench, Log) {
    let mut bench = Bench::new();
    bench.keep = keep(2, Start::New);
    let mut log = Log {
        stop_after: Some(5),
        ..Log::default()
    };
    let error = bench.run(config, &mut log).unwrap_err();
    let Error::Stopped { step, saved, .. } = &error else {
        panic!("{error}");
    };
    let dir = bench.out().join("checkpoints/step-000005");
    assert_eq!((*step, saved.as_ref()), (5, Some(&dir)));
    assert!(error.to_string().contains("--resume goes on"), "{error}");
    assert_eq!(bench.files(), ["checkpoints", "train.yaml"]);
    meddle(&bench);
    bench.keep = keep(2, Start::Resume);
    let mut log = Log::default();
    bench.run(config, &mut log).unwrap();
    (bench, log)
}

fn losses(log: &Log) -> Vec<f32> {
    let mut all = vec![];
    for event in &log.events {
        match event {
            Event::Resumed { losses, .. } => all.extend(losses),
            Event::Step { loss, .. } => all.push(*loss),
            _ => {}
        }
    }
    all
}

fn remarks(log: &Log) -> (u64, Vec<String>) {
    let found = log.events.iter().find_map(|e| match e {
        Event::Resumed { step, remarks, .. } => Some((*step, remarks.clone())),
        _ => None,
    });
    found.unwrap()
}

/// Losses and adapter of the same run, left alone.
fn undisturbed(config: &TrainConfig) -> (Vec<f32>, Vec<u8>) {
    let bench = Bench::new();
    let summary = bench.run(config, &mut Log::default()).unwrap();
    (summary.losses, bench.adapter())
}

#[test]
fn a_stopped_run_goes_on_bit_for_bit() {
    for (optimizer, accumulate) in [
        (OptimizerKind::AdamW, 1),
        (OptimizerKind::AdamW, 2),
        (OptimizerKind::Lion, 1),
    ] {
        let config = TrainConfig {
            optimizer,
            accumulate,
            ..settings()
        };
        let (want, adapter) = undisturbed(&config);
        let (bench, log) = broken_off(&config, |_| {});
        assert_eq!(remarks(&log), (5, vec![]));
        assert_eq!(losses(&log), want);
        assert_eq!(bench.adapter(), adapter);
    }
}

#[test]
fn a_damaged_checkpoint_is_passed_over_and_it_is_said() {
    let (want, adapter) = undisturbed(&settings());
    let state = |b: &Bench| b.out().join("checkpoints/step-000005/state.safetensors");
    type Damage = fn(&PathBuf);
    let cases: [(Damage, &str); 4] = [
        (
            |p| {
                let bytes = fs::read(p).unwrap();
                fs::write(p, &bytes[..bytes.len() / 2]).unwrap();
            },
            "state.safetensors has ",
        ),
        (
            |p| {
                let mut bytes = fs::read(p).unwrap();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                fs::write(p, bytes).unwrap();
            },
            "state.safetensors was changed",
        ),
        (
            |p| fs::remove_file(p).unwrap(),
            "state.safetensors is missing",
        ),
        (
            |p| fs::write(p.with_file_name("manifest.json"), "{").unwrap(),
            "manifest.json is not readable",
        ),
    ];
    for (damage, why) in cases {
        let (bench, log) = broken_off(&settings(), |b| damage(&state(b)));
        let (step, said) = remarks(&log);
        assert_eq!((step, said.len()), (4, 1), "{said:?}");
        assert!(
            said[0].contains(why) && said[0].contains("step-000005"),
            "{said:?}"
        );
        assert_eq!(losses(&log), want, "{why}");
        assert_eq!(bench.adapter(), adapter, "{why}");
    }
}

#[test]
fn no_whole_checkpoint_is_an_error_and_overwriting_starts_anew() {
    let (want, adapter) = undisturbed(&settings());
    let mut bench = Bench::new();
    bench.keep = keep(4, Start::New);
    bench.run(&settings(), &mut Log::default()).unwrap();
    let again = bench.run(&settings(), &mut Log::default()).unwrap_err();
    assert!(matches!(again, Error::HoldsARun { step: 8, .. }), "{again}");
    for step in ["step-000004", "step-000008"] {
        fs::write(
            bench
                .out()
                .join("checkpoints")
                .join(step)
                .join("state.safetensors"),
            "",
        )
        .unwrap();
    }
    bench.keep = keep(4, Start::Resume);
    let error = bench.run(&settings(), &mut Log::default()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("none of 2 checkpoints is whole"), "{text}");
    bench.keep = keep(4, Start::Overwrite);
    let summary = bench.run(&settings(), &mut Log::default()).unwrap();
    assert_eq!((summary.losses, bench.adapter()), (want, adapter));
}

#[test]
fn resuming_starts_afresh_where_there_is_nothing_and_ends_at_once_where_all_is_done() {
    let mut bench = Bench::new();
    bench.keep = keep(3, Start::Resume);
    let first = bench.run(&settings(), &mut Log::default()).unwrap();
    assert_eq!((first.steps, first.resumed_from), (8, None));
    let adapter = bench.adapter();
    let second = bench.run(&settings(), &mut Log::default()).unwrap();
    assert_eq!((second.steps, second.resumed_from), (8, Some(8)));
    assert_eq!((second.losses, bench.adapter()), (first.losses, adapter));
}

#[test]
fn another_run_is_refused_and_told_apart() {
    let mut bench = Bench::new();
    bench.keep = keep(4, Start::New);
    bench.run(&settings(), &mut Log::default()).unwrap();
    bench.keep = keep(4, Start::Resume);
    let refused = |bench: &Bench, config: &TrainConfig, want: &str| {
        let error = bench.run(config, &mut Log::default()).unwrap_err();
        assert!(error.to_string().contains(want), "{error}");
    };
    let other = TrainConfig {
        lr: 2e-3,
        seed: 3,
        ..settings()
    };
    refused(&bench, &other, "lr was 0.001, is 0.002, seed was 0, is 3");
    let data = bench.data.clone();
    bench.data = bench.dir.path().join("other.jsonl");
    let text = fs::read_to_string(&data).unwrap();
    let all: Vec<&str> = text.lines().collect();
    fs::write(&bench.data, all[1..].join("\n")).unwrap();
    refused(&bench, &settings(), "not the data of the checkpoint");
    // More steps are welcome.
    bench.data = data;
    let longer = TrainConfig {
        steps: Some(10),
        ..settings()
    };
    let mut log = Log::default();
    assert_eq!(bench.run(&longer, &mut log).unwrap().steps, 10);
    let (step, said) = remarks(&log);
    assert_eq!(step, 8);
    assert!(said[0].contains("8 steps were planned, now 10"), "{said:?}");
}

#[test]
fn the_last_and_the_best_checkpoints_are_kept_and_patience_ends_a_run() {
    let mut bench = Bench::new();
    bench.valid = Some(bench.dir.path().join("valid.jsonl"));
    let text = fs::read_to_string(&bench.data).unwrap();
    let few: Vec<&str> = text.lines().take(8).collect();
    fs::write(bench.valid.as_ref().unwrap(), few.join("\n")).unwrap();
    bench.keep = keep(100, Start::New);
    // A learning rate that soon does harm.
    let config = TrainConfig {
        steps: Some(60),
        lr: 3e-2,
        schedule: tallow_train::Schedule::Constant,
        eval_every: Some(2),
        patience: Some(2),
        ..settings()
    };
    let mut log = Log::default();
    let summary = bench.run(&config, &mut log).unwrap();
    assert!(summary.early && summary.steps < 60, "{summary:?}");
    let (loss, step) = summary.best[0];
    assert_eq!(summary.steps, step + 4);
    assert!(summary.valid.unwrap().loss > loss);
    let best = bench.out().join(format!(
        "checkpoints/step-{step:06}/adapter_model.safetensors"
    ));
    assert_eq!(fs::read(best).unwrap(), bench.adapter());
    let kept = fs::read_dir(bench.out().join("checkpoints"))
        .unwrap()
        .count();
    assert_eq!(
        kept,
        2 + usize::from(step + 4 != summary.steps),
        "last two, best among them or not"
    );
    assert!(
        log.events
            .iter()
            .any(|e| matches!(e, Event::EarlyStop { .. }))
    );
    // Resumed, it ends as it ended.
    bench.keep = keep(100, Start::Resume);
    let adapter = bench.adapter();
    let again = bench.run(&config, &mut Log::default()).unwrap();
    assert_eq!((again.steps, again.early), (summary.steps, true));
    assert_eq!(bench.adapter(), adapter);
}

#[test]
fn memory_is_kept_to_by_computing_again_then_with_fewer_rows_a_batch() {
    let mut bench = Bench::new();
    let config = TrainConfig {
        steps: Some(2),
        batch: 4,
        // One length of rows, so one plan.
        packing: true,
        ..settings()
    };
    let shape = |log: &Log| {
        log.events.iter().find_map(|e| match e {
            Event::Start {
                batch,
                accumulate,
                memory,
                ..
            } => Some((*batch, *accumulate, memory.total())),
            _ => None,
        })
    };
    let mut log = Log::default();
    let want = bench.run(&config, &mut log).unwrap();
    let (batch, accumulate, most) = shape(&log).unwrap();
    assert_eq!((batch, accumulate), (4, 1));
    let adapter = bench.adapter();
    // Norms and gates computed again are enough, and change no bit.
    bench.memory_bytes = Some(most - 1);
    let mut log = Log::default();
    let got = bench.run(&config, &mut log).unwrap();
    let (batch, accumulate, less) = shape(&log).unwrap();
    assert_eq!((batch, accumulate), (4, 1));
    assert!(less < most * 95 / 100, "{less} bytes for {most}");
    assert_eq!(
        (got.losses, bench.adapter()),
        (want.losses.clone(), adapter)
    );
    // Then fewer rows.
    let limit = less - 1;
    bench.memory_bytes = Some(limit);
    let mut log = Log::default();
    let got = bench.run(&config, &mut log).unwrap();
    let (batch, accumulate, less) = shape(&log).unwrap();
    assert!(
        batch < 4 && batch * accumulate == 4,
        "{batch} x {accumulate}"
    );
    assert!(less <= limit);
    let off = got.losses[1] / want.losses[1] - 1.0;
    assert!(off.abs() < 1e-4, "{:?} for {:?}", got.losses, want.losses);
    bench.memory_bytes = Some(1 << 20);
    let error = bench
        .run(&config, &mut Log::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("of memory, and 1.0 MiB is allowed"),
        "{error}"
    );
}

#[test]
fn a_manifest_names_no_file_outside_its_folder() {
    let bench = Bench::new();
    let store = tallow_train::checkpoint::Store::new(&bench.out());
    let dir = store.path(1);
    fs::create_dir_all(&dir).unwrap();
    let secret = bench.dir.path().join("secret");
    fs::write(&secret, "x").unwrap();
    let sum = serde_json::json!({"bytes": 1, "crc32": crc32c::crc32c(b"x")});
    let outside = [
        "../../../secret".to_owned(),
        secret.display().to_string(),
        "..".to_owned(),
    ];
    for name in outside {
        let mut manifest = serde_json::json!({});
        for file in ["checkpoint.json", "state.safetensors"] {
            fs::write(dir.join(file), "x").unwrap();
            manifest[file] = sum.clone();
        }
        manifest[&name] = sum.clone();
        fs::write(dir.join("manifest.json"), manifest.to_string()).unwrap();
        let said = store.load(1).unwrap_err().to_string();
        assert!(said.contains(&format!("{name} is missing")), "{said}");
    }
    // Deeper than any reader goes, and of no length.
    for about in ["[".repeat(10_000), String::new()] {
        fs::write(dir.join("manifest.json"), &about).unwrap();
        let said = store.load(1).unwrap_err().to_string();
        assert!(said.contains("manifest.json is not readable"), "{said}");
    }
}
