//! Steps in numbers: accumulation against one large batch, optimizers against their formulas in f64.
use super::support::*;
use tallow_llm::{Adapter, Model};
use tallow_train::{Batch, OptimizerKind, TrainConfig, Trainer};

/// Rows of unequal lengths.
fn rows(n: u32) -> Vec<Vec<u32>> {
    let row = |i: u32| {
        (0..9 + 7 * i)
            .map(move |k| (k * 37 + i * 101) % 2048)
            .collect()
    };
    (0..n).map(row).collect()
}

fn batch(rows: &[Vec<u32>]) -> Batch {
    let mut batch = Batch::default();
    let t = rows.iter().map(|r| r.len() - 1).max().unwrap();
    batch
        .fill([rows.len(), t], rows.iter().map(Vec::as_slice))
        .unwrap();
    batch
}

/// An adapter that is not at its start, so that every part has a gradient.
fn moved(model: &Model) -> Adapter {
    let adapter = adapter(model);
    let values = model.session.read(&adapter.params).unwrap();
    let values: Vec<f32> = values
        .iter()
        .enumerate()
        .map(|(i, v)| v + 0.02 * ((i * 7919 % 1000) as f32 / 500.0 - 1.0))
        .collect();
    model.session.write(&adapter.params, &values).unwrap();
    adapter
}

fn plain(optimizer: OptimizerKind) -> TrainConfig {
    TrainConfig {
        optimizer,
        beta1: 0.0,
        weight_decay: 0.0,
        ..config()
    }
}

/// The gradient of the mean loss at the adapter's parameters, which stay.
fn gradient(model: &Model, adapter: &Adapter, batch: &Batch) -> Vec<f64> {
    let before = model.session.read(&adapter.params).unwrap();
    let mut trainer = Trainer::new(model, adapter, &plain(OptimizerKind::Sgd)).unwrap();
    trainer.step(std::slice::from_ref(batch), 1.0).unwrap();
    let after = model.session.read(&adapter.params).unwrap();
    model.session.write(&adapter.params, &before).unwrap();
    let pairs = before.iter().zip(&after);
    pairs.map(|(b, a)| f64::from(*b) - f64::from(*a)).collect()
}

fn off(got: &[f64], want: &[f64]) -> f64 {
    norm(got.iter().zip(want).map(|(g, w)| g - w)) / norm(want.iter().copied())
}

#[test]
fn three_batches_of_two_rows_are_one_of_six() {
    let model = model();
    let rows = rows(6);
    let whole = batch(&rows);
    let parts: Vec<Batch> = rows.chunks(2).map(batch).collect();
    let lens: Vec<usize> = parts.iter().map(|b| b.counted).collect();
    assert!(lens[0] < lens[1] && lens[1] < lens[2], "{lens:?}");
    let run = |accumulate: usize, batches: &[Batch]| {
        let adapter = moved(&model);
        let before = model.session.read(&adapter.params).unwrap();
        let config = TrainConfig {
            accumulate,
            clip: Some(0.5),
            ..plain(OptimizerKind::Sgd)
        };
        let mut trainer = Trainer::new(&model, &adapter, &config).unwrap();
        // Large enough that the difference of parameters is exact to seven digits.
        let got = trainer.step(batches, 1e3).unwrap();
        let after = model.session.read(&adapter.params).unwrap();
        let pairs = before.iter().zip(&after);
        let moved: Vec<f64> = pairs.map(|(b, a)| f64::from(*b) - f64::from(*a)).collect();
        // The sums are empty again: the same step from the same place moves as far.
        model.session.write(&adapter.params, &before).unwrap();
        let again = trainer.step(batches, 1e3).unwrap();
        assert_eq!((got.loss, got.grad_norm), (again.loss, again.grad_norm));
        (got, moved)
    };
    let (one, one_moved) = run(1, &[whole]);
    let (three, three_moved) = run(3, &parts);
    let near = |a: f32, b: f32| (f64::from(a) / f64::from(b) - 1.0).abs();
    assert!(near(three.loss, one.loss) < 1e-6, "{three:?} for {one:?}");
    assert!(
        near(three.grad_norm, one.grad_norm) < 1e-6,
        "{three:?} for {one:?}"
    );
    let off = off(&three_moved, &one_moved);
    assert!(off < 1e-6, "off by {off:.1e}");
}

#[test]
fn another_number_of_batches_is_refused() {
    let model = model();
    let mut trainer = Trainer::new(&model, &adapter(&model), &config()).unwrap();
    let two = [batch(&rows(1)), batch(&rows(1))];
    let error = trainer.step(&two, 1e-3).unwrap_err().to_string();
    assert_eq!(error, "batches of a step: want 1, got 2");
}

