//! Cross entropy over a projection.
use super::*;
use crate::{
    op::Softmax,
    oracle::{Value, eval},
};

/// `x [2, 3, 4]` and `w [7, 4]`, which is frozen or not, and targets `[2, 3]`; `f` makes log-softmax
/// of the logits `[6, 7]`.
fn loss(
    role: Role,
    pick: fn(&mut Builder, NodeId, NodeId) -> Result<NodeId>,
    f: impl Fn(&mut Builder, NodeId) -> Result<NodeId>,
) -> Graph {
    let ins = [
        (Role::Data, TensorType::f32([2, 3, 4])),
        (role, TensorType::f32([7, 4])),
        (Role::Data, TensorType::u32([2, 3])),
    ];
    build(&ins, |b, x| {
        let rows = b.reshape(x[0], [6, 4])?;
        let logits = b.matmul(rows, false, x[1], true)?;
        let logp = f(b, logits)?;
        let t = b.reshape(x[2], [6, 1])?;
        let t = b.cast(t, DType::F32)?;
        let index = b.push(Op::Iota([1, 7].into(), 1), &[])?;
        let hot = b.map(Equal, &[index, t])?;
        let picked = pick(b, hot, logp)?;
        let nll = b.sum_last(picked)?;
        let nll = b.map(Neg, &[nll])?;
        let nll = b.reshape(nll, [6])?;
        Ok(vec![b.reduce(ReduceOp::Sum, 0, nll)?])
    })
}

fn times(b: &mut Builder, hot: NodeId, logp: NodeId) -> Result<NodeId> {
    b.map(Mul, &[logp, hot])
}
fn chosen(b: &mut Builder, hot: NodeId, logp: NodeId) -> Result<NodeId> {
    let zero = b.scalar(0.0);
    b.map(Select, &[hot, logp, zero])
}

/// `l - max` and `log sum exp` of it.
fn shifted(b: &mut Builder, l: NodeId) -> Result<[NodeId; 3]> {
    let m = b.reduce(ReduceOp::Max, 1, l)?;
    let d = b.map(Sub, &[l, m])?;
    let e = b.map(Exp, &[d])?;
    let s = b.sum_last(e)?;
    Ok([d, b.map(Log, &[s])?, m])
}

fn of_shifted(b: &mut Builder, l: NodeId) -> Result<NodeId> {
    let [d, lse, _] = shifted(b, l)?;
    b.map(Sub, &[d, lse])
}
fn of_log_sum_exp(b: &mut Builder, l: NodeId) -> Result<NodeId> {
    let [_, lse, m] = shifted(b, l)?;
    let lse = b.map(Add, &[m, lse])?;
    b.map(Sub, &[l, lse])
}
fn of_softmax(b: &mut Builder, l: NodeId) -> Result<NodeId> {
    let p = b.composite(Softmax, &[l])?[0];
    b.map(Log, &[p])
}

#[test]
fn every_writing() {
    for role in [Role::Frozen, Role::State] {
        for pick in [times, chosen] {
            for f in [of_shifted, of_log_sum_exp, of_softmax] {
                let r = becomes(&loss(role, pick, f), &["cross_entropy"]);
                // The signs cancel.
                assert!(!r.nodes.iter().any(|n| n.op == Op::Map(Neg)));
            }
        }
    }
}

#[test]
fn padding_means_the_same() {
    let g = loss(Role::Frozen, times, of_shifted);
    let (r, _) = recognise(&g).unwrap();
    let mut x = super::super::super::testing::inputs(&g, 1);
    x[2] = Value::full(x[2].ty.clone(), f64::from(u32::MAX));
    for g in [&g, &r] {
        assert_eq!(eval(g, &x).unwrap()[0].data, [0.0]);
    }
}

#[test]
fn near_misses() {
    let logits_stay = |g: &Graph, names: &[&str]| {
        becomes(g, names);
    };
    // Not normalised; a bias; another axis of the index.
    logits_stay(&loss(Role::Frozen, times, |_, l| Ok(l)), &["linear"]);
    let biased = |b: &mut Builder, l: NodeId| {
        let one = b.push(Op::Iota([7].into(), 0), &[])?;
        let l = b.map(Add, &[l, one])?;
        of_shifted(b, l)
    };
    logits_stay(&loss(Role::Frozen, times, biased), &["linear"]);
    let scaled = |b: &mut Builder, l: NodeId| {
        let l = b.map_const(Mul, l, 2.0)?;
        of_shifted(b, l)
    };
    logits_stay(&loss(Role::State, times, scaled), &[]);
    // log sum exp - picked gives padding another value.
    let g = build(
        &[
            (Role::Data, TensorType::f32([3, 4])),
            (Role::Frozen, TensorType::f32([7, 4])),
            (Role::Data, TensorType::u32([3])),
        ],
        |b, x| {
            let l = b.matmul(x[0], false, x[1], true)?;
            let [_, lse, m] = shifted(b, l)?;
            let lse = b.map(Add, &[m, lse])?;
            let t = b.reshape(x[2], [3, 1])?;
            let t = b.cast(t, DType::F32)?;
            let index = b.push(Op::Iota([1, 7].into(), 1), &[])?;
            let hot = b.map(Equal, &[index, t])?;
            let picked = b.map(Mul, &[hot, l])?;
            let picked = b.sum_last(picked)?;
            Ok(vec![b.map(Sub, &[lse, picked])?])
        },
    );
    logits_stay(&g, &["linear"]);
    // Somebody reads the logits.
    let mut g = loss(Role::Frozen, times, of_shifted);
    let logits = |n: &crate::graph::Node| matches!(n.op, Op::MatMul { .. });
    let at = g.nodes.iter().position(logits).unwrap();
    g.outputs.push(NodeId(at as u32));
    logits_stay(&g, &["linear"]);
}
