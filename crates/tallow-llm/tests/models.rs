//! Whole models on the CPU: reference outputs, adapters, generation.
//! Invariant: every number compared comes from another program, or from another way through this one.
//! Absent on purpose: speed.

#[path = "models/adapters.rs"]
mod adapters;
#[path = "models/ahead.rs"]
mod ahead;
#[path = "models/generation.rs"]
mod generation;
#[path = "models/goldens.rs"]
mod goldens;
#[path = "models/packed.rs"]
mod packed;
#[path = "models/shapes.rs"]
mod shapes;
#[path = "models/support.rs"]
mod support;
#[path = "models/variants.rs"]
mod variants;
