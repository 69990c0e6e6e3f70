//! The wgpu backend of tallow: kernels in WGSL for Metal, Vulkan and DX12, and plans replayed as resolved lists of
//! dispatches.
//! Invariant: on a machine without a GPU or its loader the crate builds, starts and says what is missing.
//! Absent on purpose: graphs and passes of the core. Kernels see buffers, extents and strides.

mod adapter;
mod ahead;
mod cache;
mod device;
pub mod error;
mod fused;
mod glue;
mod gpu;
mod launch;
mod memory;
#[cfg(target_os = "macos")]
mod mps;
mod recording;
mod shader;
mod transfer;

pub use adapter::{Choice, Found, found};
pub use device::{Wgpu, WgpuOptions};
pub use error::Error;
pub use glue::{Source, Wanted, sources};
