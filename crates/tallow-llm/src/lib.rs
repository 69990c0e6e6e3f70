//! Language models: their files (configurations, weights, PEFT adapters, tokenizers, data), their graphs, one
//! file a family, and text from them.
//! Invariant: nothing read from a file can make this crate panic; every refusal is one sentence that names
//! the file and what to do. Absent on purpose: devices; the model families build graphs and know none.
#![deny(unsafe_code)]

pub mod adapter;
pub mod cache;
pub mod chat;
pub mod config;
pub mod data;
pub mod error;
pub mod files;
pub mod generate;
mod json;
mod layers;
mod llama;
pub mod merge;
mod mistral;
pub mod mlx;
pub mod model;
pub mod peft;
mod qwen2;
pub mod sample;
#[cfg(test)]
mod test_files;
pub mod tokenizer;
pub mod verify;
pub mod weights;

pub use adapter::{Adapter, Adapters};
pub use cache::Cache;
pub use chat::ChatTemplate;
pub use config::{Family, ModelConfig, Projection, Projections};
pub use error::{Error, Result};
pub use generate::{Decoder, FinishReason, GenerateOptions, Generated, Generator, Piece, Stream};
pub use model::{ComputeDType, Hidden, LoadOptions, Model};
pub use peft::{AdapterConfig, Init, LoraModule, Targets};
pub use sample::{Sampler, Sampling, StopStrings};
pub use tokenizer::{DecodeStream, Tokenizer};
pub use verify::{Check, verify};
pub use weights::{StoredDtype, TensorView, Weights};
