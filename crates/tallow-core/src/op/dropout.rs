//! Dropout (Srivastava et al. 2014), and the product of what it leaves with a small matrix: the way into an adapter.
//! Invariant: the mask is a function of seed, id and place alone, so backward makes it again and nothing keeps it.
//! Absent on purpose: a mode. Whoever evaluates leaves the op out.
use super::{composite::misfit, *};
use crate::graph::{Builder, NodeId};
use ScalarOp::{Less, Mul, Select};

/// `y = x / keep` where a uniform number below `keep` is drawn, else 0. Operands: `x` f32 of any shape, `seed [2]` u32.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Dropout {
    /// Identity of the draw, as in [`Op::Random`].
    pub id: u32,
    /// Probability that an element stays.
    pub keep: Bits,
}

/// `h [.., r] = dropout(x) Aᵀ`. Operands: `x [.., k]`, `A [r, k]`, both f32, `seed [2]` u32.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DropoutLinear(pub Dropout);

fn is_seed(t: &TensorType) -> bool {
    *t == TensorType::u32([2])
}

impl CompositeOp for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        let keeps = self.keep.get() > 0.0 && self.keep.get() <= 1.0;
        match ins {
            [x, seed] if x.dtype == DType::F32 && is_seed(seed) && keeps => Ok(vec![(*x).clone()]),
            _ => misfit(
                self.name(),
                "f32 x, a u32 seed [2], and keep above 0 up to 1",
                ins,
            ),
        }
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let (id, shape) = (self.id, b.shape(ins[0]).clone());
        let drawn = b.push(Op::Random { id, shape }, &[ins[1]])?;
        let keep = b.scalar(self.keep.get());
        let stays = b.map(Less, &[drawn, keep])?;
        let x = b.map_const(Mul, ins[0], 1.0 / self.keep.get())?;
        let zero = b.scalar(0.0);
        Ok(vec![b.map(Select, &[stays, x, zero])?])
    }
    fn vjp(&self, cx: &mut VjpCx) -> Result<Option<Vec<Option<NodeId>>>> {
        let Some(dy) = cx.cts[0] else {
            return Ok(Some(vec![None, None]));
        };
        let dx = cx.b.composite(self.clone(), &[dy, cx.ins[1]])?[0];
        Ok(Some(vec![Some(dx), None]))
    }
    fn in_place(&self, k: usize) -> Option<usize> {
        (k == 0).then_some(0)
    }
    fn flops(&self, ins: &[&TensorType], _: &[bool]) -> f64 {
        25.0 * ins[0].shape.numel() as f64
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let s: [&[usize]; 5] = [&[1], &[3, 7], &[2, 5, 33], &[4, 688], &[131]];
        let make = |(i, s): (usize, &&[usize])| {
            let op = Dropout {
                id: i as u32,
                keep: Bits::from([0.9, 0.5, 1.0][i % 3]),
            };
            (op, vec![TensorType::f32(*s), TensorType::u32([2])])
        };
        s.iter().enumerate().map(make).collect()
    }
}

impl CompositeOp for DropoutLinear {
    fn name(&self) -> &'static str {
        "dropout_linear"
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        match ins {
            [x, a, seed]
                if a.shape.rank() == 2
                    && x.shape.rank() > 0
                    && x.shape.last() == a.shape.last()
                    && a.dtype == DType::F32 =>
            {
                self.0.infer(&[x, seed])?;
                Ok(vec![TensorType::f32(x.shape.with_last(a.shape.0[0]))])
            }
            _ => misfit(self.name(), "x [.., k], A [r, k] and a seed", ins),
        }
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let x = b.composite(self.0.clone(), &[ins[0], ins[2]])?[0];
        let lead = b.shape(x).clone();
        let rows = b.reshape(x, [lead.rows(), lead.last()])?;
        let h = b.matmul(rows, false, ins[1], true)?;
        let r = b.shape(ins[1]).0[0];
        Ok(vec![b.reshape(h, lead.with_last(r))?])
    }
    fn vjp(&self, cx: &mut VjpCx) -> Result<Option<Vec<Option<NodeId>>>> {
        let mut out = vec![None; 3];
        let Some(dh) = cx.cts[0] else {
            return Ok(Some(out));
        };
        let (x, a, seed) = (cx.ins[0], cx.ins[1], cx.ins[2]);
        let lead = cx.b.shape(x).clone();
        let flat = [lead.rows(), lead.last()];
        let r = cx.b.shape(a).0[0];
        let dh = cx.b.reshape(dh, [lead.rows(), r])?;
        if cx.needs[0] {
            let d = cx.b.matmul(dh, false, a, false)?;
            let d = cx.b.reshape(d, lead)?;
            out[0] = Some(cx.b.composite(self.0.clone(), &[d, seed])?[0]);
        }
        if cx.needs[1] {
            // Behind a barrier, so that what forward left of `x` is made again and not kept.
            let again = cx.b.push(Op::Barrier(self.0.id), &[x])?;
            let left = cx.b.composite(self.0.clone(), &[again, seed])?[0];
            let left = cx.b.reshape(left, flat)?;
            out[1] = Some(cx.b.matmul(dh, true, left, false)?);
        }
        Ok(Some(out))
    }
    fn flops(&self, ins: &[&TensorType], _: &[bool]) -> f64 {
        let (x, r) = (ins[0].shape.numel() as f64, ins[1].shape.0[0] as f64);
        x * (25.0 + 2.0 * r)
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let make = |(x, r, keep): (&[usize], usize, f32)| {
            let k = x.last().copied().unwrap_or(1);
            let op = DropoutLinear(Dropout {
                id: 7,
                keep: keep.into(),
            });
            let seed = TensorType::u32([2]);
            (op, vec![TensorType::f32(x), TensorType::f32([r, k]), seed])
        };
        let all: [(&[usize], usize, f32); 3] = [
            (&[1, 1], 1, 0.5),
            (&[2, 3, 33], 5, 0.75),
            (&[17, 64], 8, 0.9),
        ];
        all.into_iter().map(make).collect()
    }
}
