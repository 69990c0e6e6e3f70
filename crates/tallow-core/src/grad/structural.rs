//! Gradients of the structural ops: one rule each.
//! Invariant: a cotangent has the type of its operand.
//! Absent on purpose: composites, which bring their own.
use super::map;
use crate::{
    Result,
    graph::{Builder, NodeId},
    op::{Bits, Op, ReduceOp},
    scalar::ScalarOp::{Div, Equal, Mul},
    types::{DType, Shape},
};

/// Cotangents of the operands `x` of the node `y`, from its cotangent `d`. Only operands in
/// `needs` get one. Ties of a `max` share the cotangent equally.
pub(super) fn vjp(
    b: &mut Builder,
    op: &Op,
    x: &[NodeId],
    y: NodeId,
    d: NodeId,
    needs: &[bool],
) -> Result<Vec<Option<NodeId>>> {
    if let Op::Map(s) = op {
        return map::vjp(b, *s, x, y, d, needs);
    }
    let mut out = vec![None; x.len()];
    match op {
        Op::Cast(_) => out[0] = Some(b.cast(d, b.ty(x[0]).dtype)?),
        Op::Reduce(ReduceOp::Sum, _) => out[0] = Some(b.broadcast(d, &b.shape(x[0]).clone())?),
        Op::Reduce(ReduceOp::Max, axis) => {
            let hit = b.map(Equal, &[x[0], y])?;
            let ties = b.reduce(ReduceOp::Sum, *axis, hit)?;
            let share = b.map(Div, &[d, ties])?;
            out[0] = Some(b.map(Mul, &[hit, share])?);
        }
        Op::Broadcast(_) => out[0] = Some(sum_to(b, d, &b.shape(x[0]).clone())?),
        Op::Reshape(_) => out[0] = Some(b.reshape(d, b.shape(x[0]).clone())?),
        Op::Permute(axes) => {
            let mut back = vec![0; axes.len()];
            for (i, a) in axes.iter().enumerate() {
                back[*a] = i;
            }
            out[0] = Some(b.permute(d, &back)?);
        }
        Op::Slice { axis, start, len } => {
            let (axis, before) = (*axis, *start);
            let after = b.shape(x[0]).0[axis] - start - len;
            let pad = Op::Pad {
                axis,
                before,
                after,
            };
            out[0] = Some(b.push(pad, &[d])?);
        }
        Op::Concat(axis) => {
            let mut at = 0;
            for (k, part) in x.iter().enumerate() {
                let len = b.shape(*part).0[*axis];
                if needs[k] {
                    out[k] = Some(b.slice(d, *axis, at, len)?);
                }
                at += len;
            }
        }
        Op::Pad { axis, before, .. } => {
            let len = b.shape(x[0]).0[*axis];
            out[0] = Some(b.slice(d, *axis, *before, len)?);
        }
        Op::MatMul { ta, tb, alpha } => out = matmul(b, [*ta, *tb], *alpha, x, d, needs)?,
        Op::Gather(_) if needs[0] => out[0] = Some(scatter(b, x[0], x[1], d)?),
        Op::Gather(_) => {}
        Op::ScatterAdd(_) if needs[1] => {
            let dtype = b.ty(x[1]).dtype;
            out[1] = Some(b.push(Op::Gather(dtype), &[d, x[0]])?);
        }
        Op::ScatterAdd(_) => {}
        Op::Barrier(_) => out[0] = Some(d),
        Op::Input(..)
        | Op::Const(_)
        | Op::Iota(..)
        | Op::Random { .. }
        | Op::Map(_)
        | Op::Part(_)
        | Op::Composite(_) => {}
    }
    Ok(out)
}

/// Sums the axes along which a value of shape `to` was repeated.
fn sum_to(b: &mut Builder, mut d: NodeId, to: &Shape) -> Result<NodeId> {
    let lead = b.shape(d).rank() - to.rank();
    for axis in 0..b.shape(d).rank() {
        if axis < lead || to.0[axis - lead] == 1 {
            d = b.reduce(ReduceOp::Sum, axis, d)?;
        }
    }
    b.reshape(d, to.clone())
}

/// Adds the rows of `d` to where `ids` read them from, in f32.
fn scatter(b: &mut Builder, table: NodeId, ids: NodeId, d: NodeId) -> Result<NodeId> {
    let (s, dtype) = (b.shape(table).clone(), b.ty(table).dtype);
    let n = b.shape(ids).numel();
    let ids = b.reshape(ids, [n])?;
    let rows = b.cast(d, DType::F32)?;
    let rows = b.reshape(rows, [n, s.last()])?;
    let sum = b.push(Op::ScatterAdd(s.0[0]), &[ids, rows])?;
    b.cast(sum, dtype)
}

/// With `y = alpha op(a) op(b)`: `d op(a) = alpha d op(b)ᵀ`, `d op(b) = alpha op(a)ᵀ d`, each
/// written so that the result comes out as its operand is stored.
fn matmul(
    b: &mut Builder,
    [ta, tb]: [bool; 2],
    alpha: Bits,
    x: &[NodeId],
    d: NodeId,
    needs: &[bool],
) -> Result<Vec<Option<NodeId>>> {
    let mut product = |need: bool, l: NodeId, ta: bool, r: NodeId, tb: bool| match need {
        true => b.push(Op::MatMul { ta, tb, alpha }, &[l, r]).map(Some),
        false => Ok(None),
    };
    let left = match ta {
        false => product(needs[0], d, false, x[1], !tb)?,
        true => product(needs[0], x[1], tb, d, true)?,
    };
    let right = match tb {
        false => product(needs[1], x[0], !ta, d, false)?,
        true => product(needs[1], d, true, x[0], ta)?,
    };
    Ok(vec![left, right])
}
