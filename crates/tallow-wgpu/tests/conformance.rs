//! The conformance suite on an adapter of this machine: a real GPU if there is one, else software Vulkan.
//! Invariant: a machine without any adapter prints why and passes; `TALLOW_REQUIRE_WGPU=1` makes that a failure.
//! Absent on purpose: speed.
#[path = "conformance/kernels.rs"]
mod kernels;

use std::sync::{Arc, OnceLock};
use tallow_conformance::{
    Case, check_all, composites, distance, dtypes, layouts, structural, training,
};
use tallow_core::{
    backend::{Backend, Chooser},
    kernel::{Candidate, KernelSpec},
    session::Session,
    types::DType,
};
use tallow_wgpu::{Choice, Wgpu, WgpuOptions, found};

/// What a test wants of the GPU.
#[derive(Clone, Copy)]
enum Way {
    Usual,
    WithoutSubgroups,
    WeightsInBf16,
    WeightsInPieces,
}

/// A GPU, opened once for all tests that want it the same way; `None`, with the reason printed, where there is none.
/// `TALLOW_TEST_ADAPTER=1` takes another than the first.
fn gpu(way: Way) -> Option<Arc<Wgpu>> {
    static GPUS: [OnceLock<Option<Arc<Wgpu>>>; 4] = [const { OnceLock::new() }; 4];
    let open = || {
        let number = std::env::var("TALLOW_TEST_ADAPTER").ok();
        let options = WgpuOptions {
            adapter: Choice::Number(number.and_then(|n| n.parse().ok()).unwrap_or(0)),
            weights: match way {
                Way::WeightsInBf16 => DType::BF16,
                _ => DType::F32,
            },
            plain: matches!(way, Way::WithoutSubgroups),
            // A few rows of the examples' weights.
            binding_bytes: matches!(way, Way::WeightsInPieces).then_some(4096),
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
    GPUS[way as usize].get_or_init(open).clone()
}

/// `cases`, or those whose name contains `TALLOW_CASE` (`TALLOW_CASE="rms_norm "`).
fn wanted(cases: Vec<Case>) -> Vec<Case> {
    let only = std::env::var("TALLOW_CASE").unwrap_or_default();
    cases
        .into_iter()
        .filter(|c| c.name.contains(&only))
        .collect()
}

fn run(cases: Vec<Case>, way: Way) {
    let cases = wanted(cases);
    match gpu(way) {
        Some(gpu) if !cases.is_empty() => check_all(&Session::new(gpu), cases),
        _ => {}
    }
}

/// The dearest candidate: what is offered but seldom chosen is tested too.
struct Dearest;
impl Chooser for Dearest {
    fn choose(&self, _: &KernelSpec, c: &[Candidate]) -> (usize, String) {
        let dearest = (0..c.len()).max_by(|a, b| c[*a].cost.total_cmp(&c[*b].cost));
        (dearest.unwrap_or(0), "dearest".into())
    }
}

macro_rules! parts {
    ($($name:ident: $cases:ident;)*) => { $(
        #[test]
        fn $name() {
            run($cases(), Way::Usual);
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
    run(composites(), Way::WithoutSubgroups);
    run(structural(), Way::WithoutSubgroups);
}

fn is_linear(c: &Case) -> bool {
    let op = c.name.split(' ').next().unwrap_or_default();
    ["linear", "lora_linear", "lora_linear_grad", "linear_grad"].contains(&op)
}

#[test]
fn linears_that_are_offered_but_not_chosen() {
    let Some(gpu) = gpu(Way::Usual) else { return };
    let session = Session::with_chooser(gpu, Box::new(Dearest));
    let cases = composites().into_iter().filter(is_linear);
    check_all(&session, cases.collect());
}

#[test]
fn weights_larger_than_a_binding() {
    let cases = composites().into_iter().filter(is_linear);
    run(cases.collect(), Way::WeightsInPieces);
}

/// Frozen weights are rounded: within two percent of the oracle in norm, and never exact by accident of another path.
#[test]
fn weights_in_bf16_are_near_the_oracle() {
    let Some(gpu) = gpu(Way::WeightsInBf16) else {
        return;
    };
    let session = Session::new(gpu);
    let (mut bad, mut rounded, mut count) = (vec![], 0, 0);
    for case in composites() {
        if !is_linear(&case) || !case.name.contains("Frozen") {
            continue;
        }
        for d in distance(&session, &case).expect("runs") {
            count += 1;
            rounded += usize::from(d > 1e-5);
            if d.is_nan() || d > 2e-2 {
                bad.push(format!("{}: {d:.2e}", case.name));
            }
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
    assert!(
        rounded * 4 > count,
        "only {rounded} of {count} results were rounded: bf16 did not run"
    );
}

/// Any start and length, though the GPU copies whole words.
#[test]
fn bytes_are_moved_from_any_place_to_any_place() {
    let Some(gpu) = gpu(Way::Usual) else { return };
    let backend: &dyn Backend = &*gpu;
    let b = backend.alloc(23).expect("memory");
    let mut want = vec![0u8; 23];
    let pieces = [
        (0, 23),
        (1, 1),
        (3, 6),
        (5, 3),
        (22, 1),
        (8, 4),
        (19, 4),
        (7, 0),
    ];
    for (k, (at, len)) in pieces.into_iter().enumerate() {
        let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + k * 31 + 1) as u8).collect();
        want[at..at + len].copy_from_slice(&bytes);
        backend.upload(&b, at, &bytes).expect("upload");
        let mut all = vec![9; 23];
        backend.download(&b, 0, &mut all).expect("download");
        assert_eq!(all, want, "after {len} bytes at {at}");
        let mut some = vec![9; len];
        backend.download(&b, at, &mut some).expect("download");
        assert_eq!(some, bytes);
    }
    assert!(backend.upload(&b, 20, &[0; 4]).is_err());
    assert!(backend.download(&b, 23, &mut [0]).is_err());
}

#[test]
fn adapters_that_are_not_there_are_named() {
    let open = |adapter| {
        let weights = DType::F32;
        let options = WgpuOptions {
            adapter,
            weights,
            plain: false,
            binding_bytes: None,
        };
        Wgpu::open(&options).map(|_| ()).map_err(|e| e.to_string())
    };
    let count = found().len();
    let beyond = open(Choice::Number(count)).expect_err("no such adapter");
    assert!(
        beyond.starts_with(&format!("wgpu:{count}: no ")),
        "{beyond}"
    );
    if found().iter().all(|f| f.software) {
        let none = open(Choice::Gpu).expect_err("no GPU");
        assert!(none.starts_with("wgpu: no GPU found"), "{none}");
    }
}

#[test]
fn adapters_are_described() {
    for f in found() {
        assert!(!f.name.is_empty() && f.binding_bytes > 0, "{f:?}");
        println!("{f:?}");
    }
}
