//! Root mean square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467), with and without the
//! residual addition in front, and its gradient.
use super::{composite::misfit, *};
use crate::graph::{Builder, NodeId};
use ScalarOp::{Add, Mul, Rsqrt, Sub};

/// `y = x * rsqrt(mean(x²) + eps) * w`. Operands `x [.., c]`, `w [c]`; f32.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RmsNorm {
    /// Added to the mean square.
    pub eps: Bits,
}

/// Gradient of [`RmsNorm`]. Operands `x [.., c]`, `w [c]`, `dy [.., c]` and, with `residual`,
/// `r [.., c]`; results `dx (+ r)` and `dw [c]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RmsNormGrad {
    /// Added to the mean square.
    pub eps: Bits,
    /// Add a gradient that arrives past the norm.
    pub residual: bool,
}

/// `s = a + b`, `y = rms_norm(s) * w`. Operands `a`, `b [.., c]`, `w [c]`; results `s`, `y`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AddRmsNorm {
    /// Added to the mean square.
    pub eps: Bits,
}

/// `rsqrt(mean(x²) + eps)`, `[.., 1]`.
fn inverse_rms(b: &mut Builder, x: NodeId, eps: Bits) -> Result<NodeId> {
    let c = b.shape(x).last();
    let sq = b.map(Mul, &[x, x])?;
    let sum = b.sum_last(sq)?;
    let mean = b.map_const(Mul, sum, 1.0 / c as f32)?;
    let v = b.map_const(Add, mean, eps.get())?;
    b.map(Rsqrt, &[v])
}

fn fits(xs: &[&TensorType], w: &TensorType) -> bool {
    let same = xs.iter().all(|t| *t == xs[0]);
    same && xs[0].shape.rank() > 0
        && w.shape == [xs[0].shape.last()].into()
        && w.dtype == DType::F32
        && xs[0].dtype == DType::F32
}

fn sizes() -> Vec<(TensorType, TensorType)> {
    let shapes: [&[usize]; 5] = [&[1, 1], &[3, 7], &[2, 5, 33], &[1, 192], &[37, 256]];
    shapes
        .iter()
        .map(|s| (TensorType::f32(*s), TensorType::f32([s[s.len() - 1]])))
        .collect()
}

impl CompositeOp for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        match ins {
            [x, w] if fits(&[x], w) => Ok(vec![(*x).clone()]),
            _ => misfit(self.name(), "f32 x [.., c] and w [c]", ins),
        }
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let r = inverse_rms(b, ins[0], self.eps)?;
        let xn = b.map(Mul, &[ins[0], r])?;
        Ok(vec![b.map(Mul, &[xn, ins[1]])?])
    }
    fn vjp(&self, cx: &mut VjpCx) -> Result<Option<Vec<Option<NodeId>>>> {
        let Some(dy) = cx.cts[0] else {
            return Ok(Some(vec![None, None]));
        };
        let grad = RmsNormGrad {
            eps: self.eps,
            residual: false,
        };
        let d = cx.b.composite(grad, &[cx.ins[0], cx.ins[1], dy])?;
        Ok(Some(vec![Some(d[0]), Some(d[1])]))
    }
    fn flops(&self, ins: &[&TensorType], _: &[bool]) -> f64 {
        4.0 * ins[0].shape.numel() as f64
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let op = RmsNorm { eps: 1e-5.into() };
        let make = |(x, w)| (op.clone(), vec![x, w]);
        sizes().into_iter().map(make).collect()
    }
}

impl CompositeOp for RmsNormGrad {
    fn name(&self) -> &'static str {
        "rms_norm_grad"
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        let want = "f32 x, dy (and r) [.., c] and w [c]";
        match ins {
            [x, w, dy] if !self.residual && fits(&[x, dy], w) => {}
            [x, w, dy, r] if self.residual && fits(&[x, dy, r], w) => {}
            _ => return misfit(self.name(), want, ins),
        }
        Ok(vec![ins[0].clone(), ins[1].clone()])
    }
    /// With `r = rsqrt(mean(x²) + eps)`, `g = dy * w`: `dx = r g - x r³ mean(x g)`, `dw = sum dy x r`.
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let (x, w, dy) = (ins[0], ins[1], ins[2]);
        let c = b.shape(x).last();
        let r = inverse_rms(b, x, self.eps)?;
        let g = b.map(Mul, &[dy, w])?;
        let xg = b.map(Mul, &[x, g])?;
        let dot = b.sum_last(xg)?;
        let mean = b.map_const(Mul, dot, 1.0 / c as f32)?;
        let r2 = b.map(Mul, &[r, r])?;
        let k = b.map(Mul, &[mean, r2])?;
        let xk = b.map(Mul, &[x, k])?;
        let inner = b.map(Sub, &[g, xk])?;
        let mut dx = b.map(Mul, &[inner, r])?;
        if self.residual {
            dx = b.map(Add, &[dx, ins[3]])?;
        }
        let xr = b.map(Mul, &[x, r])?;
        let per_row = b.map(Mul, &[dy, xr])?;
        let rows = b.reshape(per_row, [b.shape(x).numel() / c.max(1), c])?;
        let dw = b.reduce(ReduceOp::Sum, 0, rows)?;
        let dw = b.reshape(dw, [c])?;
        Ok(vec![dx, dw])
    }
    fn flops(&self, ins: &[&TensorType], live: &[bool]) -> f64 {
        (if live.get(1) == Some(&true) {
            12.0
        } else {
            9.0
        }) * ins[0].shape.numel() as f64
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let make = |(residual, (x, w)): (bool, (TensorType, TensorType))| {
            let eps = 1e-5.into();
            let mut ins = vec![x.clone(), w, x.clone()];
            if residual {
                ins.push(x);
            }
            (RmsNormGrad { eps, residual }, ins)
        };
        let plain = sizes().into_iter().map(|s| make((false, s)));
        plain
            .chain(sizes().into_iter().map(|s| make((true, s))))
            .collect()
    }
}

impl CompositeOp for AddRmsNorm {
    fn name(&self) -> &'static str {
        "add_rms_norm"
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        match ins {
            [x, y, w] if fits(&[x, y], w) => Ok(vec![(*x).clone(), (*x).clone()]),
            _ => misfit(self.name(), "f32 a, b [.., c] and w [c]", ins),
        }
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let s = b.map(Add, &[ins[0], ins[1]])?;
        let norm = RmsNorm { eps: self.eps };
        let y = norm.decompose(b, &[s, ins[2]])?;
        Ok(vec![s, y[0]])
    }
    fn vjp(&self, cx: &mut VjpCx) -> Result<Option<Vec<Option<NodeId>>>> {
        let (ds, dw) = match (cx.cts[0], cx.cts[1]) {
            (ds, None) => (ds, None),
            (ds, Some(dy)) => {
                let residual = ds.is_some();
                let eps = self.eps;
                let mut ins = vec![cx.outs[0], cx.ins[2], dy];
                ins.extend(ds);
                let d = cx.b.composite(RmsNormGrad { eps, residual }, &ins)?;
                (Some(d[0]), Some(d[1]))
            }
        };
        Ok(Some(vec![ds, ds, dw]))
    }
    fn flops(&self, ins: &[&TensorType], _: &[bool]) -> f64 {
        5.0 * ins[0].shape.numel() as f64
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let op = AddRmsNorm { eps: 1e-6.into() };
        let make = |(x, w): (TensorType, TensorType)| (op.clone(), vec![x.clone(), x, w]);
        sizes().into_iter().map(make).collect()
    }
}
