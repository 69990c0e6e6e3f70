//! Linear layers with adapters: the op this project exists for.
//! LoRA (Hu et al. 2021, arXiv:2106.09685): `y = x Wᵀ + bias + s (x Aᵀ) Bᵀ`. Projections that share
//! `x` (q, k, v; gate, up) are blocks of one op, their results side by side. Several adapters trained side by
//! side share the rows of `x`, an equal part each: the product with `W` is one for all of them.
//! Invariant: `W` is never differentiated unless asked for; the gradient keeps the adapter inside the product.
use super::{composite::misfit, *};
use crate::graph::{Builder, NodeId};
use ScalarOp::Add;

mod grad;

/// One projection of a [`Linear`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Block {
    /// Outputs.
    pub n: usize,
    /// Has a bias `[n]`.
    pub bias: bool,
    /// Rank and scale of its adapter in each share of the rows, where it has one. All blocks of an op have
    /// equally many shares, at least one.
    pub adapters: Vec<Option<(usize, Bits)>>,
}

/// `y [.., Σn]` and, for each share with an adapter, `h [.., Σr]` of its rows, with `h_i = x A_iᵀ`.
/// Operands: `x [.., k]` f32, whose first axis the shares divide evenly; for each block `W [n, k]`, then its bias
/// `[n]`, then `A [r, k]`, `B [n, r]` of each share that has them; last, with `residual`, a tensor like `y` that is added.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Linear {
    /// Projections, in the order of their outputs.
    pub blocks: Vec<Block>,
    /// Add a last operand to the result.
    pub residual: bool,
}

/// Gradient of a [`Linear`] in its input. Operands: `dy [.., Σn]`; for each block `W`, then `A`, `B` of each share
/// that has them; last, with `residual`, a tensor like `x` that is added to `dx`. Results:
/// `dx [.., k] = Σ dy_i W_i + Σ dh_i A_i` and, for each share with an adapter, `dh [.., Σr]`, `dh_i = s dy_i B_i`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LinearGrad {
    /// Projections, as in the forward op (biases are not operands here).
    pub blocks: Vec<Block>,
    /// Add a last operand to `dx`.
    pub residual: bool,
}

/// Where the operands of one block are.
#[derive(Clone, Debug)]
pub struct LinearIns {
    /// Weight `[n, k]`.
    pub w: usize,
    /// Bias `[n]`.
    pub bias: Option<usize>,
    /// `A [r, k]` and `B [n, r]` of each share.
    pub ab: Vec<Option<(usize, usize)>>,
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
            ab: b
                .adapters
                .iter()
                .map(|a| a.map(|_| (take(), take())))
                .collect(),
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
    let shares = shares(blocks);
    let fits = ins.len() == used + usize::from(residual)
        && blocks.iter().zip(&at).all(|(b, i)| {
            let mut adapters = b.adapters.iter().zip(&i.ab);
            let adapted = adapters.all(|(adapter, ab)| match (adapter, ab) {
                (Some((r, _)), Some((a, bb))) => {
                    *ins[*a] == TensorType::f32([*r, k]) && *ins[*bb] == TensorType::f32([b.n, *r])
                }
                _ => true,
            });
            adapted
                && b.adapters.len() == shares
                && ins[i.w].shape == [b.n, k].into()
                && ins[i.w].dtype.is_float()
                && i.bias.is_none_or(|j| *ins[j] == TensorType::f32([b.n]))
        });
    let lead = &ins[0].shape;
    let divides = shares == 1 || shares > 1 && lead.rank() > 1 && lead.0[0].is_multiple_of(shares);
    if fits && divides && ins[0].dtype == DType::F32 {
        return Ok(());
    }
    let n: Vec<_> = blocks.iter().map(|b| b.n).collect();
    misfit(
        name,
        &format!(
            "f32 operands of a product with inner extent {k} and outputs {n:?}, rows in {shares} equal shares"
        ),
        ins,
    )
}

/// Parts of the rows that have adapters of their own.
fn shares(blocks: &[Block]) -> usize {
    blocks.first().map_or(0, |b| b.adapters.len())
}

