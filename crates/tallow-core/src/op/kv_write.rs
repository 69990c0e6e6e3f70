//! Writing new keys or values into a cache whose index is the position.
use super::{composite::misfit, *};
use crate::graph::{Builder, NodeId};
use ScalarOp::{Equal, Select};

/// `cache [b, s, h, d]` with row `pos[b, i]` replaced by `new[b, i]`. Operands `cache`,
/// `new [b, t, h, d]`, `pos [b, t] u32`. Positions at or past `s` (padding) are not written;
/// of equal positions the last wins. Takes over the cache's storage where nobody reads the old value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KvWrite;

impl CompositeOp for KvWrite {
    fn name(&self) -> &'static str {
        "kv_write"
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        if let [cache, new, pos] = ins
            && let ([b, _, h, d], [nb, t, nh, nd]) = (&cache.shape.0[..], &new.shape.0[..])
            && [b, h, d] == [nb, nh, nd]
            && **pos == TensorType::u32([*b, *t])
            && cache.dtype == new.dtype
        {
            return Ok(vec![(*cache).clone()]);
        }
        misfit(
            self.name(),
            "cache [b, s, h, d], new [b, t, h, d], u32 pos [b, t]",
            ins,
        )
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let (s, n) = (b.shape(ins[0]).0.clone(), b.shape(ins[1]).0.clone());
        let row = b.push(Op::Iota([1, s[1], 1, 1].into(), 1), &[])?;
        let pos = b.cast(ins[2], DType::F32)?;
        let mut cache = ins[0];
        for i in 0..n[1] {
            let p = b.slice(pos, 1, i, 1)?;
            let p = b.reshape(p, [s[0], 1, 1, 1])?;
            let hit = b.map(Equal, &[row, p])?;
            let hit = b.cast(hit, b.ty(cache).dtype)?;
            let new = b.slice(ins[1], 1, i, 1)?;
            cache = b.map(Select, &[hit, new, cache])?;
        }
        Ok(vec![cache])
    }
    fn in_place(&self, _: usize) -> Option<usize> {
        Some(0)
    }
    fn flops(&self, _: &[&TensorType], _: &[bool]) -> f64 {
        0.0
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let sizes = [[1, 1, 1, 1, 2], [2, 7, 3, 2, 6], [1, 33, 5, 1, 32]];
        let make = |[b, s, t, h, d]: [usize; 5]| {
            let (cache, new) = (TensorType::f32([b, s, h, d]), TensorType::f32([b, t, h, d]));
            (KvWrite, vec![cache, new, TensorType::u32([b, t])])
        };
        sizes.into_iter().map(make).collect()
    }
}
