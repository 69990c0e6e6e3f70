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
pub use tallow_cuda as cuda;
pub use tallow_llm as llm;
pub use tallow_train as train;
pub use tallow_tune as tune;

/// The README's examples, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
pub struct Readme;

use std::sync::Arc;
use tallow_cpu::{Cpu, CpuOptions};
use tallow_cuda::{Cuda, CudaOptions};

/// Device names that [`open`] knows.
pub const BACKENDS: &[&str] = &["cpu", "cuda:N", "auto"];

/// How a device is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// `cpu`; `cuda:0` or another card by number; `auto`: card 0 if it opens, else the CPU.
    pub device: String,
    /// CPU threads; `None`: `TALLOW_THREADS` or the physical cores.
    pub threads: Option<usize>,
    /// What packed weights are stored as: f32 or bf16. On a card, what they are multiplied as.
    pub weights: DType,
    /// How kernels are chosen.
    pub choose: Choose,
}

/// How kernels are chosen where there is a choice.
#[derive(Clone, Debug)]
pub enum Choose {
    /// By the device's estimates: the same on every run.
    Estimate,
    /// By measuring them once; the table is kept.
    Measure(tune::Options),
}

/// A session on a device, by name: `open("cpu")`. Kernels are chosen by estimate.
///
/// # Errors
/// If the device is unknown or cannot be opened.
pub fn open(device: &str) -> Result<Session> {
    open_with(&OpenOptions {
        device: device.into(),
        threads: None,
        weights: DType::F32,
        choose: Choose::Estimate,
    })
}

/// A session on a device, with options.
///
/// # Errors
/// As [`open`].
pub fn open_with(options: &OpenOptions) -> Result<Session> {
    let backend: Arc<dyn Backend> = match (options.device.as_str(), card(&options.device)) {
        ("cpu", _) => cpu_backend(options)?,
        ("auto", _) => match cuda_backend(0, options) {
            Ok(card) => card,
            Err(_) => cpu_backend(options)?,
        },
        (_, Some(ordinal)) => cuda_backend(ordinal, options)?,
        (other, None) => {
            return Err(Error::Device {
                device: other.into(),
                what: format!("unknown device; this build knows {}", BACKENDS.join(", ")),
            });
        }
    };
    Ok(match options.choose.clone() {
        Choose::Estimate => Session::new(backend),
        Choose::Measure(how) => {
            let tuner = tune::Tuner::new(backend.clone(), how);
            Session::with_chooser(backend, Box::new(tuner))
        }
    })
}

/// The number in `cuda:N`; `cuda` is the first card.
fn card(device: &str) -> Option<usize> {
    match device.strip_prefix("cuda")? {
        "" => Some(0),
        rest => rest.strip_prefix(':')?.parse().ok(),
    }
}

fn cpu_backend(options: &OpenOptions) -> Result<Arc<dyn Backend>> {
    Ok(Arc::new(Cpu::open(&CpuOptions {
        threads: options.threads,
        weights: options.weights,
        isa: None,
    })?))
}

fn cuda_backend(ordinal: usize, options: &OpenOptions) -> Result<Arc<dyn Backend>> {
    Ok(Arc::new(Cuda::open(&CudaOptions {
        ordinal,
        weights: options.weights,
    })?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_named_by_number() {
        assert_eq!(card("cuda"), Some(0));
        assert_eq!(card("cuda:3"), Some(3));
        for other in ["cuda:", "cuda:x", "cuda3", "cpu", "auto"] {
            assert_eq!(card(other), None, "{other}");
        }
    }
}
