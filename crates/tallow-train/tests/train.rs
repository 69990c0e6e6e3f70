//! Training against the reference: 100 steps of PEFT, evaluation, and runs that must not leave files behind.
//! Absent on purpose: kernels; each has its tests where it lives.
use std::slice::from_ref;
use support::*;
use tallow_core::op::Role;
use tallow_llm::{Adapter, data::LossOn, weights::Weights};
use tallow_train::{Batch, Error, Evaluator, Event, TrainConfig, Trainer};

#[path = "train/beside.rs"]
mod beside;
#[path = "train/nonfinite.rs"]
mod nonfinite;
#[path = "train/resume.rs"]
mod resume;
#[path = "train/step.rs"]
mod step;
#[path = "train/support.rs"]
mod support;

#[test]
fn a_hundred_steps_agree_with_peft() {
    let file = root().join("tests/goldens/tiny-wikisql-peft-100-steps.safetensors");
    let golden = Weights::open_file(&file).unwrap();
    let model = model();
    let adapter = adapter(&model);
    let session = &model.session;
    let names: Vec<String> = adapter.parts().unwrap().into_iter().map(|p| p.0).collect();
    for name in &names {
        let init = golden
            .get(&format!("init.{name}"))
            .unwrap()
            .to_f32()
            .unwrap();
        adapter.set(session, name, &init).unwrap();
    }
    let batches = golden.get("batches").unwrap();
    let ids = ids(batches.as_bytes(), batches.bytes.len() / (100 * 4 * 128));
    let want = golden.get("losses").unwrap().to_f32().unwrap();
    let mut trainer = Trainer::new(&model, &adapter, &config()).unwrap();
    let mut batch = Batch::default();
    for (i, step) in ids.chunks(4 * 128).enumerate() {
        let rows: Vec<&[u32]> = step.chunks(128).map(unpadded).collect();
        batch.fill([4, 128], rows).unwrap();
        let got = trainer.step(from_ref(&batch), 1e-3).unwrap();
        let off = (f64::from(got.loss) - f64::from(want[i])).abs() / f64::from(want[i]);
        assert!(
            off <= 1e-5,
            "step {i}: {} for {}, off by {off:.1e}",
            got.loss,
            want[i]
        );
        assert!(got.grad_norm > 0.0);
    }
    assert_eq!(trainer.recordings(), 1);
    let mut worst = (0.0, "");
    for name in &names {
        let got = adapter.get(session, name).unwrap();
        let want = golden
            .get(&format!("after100.{name}"))
            .unwrap()
            .to_f32()
            .unwrap();
        let differ = got
            .iter()
            .zip(&want)
            .map(|(g, w)| f64::from(*g) - f64::from(*w));
        let off = norm(differ) / norm(want.iter().map(|w| f64::from(*w)));
        if off >= worst.0 {
            worst = (off, name);
        }
    }
    assert!(worst.0 <= 2e-4, "{} is off by {:.1e}", worst.1, worst.0);
    let valid = golden.get("valid_before_after").unwrap().to_f32().unwrap();
    let data = root().join("assets/wikisql/valid.jsonl");
    let bare = Evaluator::new(&model, None)
        .run(&data, &tokenizer())
        .unwrap();
    assert!(
        (bare.loss / f64::from(valid[0]) - 1.0).abs() < 1e-4,
        "{} for {}",
        bare.loss,
        valid[0]
    );
    let tuned = Evaluator::new(&model, Some(&adapter))
        .run(&data, &tokenizer())
        .unwrap();
    assert!(
        (tuned.loss / f64::from(valid[1]) - 1.0).abs() < 1e-3,
        "{} for {}",
        tuned.loss,
        valid[1]
    );
    assert_eq!((bare.lines, bare.tokens), (100, tuned.tokens));
}

/// Little-endian integers of `width` bytes that fit into u32.
fn ids(bytes: &[u8], width: usize) -> Vec<u32> {
    let one = |b: &[u8]| {
        assert!(b[4..].iter().all(|x| *x == 0));
        u32::from_le_bytes([b[0], b[1], b[2], b[3]])
    };
    bytes.chunks(width).map(one).collect()
}