/// Sum of the blocks' ranks in each share.
fn ranks(blocks: &[Block]) -> Vec<usize> {
    let rank = |g: usize| {
        let all = blocks
            .iter()
            .filter_map(move |b| b.adapters.get(g)?.as_ref());
        all.map(|a| a.0)
    };
    (0..shares(blocks)).map(|g| rank(g).sum()).collect()
}

/// Which result is `h` or `dh` of each share, from 1.
fn hidden(blocks: &[Block]) -> Vec<Option<usize>> {
    let mut next = 0;
    let mut number = |r: usize| {
        next += usize::from(r > 0);
        (r > 0).then_some(next)
    };
    ranks(blocks).into_iter().map(&mut number).collect()
}

/// Types of `h` or `dh`, given that of all rows.
fn hidden_types(blocks: &[Block], rows: &Shape) -> Vec<TensorType> {
    let one = |r: usize| {
        let mut shape = rows.with_last(r);
        shape.0[0] /= shares(blocks);
        TensorType::f32(shape)
    };
    let with = ranks(blocks).into_iter().filter(|r| *r > 0);
    with.map(one).collect()
}

fn outputs(blocks: &[Block]) -> usize {
    blocks.iter().map(|b| b.n).sum()
}

/// The rows of share `g` of `count`, flattened: `[rows, last]`.
fn share(b: &mut Builder, x: NodeId, g: usize, count: usize) -> Result<NodeId> {
    if count == 1 {
        return flat(b, x);
    }
    let len = b.shape(x).0[0] / count;
    let part = b.slice(x, 0, g * len, len)?;
    flat(b, part)
}

/// Multiplications and additions of one pass, with the adapters inside.
fn product_flops(blocks: &[Block], rows: f64, k: f64) -> f64 {
    let one = |b: &Block| {
        let r = mean_rank(b);
        b.n as f64 * (k + r) + r * k
    };
    2.0 * rows * blocks.iter().map(one).sum::<f64>()
}

fn mean_rank(b: &Block) -> f64 {
    let all: usize = b.adapters.iter().flatten().map(|a| a.0).sum();
    all as f64 / b.adapters.len().max(1) as f64
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
    /// Parts of the rows that have adapters of their own.
    pub fn shares(&self) -> usize {
        shares(&self.blocks)
    }
    /// Sum of the blocks' ranks in each share.
    pub fn ranks(&self) -> Vec<usize> {
        ranks(&self.blocks)
    }
    /// Which result is `h` of each share, where it has adapters.
    pub fn hidden(&self) -> Vec<Option<usize>> {
        hidden(&self.blocks)
    }
    /// Has any block an adapter?
    pub fn is_adapted(&self) -> bool {
        self.ranks().iter().any(|r| *r > 0)
    }
}

impl LinearGrad {
    /// Where each block's operands are.
    pub fn ins(&self) -> Vec<LinearIns> {
        layout(&self.blocks, false).0
    }
    /// Sum of the blocks' ranks in each share.
    pub fn ranks(&self) -> Vec<usize> {
        ranks(&self.blocks)
    }
    /// Which result is `dh` of each share, where it has adapters.
    pub fn hidden(&self) -> Vec<Option<usize>> {
        hidden(&self.blocks)
    }
}

/// Rows of the flattened operand, `[rows, last]`.
fn flat(b: &mut Builder, x: NodeId) -> Result<NodeId> {
    let s = b.shape(x);
    let to = [s.rows(), s.last()];
    b.reshape(x, to)
}

