//! The CPU backend of tallow: kernels with run-time dispatch and the thread pool they run on.
//! Invariant: no kernel allocates, and no result depends on the number of threads.
//! Absent on purpose: graphs, shapes, dtypes of the core. Kernels see pointers and strides.

pub mod error;
pub mod pool;
pub mod simd;
pub mod tile;

#[cfg(test)]
mod testing;

pub use error::Error;
