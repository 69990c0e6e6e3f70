//! The CUDA backend of tallow: kernels compiled for the card found, and plans replayed as one CUDA graph.
//! Invariant: the crate links to no CUDA library; on a machine without them it builds, starts and says what
//! is missing.
//! Absent on purpose: graphs and passes of the core. Kernels see pointers, extents and strides.

mod compile;
mod device;
mod driver;
pub mod error;
mod fused;
mod gemm;
mod glue;
mod graph;
mod launch;
mod paper;
mod recording;
mod staging;

pub use compile::{Arch, Compiled, compile};
pub use device::{Cuda, CudaOptions, Found, found, lacks, versions};
pub use error::Error;
pub use glue::sources;
pub use paper::Paper;
