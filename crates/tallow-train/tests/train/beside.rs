//! Several adapters trained side by side: each is what it is alone, and none sees another.
use super::nonfinite::{POISON, batch, poisoned};
use super::support::*;
use std::{fs, path::PathBuf};
use tallow_llm::{Adapter, AdapterConfig, Model, Targets};
use tallow_train::{
    Batch, Error, Event, FeedSettings, Job, Observer, OptimizerKind, Start, StepResult, Summary,
    TrainConfig, Trainer, Turn, train_all,
};

/// How far the losses of a run beside others may be from those of the run alone, relatively.
const NEAR: f64 = 1e-5;

fn rows(member: u32, step: u32, longest: u32) -> Vec<Vec<u32>> {
    let ids = |i: u32| {
        let n = 5 + (i * 13 + step * 7 + member * 3) % longest;
        (0..n).map(move |k| (k * 37 + i * 101 + step * 59 + member * 17) % 2048)
    };
    (0..2).map(|i| ids(i).collect()).collect()
}

/// Rank, scale, targets, rate and optimizer of each.
fn members(model: &Model) -> Vec<(Adapter, TrainConfig, f64)> {
    let names = |all: &[&str]| Targets::Names(all.iter().map(|n| (*n).to_owned()).collect());
    let tune = |rank, alpha, targets, change: fn(&mut AdapterConfig), seed| {
        let mut config = AdapterConfig::new(rank, alpha, targets);
        change(&mut config);
        Adapter::new(model, &config, seed).unwrap()
    };
    let plain = |_: &mut AdapterConfig| {};
    let sgd = TrainConfig {
        optimizer: OptimizerKind::Sgd,
        clip: Some(0.3),
        seed: 3,
        ..config()
    };
    let lion = TrainConfig {
        optimizer: OptimizerKind::Lion,
        weight_decay: 0.1,
        seed: 4,
        ..config()
    };
    vec![
        (tune(8, 16.0, Targets::AllLinear, plain, 0), config(), 1e-3),
        (
            tune(3, 6.0, names(&["q_proj", "down_proj"]), plain, 1),
            sgd,
            0.1,
        ),
        (tune(16, 8.0, Targets::AllLinear, plain, 2), lion, 1e-4),
    ]
}

/// The same with what is added outside of the product.
fn variants(model: &Model) -> Vec<(Adapter, TrainConfig, f64)> {
    let tune = |change: fn(&mut AdapterConfig), names: Targets, seed| {
        let mut c = AdapterConfig::new(4, 8.0, names);
        change(&mut c);
        (Adapter::new(model, &c, seed).unwrap(), config(), 1e-3)
    };
    let all = || Targets::AllLinear;
    let ends = ["embed_tokens", "lm_head", "q_proj"].map(str::to_owned);
    vec![
        tune(|_| {}, all(), 0),
        tune(|c| c.use_dora = true, all(), 1),
        tune(|c| c.dropout = 0.3, all(), 2),
        tune(|_| {}, Targets::Names(ends.to_vec()), 3),
    ]
}

/// Padded to `least` inputs or to the longest row.
fn batches(member: u32, step: u32, least: usize, count: usize) -> Vec<Batch> {
    let one = |i: usize| {
        let rows = rows(member, step * 10 + i as u32, 20 + 9 * member);
        let t = rows.iter().map(|r| r.len() - 1).max().unwrap().max(least);
        let mut batch = Batch::default();
        let rows = rows.iter().map(Vec::as_slice);
        batch.fill([2, t], rows).unwrap();
        batch
    };
    (0..count).map(one).collect()
}

