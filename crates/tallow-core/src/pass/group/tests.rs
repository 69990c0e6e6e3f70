//! What is merged, what must not be, and that results and gradients stay.
use super::{
    super::{
        simplify::simplify,
        testing::{build, composites, only, same},
    },
    *,
};
use crate::{
    grad::grad,
    graph::Builder,
    op::{Block, ReduceOp, Role},
    scalar::ScalarOp::{Add, Exp, Mul},
    types::TensorType,
};

fn layer(b: &mut Builder, x: NodeId, n: usize, rank: usize, bias: bool) -> Result<Vec<NodeId>> {
    let k = b.shape(x).last();
    let mut ins = vec![x, b.input(Role::Frozen, TensorType::f32([n, k]))];
    if bias {
        ins.push(b.input(Role::Frozen, TensorType::f32([n])));
    }
    if rank > 0 {
        ins.push(b.input(Role::State, TensorType::f32([rank, k])));
        ins.push(b.input(Role::State, TensorType::f32([n, rank])));
    }
    let adapters = vec![(rank > 0).then(|| (rank, 2.0.into()))];
    let blocks = vec![Block { n, bias, adapters }];
    let residual = false;
    b.composite(Linear { blocks, residual }, &ins)
}

/// q with an adapter, k bare with a bias, v with both; weights defined in between.
fn qkv() -> Graph {
    build(&[(Role::Data, TensorType::f32([2, 3, 4]))], |b, x| {
        let x = b.map(Exp, x)?;
        let q = layer(b, x, 4, 2, false)?;
        let early = b.map(Exp, &[q[0]])?;
        let k = layer(b, x, 2, 0, true)?;
        let v = layer(b, x, 3, 1, true)?;
        Ok(vec![early, k[0], v[0], v[1], q[1]])
    })
}

#[test]
fn layers_of_one_input_become_blocks() {
    let g = qkv();
    let (s, notes) = group(&g).unwrap();
    same(&g, &s);
    assert!(matches!(only(&s), Composite::Linear(l) if l.blocks.len() == 3 && l.ranks() == [3]));
    assert_eq!(notes.len(), 1);
    assert!(notes[0].contains("4 + 2 + 3"), "{}", notes[0]);
    assert_eq!(g.inputs().len(), s.inputs().len());
    // A second run finds nothing.
    assert_eq!(group(&s).unwrap(), (s, vec![]));
}

#[test]
fn the_gradient_of_a_group_is_one_product() {
    let mut g = qkv();
    let mut b = Builder::resume(&g);
    let mut loss = b.scalar(0.0);
    for o in &g.outputs[..3] {
        let n = b.shape(*o).numel();
        let y = b.reshape(*o, [n]).unwrap();
        let y = b.map(Mul, &[y, y]).unwrap();
        let y = b.reduce(ReduceOp::Sum, 0, y).unwrap();
        let y = b.reshape(y, []).unwrap();
        loss = b.map(Add, &[loss, y]).unwrap();
    }
    let adapters = g.inputs().into_iter().filter(|i| i.1 == Role::State);
    let mut outs = vec![loss];
    outs.extend(adapters.map(|i| i.0));
    g = b.finish(outs, vec![]);
    let plain = grad(&g, &g.outputs[1..]).unwrap();
    let (s, _) = group(&g).unwrap();
    let d = simplify(&grad(&s, &s.outputs[1..]).unwrap()).unwrap();
    same(&plain, &d);
    assert_eq!(composites(&d), ["lora_linear", "lora_linear_grad"]);
    let pads = d.nodes.iter().filter(|n| matches!(n.op, Op::Pad { .. }));
    assert_eq!(pads.count(), 0);
}

#[test]
fn layers_that_differ_or_depend_stay_apart() {
    let x = [(Role::Data, TensorType::f32([3, 4]))];
    // Another input; a weight that is not frozen; a residual.
    let g = build(&x, |b, x| {
        let y = layer(b, x[0], 4, 0, false)?[0];
        let z = layer(b, y, 4, 0, false)?[0];
        let w = b.input(Role::State, TensorType::f32([4, 4]));
        let block = Block {
            n: 4,
            bias: false,
            adapters: vec![None],
        };
        let op = |residual| Linear {
            blocks: vec![block.clone()],
            residual,
        };
        let trained = b.composite(op(false), &[x[0], w])?[0];
        let w = b.input(Role::Frozen, TensorType::f32([4, 4]));
        let added = b.composite(op(true), &[x[0], w, z])?[0];
        Ok(vec![trained, added])
    });
    assert_eq!(group(&g).unwrap(), (g, vec![]));
    // The second's adapter is computed from the first's result; the third is free.
    let g = build(&x, |b, x| {
        let first = layer(b, x[0], 4, 0, false)?[0];
        let w = b.input(Role::Frozen, TensorType::f32([4, 4]));
        let up = b.input(Role::State, TensorType::f32([4, 3]));
        let op = Linear {
            blocks: vec![Block {
                n: 4,
                bias: false,
                adapters: vec![Some((3, 1.0.into()))],
            }],
            residual: false,
        };
        let second = b.composite(op, &[x[0], w, first, up])?[0];
        let third = layer(b, x[0], 2, 0, false)?[0];
        Ok(vec![second, third])
    });
    let (s, notes) = group(&g).unwrap();
    same(&g, &s);
    assert_eq!(notes.len(), 1);
    assert_eq!(composites(&s), ["linear", "lora_linear"]);
}

/// Group one would need group two's result and the other way round.
#[test]
fn two_groups_make_no_cycle() {
    let ins: Vec<_> = [[3, 3], [3, 3], [3, 3], [3, 3]]
        .iter()
        .map(|s| (Role::State, TensorType::f32(*s)))
        .collect();
    let g = build(&ins, |b, x| {
        let op = Linear {
            blocks: vec![Block {
                n: 3,
                bias: false,
                adapters: vec![None],
            }],
            residual: false,
        };
        let mut layer = |x, w| Ok(b.composite(op.clone(), &[x, w])?[0]);
        let a1 = layer(x[0], x[2])?;
        let b2 = layer(x[1], x[3])?;
        let a2 = layer(x[0], b2)?;
        let b1 = layer(x[1], a1)?;
        Ok(vec![a2, b1])
    });
    let (s, notes) = group(&g).unwrap();
    same(&g, &s);
    assert_eq!(notes.len(), 1);
}
