//! Products of every layout: with few rows or columns (the seed's, the ways into adapters and back, their gradients), and
//! those of the units that some adapters have.
//! Invariant: shapes on both sides of what a group of threads takes, and of what it loads at once.
//! Absent on purpose: which kernel is chosen.
use tallow_conformance::Case;
use tallow_core::{
    graph::{Builder, NodeId},
    op::{Block, Linear, LinearGrad, Op, Role},
    oracle::sample,
    types::{DType, TensorType},
};

fn case(name: String, types: &[TensorType], f: &dyn Fn(&mut Builder, &[NodeId]) -> NodeId) -> Case {
    let mut b = Builder::default();
    let input = |t: &TensorType| b.input(Role::Data, t.clone());
    let ins: Vec<_> = types.iter().map(input).collect();
    let out = f(&mut b, &ins);
    let random = |(i, t): (usize, &TensorType)| sample::random(t, 5, 23, i as u32);
    Case {
        name,
        graph: b.finish(vec![out], vec![]),
        inputs: types.iter().enumerate().map(random).collect(),
    }
}

/// A linear over weights of this type, with everything that it can add.
fn linear([m, k, n]: [usize; 3], w: DType, rank: usize) -> Case {
    let op = Linear {
        blocks: vec![Block {
            n,
            bias: true,
            adapters: vec![(rank > 0).then(|| (rank, 0.5.into()))],
        }],
        residual: true,
    };
    let f32s = |s: [usize; 2]| TensorType::f32(s);
    let mut types = vec![
        f32s([m, k]),
        TensorType::new([n, k], w),
        TensorType::f32([n]),
    ];
    if rank > 0 {
        types.extend([f32s([rank, k]), f32s([n, rank])]);
    }
    types.push(f32s([m, n]));
    let name = format!("linear {m}x{k}x{n} {w} rank {rank}");
    case(name, &types, &|b, x| {
        b.composite(op.clone(), x).expect("fits")[0]
    })
}

pub(crate) fn skinny() -> Vec<Case> {
    let mut all = vec![];
    let sizes = [
        [128, 512, 8],
        [1, 8, 1],
        [7, 129, 3],
        [33, 31, 64],
        [130, 515, 24],
        [1031, 64, 5],
        [4099, 36, 7],
        [9, 257, 131],
        [64, 96, 200],
    ];
    for [m, k, n] in sizes {
        for (ta, tb) in [(false, false), (false, true), (true, false)] {
            let left = if ta { [k, m] } else { [m, k] };
            let right = if tb { [n, k] } else { [k, n] };
            let types = [left, right].map(TensorType::f32);
            let name = format!("skinny matmul {m}x{k}x{n} {ta} {tb}");
            all.push(case(name, &types, &|b, x| {
                b.matmul(x[0], ta, x[1], tb).expect("fits")
            }));
        }
    }
    for w in [DType::F32, DType::BF16] {
        for (size, rank) in [
            ([37, 130, 6], 0),
            ([11, 264, 150], 4),
            ([64, 72, 33], 64),
            ([130, 40, 96], 16),
        ] {
            all.push(linear(size, w, rank));
        }
    }
    all
}

/// A product of matrices of type `d`, times `alpha`.
fn matmul([m, k, n]: [usize; 3], [ta, tb]: [bool; 2], d: DType, alpha: f32) -> Case {
    let left = if ta { [k, m] } else { [m, k] };
    let right = if tb { [n, k] } else { [k, n] };
    let types = [left, right].map(|s| TensorType::new(s, d));
    let name = format!("{d} matmul {m}x{k}x{n} {ta} {tb} times {alpha}");
    let alpha = alpha.into();
    case(name, &types, &|b, x| {
        b.push(Op::MatMul { ta, tb, alpha }, x).expect("fits")
    })
}

const TURNED: [[bool; 2]; 4] = [[false, false], [false, true], [true, false], [true, true]];

/// The gradient by `x` of two projections with adapters of rank `rank`, and what is added to it.
fn linear_grad([m, k, n]: [usize; 3], w: DType, rank: usize) -> Case {
    let block = Block {
        n,
        bias: false,
        adapters: vec![Some((rank, 0.5.into()))],
    };
    let op = LinearGrad {
        blocks: vec![block.clone(), block],
        residual: true,
    };
    let f32s = |s: [usize; 2]| TensorType::f32(s);
    let block = [TensorType::new([n, k], w), f32s([rank, k]), f32s([n, rank])];
    let types = [&[f32s([m, 2 * n])], &block[..], &block[..], &[f32s([m, k])]].concat();
    let name = format!("linear_grad {m}x{k}x{n} {w} rank {rank}");
    case(name, &types, &|b, x| {
        b.composite(op.clone(), x).expect("fits")[0]
    })
}

/// On both sides of a unit's 8, of the 16 of a sum that are brought at once, of the 64 that a workgroup makes, and past
/// them; sums of one.
pub(crate) fn coop() -> Vec<Case> {
    let mut all = vec![];
    let sizes = [
        [8, 1, 8],
        [9, 17, 13],
        [63, 15, 65],
        [64, 16, 64],
        [65, 31, 127],
        [131, 67, 129],
    ];
    for size in sizes {
        all.extend(TURNED.map(|turned| matmul(size, turned, DType::F32, 1.0)));
    }
    all.push(matmul([70, 40, 33], [false, true], DType::F32, -0.3));
    all.push(matmul([70, 40, 33], [false, true], DType::BF16, 1.0));
    let batch = [[3, 9, 20], [3, 20, 17]].map(TensorType::f32);
    all.push(case("matmul of 3".into(), &batch, &|b, x| {
        b.matmul(x[0], false, x[1], false).expect("fits")
    }));
    all.extend([
        linear([65, 33, 67], DType::F32, 0),
        linear([37, 130, 70], DType::BF16, 1),
        linear([64, 72, 33], DType::F32, 16),
        linear([130, 40, 96], DType::F16, 33),
        linear_grad([67, 70, 21], DType::F32, 5),
        linear_grad([64, 65, 40], DType::BF16, 16),
    ]);
    all
}

/// For units that multiply f16.
pub(crate) fn coop_f16() -> Vec<Case> {
    let sizes = [[8, 1, 8], [13, 17, 9], [65, 31, 127], [131, 67, 129]];
    let all = |size| TURNED.map(|turned| matmul(size, turned, DType::F16, 1.0));
    let scaled = matmul([70, 40, 33], [false, true], DType::F16, -0.3);
    sizes.into_iter().flat_map(all).chain([scaled]).collect()
}
