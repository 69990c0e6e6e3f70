//! Linear layers with adapters: the op this project exists for.
//! LoRA (Hu et al. 2021, arXiv:2106.09685): `y = x Wᵀ + bias + s (x Aᵀ) Bᵀ`. Projections that share
//! `x` (q, k, v; gate, up) are blocks of one op, their results side by side.
//! Invariant: `W` is never differentiated unless asked for; the gradient keeps the adapter inside the product.
use super::{composite::misfit, *};
use crate::graph::{Builder, NodeId};
use ScalarOp::Add;

/// One projection of a [`Linear`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Block {
    /// Outputs.
    pub n: usize,
    /// Has a bias `[n]`.
    pub bias: bool,
    /// Rank and scale of its adapter, if it has one.
    pub adapter: Option<(usize, Bits)>,
}

/// `y [.., Σn]` and, if any block has an adapter, `h [.., Σr]` with `h_i = x A_iᵀ`.
/// Operands: `x [.., k]` f32; for each block `W [n, k]`, then its bias `[n]`, then `A [r, k]`, `B [n, r]`;
/// last, with `residual`, a tensor like `y` that is added.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Linear {
    /// Projections, in the order of their outputs.
    pub blocks: Vec<Block>,
    /// Add a last operand to the result.
    pub residual: bool,
}

/// Gradient of a [`Linear`] in its input. Operands: `dy [.., Σn]`; for each block `W`, then `A`, `B`;
/// last, with `residual`, a tensor like `x` that is added to `dx`. Results:
/// `dx [.., k] = Σ dy_i W_i + Σ dh_i A_i` and, if any block has an adapter, `dh [.., Σr]`, `dh_i = s dy_i B_i`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LinearGrad {
    /// Projections, as in the forward op (biases are not operands here).
    pub blocks: Vec<Block>,
    /// Add a last operand to `dx`.
    pub residual: bool,
}

/// Where the operands of one block are.
#[derive(Clone, Copy, Debug)]
pub struct LinearIns {
    /// Weight `[n, k]`.
    pub w: usize,
    /// Bias `[n]`.
    pub bias: Option<usize>,
    /// `A [r, k]` and `B [n, r]`.
    pub ab: Option<(usize, usize)>,
}

fn layout(blocks: &[Block], biases: bool) -> (Vec<LinearIns>, usize) {
    let mut next = 1;
    let mut take = || {
        next += 1;
        next - 1
    };
    let ins = blocks
        .iter()
        .map(|b| LinearIns {
            w: take(),
            bias: (biases && b.bias).then(&mut take),
            ab: b.adapter.map(|_| (take(), take())),
        })
        .collect();
    (ins, next)
}

fn check(
    name: &'static str,
    blocks: &[Block],
    (at, used): (Vec<LinearIns>, usize),
    residual: bool,
    k: usize,
    ins: &[&TensorType],
) -> Result<()> {
    let fits = ins.len() == used + usize::from(residual)
        && !blocks.is_empty()
        && blocks.iter().zip(&at).all(|(b, i)| {
            let adapter = match (b.adapter, i.ab) {
                (Some((r, _)), Some((a, bb))) => {
                    *ins[a] == TensorType::f32([r, k]) && *ins[bb] == TensorType::f32([b.n, r])
                }
                _ => true,
            };
            adapter
                && ins[i.w].shape == [b.n, k].into()
                && ins[i.w].dtype.is_float()
                && i.bias.is_none_or(|j| *ins[j] == TensorType::f32([b.n]))
        });
    if fits && ins[0].dtype == DType::F32 {
        return Ok(());
    }
    let n: Vec<_> = blocks.iter().map(|b| b.n).collect();
    misfit(
        name,
        &format!("f32 operands of a product with inner extent {k} and outputs {n:?}"),
        ins,
    )
}

fn ranks(blocks: &[Block]) -> usize {
    blocks.iter().filter_map(|b| b.adapter).map(|a| a.0).sum()
}

fn outputs(blocks: &[Block]) -> usize {
    blocks.iter().map(|b| b.n).sum()
}

/// Multiplications and additions of one pass, with the adapters inside.
fn product_flops(blocks: &[Block], rows: f64, k: f64) -> f64 {
    let one = |b: &Block| {
        let r = b.adapter.map_or(0, |a| a.0) as f64;
        b.n as f64 * (k + r) + r * k
    };
    2.0 * rows * blocks.iter().map(one).sum::<f64>()
}

impl Linear {
    /// Where each block's operands are.
    pub fn ins(&self) -> Vec<LinearIns> {
        layout(&self.blocks, true).0
    }
    /// Sum of the blocks' outputs.
    pub fn n(&self) -> usize {
        outputs(&self.blocks)
    }
    /// Sum of the blocks' ranks.
    pub fn rank(&self) -> usize {
        ranks(&self.blocks)
    }
}