impl Linear {
    /// Results of every block, and `h` of those with an adapter, for the rows `x [m, k]` of share `g`.
    fn decompose_share(
        &self,
        b: &mut Builder,
        ins: &[NodeId],
        x: NodeId,
        g: usize,
    ) -> Result<(Vec<NodeId>, Vec<NodeId>)> {
        let (mut ys, mut hs) = (vec![], vec![]);
        for (block, i) in self.blocks.iter().zip(self.ins()) {
            let w = b.cast(ins[i.w], DType::F32)?;
            let mut y = b.matmul(x, false, w, true)?;
            if let Some(bias) = i.bias {
                y = b.map(Add, &[y, ins[bias]])?;
            }
            if let (Some((_, alpha)), Some((a, bb))) = (block.adapters[g], i.ab[g]) {
                let h = b.matmul(x, false, ins[a], true)?;
                let (ta, tb) = (false, true);
                let up = b.push(Op::MatMul { ta, tb, alpha }, &[h, ins[bb]])?;
                y = b.map(Add, &[y, up])?;
                hs.push(h);
            }
            ys.push(y);
        }
        Ok((ys, hs))
    }

    /// Gradients of weights and biases, where they are wanted.
    fn vjp_base(&self, cx: &mut VjpCx, dy: NodeId, out: &mut [Option<NodeId>]) -> Result<()> {
        let mut n0 = 0;
        for (block, i) in self.blocks.iter().zip(self.ins()) {
            let wanted = cx.needs[i.w] || i.bias.is_some_and(|j| cx.needs[j]);
            if wanted {
                let dy = flat(cx.b, dy)?;
                let dy = cx.b.slice(dy, 1, n0, block.n)?;
                if cx.needs[i.w] {
                    let x = flat(cx.b, cx.ins[0])?;
                    let dw = cx.b.push(tn(Bits::from(1.0)), &[dy, x])?;
                    out[i.w] = Some(cx.b.cast(dw, cx.b.ty(cx.ins[i.w]).dtype)?);
                }
                if let Some(j) = i.bias.filter(|j| cx.needs[*j]) {
                    let sum = cx.b.reduce(ReduceOp::Sum, 0, dy)?;
                    out[j] = Some(cx.b.reshape(sum, [block.n])?);
                }
            }
            n0 += block.n;
        }
        Ok(())
    }

    /// `dA = dhᵀ x` and `dB = s dyᵀ h` of share `g`.
    fn vjp_share(
        &self,
        cx: &mut VjpCx,
        g: usize,
        [dy, dh, h]: [NodeId; 3],
        out: &mut [Option<NodeId>],
    ) -> Result<()> {
        let count = self.shares();
        let x = share(cx.b, cx.ins[0], g, count)?;
        let dy = share(cx.b, dy, g, count)?;
        let (dh, h) = (flat(cx.b, dh)?, flat(cx.b, h)?);
        let (mut n0, mut r0) = (0, 0);
        for (block, i) in self.blocks.iter().zip(self.ins()) {
            if let (Some((r, scale)), Some((a, bb))) = (block.adapters[g], i.ab[g]) {
                if cx.needs[a] {
                    let dh = cx.b.slice(dh, 1, r0, r)?;
                    out[a] = Some(cx.b.push(tn(Bits::from(1.0)), &[dh, x])?);
                }
                if cx.needs[bb] {
                    let dy = cx.b.slice(dy, 1, n0, block.n)?;
                    let h = cx.b.slice(h, 1, r0, r)?;
                    out[bb] = Some(cx.b.push(tn(scale), &[dy, h])?);
                }
                r0 += r;
            }
            n0 += block.n;
        }
        Ok(())
    }
}

/// `alpha aᵀ b`.
fn tn(alpha: Bits) -> Op {
    Op::MatMul {
        ta: true,
        tb: false,
        alpha,
    }
}

