//! A device behind a bus chooses its tokens itself, some of them ahead: the text is the one that is chosen here.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tallow_core::Result;
use tallow_core::backend::{Backend, Bindings, Buffer, DeviceInfo, HostBytes, Recording};
use tallow_core::kernel::{Candidate, Format, KernelSpec, Operand};
use tallow_core::plan::Plan;
use tallow_core::session::Session;
use tallow_core::types::DType;
use tallow_cpu::{Cpu, CpuOptions};
use tallow_llm::{
    Adapter, AdapterConfig, Decoder, FinishReason, GenerateOptions, Generated, Generator,
    LoadOptions, Model, Sampling, Targets, Tokenizer,
};

use crate::support::*;

/// This processor, far away.
struct Far {
    cpu: Cpu,
    reads: AtomicUsize,
}

impl Backend for Far {
    fn info(&self) -> &DeviceInfo {
        self.cpu.info()
    }
    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        self.cpu.alloc(bytes)
    }
    fn adopt(&self, host: HostBytes, range: Range<usize>, align: usize) -> Result<Buffer> {
        self.cpu.adopt(host, range, align)
    }
    fn upload(&self, dst: &Buffer, at: usize, src: &[u8]) -> Result<()> {
        self.cpu.upload(dst, at, src)
    }
    fn download(&self, src: &Buffer, at: usize, dst: &mut [u8]) -> Result<()> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.cpu.download(src, at, dst)
    }
    fn far(&self) -> bool {
        true
    }
    fn candidates(&self, spec: &KernelSpec) -> Result<Vec<Candidate>> {
        self.cpu.candidates(spec)
    }
    fn prepare(
        &self,
        format: Format,
        src: &Buffer,
        at: usize,
        op: &Operand,
        dst: &Buffer,
    ) -> Result<()> {
        self.cpu.prepare(format, src, at, op, dst)
    }
    fn record(&self, plan: Arc<Plan>, bind: Bindings) -> Result<Box<dyn Recording>> {
        self.cpu.record(plan, bind)
    }
}

fn far() -> (Arc<Far>, Model) {
    let options = CpuOptions {
        threads: Some(2),
        weights: DType::F32,
        isa: None,
    };
    let device = Arc::new(Far {
        cpu: Cpu::open(&options).unwrap(),
        reads: AtomicUsize::new(0),
    });
    let session = Session::new(device.clone());
    let model = Model::load(&session, &tiny(), &LoadOptions::default()).unwrap();
    (device, model)
}

fn options(max_new_tokens: usize, stop: &str) -> GenerateOptions {
    GenerateOptions {
        sampling: Sampling::greedy(),
        max_new_tokens,
        stop: (!stop.is_empty())
            .then(|| stop.to_owned())
            .into_iter()
            .collect(),
        ignore_eos: false,
    }
}

/// The built-in model with an adapter, so that its texts differ from each other.
fn adapter_of(model: &Model, seed: f32) -> Adapter {
    let config = AdapterConfig::new(8, 16.0, Targets::AllLinear);
    let a = Adapter::new(model, &config, 5).unwrap();
    let noise: Vec<f32> = (0..a.elems())
        .map(|i| (i as f32 * seed).sin() * 0.05)
        .collect();
    model.session.write(&a.params, &noise).unwrap();
    a
}

fn text(generator: &mut Generator, prompt: &str) -> Generated {
    let tokenizer = Tokenizer::open(&tiny()).unwrap();
    generator.generate(&tokenizer, prompt).unwrap()
}

#[test]
fn texts_are_those_of_a_device_that_is_near() {
    let (_, model) = far();
    let near = load(&tiny());
    for seed in [1.0, 0.37] {
        let (a, b) = (adapter_of(&model, seed), adapter_of(&near, seed));
        for (n, stop) in [(1, ""), (2, ""), (17, ""), (60, ""), (60, "e"), (300, "")] {
            let mut here = Generator::new(&near, Some(&b), options(n, stop)).unwrap();
            let mut there = Generator::new(&model, Some(&a), options(n, stop)).unwrap();
            // One generator for all of them: what was chosen for one and thrown away is not seen by the next.
            for prompt in [
                "question: how many",
                "select",
                "a long prompt, not a question",
            ] {
                assert_eq!(
                    text(&mut there, prompt),
                    text(&mut here, prompt),
                    "{n} {stop}"
                );
            }
        }
    }
}