impl LinearGrad {
    /// Where each block's operands are.
    pub fn ins(&self) -> Vec<LinearIns> {
        layout(&self.blocks, false).0
    }
}

/// Rows of the flattened operand, `[rows, last]`.
fn flat(b: &mut Builder, x: NodeId) -> Result<NodeId> {
    let s = b.shape(x);
    let to = [s.rows(), s.last()];
    b.reshape(x, to)
}

impl CompositeOp for Linear {
    fn name(&self) -> &'static str {
        if self.rank() > 0 {
            "lora_linear"
        } else {
            "linear"
        }
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        let Some(x) = ins.first().filter(|x| x.shape.rank() > 0) else {
            return misfit(self.name(), "x [.., k]", ins);
        };
        let at = layout(&self.blocks, true);
        check(
            self.name(),
            &self.blocks,
            at,
            self.residual,
            x.shape.last(),
            ins,
        )?;
        let y = TensorType::f32(x.shape.with_last(self.n()));
        if self.residual && *ins[ins.len() - 1] != y {
            return misfit(self.name(), &format!("a residual {y}"), ins);
        }
        let h = TensorType::f32(x.shape.with_last(self.rank()));
        Ok(if self.rank() > 0 { vec![y, h] } else { vec![y] })
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let lead = b.shape(ins[0]).clone();
        let x = flat(b, ins[0])?;
        let (mut ys, mut hs) = (vec![], vec![]);
        for (block, i) in self.blocks.iter().zip(self.ins()) {
            let w = b.cast(ins[i.w], DType::F32)?;
            let mut y = b.matmul(x, false, w, true)?;
            if let Some(bias) = i.bias {
                y = b.map(Add, &[y, ins[bias]])?;
            }
            if let (Some((_, alpha)), Some((a, bb))) = (block.adapter, i.ab) {
                let h = b.matmul(x, false, ins[a], true)?;
                let (ta, tb) = (false, true);
                let up = b.push(Op::MatMul { ta, tb, alpha }, &[h, ins[bb]])?;
                y = b.map(Add, &[y, up])?;
                hs.push(h);
            }
            ys.push(y);
        }
        let y = b.concat(1, &ys)?;
        let mut y = b.reshape(y, lead.with_last(self.n()))?;
        if let (true, Some(r)) = (self.residual, ins.last()) {
            y = b.map(Add, &[y, *r])?;
        }
        let mut out = vec![y];
        if !hs.is_empty() {
            let h = b.concat(1, &hs)?;
            out.push(b.reshape(h, lead.with_last(self.rank()))?);
        }
        Ok(out)
    }
    fn vjp(&self, cx: &mut VjpCx) -> Result<Option<Vec<Option<NodeId>>>> {
        if cx.cts.get(1).is_some_and(Option::is_some) {
            return Ok(None);
        }
        let mut out = vec![None; cx.ins.len()];
        let Some(dy) = cx.cts[0] else {
            return Ok(Some(out));
        };
        if self.residual {
            out[cx.ins.len() - 1] = Some(dy);
        }
        let at = self.ins();
        let mut ins = vec![dy];
        for i in &at {
            ins.push(cx.ins[i.w]);
            ins.extend(i.ab.iter().flat_map(|(a, b)| [cx.ins[*a], cx.ins[*b]]));
        }
        let grad = LinearGrad {
            blocks: self.blocks.clone(),
            residual: false,
        };
        let d = cx.b.composite(grad, &ins)?;
        out[0] = Some(d[0]);
        let x = flat(cx.b, cx.ins[0])?;
        let dy = flat(cx.b, dy)?;
        let (mut n0, mut r0) = (0, 0);
        for (block, i) in self.blocks.iter().zip(&at) {
            let dy_i = cx.b.slice(dy, 1, n0, block.n)?;
            let alpha = Bits::from(1.0);
            let tn = |alpha| Op::MatMul {
                ta: true,
                tb: false,
                alpha,
            };
            if cx.needs[i.w] {
                let dw = cx.b.push(tn(alpha), &[dy_i, x])?;
                out[i.w] = Some(cx.b.cast(dw, cx.b.ty(cx.ins[i.w]).dtype)?);
            }
            if let Some(j) = i.bias.filter(|j| cx.needs[*j]) {
                let sum = cx.b.reduce(ReduceOp::Sum, 0, dy_i)?;
                out[j] = Some(cx.b.reshape(sum, [block.n])?);
            }
            if let (Some((r, scale)), Some((a, bb))) = (block.adapter, i.ab) {
                let dh = flat(cx.b, d[1])?;
                let dh = cx.b.slice(dh, 1, r0, r)?;
                let h = flat(cx.b, cx.outs[1])?;
                let h = cx.b.slice(h, 1, r0, r)?;
                if cx.needs[a] {
                    out[a] = Some(cx.b.push(tn(alpha), &[dh, x])?);
                }
                if cx.needs[bb] {
                    out[bb] = Some(cx.b.push(tn(scale), &[dy_i, h])?);
                }
                r0 += r;
            }
            n0 += block.n;
        }
        Ok(Some(out))
    }
    fn flops(&self, ins: &[&TensorType], _: &[bool]) -> f64 {
        let x = &ins[0].shape;
        product_flops(&self.blocks, x.rows() as f64, x.last() as f64)
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let make = |(rows, k, blocks, residual): (usize, usize, Vec<Block>, bool)| {
            let op = Linear { blocks, residual };
            let mut ins = vec![TensorType::f32([rows, k])];
            for b in &op.blocks {
                ins.push(TensorType::f32([b.n, k]));
                ins.extend(b.bias.then(|| TensorType::f32([b.n])));
                if let Some((r, _)) = b.adapter {
                    ins.extend([TensorType::f32([r, k]), TensorType::f32([b.n, r])]);
                }
            }
            ins.extend(residual.then(|| TensorType::f32([rows, op.n()])));
            (op, ins)
        };
        example_blocks().into_iter().map(make).collect()
    }
}