impl CompositeOp for Linear {
    fn name(&self) -> &'static str {
        if self.is_adapted() {
            "lora_linear"
        } else {
            "linear"
        }
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        let Some(x) = ins.first().filter(|x| x.shape.rank() > 0) else {
            return misfit("linear", "x [.., k]", ins);
        };
        let at = layout(&self.blocks, true);
        let k = x.shape.last();
        check("linear", &self.blocks, at, self.residual, k, ins)?;
        let y = TensorType::f32(x.shape.with_last(self.n()));
        if self.residual && *ins[ins.len() - 1] != y {
            return misfit(self.name(), &format!("a residual {y}"), ins);
        }
        let mut all = vec![y];
        all.extend(hidden_types(&self.blocks, &x.shape));
        Ok(all)
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let lead = b.shape(ins[0]).clone();
        let count = self.shares();
        let (mut all, mut out) = (vec![], vec![]);
        for g in 0..count {
            let x = share(b, ins[0], g, count)?;
            let (ys, hs) = self.decompose_share(b, ins, x, g)?;
            all.push(b.concat(1, &ys)?);
            if !hs.is_empty() {
                out.push(b.concat(1, &hs)?);
            }
        }
        let y = b.concat(0, &all)?;
        let mut y = b.reshape(y, lead.with_last(self.n()))?;
        if let (true, Some(r)) = (self.residual, ins.last()) {
            y = b.map(Add, &[y, *r])?;
        }
        let types = hidden_types(&self.blocks, &lead);
        for (h, ty) in out.iter_mut().zip(types) {
            *h = b.reshape(*h, ty.shape)?;
        }
        out.insert(0, y);
        Ok(out)
    }
    fn vjp(&self, cx: &mut VjpCx) -> Result<Option<Vec<Option<NodeId>>>> {
        if cx.cts[1..].iter().any(Option::is_some) {
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
            let ab = i.ab.iter().flatten();
            ins.extend(ab.flat_map(|(a, b)| [cx.ins[*a], cx.ins[*b]]));
        }
        let grad = LinearGrad {
            blocks: self.blocks.clone(),
            residual: false,
        };
        let d = cx.b.composite(grad, &ins)?;
        out[0] = Some(d[0]);
        self.vjp_base(cx, dy, &mut out)?;
        for (g, number) in self.hidden().into_iter().enumerate() {
            if let Some(number) = number {
                self.vjp_share(cx, g, [dy, d[number], cx.outs[number]], &mut out)?;
            }
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
                ins.extend(adapter_types(b, k));
            }
            ins.extend(residual.then(|| TensorType::f32([rows, op.n()])));
            (op, ins)
        };
        example_blocks().into_iter().map(make).collect()
    }
}

/// `A` and `B` of each share.
fn adapter_types(b: &Block, k: usize) -> Vec<TensorType> {
    let two = |(r, _): &(usize, Bits)| [TensorType::f32([*r, k]), TensorType::f32([b.n, *r])];
    b.adapters.iter().flatten().flat_map(two).collect()
}

/// Rows, inner extent, blocks, residual.
fn example_blocks() -> Vec<(usize, usize, Vec<Block>, bool)> {
    let scales = [1.75, 0.5, -2.0, 1.0, 3.0, 0.25, 1.25, 0.75];
    // Ranks: 0 where there is no adapter.
    let block = |n: usize, bias: bool, ranks: &[usize]| Block {
        n,
        bias,
        adapters: (ranks.iter().zip(scales))
            .map(|(r, s)| (*r > 0).then(|| (*r, Bits::from(s))))
            .collect(),
    };
    vec![
        (1, 1, vec![block(1, false, &[1])], false),
        (3, 7, vec![block(5, true, &[0])], true),
        (
            1,
            33,
            vec![
                block(31, false, &[3]),
                block(33, true, &[0]),
                block(64, false, &[8]),
            ],
            false,
        ),
        (37, 64, vec![block(65, false, &[8])], true),
        (
            13,
            127,
            vec![block(32, true, &[5]), block(1, true, &[2])],
            true,
        ),
        (
            130,
            96,
            vec![block(96, false, &[16]), block(40, false, &[4])],
            false,
        ),
        // Several adapters, each with rows of its own.
        (2, 5, vec![block(3, false, &[1, 2])], false),
        (
            14,
            33,
            vec![block(31, true, &[3, 8]), block(40, false, &[4, 1])],
            true,
        ),
        (
            8 * 37,
            64,
            vec![
                block(33, false, &[8, 1, 2, 16, 4, 0, 3, 8]),
                block(7, false, &[0, 1, 0, 0, 2, 0, 8, 1]),
            ],
            false,
        ),
        (300, 70, vec![block(65, true, &[5, 0, 40])], true),
    ]
}
