//! Cross entropy of a projection, without ever holding all logits.
//! Invariant: the gradient of the rows is a second result of the same pass, so the logits are made once.
use super::{composite::misfit, *};
use crate::graph::{Builder, NodeId};
use ScalarOp::{Div, Equal, Exp, Less, Log, Mul, Sub};

/// The same of logits that are there already: where they are more than a projection by frozen weights.
/// Operands `l [n, v]` f32, `target [n] u32`; results `nll [n]` and its gradient `dl [n, v]`, row by row.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LogitsCrossEntropy;

/// Operands `x [n, c]` f32, `w [v, c]`, `target [n] u32`. With `l = x wᵀ`: results
/// `nll [n] = logsumexp(l) - l[target]` in nats and `dx [n, c] = (softmax(l) - onehot(target)) w`,
/// the gradient of each row's own `nll`. A target at or past `v` is not counted: both are 0.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CrossEntropy;

/// `nll [n]` and its gradient in the logits `[n, v]`.
fn of_logits(b: &mut Builder, logits: NodeId, target: NodeId) -> Result<[NodeId; 2]> {
    let (n, v) = (b.shape(logits).0[0], b.shape(logits).0[1]);
    let m = b.reduce(ReduceOp::Max, 1, logits)?;
    let d = b.map(Sub, &[logits, m])?;
    let e = b.map(Exp, &[d])?;
    let sum = b.reduce(ReduceOp::Sum, 1, e)?;
    let t = b.cast(target, DType::F32)?;
    let t = b.reshape(t, [n, 1])?;
    let index = b.push(Op::Iota([1, v].into(), 1), &[])?;
    let hot = b.map(Equal, &[index, t])?;
    let picked = b.map(Mul, &[hot, d])?;
    let picked = b.reduce(ReduceOp::Sum, 1, picked)?;
    let size = b.scalar(v as f32);
    let counted = b.map(Less, &[t, size])?;
    let log = b.map(Log, &[sum])?;
    let nll = b.map(Sub, &[log, picked])?;
    let nll = b.map(Mul, &[nll, counted])?;
    let p = b.map(Div, &[e, sum])?;
    let dl = b.map(Sub, &[p, hot])?;
    let dl = b.map(Mul, &[dl, counted])?;
    Ok([b.reshape(nll, [n])?, dl])
}

impl CompositeOp for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        if let [x, w, t] = ins
            && let ([n, c], [v, wc]) = (&x.shape.0[..], &w.shape.0[..])
            && c == wc
            && *v > 0
            && **t == TensorType::u32([*n])
            && x.dtype == DType::F32
            && w.dtype.is_float()
        {
            return Ok(vec![TensorType::f32([*n]), (*x).clone()]);
        }
        misfit(self.name(), "f32 x [n, c], w [v, c], u32 target [n]", ins)
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let w = b.cast(ins[1], DType::F32)?;
        let logits = b.matmul(ins[0], false, w, true)?;
        let [nll, dl] = of_logits(b, logits, ins[2])?;
        let dx = b.matmul(dl, false, w, false)?;
        Ok(vec![nll, dx])
    }
    fn vjp(&self, cx: &mut VjpCx) -> Result<Option<Vec<Option<NodeId>>>> {
        if cx.needs[1] || cx.cts[1].is_some() {
            return Ok(None);
        }
        let Some(d) = cx.cts[0] else {
            return Ok(Some(vec![None; 3]));
        };
        let n = cx.b.shape(d).0[0];
        let d = cx.b.reshape(d, [n, 1])?;
        let dx = cx.b.map(Mul, &[cx.outs[1], d])?;
        Ok(Some(vec![Some(dx), None, None]))
    }
    fn flops(&self, ins: &[&TensorType], live: &[bool]) -> f64 {
        let product = 2.0 * ins[0].shape.numel() as f64 * ins[1].shape.0[0] as f64;
        product * if live.get(1) == Some(&true) { 2.0 } else { 1.0 }
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let make = |[n, c, v]: [usize; 3]| {
            let (x, w) = (TensorType::f32([n, c]), TensorType::f32([v, c]));
            (CrossEntropy, vec![x, w, TensorType::u32([n])])
        };
        let sizes = [[1, 1, 1], [3, 7, 5], [37, 33, 67], [130, 24, 321]];
        sizes.into_iter().map(make).collect()
    }
}

impl CompositeOp for LogitsCrossEntropy {
    fn name(&self) -> &'static str {
        "logits_cross_entropy"
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        if let [l, t] = ins
            && let [n, v] = &l.shape.0[..]
            && *v > 0
            && **t == TensorType::u32([*n])
            && l.dtype == DType::F32
        {
            return Ok(vec![TensorType::f32([*n]), (*l).clone()]);
        }
        misfit(self.name(), "f32 logits [n, v], u32 target [n]", ins)
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        Ok(of_logits(b, ins[0], ins[1])?.to_vec())
    }
    fn vjp(&self, cx: &mut VjpCx) -> Result<Option<Vec<Option<NodeId>>>> {
        if cx.cts[1].is_some() {
            return Ok(None);
        }
        let Some(d) = cx.cts[0] else {
            return Ok(Some(vec![None; 2]));
        };
        let n = cx.b.shape(d).0[0];
        let d = cx.b.reshape(d, [n, 1])?;
        let dl = cx.b.map(Mul, &[cx.outs[1], d])?;
        Ok(Some(vec![Some(dl), None]))
    }
    fn flops(&self, ins: &[&TensorType], _: &[bool]) -> f64 {
        20.0 * ins[0].shape.numel() as f64
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let make = |[n, v]: [usize; 2]| {
            let logits = TensorType::f32([n, v]);
            (LogitsCrossEntropy, vec![logits, TensorType::u32([n])])
        };
        let sizes = [[1, 1], [3, 5], [37, 67], [20, 321]];
        sizes.into_iter().map(make).collect()
    }
}
