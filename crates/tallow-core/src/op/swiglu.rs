//! SwiGLU gate (Shazeer 2020, arXiv:2002.05202): `silu(g) * u`, and its gradient.
use super::{composite::misfit, *};
use crate::graph::{Builder, NodeId};
use ScalarOp::{Add, Mul, Sigmoid, Sub};

/// `y = g * sigmoid(g) * u`. Operands `g`, `u` of one f32 shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SwiGlu;

/// Operands `g`, `u`, `dy`; results `dg`, `du`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SwiGluGrad;

fn shapes() -> Vec<TensorType> {
    let s: [&[usize]; 4] = [&[1], &[3, 7], &[2, 5, 33], &[4, 688]];
    s.iter().map(|s| TensorType::f32(*s)).collect()
}

fn equal(ins: &[&TensorType], n: usize) -> bool {
    ins.len() == n && ins.iter().all(|t| *t == ins[0]) && ins[0].dtype == DType::F32
}

impl CompositeOp for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        if equal(ins, 2) {
            return Ok(vec![ins[0].clone()]);
        }
        misfit(self.name(), "f32 g and u of one shape", ins)
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let s = b.map(Sigmoid, &[ins[0]])?;
        let silu = b.map(Mul, &[ins[0], s])?;
        Ok(vec![b.map(Mul, &[silu, ins[1]])?])
    }
    fn vjp(&self, cx: &mut VjpCx) -> Result<Option<Vec<Option<NodeId>>>> {
        let Some(dy) = cx.cts[0] else {
            return Ok(Some(vec![None, None]));
        };
        let d = cx.b.composite(SwiGluGrad, &[cx.ins[0], cx.ins[1], dy])?;
        Ok(Some(vec![Some(d[0]), Some(d[1])]))
    }
    fn flops(&self, ins: &[&TensorType], _: &[bool]) -> f64 {
        10.0 * ins[0].shape.numel() as f64
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let make = |x: TensorType| (SwiGlu, vec![x.clone(), x]);
        shapes().into_iter().map(make).collect()
    }
}

impl CompositeOp for SwiGluGrad {
    fn name(&self) -> &'static str {
        "swiglu_grad"
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        if equal(ins, 3) {
            return Ok(vec![ins[0].clone(), ins[0].clone()]);
        }
        misfit(self.name(), "f32 g, u and dy of one shape", ins)
    }
    /// With `s = sigmoid(g)`: `dg = dy u s (1 + g (1 - s))`, `du = dy g s`.
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let (g, u, dy) = (ins[0], ins[1], ins[2]);
        let s = b.map(Sigmoid, &[g])?;
        let one = b.scalar(1.0);
        let rest = b.map(Sub, &[one, s])?;
        let inner = b.map(Mul, &[g, rest])?;
        let slope = b.map_const(Add, inner, 1.0)?;
        let ds = b.map(Mul, &[s, slope])?;
        let up = b.map(Mul, &[dy, u])?;
        let dg = b.map(Mul, &[up, ds])?;
        let silu = b.map(Mul, &[g, s])?;
        let du = b.map(Mul, &[dy, silu])?;
        Ok(vec![dg, du])
    }
    fn flops(&self, ins: &[&TensorType], _: &[bool]) -> f64 {
        16.0 * ins[0].shape.numel() as f64
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let make = |x: TensorType| (SwiGluGrad, vec![x.clone(), x.clone(), x]);
        shapes().into_iter().map(make).collect()
    }
}
