//! The conformance suite on an adapter of this machine: a real GPU if there is one, else software Vulkan.
//! Invariant: a machine without any adapter prints why and passes; `TALLOW_REQUIRE_WGPU=1` makes that a failure.
//! Absent on purpose: speed.
#[path = "conformance/kernels.rs"]
mod kernels;

use std::sync::{Arc, OnceLock};
use tallow_conformance::{Case, check_all, composites, dtypes, layouts, structural, training};
use tallow_core::{session::Session, types::DType};
use tallow_wgpu::{Choice, Wgpu, WgpuOptions, found};

/// A GPU, opened once for all tests with the same options; `None`, with the reason printed, where there is none.
/// `TALLOW_TEST_ADAPTER=1` takes another than the first.
fn gpu(plain: bool) -> Option<Arc<Wgpu>> {
    static GPUS: [OnceLock<Option<Arc<Wgpu>>>; 2] = [OnceLock::new(), OnceLock::new()];
    let open = || {
        let number = std::env::var("TALLOW_TEST_ADAPTER").ok();
        let options = WgpuOptions {
            adapter: Choice::Number(number.and_then(|n| n.parse().ok()).unwrap_or(0)),
            weights: DType::F32,
            plain,
        };
        match Wgpu::open(&options) {
            Ok(c) => Some(Arc::new(c)),
            Err(e) => {
                assert!(
                    std::env::var_os("TALLOW_REQUIRE_WGPU").is_none(),
                    "TALLOW_REQUIRE_WGPU is set, but {e}"
                );
                eprintln!("SKIP: {e}");
                None
            }
        }
    };
    GPUS[usize::from(plain)].get_or_init(open).clone()
}

/// Runs `cases`, or those whose name contains `TALLOW_CASE` (`TALLOW_CASE="rms_norm "`).
fn run(cases: Vec<Case>, plain: bool) {
    let Some(gpu) = gpu(plain) else { return };
    let only = std::env::var("TALLOW_CASE").unwrap_or_default();
    let wanted: Vec<Case> = cases
        .into_iter()
        .filter(|c| c.name.contains(&only))
        .collect();
    if wanted.is_empty() && !only.is_empty() {
        return;
    }
    check_all(&Session::new(gpu), wanted);
}

macro_rules! parts {
    ($($name:ident: $cases:ident;)*) => { $(
        #[test]
        fn $name() {
            run($cases(), false);
        }
    )* };
}

parts! {
    composites_match_their_decomposition: composites;
    structural_ops_match_the_oracle: structural;
    dtypes_convert_and_compute: dtypes;
    strided_operands_and_results: layouts;
    gradients_and_updates_of_a_small_model: training;
}

#[test]
fn the_same_without_subgroups() {
    run(composites(), true);
    run(structural(), true);
}

#[test]
fn adapters_are_described() {
    for f in found() {
        assert!(!f.name.is_empty() && f.binding_bytes > 0, "{f:?}");
        println!("{f:?}");
    }
}