/// A row without the padding behind it (id 2).
fn unpadded(row: &[u32]) -> &[u32] {
    let n = row.iter().rposition(|id| *id != 2).map_or(0, |i| i + 1);
    &row[..n]
}

#[test]
fn padding_and_company_change_no_loss() {
    let model = model();
    let rows: Vec<Vec<u32>> = (0..7_u32)
        .map(|i| (0..5 + 9 * i).map(|k| (k * 37 + i * 101) % 2048).collect())
        .collect();
    let all: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
    let mut evaluator = Evaluator::new(&model, None);
    let (together, tokens) = evaluator.rows(&all).unwrap();
    let mut alone = (0.0, 0);
    for row in &rows {
        // Exactly its length: no padding at all.
        let (b, t) = (1, row.len() - 1);
        let mut batch = Batch::default();
        batch.fill([b, t], [row.as_slice()]).unwrap();
        let s = &model.session;
        let leaf = |v: &[u32]| s.tensor_u32(v, [b, t], Role::Data).unwrap();
        let x = model
            .hidden(&leaf(&batch.ids), &leaf(&batch.pos), None, None)
            .unwrap()
            .x;
        let nll = s
            .read(&model.nll(&x, &leaf(&batch.targets)).unwrap())
            .unwrap();
        alone.0 += nll.iter().map(|v| f64::from(*v)).sum::<f64>();
        alone.1 += batch.counted as u64;
    }
    assert_eq!(tokens, alone.1);
    assert!(
        (together / alone.0 - 1.0).abs() < 1e-6,
        "{together} for {}",
        alone.0
    );
}

#[test]
fn clipping_leaves_short_gradients_alone_and_shortens_long_ones() {
    let model = model();
    let row: Vec<u32> = (0..17).map(|k| k * 91 % 2048).collect();
    let mut batch = Batch::default();
    batch.fill([1, 16], [row.as_slice()]).unwrap();
    let after = |clip: Option<f64>| {
        let adapter = adapter(&model);
        // eps dominates, so that the update is proportional to the gradient and clipping shows.
        let config = TrainConfig {
            clip,
            eps: 1e3,
            weight_decay: 0.0,
            ..config()
        };
        let before = model.session.read(&adapter.params).unwrap();
        let mut trainer = Trainer::new(&model, &adapter, &config).unwrap();
        let got = trainer.step(from_ref(&batch), 1e3).unwrap();
        let after = model.session.read(&adapter.params).unwrap();
        let moved = norm(
            after
                .iter()
                .zip(before)
                .map(|(a, b)| f64::from(*a) - f64::from(b)),
        );
        (got.grad_norm, moved)
    };
    let (full, moved) = after(None);
    let (same, unmoved) = after(Some(f64::from(full) * 2.0));
    let (_, halved) = after(Some(f64::from(full) / 2.0));
    assert_eq!(full, same);
    assert!(
        (unmoved / moved - 1.0).abs() < 1e-3,
        "{unmoved} for {moved}"
    );
    assert!(
        (halved / moved - 0.5).abs() < 1e-2,
        "{halved} for half of {moved}"
    );
}

