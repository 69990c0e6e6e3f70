//! tallow-bench: the honest clock. Works are measured so that a time that could not have happened is an error.
//!
//! Read in this order: `work` what can be measured; `measure` how, and when a row is not believed; `calm` whether the
//! machine is ours; `probe` what it reaches; `floors` rows and floors held against each other; `ours` tallow as a work; `suite` which works.
//! Invariant: a figure without a passed check does not exist. Absent on purpose: kernels, and tuning for benchmarks.
// One call of a peer's interface is unsafe; without peers nothing is.
#![cfg_attr(not(feature = "peers"), forbid(unsafe_code))]
#![deny(unsafe_code)]

pub mod calm;
pub mod compare;
pub mod error;
pub mod floors;
pub mod load;
pub mod measure;
pub mod ours;
pub mod peer;
pub mod probe;
pub mod report;
pub mod run;
pub mod shapes;
pub mod stats;
pub mod suite;
pub mod work;

pub use error::{Error, Result};
