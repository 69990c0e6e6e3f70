//! One suite for every backend: each op, on awkward shapes and layouts, through the whole compiler,
//! against the f64 oracle. `suite!(expression)` is a backend's whole test file.
//! Invariant: inputs are fresh and random, outputs and state are poisoned with NaN before they are
//! written, and the tolerance is the oracle's own rounding bound times one constant.
//! Absent on purpose: knowledge of any device.

mod cases;
mod compare;
mod specs;
pub use cases::{Case, composites, dtypes, inside, layouts, structural, training};
pub use compare::{Failure, check, check_all, distance};
pub use specs::specs;

/// Makes one test for each part of the suite, on the session that `$session` opens.
#[macro_export]
macro_rules! suite {
    ($session:expr) => {
        #[test]
        fn composites_match_their_decomposition() {
            $crate::check_all(&$session, $crate::composites());
        }
        #[test]
        fn structural_ops_match_the_oracle() {
            $crate::check_all(&$session, $crate::structural());
        }
        #[test]
        fn dtypes_convert_and_compute() {
            $crate::check_all(&$session, $crate::dtypes());
        }
        #[test]
        fn strided_operands_and_results() {
            $crate::check_all(&$session, $crate::layouts());
        }
        #[test]
        fn gradients_and_updates_of_a_small_model() {
            $crate::check_all(&$session, $crate::training());
        }
    };
}
