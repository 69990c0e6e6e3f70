//! A loss or gradient that is not finite: nothing is spoilt, and the lines are named.
use super::support::*;
use safetensors::{SafeTensors, tensor::TensorView};
use std::{collections::HashMap, fs, path::Path};
use tallow_llm::{LoadOptions, Model};
use tallow_train::{Batch, Error, Event, OptimizerKind, TrainConfig, Trainer};

/// A token that only some lines have.
pub(crate) const POISON: u32 = 1234;

/// The tiny model with infinity in the embedding of one token, and an output projection of its own so that no
/// other token sees it.
pub(crate) fn poisoned(dir: &Path) -> Model {
    let tiny = root().join("assets/tiny");
    let bytes = fs::read(tiny.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let name = "model.embed_tokens.weight";
    let whole = file.tensor(name).unwrap();
    let mut spoilt = whole.data().to_vec();
    let row = whole.shape()[1] * 2;
    let infinity = 0x7f80_u16.to_le_bytes();
    spoilt[POISON as usize * row..][..2].copy_from_slice(&infinity);
    let spoilt = TensorView::new(whole.dtype(), whole.shape().to_vec(), &spoilt).unwrap();
    let mut all: Vec<(String, TensorView)> = file.tensors();
    all.retain(|(n, _)| n != name);
    all.push((name.into(), spoilt));
    all.push(("lm_head.weight".into(), whole));
    let bytes = safetensors::serialize(all, None::<HashMap<_, _>>).unwrap();
    fs::write(dir.join("model.safetensors"), bytes).unwrap();
    let config = fs::read_to_string(tiny.join("config.json")).unwrap();
    let untied = config.replace(
        "\"tie_word_embeddings\": true",
        "\"tie_word_embeddings\": false",
    );
    assert_ne!(config, untied);
    fs::write(dir.join("config.json"), untied).unwrap();
    Model::load(&model().session, dir, &LoadOptions::default()).unwrap()
}

pub(crate) fn batch(ids: &[u32]) -> Batch {
    let mut batch = Batch::default();
    batch.fill([1, ids.len() - 1], [ids]).unwrap();
    batch
}

#[test]
fn nothing_is_spoilt_and_the_counter_of_updates_stays() {
    let dir = tempfile::tempdir().unwrap();
    let model = poisoned(dir.path());
    for optimizer in OptimizerKind::ALL {
        for accumulate in [1, 2] {
            let config = TrainConfig {
                optimizer,
                accumulate,
                clip: Some(1.0),
                ..config()
            };
            let (good, bad) = (batch(&[5, 6, 7, 8]), batch(&[5, POISON, 7, 8]));
            let step = |last: &Batch| match accumulate {
                1 => vec![last.clone()],
                _ => vec![good.clone(), last.clone()],
            };
            let run = |batches: &[&Batch]| {
                let adapter = adapter(&model);
                let mut trainer = Trainer::new(&model, &adapter, &config).unwrap();
                let mut results = vec![];
                for b in batches {
                    let before = trainer.snapshot(0).unwrap();
                    let got = trainer.step(&step(b), 1e-3).unwrap();
                    let after = trainer.snapshot(0).unwrap();
                    assert_eq!(got.updated(), before.params != after.params);
                    assert_eq!(got.updated(), before.m != after.m);
                    assert_eq!(after.updates, before.updates + u64::from(got.updated()));
                    results.push(got);
                }
                (results, trainer.snapshot(0).unwrap())
            };
            let (results, with) = run(&[&good, &bad, &good]);
            assert!(!results[1].loss.is_finite(), "{:?}", results[1]);
            let own = (accumulate > 1).then_some(1);
            assert_eq!(results[1].bad_batch, own);
            let (others, without) = run(&[&good, &good]);
            assert_eq!((results[0], results[2]), (others[0], others[1]));
            let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&with.params), bits(&without.params), "{optimizer}");
        }
    }
}

/// A run over lines of which one has the poisoned token.
fn bench(dir: &Path) -> (Bench, usize) {
    let mut bench = Bench::new();
    bench.model = poisoned(dir);
    let word = bench.tokenizer.decode(&[POISON]).unwrap();
    let line = |i: usize| match i {
        6 => format!("{{\"text\": \"a{word} b\"}}\n"),
        _ => format!("{{\"text\": \"table {i}\"}}\n"),
    };
    bench.data = bench.dir.path().join("data.jsonl");
    fs::write(&bench.data, (1..=12).map(line).collect::<String>()).unwrap();
    (bench, 6)
}

fn settings() -> TrainConfig {
    TrainConfig {
        steps: Some(12),
        batch: 2,
        seq_len: 16,
        ..config()
    }
}

#[test]
fn the_run_stops_and_names_the_step_the_lines_and_the_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let (mut bench, line) = bench(dir.path());
    bench.keep = keep(1, tallow_train::Start::New);
    let error = bench.run(&settings(), &mut Log::default()).unwrap_err();
    let Error::NotFinite {
        step, lines, last, ..
    } = &error
    else {
        panic!("{error}");
    };
    assert!(lines.contains(&format!("data.jsonl:{line}")), "{error}");
    assert_eq!(lines.matches("data.jsonl").count(), 2, "{error}");
    let want = (*step > 1).then(|| {
        bench
            .out()
            .join(format!("checkpoints/step-{:06}", step - 1))
    });
    assert_eq!(last, &want, "{error}");
}

#[test]
fn skipped_steps_are_counted_and_the_rest_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (bench, line) = bench(dir.path());
    let config = TrainConfig {
        skip_nonfinite: true,
        ..settings()
    };
    let mut log = Log::default();
    let summary = bench.run(&config, &mut log).unwrap();
    // Two passes over twelve lines of which one is bad.
    assert_eq!((summary.steps, summary.skipped), (12, 2));
    let bad = summary.losses.iter().filter(|l| !l.is_finite());
    assert_eq!(bad.count(), 2);
    let named = log.events.iter().filter(|e| match e {
        Event::Skipped { lines, .. } => lines.iter().any(|l| l.line == line as u64),
        _ => false,
    });
    assert_eq!(named.count(), 2);
}
