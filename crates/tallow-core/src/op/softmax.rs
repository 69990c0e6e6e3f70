//! Softmax over the innermost axis and its gradient.
use super::{composite::misfit, *};
use crate::graph::{Builder, NodeId};
use ScalarOp::{Div, Exp, Mul, Sub};

/// `y = exp(x - max x) / sum exp(x - max x)` over the innermost axis of `x [.., c]`, f32.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Softmax;

/// `dx = y * (dy - sum(y * dy))`. Operands `y`, `dy [.., c]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SoftmaxGrad;

fn shapes() -> Vec<TensorType> {
    let s: [&[usize]; 4] = [&[1, 1], &[3, 7], &[2, 5, 33], &[5, 257]];
    s.iter().map(|s| TensorType::f32(*s)).collect()
}

impl CompositeOp for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        match ins {
            [x] if x.shape.rank() > 0 && x.dtype == DType::F32 && x.shape.last() > 0 => {
                Ok(vec![(*x).clone()])
            }
            _ => misfit(self.name(), "f32 x [.., c] with c >= 1", ins),
        }
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let axis = b.shape(ins[0]).rank() - 1;
        let m = b.reduce(ReduceOp::Max, axis, ins[0])?;
        let d = b.map(Sub, &[ins[0], m])?;
        let e = b.map(Exp, &[d])?;
        let s = b.reduce(ReduceOp::Sum, axis, e)?;
        Ok(vec![b.map(Div, &[e, s])?])
    }
    fn vjp(&self, cx: &mut VjpCx) -> Result<Option<Vec<Option<NodeId>>>> {
        let Some(dy) = cx.cts[0] else {
            return Ok(Some(vec![None]));
        };
        let d = cx.b.composite(SoftmaxGrad, &[cx.outs[0], dy])?;
        Ok(Some(vec![Some(d[0])]))
    }
    fn flops(&self, ins: &[&TensorType], _: &[bool]) -> f64 {
        12.0 * ins[0].shape.numel() as f64
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        shapes().into_iter().map(|x| (Softmax, vec![x])).collect()
    }
}

impl CompositeOp for SoftmaxGrad {
    fn name(&self) -> &'static str {
        "softmax_grad"
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        match ins {
            [y, dy] if y == dy && y.shape.rank() > 0 && y.dtype == DType::F32 => {
                Ok(vec![(*y).clone()])
            }
            _ => misfit(self.name(), "f32 y and dy [.., c]", ins),
        }
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let p = b.map(Mul, &[ins[0], ins[1]])?;
        let s = b.sum_last(p)?;
        let d = b.map(Sub, &[ins[1], s])?;
        Ok(vec![b.map(Mul, &[ins[0], d])?])
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let make = |x: TensorType| (SoftmaxGrad, vec![x.clone(), x]);
        shapes().into_iter().map(make).collect()
    }
}
