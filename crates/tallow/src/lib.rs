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
#[cfg(feature = "wgpu")]
pub use tallow_wgpu as wgpu;

/// The README's examples, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
pub struct Readme;

use std::sync::Arc;
use tallow_cpu::{Cpu, CpuOptions};
use tallow_cuda::{Cuda, CudaOptions, Paper};

/// Device names that [`open`] knows.
pub const BACKENDS: &[&str] = &[
    "cpu",
    "cuda:N",
    "cuda:paper",
    #[cfg(feature = "wgpu")]
    "wgpu:N",
    "auto",
];

/// How a device is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// `cpu`; `cuda:0` or another card by number; `wgpu`: the first GPU of Metal, Vulkan or DX12, or `wgpu:0` another
    /// adapter by number; `auto`: card 0 if it opens, else such a GPU if it opens, else the CPU. `cuda:paper` makes plans
    /// as an H100 or H200 would, on any machine, and runs none.
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
    let backend: Arc<dyn Backend> = match Device::named(&options.device) {
        Some(Device::Cpu) => cpu_backend(options)?,
        Some(Device::Auto) => cuda_backend(0, options)
            .or_else(|_| wgpu_backend(None, options))
            .or_else(|_| cpu_backend(options))?,
        Some(Device::Cuda(ordinal)) => cuda_backend(ordinal, options)?,
        // There is nothing to measure on.
        Some(Device::Paper) => return Ok(Session::new(Arc::new(Paper::hopper(options.weights)))),
        Some(Device::Wgpu(number)) => wgpu_backend(number, options)?,
        None => return Err(unknown(&options.device)),
    };
    Ok(match options.choose.clone() {
        Choose::Estimate => Session::new(backend),
        Choose::Measure(how) => {
            let tuner = tune::Tuner::new(backend.clone(), how);
            Session::with_chooser(backend, Box::new(tuner))
        }
    })
}

fn unknown(device: &str) -> Error {
    Error::Device {
        device: device.into(),
        what: format!("unknown device; this build knows {}", BACKENDS.join(", ")),
    }
}

/// What a device's name means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Device {
    Cpu,
    Cuda(usize),
    Paper,
    /// An adapter by number, or the first that is a GPU.
    Wgpu(Option<usize>),
    Auto,
}

impl Device {
    fn named(device: &str) -> Option<Device> {
        if device == "cuda:paper" {
            return Some(Device::Paper);
        }
        let (name, number) = match device.split_once(':') {
            Some((name, number)) => (name, Some(number.parse().ok()?)),
            None => (device, None),
        };
        match (name, number) {
            ("cpu", None) => Some(Device::Cpu),
            ("auto", None) => Some(Device::Auto),
            ("cuda", n) => Some(Device::Cuda(n.unwrap_or(0))),
            ("wgpu", n) => Some(Device::Wgpu(n)),
            _ => None,
        }
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

#[cfg(feature = "wgpu")]
fn wgpu_backend(number: Option<usize>, options: &OpenOptions) -> Result<Arc<dyn Backend>> {
    use tallow_wgpu::{Choice, Wgpu, WgpuOptions};
    Ok(Arc::new(Wgpu::open(&WgpuOptions {
        adapter: number.map_or(Choice::Gpu, Choice::Number),
        weights: options.weights,
        plain: false,
        binding_bytes: None,
    })?))
}

#[cfg(not(feature = "wgpu"))]
fn wgpu_backend(_: Option<usize>, options: &OpenOptions) -> Result<Arc<dyn Backend>> {
    Err(unknown(&options.device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_by_kind_and_number() {
        let known = [
            ("cpu", Device::Cpu),
            ("auto", Device::Auto),
            ("cuda", Device::Cuda(0)),
            ("cuda:3", Device::Cuda(3)),
            ("cuda:paper", Device::Paper),
            ("wgpu", Device::Wgpu(None)),
            ("wgpu:1", Device::Wgpu(Some(1))),
        ];
        for (name, device) in known {
            assert_eq!(Device::named(name), Some(device), "{name}");
        }
        for other in [
            "cuda:", "cuda:x", "cuda3", "cpu:0", "auto:0", "wgpu:", "metal", "",
        ] {
            assert_eq!(Device::named(other), None, "{other}");
        }
    }
}
