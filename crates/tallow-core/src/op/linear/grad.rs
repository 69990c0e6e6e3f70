//! The gradient of a linear in its input, one product as the linear itself.
//! Invariant: the frozen weights get no gradient; each share of the rows reads its own adapters only.
//! Absent on purpose: `dA` and `dB`; they are products of what is computed here.
use super::{super::composite::misfit, *};
use crate::graph::{Builder, NodeId};

impl CompositeOp for LinearGrad {
    fn name(&self) -> &'static str {
        if self.ranks().iter().any(|r| *r > 0) {
            "lora_linear_grad"
        } else {
            "linear_grad"
        }
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        let at = layout(&self.blocks, false);
        let (Some(dy), Some(w)) = (ins.first(), ins.get(1)) else {
            return misfit("linear_grad", "dy and weights", ins);
        };
        let k = w.shape.last();
        check("linear_grad", &self.blocks, at, self.residual, k, ins)?;
        let dx = TensorType::f32(dy.shape.with_last(k));
        if dy.shape.last() != outputs(&self.blocks) || self.residual && *ins[ins.len() - 1] != dx {
            return misfit(self.name(), "dy [.., Σn] and a residual like dx", ins);
        }
        let mut all = vec![dx];
        all.extend(hidden_types(&self.blocks, &dy.shape));
        Ok(all)
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let lead = b.shape(ins[0]).clone();
        let k = b.shape(ins[1]).last();
        let count = shares(&self.blocks);
        let (mut all, mut out) = (vec![], vec![]);
        for g in 0..count {
            let dy = share(b, ins[0], g, count)?;
            let (dx, dhs) = self.decompose_share(b, ins, dy, g)?;
            all.push(dx);
            if !dhs.is_empty() {
                out.push(b.concat(1, &dhs)?);
            }
        }
        let dx = b.concat(0, &all)?;
        let mut dx = b.reshape(dx, lead.with_last(k))?;
        if let (true, Some(r)) = (self.residual, ins.last()) {
            dx = b.map(Add, &[dx, *r])?;
        }
        for (dh, ty) in out.iter_mut().zip(hidden_types(&self.blocks, &lead)) {
            *dh = b.reshape(*dh, ty.shape)?;
        }
        out.insert(0, dx);
        Ok(out)
    }
    fn flops(&self, ins: &[&TensorType], live: &[bool]) -> f64 {
        let (rows, k) = (ins[0].shape.rows() as f64, ins[1].shape.last() as f64);
        if live.first() == Some(&true) {
            return product_flops(&self.blocks, rows, k);
        }
        let one = |b: &Block| b.n as f64 * mean_rank(b);
        2.0 * rows * self.blocks.iter().map(one).sum::<f64>()
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let make = |(rows, k, blocks, residual): (usize, usize, Vec<Block>, bool)| {
            let mut ins = vec![TensorType::f32([rows, outputs(&blocks)])];
            for b in &blocks {
                ins.push(TensorType::f32([b.n, k]));
                ins.extend(adapter_types(b, k));
            }
            ins.extend(residual.then(|| TensorType::f32([rows, k])));
            (LinearGrad { blocks, residual }, ins)
        };
        example_blocks().into_iter().map(make).collect()
    }
}

impl LinearGrad {
    /// `dx` of the rows `dy [m, Σn]` of share `g`, and `dh` of each block with an adapter.
    fn decompose_share(
        &self,
        b: &mut Builder,
        ins: &[NodeId],
        dy: NodeId,
        g: usize,
    ) -> Result<(NodeId, Vec<NodeId>)> {
        let (mut dx, mut dhs, mut n0) = (None, vec![], 0);
        let mut sum = |b: &mut Builder, d: NodeId| {
            dx = Some(match dx {
                Some(p) => b.map(Add, &[p, d])?,
                None => d,
            });
            Ok(())
        };
        for (block, i) in self.blocks.iter().zip(self.ins()) {
            let dy_i = b.slice(dy, 1, n0, block.n)?;
            n0 += block.n;
            let w = b.cast(ins[i.w], DType::F32)?;
            let d = b.matmul(dy_i, false, w, false)?;
            sum(b, d)?;
            if let (Some((_, alpha)), Some((a, bb))) = (block.adapters[g], i.ab[g]) {
                let (ta, tb) = (false, false);
                let dh = b.push(Op::MatMul { ta, tb, alpha }, &[dy_i, ins[bb]])?;
                let d = b.matmul(dh, false, ins[a], false)?;
                sum(b, d)?;
                dhs.push(dh);
            }
        }
        match dx {
            Some(dx) => Ok((dx, dhs)),
            None => misfit(self.name(), "at least one block", &[]),
        }
    }
}
