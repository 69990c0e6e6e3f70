//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the "rotate half" pairing of
//! Hugging Face: element `i` of a head pairs with element `i + d/2`.
use super::{composite::misfit, *};
use crate::graph::{Builder, NodeId};
use ScalarOp::{Add, Cos, Mul, Neg, Sin};

/// Rotates `x [b, t, h, d]` by the angles `pos [b, t] u32 * inv_freq [d/2]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rope {
    /// Rotate backwards: the gradient, since a rotation's transpose is its inverse.
    pub inverse: bool,
}

impl CompositeOp for Rope {
    fn name(&self) -> &'static str {
        if self.inverse { "rope_inverse" } else { "rope" }
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        if let [x, pos, f] = ins
            && let [b, t, _, d] = x.shape.0[..]
            && d % 2 == 0
            && **pos == TensorType::u32([b, t])
            && **f == TensorType::f32([d / 2])
            && x.dtype == DType::F32
        {
            return Ok(vec![(*x).clone()]);
        }
        misfit(
            self.name(),
            "f32 x [b, t, h, d], u32 pos [b, t], f32 inv_freq [d/2]",
            ins,
        )
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let x = ins[0];
        let s = b.shape(x).0.clone();
        let half = s[3] / 2;
        let pos = b.cast(ins[1], DType::F32)?;
        let pos = b.reshape(pos, [s[0], s[1], 1, 1])?;
        let angle = b.map(Mul, &[pos, ins[2]])?;
        let (cos, sin) = (b.map(Cos, &[angle])?, b.map(Sin, &[angle])?);
        let sin = if self.inverse {
            b.map(Neg, &[sin])?
        } else {
            sin
        };
        let lo = b.slice(x, 3, 0, half)?;
        let hi = b.slice(x, 3, half, half)?;
        let (lc, hs) = (b.map(Mul, &[lo, cos])?, b.map(Mul, &[hi, sin])?);
        let neg = b.map(Neg, &[hs])?;
        let first = b.map(Add, &[lc, neg])?;
        let (hc, ls) = (b.map(Mul, &[hi, cos])?, b.map(Mul, &[lo, sin])?);
        let second = b.map(Add, &[hc, ls])?;
        Ok(vec![b.concat(3, &[first, second])?])
    }
    fn vjp(&self, cx: &mut VjpCx) -> Result<Option<Vec<Option<NodeId>>>> {
        let Some(dy) = cx.cts[0] else {
            return Ok(Some(vec![None; 3]));
        };
        if cx.needs[2] {
            return Ok(None);
        }
        let back = Rope {
            inverse: !self.inverse,
        };
        let d = cx.b.composite(back, &[dy, cx.ins[1], cx.ins[2]])?;
        Ok(Some(vec![Some(d[0]), None, None]))
    }
    fn flops(&self, ins: &[&TensorType], _: &[bool]) -> f64 {
        6.0 * ins[0].shape.numel() as f64
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let shapes = [[1, 1, 1, 2], [2, 3, 5, 6], [1, 7, 2, 32], [3, 1, 4, 64]];
        let make = |(inverse, s): (bool, [usize; 4])| {
            let pos = TensorType::u32([s[0], s[1]]);
            let ins = vec![TensorType::f32(s), pos, TensorType::f32([s[3] / 2])];
            (Rope { inverse }, ins)
        };
        shapes
            .iter()
            .flat_map(|s| [make((false, *s)), make((true, *s))])
            .collect()
    }
}
