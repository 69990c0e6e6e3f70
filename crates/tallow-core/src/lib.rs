//! tallow-core: what to compute and how it is planned. Knows no device.
//!
//! Read the modules in this order; data only ever flows downwards.
#![forbid(unsafe_code)]
pub mod error;
pub mod graph;
pub mod op;
pub mod oracle;
pub mod pass;
pub mod philox;
pub mod scalar;
pub mod types;
pub use error::{Error, Result};