#[test]
fn a_run_saves_an_adapter_that_is_read_back_and_repeats_bit_for_bit() {
    let bench = Bench::new();
    let config = TrainConfig {
        steps: Some(6),
        batch: 2,
        seq_len: 64,
        clip: Some(1.0),
        ..config()
    };
    let mut log = Log::default();
    let first = bench.run(&config, &mut log).unwrap();
    assert_eq!(first.losses.len(), 6);
    assert!(first.losses.iter().all(|l| l.is_finite()));
    assert_eq!(
        bench.files(),
        [
            "adapter_config.json",
            "adapter_model.safetensors",
            "train.yaml"
        ]
    );
    let (read, warnings) = Adapter::load(&bench.model, &bench.out(), Role::Frozen).unwrap();
    assert_eq!(
        (read.elems(), warnings.len()),
        (adapter(&bench.model).elems(), 0)
    );
    let cut = log
        .events
        .iter()
        .any(|e| matches!(e, Event::Start { data, .. } if data.cut > 0));
    assert!(cut, "lines of more than 64 tokens are told about");
    assert!(matches!(log.events.last(), Some(Event::Saved { .. })));
    let again = bench.run(&config, &mut Log::default()).unwrap();
    assert_eq!(first.losses, again.losses);
    let other = TrainConfig { seed: 1, ..config };
    let other = bench.run(&other, &mut Log::default()).unwrap();
    assert_ne!(first.losses, other.losses);
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_saves_nothing() {
    let bench = Bench::new();
    let config = TrainConfig {
        steps: Some(50),
        batch: 1,
        seq_len: 16,
        lr: 1e30,
        ..config()
    };
    let error = bench.run(&config, &mut Log::default()).unwrap_err();
    let Error::NotFinite { step, .. } = error else {
        panic!("{error}");
    };
    assert!((2..50).contains(&step), "{step}");
    assert_eq!(bench.files(), ["train.yaml"]);
}

#[test]
fn a_stopped_run_saves_nothing() {
    let bench = Bench::new();
    let config = TrainConfig {
        steps: Some(50),
        batch: 1,
        seq_len: 16,
        ..config()
    };
    let mut log = Log {
        stop_after: Some(2),
        ..Log::default()
    };
    let error = bench.run(&config, &mut log).unwrap_err();
    assert_eq!(
        error.to_string(),
        "stopped after step 2 of 50; nothing was saved"
    );
    assert_eq!(bench.files(), ["train.yaml"]);
}

#[test]
fn a_line_too_long_to_evaluate_is_named_by_its_number() {
    let bench = Bench::new();
    let path = bench.dir.path().join("long.jsonl");
    let long = "word ".repeat(3000);
    std::fs::write(
        &path,
        format!("{{\"text\": \"a b\"}}\n{{\"text\": \"{long}\"}}\n"),
    )
    .unwrap();
    let error = Evaluator::new(&bench.model, None)
        .run(&path, &bench.tokenizer)
        .unwrap_err();
    let text = error.to_string();
    assert!(text.contains("long.jsonl, line 2: "), "{text}");
    assert!(
        text.contains("the model has positions for 1024; split"),
        "{text}"
    );
}

/// Three files of the three kinds, and what a model says of each, packed or not.
#[test]
fn packed_lines_have_the_loss_of_lines_alone() {
    let bench = Bench::new();
    // A template that tiny has not of its own, and lines on both sides of a packed row's length.
    let model = bench.dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let from = root().join("assets/tiny").join(name);
        if from.exists() {
            std::fs::copy(from, model.join(name)).unwrap();
        }
    }
    let template = "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}";
    std::fs::write(model.join("chat_template.jinja"), template).unwrap();
    let tokenizer = tallow_llm::Tokenizer::open(&model).unwrap();
    let words = |i: usize| "table name where ".repeat(1 + i * i % 7 + 200 * (i % 40 / 39));
    let text = |i: usize| format!("{{\"text\": \"{}\"}}\n", words(i));
    let halves = |i: usize| {
        let (prompt, completion) = (words(i), words(i + 1));
        format!("{{\"prompt\": \"{prompt}\", \"completion\": \"{completion}\"}}\n")
    };
    let chat = |i: usize| {
        let turn =
            |role: &str, i| format!("{{\"role\": \"{role}\", \"content\": \"{}\"}}", words(i));
        let (a, b) = (turn("user", i), turn("assistant", i + 1));
        format!("{{\"messages\": [{a}, {b}]}}\n")
    };
    let kinds: [&dyn Fn(usize) -> String; 3] = [&text, &halves, &chat];
    for (k, line) in kinds.into_iter().enumerate() {
        let file = bench.dir.path().join(format!("{k}.jsonl"));
        // More than one window of lines, and a few.
        let lines = if k == 0 { 0..270 } else { 36..46 };
        std::fs::write(&file, lines.map(line).collect::<String>()).unwrap();
        for loss_on in [LossOn::Answers, LossOn::Everything] {
            let alone = Evaluator::new(&bench.model, None).counting(loss_on);
            let packed = Evaluator::new(&bench.model, None)
                .counting(loss_on)
                .packed();
            let [a, b] = [alone, packed].map(|mut e| e.run(&file, &tokenizer).unwrap());
            assert_eq!((a.tokens, a.lines), (b.tokens, b.lines));
            let off = (a.loss / b.loss - 1.0).abs();
            assert!(off < 1e-6, "{k}: {} for {}", b.loss, a.loss);
        }
    }
}