#[test]
fn tokens_are_drawn_by_seed_and_number_however_many_come_at_a_time() {
    let (device, model) = far();
    let a = adapter_of(&model, 1.0);
    let sampling = Sampling {
        temperature: 0.9,
        top_k: 30,
        top_p: 0.95,
        seed: 11,
        ..Sampling::greedy()
    };
    let texts = |sampling: Sampling, n: usize| {
        let sampled = GenerateOptions {
            sampling,
            ..options(n, "")
        };
        let mut generator = Generator::new(&model, Some(&a), sampled).unwrap();
        // One after another with one generator: a text does not depend on those before it.
        ["select", "question: how many", "select"].map(|p| text(&mut generator, p))
    };
    let before = device.reads.load(Ordering::SeqCst);
    let all = texts(sampling, 60);
    let added: usize = all.iter().map(|t| t.ids.len()).sum();
    let reads = device.reads.load(Ordering::SeqCst) - before;
    assert!(reads < added, "{reads} reads for {added} tokens");
    assert_eq!(all[0], all[2]);
    assert_eq!(texts(sampling, 60), all);
    assert_ne!(
        texts(
            Sampling {
                seed: 12,
                ..sampling
            },
            60
        )[0]
        .ids,
        all[0].ids
    );
    // Shorter texts are beginnings of longer ones.
    for n in [1, 2, 7] {
        for (short, long) in texts(sampling, n).iter().zip(&all) {
            assert_eq!(short.ids, long.ids[..n.min(long.ids.len())]);
        }
    }
    // What one at a time gives.
    let mut decoder = Decoder::new(&model, Some(&a), 64).unwrap();
    decoder.draw_by(&sampling).unwrap();
    let tokenizer = Tokenizer::open(&tiny()).unwrap();
    let mut fed = tokenizer.encode_prompt("select", &model.config).unwrap();
    for id in &all[0].ids {
        let next = decoder.feed_choosing(&fed, 1).unwrap().to_vec();
        assert_eq!(next, [*id]);
        fed = next;
    }
    // Each of them is one that the host would have kept.
    let near = load(&tiny());
    let b = adapter_of(&near, 1.0);
    let mut decoder = Decoder::new(&near, Some(&b), 64).unwrap();
    let mut fed = tokenizer.encode_prompt("select", &near.config).unwrap();
    for id in &all[0].ids {
        let scores = decoder.feed(&fed).unwrap();
        let better = scores.iter().filter(|s| **s > scores[*id as usize]).count();
        assert!(better < 30, "token {id} is number {better}");
        fed = vec![*id];
    }
}

#[test]
fn a_penalty_is_left_to_the_host() {
    let (_, model) = far();
    let near = load(&tiny());
    let (a, b) = (adapter_of(&model, 1.0), adapter_of(&near, 1.0));
    let sampled = GenerateOptions {
        sampling: Sampling {
            temperature: 0.8,
            repetition_penalty: 1.3,
            seed: 3,
            ..Sampling::greedy()
        },
        ..options(30, "")
    };
    let mut there = Generator::new(&model, Some(&a), sampled.clone()).unwrap();
    let mut here = Generator::new(&near, Some(&b), sampled).unwrap();
    assert_eq!(text(&mut there, "select"), text(&mut here, "select"));
}

#[test]
fn tokens_come_several_at_a_time_and_no_further_than_there_is_room() {
    let (device, model) = far();
    let mut decoder = Decoder::new(&model, None, 1).unwrap();
    let capacity = decoder.capacity();
    let mut ids = vec![1];
    let (mut all, mut most) = (0, 0);
    while decoder.position() < capacity {
        let before = device.reads.load(Ordering::SeqCst);
        let at = decoder.position();
        let new = decoder.feed_choosing(&ids, 1000).unwrap().to_vec();
        assert_eq!(device.reads.load(Ordering::SeqCst), before + 1);
        assert_eq!(decoder.position(), at + new.len());
        (all, most) = (all + new.len(), most.max(new.len()));
        ids = vec![*new.last().unwrap()];
    }
    assert_eq!(all, capacity);
    assert!(most > 1, "never more than one at a time");
    assert!(decoder.feed_choosing(&ids, 1).is_err());
    // As many as are wanted.
    decoder.reset();
    assert_eq!(decoder.feed_choosing(&[1], 2).unwrap().len(), 2);
    assert_eq!(decoder.feed_choosing(&[1], 1).unwrap().len(), 1);
}

#[test]
fn scores_that_are_no_numbers_are_still_named() {
    let (_, model) = far();
    let a = adapter_of(&model, 1.0);
    let mut generator = Generator::new(&model, Some(&a), options(40, "")).unwrap();
    assert_ne!(text(&mut generator, "select").finish, FinishReason::Eos);
    let broken = vec![f32::NAN; a.elems()];
    model.session.write(&a.params, &broken).unwrap();
    let tokenizer = Tokenizer::open(&tiny()).unwrap();
    let error = generator.generate(&tokenizer, "s").unwrap_err().to_string();
    assert!(error.starts_with("logits: token 0 has NaN"), "{error}");
    let mut decoder = Decoder::new(&model, Some(&a), 9).unwrap();
    assert!(decoder.feed_choosing(&[1], 5).unwrap().is_empty());
    assert_eq!(decoder.position(), 1);
    assert!(decoder.scores().unwrap()[0].is_nan());
}
