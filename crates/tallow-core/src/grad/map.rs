//! Derivatives of the scalar functions: one row each.
//! Invariant: a rule uses the result where that is cheaper than the operand.
//! Absent on purpose: the slopes of flat functions.
use crate::{
    Result,
    graph::{Builder, NodeId},
    scalar::ScalarOp::{self, *},
};

/// The functions whose slope is 0 wherever they have one, as a pattern.
macro_rules! flat {
    () => {
        Less | Equal | Floor
    };
}

/// Is its slope 0 wherever it has one? Nothing below it is differentiated through it.
pub(super) fn is_flat(s: ScalarOp) -> bool {
    matches!(s, flat!())
}

/// Cotangents of the operands `x` of `y = s(x)` from the cotangent `d`; only those in `needs` are
/// built. Ties: `max` and `min` pass everything to the first operand; `abs` has slope 0 at 0.
pub(super) fn vjp(
    b: &mut Builder,
    s: ScalarOp,
    x: &[NodeId],
    y: NodeId,
    d: NodeId,
    needs: &[bool],
) -> Result<Vec<Option<NodeId>>> {
    let one = |b: &mut Builder, k: usize| operand(b, s, x, y, d, k);
    (0..x.len())
        .map(|k| if needs[k] { one(b, k) } else { Ok(None) })
        .collect()
}

fn operand(
    b: &mut Builder,
    s: ScalarOp,
    x: &[NodeId],
    y: NodeId,
    d: NodeId,
    k: usize,
) -> Result<Option<NodeId>> {
    Ok(Some(match (s, k) {
        (flat!(), _) | (Select, 0) => return Ok(None),
        (Add, _) | (Sub, 0) => d,
        (Sub, _) | (Neg, _) => b.map(Neg, &[d])?,
        (Mul, _) => b.map(Mul, &[d, x[1 - k]])?,
        (Div, 0) => b.map(Div, &[d, x[1]])?,
        (Div, _) => {
            let dy = b.map(Mul, &[d, y])?;
            let q = b.map(Div, &[dy, x[1]])?;
            b.map(Neg, &[q])?
        }
        (Max, _) => {
            let second = b.map(Less, &[x[0], x[1]])?;
            chosen(b, second, d, k == 1)?
        }
        (Min, _) => {
            let second = b.map(Less, &[x[1], x[0]])?;
            chosen(b, second, d, k == 1)?
        }
        (Select, _) => chosen(b, x[0], d, k == 1)?,
        (Abs, _) => {
            let zero = b.map_const(Mul, x[0], 0.0)?;
            let (up, down) = (b.map(Less, &[zero, x[0]])?, b.map(Less, &[x[0], zero])?);
            let sign = b.map(Sub, &[up, down])?;
            b.map(Mul, &[d, sign])?
        }
        (Exp, _) => b.map(Mul, &[d, y])?,
        (Log, _) => b.map(Div, &[d, x[0]])?,
        (Sin, _) => {
            let c = b.map(Cos, &[x[0]])?;
            b.map(Mul, &[d, c])?
        }
        (Cos, _) => {
            let s = b.map(Sin, &[x[0]])?;
            let ds = b.map(Mul, &[d, s])?;
            b.map(Neg, &[ds])?
        }
        (Tanh, _) => {
            let dy = b.map(Mul, &[d, y])?;
            let dyy = b.map(Mul, &[dy, y])?;
            b.map(Sub, &[d, dyy])?
        }
        (Sigmoid, _) => {
            let dy = b.map(Mul, &[d, y])?;
            let dyy = b.map(Mul, &[dy, y])?;
            b.map(Sub, &[dy, dyy])?
        }
        (Sqrt, _) => {
            let half = b.map_const(Mul, d, 0.5)?;
            b.map(Div, &[half, y])?
        }
        (Rsqrt, _) => {
            let yy = b.map(Mul, &[y, y])?;
            let cube = b.map(Mul, &[yy, y])?;
            let slope = b.map_const(Mul, cube, -0.5)?;
            b.map(Mul, &[d, slope])?
        }
        (Recip, _) => {
            let yy = b.map(Mul, &[y, y])?;
            let dyy = b.map(Mul, &[d, yy])?;
            b.map(Neg, &[dyy])?
        }
    }))
}

/// `d` where `c` is not 0 (`when`) or where it is 0 (`!when`); 0 elsewhere.
fn chosen(b: &mut Builder, c: NodeId, d: NodeId, when: bool) -> Result<NodeId> {
    let zero = b.scalar(0.0);
    let zero = b.cast(zero, b.ty(d).dtype)?;
    b.map(Select, &if when { [c, d, zero] } else { [c, zero, d] })
}