/// Losses of `steps` steps of each, alone and side by side.
fn both(
    make: fn(&Model) -> Vec<(Adapter, TrainConfig, f64)>,
    [least, accumulate]: [usize; 2],
    steps: u32,
) -> [Vec<Vec<StepResult>>; 2] {
    let model = model();
    let with = |(a, c, lr): (Adapter, TrainConfig, f64)| (a, TrainConfig { accumulate, ..c }, lr);
    let all = || make(&model).into_iter().map(with).collect::<Vec<_>>();
    let data = |i: usize, step| batches(i as u32, step, least, accumulate);
    let alone = all()
        .into_iter()
        .enumerate()
        .map(|(i, (adapter, config, lr))| {
            let mut trainer = Trainer::new(&model, &adapter, &config).unwrap();
            let step = |s| trainer.step(&data(i, s), lr).unwrap();
            (0..steps).map(step).collect::<Vec<_>>()
        });
    let alone = alone.collect();
    let together = all();
    let members: Vec<_> = together.iter().map(|(a, c, _)| (a, c)).collect();
    let mut trainer = Trainer::side_by_side(&model, &members).unwrap();
    let mut beside = vec![vec![]; together.len()];
    for step in 0..steps {
        let given: Vec<_> = (0..together.len()).map(|i| data(i, step)).collect();
        let turn =
            |(batches, m): (&'_ Vec<Batch>, &(Adapter, TrainConfig, f64))| (batches.clone(), m.2);
        let given: Vec<_> = given.iter().zip(&together).map(turn).collect();
        let turns: Vec<_> = given
            .iter()
            .map(|(batches, lr)| Some(Turn { batches, lr: *lr }))
            .collect();
        for (to, got) in beside.iter_mut().zip(trainer.step_all(&turns).unwrap()) {
            to.push(got.unwrap());
        }
    }
    [alone, beside]
}

#[test]
fn each_is_what_it_is_alone() {
    // What dropout drops depends on the length that rows are padded to, so that is one there.
    for (make, least, accumulate) in [
        (members as fn(&Model) -> _, 0, 1),
        (members, 0, 2),
        (variants, 60, 1),
    ] {
        let [alone, beside] = both(make, [least, accumulate], 8);
        for (i, (a, b)) in alone.iter().zip(&beside).enumerate() {
            assert!(b[7].loss != b[0].loss, "adapter {i} does not learn");
            for (step, (a, b)) in a.iter().zip(b).enumerate() {
                let off = |x: f32, y: f32| (f64::from(x) / f64::from(y) - 1.0).abs();
                let (loss, norm) = (off(b.loss, a.loss), off(b.grad_norm, a.grad_norm));
                assert!(
                    loss < NEAR && norm < 100.0 * NEAR,
                    "adapter {i}, {accumulate} batches, step {step}: {b:?} for {a:?}"
                );
            }
        }
    }
}

/// Infinity in the rows of one adapter changes no bit of another, and nothing of its own.
#[test]
fn one_that_is_not_finite_harms_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let model = poisoned(dir.path());
    for accumulate in [1, 2] {
        let config = TrainConfig {
            accumulate,
            clip: Some(1.0),
            ..config()
        };
        let run = |poison: u32| {
            let adapters = [adapter(&model), adapter(&model), adapter(&model)];
            let all: Vec<_> = adapters.iter().map(|a| (a, &config)).collect();
            let mut trainer = Trainer::side_by_side(&model, &all).unwrap();
            let mut results = vec![];
            for step in 0..3 {
                let token = if step == 1 { poison } else { 9 };
                let own = [[5, 6, 7, 8], [5, token, 7, 8], [11, 3, 4, 2]];
                let given = own.map(|ids| vec![batch(&ids); accumulate]);
                let turns = given
                    .each_ref()
                    .map(|batches| Some(Turn { batches, lr: 1e-3 }));
                results.push(trainer.step_all(&turns).unwrap());
            }
            let snapshots = [0, 1, 2].map(|i| trainer.snapshot(i).unwrap());
            (results, snapshots)
        };
        let (results, with) = run(POISON);
        let hit = results[1][1].unwrap();
        assert!(!hit.updated() && !hit.loss.is_finite(), "{hit:?}");
        assert_eq!(with[1].updates, 2);
        assert!(with[1].params.iter().all(|x| x.is_finite()));
        let (others, without) = run(9);
        for i in [0, 2] {
            for (a, b) in results.iter().zip(&others) {
                assert_eq!(a[i], b[i], "adapter {i}");
            }
            assert_eq!(with[i], without[i], "adapter {i}");
        }
    }
}

/// Who has no turn stays as it is.
#[test]
fn who_sits_out_changes_nothing() {
    let model = model();
    for optimizer in OptimizerKind::ALL {
        let config = TrainConfig {
            optimizer,
            ..config()
        };
        let adapters = [adapter(&model), adapter(&model)];
        let all: Vec<_> = adapters.iter().map(|a| (a, &config)).collect();
        let mut trainer = Trainer::side_by_side(&model, &all).unwrap();
        let batches = [batch(&[5, 6, 7, 8])];
        let turn = Some(Turn {
            batches: &batches,
            lr: 1e-2,
        });
        trainer.step_all(&[turn, turn]).unwrap();
        let before = [0, 1].map(|i| trainer.snapshot(i).unwrap());
        assert_eq!(trainer.step_all(&[turn, None]).unwrap()[1], None);
        let after = [0, 1].map(|i| trainer.snapshot(i).unwrap());
        assert_eq!(before[1], after[1], "{optimizer}");
        assert_ne!(before[0].params, after[0].params);
    }
}

#[test]
fn passes_that_differ_are_refused() {
    let model = model();
    let adapters = [adapter(&model), adapter(&model)];
    let other = TrainConfig {
        batch: 9,
        ..config()
    };
    let all = [(&adapters[0], &config()), (&adapters[1], &other)];
    let error = Trainer::side_by_side(&model, &all).err().unwrap();
    assert_eq!(
        error.to_string(),
        "batch: want 4, as in every adapter trained beside this one, got 9"
    );
}

