//! Products with few rows or columns, of every layout: the seed's, the ways into adapters and back, their gradients.
//! Invariant: shapes on both sides of what a group of threads takes, and of what it loads at once.
//! Absent on purpose: which kernel is chosen.
use tallow_conformance::Case;
use tallow_core::{
    graph::{Builder, NodeId},
    op::{Block, Linear, Role},
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
    let name = format!("skinny linear {m}x{k}x{n} {w} rank {rank}");
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
