//! Graph to graph rewrites. A pass never changes what a graph means, only how it is written.
//! Invariant: outputs and updates keep their order; inputs keep their slots.
//! Absent on purpose: anything that knows a device.
pub mod again;
mod canonical;
mod edit;
pub mod expand;
pub mod fuse;
pub mod group;
pub mod recognise;
mod recompute;
pub mod simplify;
#[cfg(test)]
mod testing;
pub use canonical::canonical;
pub use recompute::recompute;
