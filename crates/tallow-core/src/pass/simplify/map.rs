//! Rules for elementwise ops.
//! Invariant: a value is scaled once, by one constant, as late as its producer allows.
//! Absent on purpose: `x * 0`, which is not 0 for infinities.
use super::{constant, scaled, uniform, views};
use crate::{
    Result,
    graph::{Builder, NodeId},
    op::{Bits, Op},
    scalar::ScalarOp::{self, *},
    types::Shape,
};

pub(super) fn simplify(
    b: &mut Builder,
    s: ScalarOp,
    x: &[NodeId],
    once: &[bool],
) -> Result<NodeId> {
    let c: Vec<Option<f64>> = x.iter().map(|i| uniform(b, *i)).collect();
    if let Some(all) = c.iter().copied().collect::<Option<Vec<f64>>>() {
        let ty = b.ty(x[0]).clone();
        if ty.dtype.is_float()
            && let Some(folded) = constant(b, s.eval(&all), &ty)?
        {
            return Ok(folded);
        }
    }
    match (s, &c[..]) {
        (Add, [Some(0.0), _]) | (Mul, [Some(1.0), _]) => return Ok(x[1]),
        (Add | Sub, [_, Some(0.0)]) | (Mul | Div, [_, Some(1.0)]) => return Ok(x[0]),
        (Select, [Some(0.0), ..]) => return Ok(x[2]),
        (Select, [Some(_), ..]) => return Ok(x[1]),
        (Neg, _) if b.node(x[0]).op == Op::Map(Neg) => return Ok(b.node(x[0]).inputs[0]),
        _ => {}
    }
    if let Some(y) = scale(b, s, x, &c, once)? {
        return Ok(y);
    }
    if let (Add, Some(y)) = (s, views::joined(b, x)?) {
        return Ok(y);
    }
    match hoisted(b, s, x)? {
        Some(y) => Ok(y),
        None => b.push(Op::Map(s), x),
    }
}

/// A constant factor goes into the product, or the factor, that made the other operand.
fn scale(
    b: &mut Builder,
    s: ScalarOp,
    x: &[NodeId],
    c: &[Option<f64>],
    once: &[bool],
) -> Result<Option<NodeId>> {
    let (k, v) = match (s, c) {
        (Mul, [None, Some(v)]) => (0, *v),
        (Mul, [Some(v), None]) => (1, *v),
        (Div, [None, Some(v)]) => (0, 1.0 / v),
        _ => return Ok(None),
    };
    if !once[k] {
        return Ok(None);
    }
    let n = b.node(x[k]).clone();
    if let Op::MatMul { ta, tb, alpha } = n.op {
        let alpha = Bits::from((f64::from(alpha.get()) * v) as f32);
        return b.push(Op::MatMul { ta, tb, alpha }, &n.inputs).map(Some);
    }
    match scaled(b, x[k]) {
        Some((inner, first)) if s == Mul && n.op == Op::Map(Mul) => {
            let v = f64::from(first) * v;
            b.map_const(Mul, inner, v as f32).map(Some)
        }
        _ => Ok(None),
    }
}

/// Reshapes move behind elementwise ops: `f(reshape a, reshape b)` is `reshape f(a, b)`.
fn hoisted(b: &mut Builder, s: ScalarOp, x: &[NodeId]) -> Result<Option<NodeId>> {
    let outer = b.shape(x[0]).clone();
    let inner_of = |i: &NodeId| match b.node(*i).op {
        Op::Reshape(_) => Some(b.shape(b.node(*i).inputs[0]).clone()),
        _ => None,
    };
    let Some(inner) = x.iter().find_map(inner_of) else {
        return Ok(None);
    };
    let mut below = Vec::with_capacity(x.len());
    for i in x {
        match under(b, *i, &inner, &outer)? {
            Some(y) => below.push(y),
            None => return Ok(None),
        }
    }
    let y = b.push(Op::Map(s), &below)?;
    b.reshape(y, outer).map(Some)
}

/// `x` of shape `outer` before it was reshaped from `inner`, if that costs nothing.
fn under(b: &mut Builder, x: NodeId, inner: &Shape, outer: &Shape) -> Result<Option<NodeId>> {
    if let Some(v) = uniform(b, x) {
        let ty = b.ty(x).dtype;
        return constant(b, v, &crate::types::TensorType::new(inner.clone(), ty));
    }
    let n = b.node(x);
    match n.op {
        Op::Reshape(_) if b.shape(n.inputs[0]) == inner => Ok(Some(n.inputs[0])),
        Op::Broadcast(_) => {
            let from = n.inputs[0];
            let row = b.shape(from).rank() == 1 && inner.rank() > 0 && inner.last() == outer.last();
            if row {
                b.broadcast(from, inner).map(Some)
            } else {
                Ok(None)
            }
        }
        _ => Ok(None),
    }
}
