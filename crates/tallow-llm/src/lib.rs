//! Language models on disk: configurations, weights, PEFT adapters, tokenizers, data files, and sampling.
//! Invariant: nothing read from a file can make this crate panic; every refusal is one sentence that names
//! the file and what to do. Absent on purpose: devices; the model families build graphs and know none.
#![deny(unsafe_code)]

pub mod config;
pub mod data;
pub mod error;
pub mod files;
mod json;
pub mod peft;
pub mod sample;
#[cfg(test)]
mod test_files;
pub mod tokenizer;
pub mod weights;

pub use config::{Family, ModelConfig, Projection, Projections};
pub use error::{Error, Result};
pub use peft::{Adapter, AdapterConfig, LoraModule, Targets};
pub use sample::{Sampler, Sampling, StopStrings};
pub use tokenizer::{DecodeStream, Tokenizer};
pub use weights::{StoredDtype, TensorView, Weights};
