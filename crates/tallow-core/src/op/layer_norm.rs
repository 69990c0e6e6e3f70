//! Layer normalisation (Ba et al. 2016, arXiv:1607.06450).
//! Invariant: it is the RMS norm of the centred row, plus a bias; so passes that know one find it here.
//! Absent on purpose: a gradient of its own. The decomposition's is used.
use super::{composite::misfit, *};
use ScalarOp::{Add, Mul, Sub};

/// `y = (x - mean(x)) * rsqrt(var(x) + eps) * w + b`, over the last axis. Operands `x [.., c]`,
/// `w [c]`, `b [c]`; f32.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LayerNorm {
    /// Added to the variance.
    pub eps: Bits,
}

impl CompositeOp for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        match ins {
            [x, w, b]
                if x.dtype == DType::F32
                    && x.shape.rank() > 0
                    && **w == TensorType::f32([x.shape.last()])
                    && w == b =>
            {
                Ok(vec![(*x).clone()])
            }
            _ => misfit(self.name(), "f32 x [.., c], w [c] and b [c]", ins),
        }
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let c = b.shape(ins[0]).last();
        let sum = b.sum_last(ins[0])?;
        let mean = b.map_const(Mul, sum, 1.0 / c as f32)?;
        let centred = b.map(Sub, &[ins[0], mean])?;
        let norm = RmsNorm { eps: self.eps };
        let y = norm.decompose(b, &[centred, ins[1]])?;
        Ok(vec![b.map(Add, &[y[0], ins[2]])?])
    }
    fn flops(&self, ins: &[&TensorType], _: &[bool]) -> f64 {
        7.0 * ins[0].shape.numel() as f64
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let op = LayerNorm { eps: 1e-5.into() };
        let shapes: [&[usize]; 5] = [&[1, 1], &[3, 7], &[2, 5, 33], &[1, 1031], &[37, 256]];
        let one = |s: &&[usize]| {
            let w = TensorType::f32([s[s.len() - 1]]);
            (op.clone(), vec![TensorType::f32(*s), w.clone(), w])
        };
        shapes.iter().map(one).collect()
    }
}
