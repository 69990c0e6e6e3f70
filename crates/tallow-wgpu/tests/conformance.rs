//! The conformance suite on an adapter of this machine: a real GPU if there is one, else software Vulkan.
//! Invariant: a machine without any adapter prints why and passes; `TALLOW_REQUIRE_WGPU=1` makes that a failure.
//! Absent on purpose: speed.
#[path = "conformance/kernels.rs"]
mod kernels;
#[path = "conformance/layer.rs"]
mod layer;
#[path = "conformance/neighbours.rs"]
mod neighbours;
#[path = "conformance/products.rs"]
mod products;

use std::sync::{Arc, OnceLock};
use tallow_conformance::{
    Case, check_all, composites, distance, dtypes, layouts, structural, training,
};
use tallow_core::{
    backend::{Backend, Chooser},
    graph::{Builder, NodeId},
    kernel::{Body, Candidate, KernelSpec, Operand},
    op::{Block, Linear, Role},
    oracle::sample,
    scalar::ScalarOp,
    session::Session,
    tensor::Tensor,
    types::{DType, TensorType},
};
use tallow_wgpu::{Choice, Wgpu, WgpuOptions, found};

/// What a test wants of the GPU.
#[derive(Clone, Copy)]
enum Way {
    Usual,
    Plain,
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
            plain: matches!(way, Way::Plain),
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

/// The candidate whose name has this in it, or the last: what is offered but seldom chosen is tested too.
struct Named(&'static str);
impl Chooser for Named {
    fn choose(&self, _: &KernelSpec, c: &[Candidate]) -> tallow_core::Result<(usize, String)> {
        let found = c.iter().position(|c| c.name.contains(self.0));
        Ok((found.unwrap_or(c.len() - 1), "named".into()))
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
fn the_same_without_subgroups_and_immediates() {
    run(composites(), Way::Plain);
    run(structural(), Way::Plain);
}

/// Products large enough for the larger tiles, with edges that no tile ends at; and a linear over such rows.
fn large_products() -> Vec<Case> {
    let made =
        |name: &str, shapes: &[[usize; 2]], f: &dyn Fn(&mut Builder, &[NodeId]) -> NodeId| {
            let mut b = Builder::default();
            let types: Vec<_> = shapes.iter().map(|s| TensorType::f32(*s)).collect();
            let ins: Vec<_> = types
                .iter()
                .map(|t| b.input(Role::Data, t.clone()))
                .collect();
            let out = f(&mut b, &ins);
            let inputs = types.iter().enumerate();
            Case {
                name: format!("{name} {shapes:?}"),
                graph: b.finish(vec![out], vec![]),
                inputs: inputs
                    .map(|(i, t)| sample::random(t, 5, 11, i as u32))
                    .collect(),
            }
        };
    let (m, n, k) = (519, 517, 35);
    let mut all = vec![];
    for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
        let shapes = [
            if ta { [k, m] } else { [m, k] },
            if tb { [n, k] } else { [k, n] },
        ];
        all.push(made("matmul", &shapes, &|b, x| {
            b.matmul(x[0], ta, x[1], tb).expect("fits")
        }));
    }
    let op = Linear {
        blocks: vec![Block {
            n,
            bias: false,
            adapters: vec![Some((5, 0.5.into()))],
        }],
        residual: true,
    };
    let shapes = [[m, k], [n, k], [5, k], [n, 5], [m, n]];
    all.push(made("lora_linear", &shapes, &|b, x| {
        b.composite(op.clone(), x).expect("fits")[0]
    }));
    all
}

#[test]
fn products_of_several_tiles() {
    run(large_products(), Way::Usual);
    run(large_products(), Way::Plain);
}

fn is_linear(c: &Case) -> bool {
    let op = c.name.split(' ').next().unwrap_or_default();
    ["linear", "lora_linear", "lora_linear_grad", "linear_grad"].contains(&op)
}

/// `cases` by the kernels of this name, where they are offered.
fn run_by(name: &'static str, way: Way, cases: Vec<Case>) {
    if let Some(gpu) = gpu(way) {
        check_all(&Session::with_chooser(gpu, Box::new(Named(name))), cases);
    }
}

#[test]
fn products_that_are_offered_but_not_chosen() {
    let linears = || composites().into_iter().filter(is_linear);
    let large = large_products().into_iter();
    run_by("tiled", Way::Usual, linears().chain(large).collect());
    let skinny = products::skinny().into_iter();
    run_by("skinny", Way::Usual, linears().chain(skinny).collect());
    let outer = |c: &Case| c.name.starts_with("outer") || c.name.contains("true false");
    let structural = structural().into_iter().chain(products::skinny());
    run_by("outer", Way::Usual, structural.filter(outer).collect());
}

/// By units and by the tiled kernel, both against the oracle.
#[test]
fn products_by_units() {
    let Some(gpu) = gpu(Way::Usual) else { return };
    let number = gpu.info().name.trim_start_matches("wgpu:").parse::<usize>();
    let adapter = found().swap_remove(number.expect("a number"));
    let of = [
        (DType::F32, products::coop as fn() -> Vec<Case>),
        (DType::F16, products::coop_f16),
    ];
    for (d, cases) in of {
        if !adapter.used_units.contains(&d) {
            let (name, units) = (&adapter.name, &adapter.units);
            eprintln!("SKIP: {name} has no units that multiply {d} and add f32: {units:?}");
            continue;
        }
        let half = || Operand::dense(&TensorType::new([64, 64], d));
        let alpha = 1.0.into();
        let spec = KernelSpec {
            body: Body::MatMul {
                ta: false,
                tb: true,
                alpha,
            },
            inputs: vec![half(), half()],
            outputs: vec![Some(half())],
        };
        let offers = gpu.candidates(&spec).expect("offers");
        assert!(offers.iter().any(|c| c.name == "matmul_coop"));
        run_by("coop", Way::Usual, cases());
        run_by("tiled", Way::Usual, cases());
    }
}

#[test]
fn skinny_products_without_subgroups_and_immediates() {
    run_by("skinny", Way::Plain, products::skinny());
}

#[test]
fn few_columns_get_a_kernel_of_their_own() {
    let Some(gpu) = gpu(Way::Usual) else { return };
    let dense = |shape: [usize; 2]| Operand::dense(&TensorType::f32(shape));
    let names = |ta: bool, tb: bool, shapes: [[usize; 2]; 3]| {
        let spec = KernelSpec {
            body: Body::MatMul {
                ta,
                tb,
                alpha: 1.0.into(),
            },
            inputs: vec![dense(shapes[0]), dense(shapes[1])],
            outputs: vec![Some(dense(shapes[2]))],
        };
        let mut all = gpu.candidates(&spec).expect("offers");
        all.sort_by(|a, b| a.cost.total_cmp(&b.cost));
        let names = all.into_iter().map(|c| c.name);
        // Where there are units, they have offers too.
        names.filter(|n| *n != "matmul_coop").collect::<Vec<_>>()
    };
    let seed = names(false, false, [[128, 512], [512, 8], [128, 8]]);
    assert_eq!(seed, ["matmul_skinny", "matmul_tiled_64"]);
    let gradient = names(true, false, [[512, 8], [512, 896], [8, 896]]);
    assert_eq!(gradient[0], "matmul_tn_outer");
    let square = names(false, true, [[512, 512], [512, 512], [512, 512]]);
    assert_eq!(square[0], "matmul_tiled_128");
}

#[test]
fn weights_larger_than_a_binding() {
    let tables = ["cross_entropy", "gather", "scatter", "Sum", "Max", "reduce"];
    let read = |c: &Case| is_linear(c) || tables.iter().any(|t| c.name.starts_with(t));
    let cases = composites().into_iter().chain(structural());
    run(
        cases.chain(kernels::tables()).filter(read).collect(),
        Way::WeightsInPieces,
    );
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

/// Software Vulkan binds 128 MiB; a GPU that binds more than a test should fill is not asked.
/// Reads after replays may come with them; none may be of an earlier one, or of another program's.
#[test]
fn what_is_read_after_a_replay_is_of_that_replay() {
    let Some(gpu) = gpu(Way::Usual) else { return };
    let session = Session::new(gpu);
    let x = session
        .zeros(TensorType::f32([3, 700]), Role::Data)
        .expect("memory");
    let double = x.mul_scalar(2.0).expect("a graph");
    let triple = x.mul_scalar(3.0).expect("a graph");
    let mut double = session.record(&[&double], &[]).expect("records");
    let mut triple = session.record(&[&triple], &[]).expect("records");
    let mut last = [0.0];
    for i in 1..9u16 {
        let v = f32::from(i);
        let values: Vec<f32> = (0..2100u16).map(|e| v + f32::from(e)).collect();
        session.write(&x, &values).expect("uploads");
        double.replay().expect("runs");
        session
            .read_part(&double.outputs[0], 2099, &mut last)
            .expect("reads");
        assert_eq!(last, [2.0 * (v + 2099.0)]);
        if i % 3 == 0 {
            triple.replay().expect("runs");
            let all = session.read(&triple.outputs[0]).expect("reads");
            let want: Vec<f32> = values.iter().map(|v| 3.0 * v).collect();
            assert_eq!(all, want);
        }
        session
            .read_part(&double.outputs[0], 0, &mut last)
            .expect("reads");
        assert_eq!(last, [2.0 * v]);
    }
}

#[test]
fn an_operand_larger_than_a_binding_is_named() {
    let Some(gpu) = gpu(Way::Usual) else { return };
    let most = found().iter().map(|f| f.binding_bytes).max().unwrap_or(0);
    if most > 1 << 28 {
        eprintln!("SKIP: this adapter binds {most} bytes");
        return;
    }
    let session = Session::new(gpu);
    let large = TensorType::f32([most as usize / 4 + 1]);
    let x = session.zeros(large, Role::Data).expect("memory");
    let y = Tensor::map(ScalarOp::Neg, &[&x]).expect("fits");
    let told = session
        .record(&[&y], &[])
        .map(|_| ())
        .expect_err("too large");
    let told = told.to_string();
    assert!(told.contains(&format!("binds at most {most}")), "{told}");
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
