//! What the tests of training share: the tiny model, settings, and a run that is watched.
use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
};
use tallow_core::{session::Session, types::DType};
use tallow_cpu::{Cpu, CpuOptions};
use tallow_llm::{Adapter, AdapterConfig, LoadOptions, Model, Targets, Tokenizer, data::LossOn};
use tallow_train::{
    Event, FeedSettings, Job, Keep, Observer, OptimizerKind, Schedule, Start, TrainConfig, train,
};

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub(crate) fn model() -> Model {
    let options = CpuOptions {
        threads: Some(2),
        weights: DType::F32,
        isa: None,
    };
    let session = Session::new(Arc::new(Cpu::open(&options).unwrap()));
    Model::load(
        &session,
        &root().join("assets/tiny"),
        &LoadOptions::default(),
    )
    .unwrap()
}

pub(crate) fn tokenizer() -> Tokenizer {
    Tokenizer::open(&root().join("assets/tiny")).unwrap()
}

pub(crate) fn adapter(model: &Model) -> Adapter {
    let config = AdapterConfig::new(8, 16.0, Targets::AllLinear);
    Adapter::new(model, &config, 0).unwrap()
}

/// The settings of the reference run.
pub(crate) fn config() -> TrainConfig {
    TrainConfig {
        steps: Some(100),
        epochs: 1.0,
        batch: 4,
        accumulate: 1,
        seq_len: 128,
        packing: false,
        loss_on: LossOn::Answers,
        optimizer: OptimizerKind::AdamW,
        lr: 1e-3,
        schedule: Schedule::Constant,
        warmup: 0,
        weight_decay: 0.01,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        clip: None,
        seed: 0,
        eval_every: None,
        patience: None,
        checkpoint_layers: false,
        skip_nonfinite: false,
    }
}

pub(crate) fn norm(v: impl Iterator<Item = f64>) -> f64 {
    v.map(|x| x * x).sum::<f64>().sqrt()
}

#[derive(Default)]
pub(crate) struct Log {
    pub(crate) events: Vec<Event>,
    pub(crate) stop_after: Option<u64>,
}

impl Observer for Log {
    fn event(&mut self, event: &Event) -> ControlFlow<()> {
        self.events.push(event.clone());
        match (event, self.stop_after) {
            (Event::Step { step, .. }, Some(last)) if *step >= last => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    }
}

pub(crate) struct Bench {
    pub(crate) model: Model,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) dir: tempfile::TempDir,
    /// Training and validation text.
    pub(crate) data: PathBuf,
    pub(crate) valid: Option<PathBuf>,
    pub(crate) keep: Option<Keep>,
    pub(crate) memory_bytes: Option<usize>,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Bench {
            model: model(),
            tokenizer: tokenizer(),
            dir: tempfile::tempdir().unwrap(),
            data: root().join("assets/wikisql/valid.jsonl"),
            valid: None,
            keep: None,
            memory_bytes: None,
        }
    }
    pub(crate) fn run(
        &self,
        config: &TrainConfig,
        log: &mut Log,
    ) -> tallow_train::Result<tallow_train::Summary> {
        let paths = vec![self.data.clone()];
        let data = FeedSettings::new(paths, config.seq_len, config.batch, config.seed);
        let job = Job {
            model: &self.model,
            tokenizer: &self.tokenizer,
            adapter: &adapter(&self.model),
            data: &data,
            valid: self.valid.as_deref(),
            out: &self.out(),
            base_name: "tiny",
            config,
            keep: self.keep,
            memory_bytes: self.memory_bytes,
            threads: Some(2),
            notes: vec![],
        };
        train(&job, log)
    }
    pub(crate) fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }
    /// The saved adapter's bytes.
    pub(crate) fn adapter(&self) -> Vec<u8> {
        std::fs::read(self.out().join("adapter_model.safetensors")).unwrap()
    }
    pub(crate) fn files(&self) -> Vec<String> {
        let Ok(dir) = std::fs::read_dir(self.dir.path().join("out")) else {
            return vec![];
        };
        let name =
            |e: std::io::Result<std::fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<String> = dir.map(name).collect();
        names.sort();
        names
    }
}

/// Checkpoints every `every` steps, the newest two kept.
pub(crate) fn keep(every: u64, start: Start) -> Option<Keep> {
    Some(Keep {
        every,
        last: 2,
        best: 1,
        start,
    })
}