/// Whole runs: folders of their own, one failing alone, and going on in step.
struct Several {
    bench: Bench,
    configs: Vec<TrainConfig>,
    data: Vec<PathBuf>,
}

impl Several {
    fn run(
        &self,
        logs: &mut [Log],
        start: Start,
    ) -> tallow_train::Result<Vec<tallow_train::Result<Summary>>> {
        let b = &self.bench;
        let adapters: Vec<Adapter> = self.configs.iter().map(|_| adapter(&b.model)).collect();
        let outs: Vec<PathBuf> = (0..adapters.len()).map(|i| self.out(i)).collect();
        let feeds: Vec<FeedSettings> = (self.data.iter().zip(&self.configs))
            .map(|(d, c)| FeedSettings::new(vec![d.clone()], c.seq_len, c.batch, c.seed))
            .collect();
        let jobs: Vec<Job> = (0..adapters.len())
            .map(|i| Job {
                model: &b.model,
                tokenizer: &b.tokenizer,
                adapter: &adapters[i],
                data: &feeds[i],
                valid: None,
                out: &outs[i],
                base_name: "tiny",
                config: &self.configs[i],
                keep: keep(2, start),
                memory_bytes: None,
                threads: Some(2),
                notes: vec![],
            })
            .collect();
        let each = jobs.iter().zip(logs);
        train_all(each.map(|(j, l)| (j, l as &mut dyn Observer)).collect())
    }
    fn out(&self, i: usize) -> PathBuf {
        self.bench.dir.path().join(format!("run-{i}"))
    }
    fn saved(&self, i: usize) -> Option<Vec<u8>> {
        fs::read(self.out(i).join("adapter_model.safetensors")).ok()
    }
}

fn several(poison: bool) -> (tempfile::TempDir, Several) {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new();
    bench.model = poisoned(dir.path());
    let word = bench.tokenizer.decode(&[POISON]).unwrap();
    let data: Vec<PathBuf> = (0..3)
        .map(|i| {
            let path = bench.dir.path().join(format!("data-{i}.jsonl"));
            let line = |k: usize| match (k, poison && i == 1) {
                (6, true) => format!("{{\"text\": \"a{word} b\"}}\n"),
                _ => format!("{{\"text\": \"table {k} of {i}\"}}\n"),
            };
            fs::write(&path, (1..=12).map(line).collect::<String>()).unwrap();
            path
        })
        .collect();
    let config = |i: u64| TrainConfig {
        steps: Some(8),
        batch: 2,
        seq_len: 16,
        seed: i,
        lr: 1e-3 * (i + 1) as f64,
        ..config()
    };
    let configs = (0..3).map(config).collect();
    let all = Several {
        bench,
        configs,
        data,
    };
    (dir, all)
}

#[test]
fn a_run_that_fails_ends_alone() {
    let (_dir, several) = several(true);
    let mut logs = [Log::default(), Log::default(), Log::default()];
    let results = several.run(&mut logs, Start::New).unwrap();
    let Err(Error::NotFinite { lines, .. }) = &results[1] else {
        panic!("{:?}", results[1]);
    };
    assert!(lines.contains("data-1.jsonl:6"), "{lines}");
    let told = |e: &Event| matches!(e, Event::Failed { .. });
    assert!(logs[1].events.iter().any(told) && !logs[0].events.iter().any(told));
    for i in [0, 2] {
        assert_eq!(results[i].as_ref().unwrap().steps, 8);
        assert!(several.saved(i).is_some());
    }
    assert!(several.saved(1).is_none());
}

#[test]
fn stopped_runs_go_on_in_step_bit_for_bit() {
    let (_dir, whole) = several(false);
    let mut logs = [Log::default(), Log::default(), Log::default()];
    whole.run(&mut logs, Start::New).unwrap();
    let (_dir, parts) = several(false);
    let mut logs = [Log::default(), Log::default(), Log::default()];
    logs[2].stop_after = Some(5);
    let error = parts.run(&mut logs, Start::New).unwrap_err();
    assert!(matches!(error, Error::Stopped { step: 5, .. }), "{error}");
    // As if it had been killed before the last checkpoint of one was written.
    fs::remove_dir_all(parts.out(0).join("checkpoints/step-000005")).unwrap();
    let mut logs = [Log::default(), Log::default(), Log::default()];
    parts.run(&mut logs, Start::Resume).unwrap();
    for (i, log) in logs.iter().enumerate() {
        let from = log.events.iter().find_map(|e| match e {
            Event::Resumed { step, .. } => Some(*step),
            _ => None,
        });
        assert_eq!(from, Some(4), "run {i}");
        assert!(whole.saved(i).is_some());
        assert!(parts.saved(i) == whole.saved(i), "run {i}");
    }
}
