//! The CPU backend of tallow: kernels with run-time dispatch and the thread pool they run on.
//! Invariant: no kernel allocates, and no result depends on the number of threads.
//! Absent on purpose: graphs, shapes, dtypes of the core. Kernels see pointers and strides.

pub mod attention;
pub mod error;
pub mod exec;
pub mod linear;
pub mod pool;
pub mod simd;
pub mod tile;
pub mod vecmath;

#[cfg(test)]
mod testing;

pub use error::Error;
