//! The CPU backend of tallow: kernels with run-time dispatch and the thread pool they run on.
//! Invariant: no kernel allocates, and no result depends on the number of threads.
//! Absent on purpose: graphs, shapes, dtypes of the core. Kernels see pointers and strides.

pub mod attention;
pub mod device;
pub mod elementwise;
pub mod error;
pub mod exec;
pub mod gather;
mod glue;
mod lanes;
pub mod linear;
pub mod loss;
pub mod norm;
pub mod optim;
pub mod philox;
pub mod pool;
pub mod probe;
pub mod reduce;
pub mod rope;
pub mod simd;
pub mod swiglu;
pub mod tile;
pub mod vecmath;
mod wave;

#[cfg(test)]
mod testing;

pub use device::{Cpu, CpuOptions};
pub use error::Error;
