//! AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) as PyTorch computes it.
use super::{composite::misfit, *};
use crate::graph::{Builder, NodeId};
use ScalarOp::{Add, Div, Mul, Sqrt, Sub};

/// Operands: parameters `p`, gradient `g`, moments `m`, `v`, all f32 of one shape, and
/// `hyper [8]` = `[lr, beta1, beta2, eps, weight_decay, 1 - beta1^t, sqrt(1 - beta2^t), grad_scale]`.
/// Results: the next `p`, `m`, `v`, which take over their operands' storage.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AdamW;

impl CompositeOp for AdamW {
    fn name(&self) -> &'static str {
        "adamw"
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        match ins {
            [p, g, m, v, h]
                if [g, m, v].iter().all(|t| **t == *p)
                    && p.dtype == DType::F32
                    && **h == TensorType::f32([8]) =>
            {
                Ok(vec![(*p).clone(); 3])
            }
            _ => misfit(
                self.name(),
                "f32 p, g, m, v of one shape and hyper [8]",
                ins,
            ),
        }
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let (p, m, v) = (ins[0], ins[2], ins[3]);
        let mut h = Vec::with_capacity(8);
        for i in 0..8 {
            let s = b.slice(ins[4], 0, i, 1)?;
            h.push(b.reshape(s, Shape::default())?);
        }
        let [lr, beta1, beta2, eps, wd, bc1, root_bc2, scale] = h[..] else {
            return misfit(self.name(), "hyper [8]", &[b.ty(ins[4])]);
        };
        let one = b.scalar(1.0);
        let g = b.map(Mul, &[ins[1], scale])?;
        let rest1 = b.map(Sub, &[one, beta1])?;
        let rest2 = b.map(Sub, &[one, beta2])?;
        let (m0, m1) = (b.map(Mul, &[m, beta1])?, b.map(Mul, &[g, rest1])?);
        let m = b.map(Add, &[m0, m1])?;
        let gg = b.map(Mul, &[g, g])?;
        let (v0, v1) = (b.map(Mul, &[v, beta2])?, b.map(Mul, &[gg, rest2])?);
        let v = b.map(Add, &[v0, v1])?;
        let root = b.map(Sqrt, &[v])?;
        let root = b.map(Div, &[root, root_bc2])?;
        let denom = b.map(Add, &[root, eps])?;
        let step = b.map(Div, &[lr, bc1])?;
        let ratio = b.map(Div, &[m, denom])?;
        let delta = b.map(Mul, &[ratio, step])?;
        let decay = b.map(Mul, &[lr, wd])?;
        let keep = b.map(Sub, &[one, decay])?;
        let kept = b.map(Mul, &[p, keep])?;
        let p = b.map(Sub, &[kept, delta])?;
        Ok(vec![p, m, v])
    }
    fn in_place(&self, k: usize) -> Option<usize> {
        [Some(0), Some(2), Some(3)].get(k).copied().flatten()
    }
    fn flops(&self, ins: &[&TensorType], _: &[bool]) -> f64 {
        15.0 * ins[0].shape.numel() as f64
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let make = |n: usize| {
            let x = TensorType::f32([n]);
            (
                AdamW,
                vec![x.clone(), x.clone(), x.clone(), x, TensorType::f32([8])],
            )
        };
        [1, 7, 33, 1031].into_iter().map(make).collect()
    }
}