/// Rows, inner extent, blocks, residual.
fn example_blocks() -> Vec<(usize, usize, Vec<Block>, bool)> {
    let block = |n: usize, bias: bool, rank: usize| Block {
        n,
        bias,
        adapter: (rank > 0).then(|| (rank, Bits::from(1.75))),
    };
    vec![
        (1, 1, vec![block(1, false, 1)], false),
        (3, 7, vec![block(5, true, 0)], true),
        (
            1,
            33,
            vec![block(31, false, 3), block(33, true, 0), block(64, false, 8)],
            false,
        ),
        (37, 64, vec![block(65, false, 8)], true),
        (13, 127, vec![block(32, true, 5), block(1, true, 2)], true),
        (
            130,
            96,
            vec![block(96, false, 16), block(40, false, 4)],
            false,
        ),
    ]
}

impl CompositeOp for LinearGrad {
    fn name(&self) -> &'static str {
        if ranks(&self.blocks) > 0 {
            "lora_linear_grad"
        } else {
            "linear_grad"
        }
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        let at = layout(&self.blocks, false);
        let (Some(dy), Some(w)) = (ins.first(), ins.get(1)) else {
            return misfit(self.name(), "dy and weights", ins);
        };
        let k = w.shape.last();
        check(self.name(), &self.blocks, at, self.residual, k, ins)?;
        let dx = TensorType::f32(dy.shape.with_last(k));
        if dy.shape.last() != outputs(&self.blocks) || self.residual && *ins[ins.len() - 1] != dx {
            return misfit(self.name(), "dy [.., Σn] and a residual like dx", ins);
        }
        let rank = ranks(&self.blocks);
        let dh = TensorType::f32(dy.shape.with_last(rank));
        Ok(if rank > 0 { vec![dx, dh] } else { vec![dx] })
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let lead = b.shape(ins[0]).clone();
        let k = b.shape(ins[1]).last();
        let dy = flat(b, ins[0])?;
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
            if let (Some((_, alpha)), Some((a, bb))) = (block.adapter, i.ab) {
                let (ta, tb) = (false, false);
                let dh = b.push(Op::MatMul { ta, tb, alpha }, &[dy_i, ins[bb]])?;
                let d = b.matmul(dh, false, ins[a], false)?;
                sum(b, d)?;
                dhs.push(dh);
            }
        }
        let Some(dx) = dx else {
            return misfit(self.name(), "at least one block", &[]);
        };
        let mut dx = b.reshape(dx, lead.with_last(k))?;
        if let (true, Some(r)) = (self.residual, ins.last()) {
            dx = b.map(Add, &[dx, *r])?;
        }
        let mut out = vec![dx];
        if !dhs.is_empty() {
            let dh = b.concat(1, &dhs)?;
            out.push(b.reshape(dh, lead.with_last(ranks(&self.blocks)))?);
        }
        Ok(out)
    }
    fn flops(&self, ins: &[&TensorType], live: &[bool]) -> f64 {
        let (rows, k) = (ins[0].shape.rows() as f64, ins[1].shape.last() as f64);
        if live.first() == Some(&true) {
            return product_flops(&self.blocks, rows, k);
        }
        let one = |b: &Block| (b.n * b.adapter.map_or(0, |a| a.0)) as f64;
        2.0 * rows * self.blocks.iter().map(one).sum::<f64>()
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let make = |(rows, k, blocks, residual): (usize, usize, Vec<Block>, bool)| {
            let mut ins = vec![TensorType::f32([rows, outputs(&blocks)])];
            for b in &blocks {
                ins.push(TensorType::f32([b.n, k]));
                if let Some((r, _)) = b.adapter {
                    ins.extend([TensorType::f32([r, k]), TensorType::f32([b.n, r])]);
                }
            }
            ins.extend(residual.then(|| TensorType::f32([rows, k])));
            (LinearGrad { blocks, residual }, ins)
        };
        example_blocks().into_iter().map(make).collect()
    }
}
