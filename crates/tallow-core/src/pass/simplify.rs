//! Algebraic clean-up: constants folded, views merged, scales and residuals moved into the op that
//! can do them for nothing.
//! Invariant: every rule leaves fewer or cheaper nodes, so repeating them ends.
//! Absent on purpose: rules that change what is not a number (`x * 0`), and reassociation of sums.
use super::edit::Edit;
use crate::{
    Result,
    graph::{Builder, Graph, Node, NodeId},
    op::{Bits, Op, ReduceOp},
    oracle::store,
    scalar::ScalarOp::{Div, Mul, Neg},
    types::{DType, TensorType},
};

mod map;
mod residual;
#[cfg(test)]
mod tests;
mod views;

/// `g` written as simply as these rules can.
pub fn simplify(g: &Graph) -> Result<Graph> {
    let mut g = local(g)?;
    // Each round can open the way for another; user code needs two or three.
    for _ in 0..8 {
        let next = local(&residual::fold(&g)?)?;
        if next == g {
            break;
        }
        g = next;
    }
    Ok(g)
}

/// The rules that look at one node and its operands.
pub(super) fn local(g: &Graph) -> Result<Graph> {
    let uses = g.use_counts();
    g.rewrite(|b, _, n, ins| {
        let once: Vec<bool> = n.inputs.iter().map(|i| uses[i.index()] == 1).collect();
        node(b, n, ins, &once)
    })
}

/// A node rebuilt; `once` tells which operands nobody else reads.
fn node(b: &mut Builder, n: &Node, ins: &[NodeId], once: &[bool]) -> Result<NodeId> {
    let movement = matches!(
        n.op,
        Op::Broadcast(_) | Op::Reshape(_) | Op::Permute(_) | Op::Slice { .. } | Op::Cast(_)
    );
    if movement && let Some(v) = uniform(b, ins[0]) {
        return match constant(b, v, &n.ty)? {
            Some(c) => Ok(c),
            None => b.push(n.op.clone(), ins),
        };
    }
    match &n.op {
        Op::Map(s) => map::simplify(b, *s, ins, once),
        Op::Cast(d) => cast(b, ins[0], *d),
        Op::Reduce(r, axis) => reduce(b, *r, *axis, ins[0], &n.ty),
        Op::MatMul { ta, tb, alpha } => matmul(b, [*ta, *tb], *alpha, ins, once),
        Op::Broadcast(_)
        | Op::Reshape(_)
        | Op::Permute(_)
        | Op::Slice { .. }
        | Op::Concat(_)
        | Op::Pad { .. } => views::simplify(b, &n.op, ins),
        Op::Input(..)
        | Op::Const(_)
        | Op::Gather(_)
        | Op::ScatterAdd(_)
        | Op::Iota(..)
        | Op::Random { .. }
        | Op::Barrier(_)
        | Op::Part(_)
        | Op::Composite(_) => b.push(n.op.clone(), ins),
    }
}

/// The value of a node all of whose elements are one constant.
pub(super) fn uniform(b: &Builder, id: NodeId) -> Option<f64> {
    let n = b.node(id);
    match &n.op {
        Op::Const(v) => Some(f64::from(v.get())),
        Op::Broadcast(_) | Op::Reshape(_) | Op::Permute(_) | Op::Slice { .. } => {
            uniform(b, n.inputs[0])
        }
        Op::Cast(d) => uniform(b, n.inputs[0]).map(|v| store(*d, v)),
        _ => None,
    }
}

/// `v` in every element of a tensor of type `ty`, if the graph can say it.
fn constant(b: &mut Builder, v: f64, ty: &TensorType) -> Result<Option<NodeId>> {
    let v = store(ty.dtype, v);
    if !ty.dtype.is_float() && f64::from(v as f32) != v {
        return Ok(None);
    }
    let c = b.scalar(v as f32);
    let c = b.cast(c, ty.dtype)?;
    Ok(Some(b.broadcast(c, &ty.shape)?))
}

/// Can every value of type `from` be held by `to`?
fn lossless(from: DType, to: DType) -> bool {
    match (from, to) {
        (a, b) if a == b => true,
        (DType::BF16 | DType::F16, DType::F32) => true,
        (DType::U8, _) => true,
        _ => false,
    }
}

fn cast(b: &mut Builder, x: NodeId, to: DType) -> Result<NodeId> {
    if let Op::Cast(mid) = b.node(x).op {
        let from = b.node(x).inputs[0];
        if lossless(b.ty(from).dtype, mid) {
            return b.cast(from, to);
        }
    }
    b.cast(x, to)
}

fn reduce(b: &mut Builder, r: ReduceOp, axis: usize, x: NodeId, ty: &TensorType) -> Result<NodeId> {
    if let (Some(v), true) = (uniform(b, x), ty.dtype.is_float()) {
        let n = b.shape(x).0[axis] as f64;
        let v = if r == ReduceOp::Sum { v * n } else { v };
        if let Some(c) = constant(b, v, ty)? {
            return Ok(c);
        }
    }
    b.reduce(r, axis, x)
}

/// `x` and `c` if `id` is `x * c` (or `x / c`, `-x`) with a constant.
fn scaled(b: &Builder, id: NodeId) -> Option<(NodeId, f32)> {
    let n = b.node(id);
    let Op::Map(s) = n.op else { return None };
    let c = |k: usize| uniform(b, n.inputs[k]).map(|v| v as f32);
    match s {
        Neg => Some((n.inputs[0], -1.0)),
        Mul => match (c(0), c(1)) {
            (_, Some(v)) => Some((n.inputs[0], v)),
            (Some(v), _) => Some((n.inputs[1], v)),
            _ => None,
        },
        Div => c(1).map(|v| (n.inputs[0], 1.0 / v)),
        _ => None,
    }
}

/// Does `id` swap the two innermost axes, and only those? Then its operand.
pub(super) fn transposed(b: &Builder, id: NodeId) -> Option<NodeId> {
    let Op::Permute(axes) = &b.node(id).op else {
        return None;
    };
    let r = axes.len();
    let swaps = r >= 2
        && axes[r - 1] == r - 2
        && axes[r - 2] == r - 1
        && axes[..r - 2].iter().enumerate().all(|(i, a)| i == *a);
    swaps.then(|| b.node(id).inputs[0])
}

/// Scales of an operand go to `alpha`, transposed operands to the flags.
fn matmul(
    b: &mut Builder,
    mut t: [bool; 2],
    alpha: Bits,
    ins: &[NodeId],
    once: &[bool],
) -> Result<NodeId> {
    let mut x = [ins[0], ins[1]];
    let mut factor = alpha.get();
    for k in 0..2 {
        if let (Some((inner, c)), true) = (scaled(b, x[k]), once[k]) {
            (x[k], factor) = (inner, factor * c);
        }
        if let Some(inner) = transposed(b, x[k]) {
            (x[k], t[k]) = (inner, !t[k]);
        }
    }
    let [ta, tb] = t;
    let alpha = Bits::from(factor);
    b.push(Op::MatMul { ta, tb, alpha }, &x)
}
