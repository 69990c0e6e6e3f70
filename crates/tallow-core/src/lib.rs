//! tallow-core: what to compute and how it is planned. Knows no device.
//!
//! Read the modules in this order; data only ever flows downwards.
#![forbid(unsafe_code)]
pub mod backend;
pub mod element;
pub mod error;
pub mod grad;
pub mod graph;
pub mod kernel;
pub mod op;
pub mod oracle;
pub mod pass;
pub mod philox;
pub mod plan;
pub mod scalar;
pub mod session;
pub mod tensor;
pub mod types;
pub use error::{Error, Result};