/// Two steps of `optimizer`; `formula(lr, p, g, m)` gives the next `p` and `m` in f64.
fn follows(optimizer: OptimizerKind, formula: impl Fn(f64, f64, f64, f64) -> (f64, f64)) {
    let model = model();
    let batch = batch(&rows(3));
    let adapter = moved(&model);
    let config = TrainConfig {
        beta1: 0.5,
        beta2: 0.75,
        weight_decay: 0.125,
        ..plain(optimizer)
    };
    let mut trainer = Trainer::new(&model, &adapter, &config).unwrap();
    let mut m = vec![0.0; adapter.elems()];
    for step in 0..2 {
        let lr = f64::from(0.01_f32);
        let before = model.session.read(&adapter.params).unwrap();
        let g = gradient(&model, &adapter, &batch);
        trainer.step(std::slice::from_ref(&batch), lr).unwrap();
        let after = model.session.read(&adapter.params).unwrap();
        let (mut got, mut want) = (vec![], vec![]);
        for i in 0..g.len() {
            // Where the gradient is lost in rounding its sign is nobody's business.
            if g[i].abs() < 1e-7 {
                continue;
            }
            let p = f64::from(before[i]);
            let (next, moment) = formula(lr, p, g[i], m[i]);
            m[i] = moment;
            got.push(f64::from(after[i]) - p);
            want.push(next - p);
        }
        assert!(got.len() > g.len() / 2, "{} of {}", got.len(), g.len());
        let off = off(&got, &want);
        assert!(off < 2e-2, "{optimizer}, step {step}: off by {off:.1e}");
    }
}

#[test]
fn sgd_is_torch_s() {
    follows(OptimizerKind::Sgd, |lr, p, g, m| {
        let m = 0.5 * m + (g + 0.125 * p);
        (p - lr * m, m)
    });
}

#[test]
fn lion_is_the_paper_s() {
    follows(OptimizerKind::Lion, |lr, p, g, m| {
        let u: f64 = 0.5 * m + 0.5 * g;
        let sign = if u == 0.0 { 0.0 } else { u.signum() };
        (p * (1.0 - lr * 0.125) - lr * sign, 0.75 * m + 0.25 * g)
    });
}

#[test]
fn a_packed_step_is_the_step_of_its_documents_alone() {
    let model = model();
    let docs: Vec<Vec<u32>> = (0..5_u32)
        .map(|d| {
            (0..9 + 4 * d)
                .map(|i| 5 + (i * 37 + d * 11) % 300)
                .collect()
        })
        .collect();
    let run = |packing: bool| {
        let config = TrainConfig {
            packing,
            ..config()
        };
        let adapter = adapter(&model);
        let mut trainer = Trainer::new(&model, &adapter, &config).unwrap();
        let mut batch = Batch::default();
        let all = docs.iter().map(Vec::as_slice);
        match packing {
            false => batch.fill([5, 32], all).unwrap(),
            true => {
                let rows = [vec![0, 4], vec![3, 1], vec![2]];
                let rows = rows.map(|r| r.into_iter().map(|i| docs[i].as_slice()));
                batch.fill_packed([3, 34], rows).unwrap();
            }
        }
        let steps = (0..4).map(|_| trainer.step(std::slice::from_ref(&batch), 1e-3).unwrap());
        let losses: Vec<f32> = steps.map(|s| s.loss).collect();
        (losses, model.session.read(&adapter.params).unwrap())
    };
    let ((alone, a), (packed, p)) = (run(false), run(true));
    for (x, y) in alone.iter().zip(&packed) {
        assert!((x - y).abs() < 1e-5 * x.abs(), "{alone:?} {packed:?}");
    }
    let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x).powi(2)).sum::<f64>();
    let off = norm(&mut a.iter().zip(&p).map(|(x, y)| x - y));
    let off = (off / norm(&mut a.iter().copied())).sqrt();
    assert!(off < 1e-4, "{off:e}");
}

#[test]
fn norms_and_gates_computed_again_take_less_memory_and_change_no_bit() {
    let batch = batch(&rows(6));
    let run = |sparing: bool| {
        let mut model = model();
        if sparing {
            model.session = model.session.sparing();
        }
        let adapter = moved(&model);
        let mut trainer = Trainer::new(&model, &adapter, &config()).unwrap();
        let plan = trainer.plan([batch.b, batch.t]).unwrap().plan;
        let steps = [(); 3].map(|()| {
            let got = trainer.step(std::slice::from_ref(&batch), 1e-2).unwrap();
            [got.loss.to_bits(), got.grad_norm.to_bits()]
        });
        let params = model.session.read(&adapter.params).unwrap();
        let bits: Vec<u32> = params.iter().map(|p| p.to_bits()).collect();
        ((plan.memory().arena, plan.steps.len()), (steps, bits))
    };
    let (((all, few), kept), ((less, more), again)) = (run(false), run(true));
    assert!(less * 10 < all * 9, "{less} bytes for {all}");
    assert!(more > few, "{more} steps, {few} before");
    assert_eq!(again, kept);
}

#[test]
fn layers_computed_again_take_less_memory_and_change_nothing() {
    let model = model();
    let batch = batch(&rows(6));
    let shape = [batch.b, batch.t];
    let run = |checkpoint_layers: bool| {
        let adapter = moved(&model);
        let config = TrainConfig {
            checkpoint_layers,
            ..config()
        };
        let mut trainer = Trainer::new(&model, &adapter, &config).unwrap();
        let arena = trainer.plan(shape).unwrap().plan.memory().arena;
        let steps = [(); 3].map(|()| {
            let got = trainer.step(std::slice::from_ref(&batch), 1e-2).unwrap();
            (got.loss, got.grad_norm)
        });
        (arena, steps)
    };
    let ((all, kept), (less, again)) = (run(false), run(true));
    assert!(less * 5 < all * 3, "{less} bytes for {all}");
    for ((loss, norm), (want_loss, want_norm)) in again.into_iter().zip(kept) {
        assert!(
            (loss / want_loss - 1.0).abs() < 1e-6,
            "{loss} for {want_loss}"
        );
        assert!(
            (norm / want_norm - 1.0).abs() < 1e-5,
            "{norm} for {want_norm}"
        );
    }
}
