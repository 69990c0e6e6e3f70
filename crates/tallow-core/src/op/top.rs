//! The likeliest token: where a row has its largest value.
use super::{composite::misfit, *};
use crate::graph::{Builder, NodeId};
use ScalarOp::{Equal, Neg, Select};

/// Of each row of `l [n, v]` f32 the index of its largest value, the first of equals, and that value: `[n, 2]` f32.
/// Where a value is NaN the index is `v`. Indices are exact below 2²⁴.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Top;

impl CompositeOp for Top {
    fn name(&self) -> &'static str {
        "top"
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        match ins {
            [l] if l.dtype == DType::F32
                && l.shape.rank() == 2
                && (1..1 << 24).contains(&l.shape.last()) =>
            {
                Ok(vec![TensorType::f32([l.shape.0[0], 2])])
            }
            _ => misfit(self.name(), "f32 l [n, v] with v from 1 to 2^24 - 1", ins),
        }
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let v = b.shape(ins[0]).last();
        let most = b.reduce(ReduceOp::Max, 1, ins[0])?;
        let index = b.push(Op::Iota([1, v].into(), 1), &[])?;
        let past = b.scalar(v as f32);
        let least = |b: &mut Builder, x: NodeId| {
            let x = b.map(Neg, &[x])?;
            let x = b.reduce(ReduceOp::Max, 1, x)?;
            b.map(Neg, &[x])
        };
        let hit = b.map(Equal, &[ins[0], most])?;
        let at = b.map(Select, &[hit, index, past])?;
        let at = least(b, at)?;
        // NaN equals nothing.
        let real = b.map(Equal, &[ins[0], ins[0]])?;
        let all = least(b, real)?;
        let at = b.map(Select, &[all, at, past])?;
        Ok(vec![b.concat(1, &[at, most])?])
    }
    fn vjp(&self, _: &mut VjpCx) -> Result<Option<Vec<Option<NodeId>>>> {
        // The decomposition has one where it has one.
        Ok(None)
    }
    fn flops(&self, ins: &[&TensorType], _: &[bool]) -> f64 {
        2.0 * ins[0].shape.numel() as f64
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let shapes: [&[usize]; 4] = [&[1, 1], &[3, 7], &[2, 1031], &[1, 5000]];
        let make = |s: &&[usize]| (Top, vec![TensorType::f32(*s)]);
        shapes.iter().map(make).collect()
    }
}
