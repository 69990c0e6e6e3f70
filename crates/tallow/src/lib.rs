//! tallow: train, run and serve low-rank adapters (LoRA) without the tax.
//!
//! The front door: [`open`] a device, build lazy [`Tensor`]s, ask a [`Session`] to run them.
//! Model families are in [`llm`], the training loop in [`train`].
//! This crate holds the only list of backends.
pub use tallow_core as core;
pub use tallow_core::{
    Error, Result,
    backend::Backend,
    op::{Mask, Role},
    plan::{Memory, Plan},
    session::{Compiled, Program, Session},
    tensor::{Grads, LoraWeights, Tensor, value_and_grad},
    types::{DType, Shape, TensorType},
};
pub use tallow_cpu as cpu;
pub use tallow_llm as llm;
pub use tallow_train as train;

/// The README's examples, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
pub struct Readme;

use std::sync::Arc;
use tallow_cpu::{Cpu, CpuOptions};

/// Device names that [`open`] knows.
pub const BACKENDS: &[&str] = &["cpu"];

/// How a device is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// `cpu`.
    pub device: String,
    /// CPU threads; `None`: `TALLOW_THREADS` or the physical cores.
    pub threads: Option<usize>,
    /// What packed weights are stored as: f32 or bf16.
    pub weights: DType,
}

/// A session on a device, by name: `open("cpu")`.
///
/// # Errors
/// If the device is unknown or cannot be opened.
pub fn open(device: &str) -> Result<Session> {
    open_with(&OpenOptions {
        device: device.into(),
        threads: None,
        weights: DType::F32,
    })
}

/// A session on a device, with options.
///
/// # Errors
/// As [`open`].
pub fn open_with(options: &OpenOptions) -> Result<Session> {
    let backend: Arc<dyn Backend> = match options.device.as_str() {
        "cpu" => Arc::new(Cpu::open(&CpuOptions {
            threads: options.threads,
            weights: options.weights,
            isa: None,
        })?),
        other => {
            return Err(Error::Device {
                device: other.into(),
                what: format!("unknown device; this build knows {}", BACKENDS.join(", ")),
            });
        }
    };
    Ok(Session::new(backend))
}
