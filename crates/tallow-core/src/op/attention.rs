//! Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762) with grouped heads
//! (Ainslie et al. 2023, arXiv:2305.13245), sliding windows, and rows of several documents; the index
//! of a key is its position.
//! Invariant: kernels and the gradient never form `[t, s]` for all heads; only the decomposition does.
use super::{composite::misfit, *};
use crate::graph::{Builder, NodeId};
use ScalarOp::{Add, Div, Exp, Less, Log, Mul, Select, Sub};

/// Which keys a query sees. A key's index is its position; a query's position is data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mask {
    /// Every key.
    Full,
    /// Keys at or before the query; with a window of `w`, itself and the `w - 1` before it.
    Causal {
        /// Number of keys seen, the query's own included; `None`: all before it.
        window: Option<u32>,
    },
}

/// `o = softmax(scale * q kᵀ, masked) v`. Operands `q [b, t, h, d]`, `k`, `v [b, s, hk, d]`,
/// `pos [b, t] u32`, f32; head `j` reads key head `j / (h / hk)`. Results `o [b, t, h, d]` and
/// `lse [b, h, t]`, the log of the softmax denominator. Under a causal mask a query at or past `s`
/// is padding: its `o`, `lse` and gradients are 0.
///
/// A fifth operand `starts [b, t] u32`, under a causal mask only, hides the keys before it: where a row holds
/// several documents, the index of the first token of the query's own. A query before its start is padding.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Attention {
    /// Factor of the scores, usually `1 / sqrt(d)`.
    pub scale: Bits,
    /// Which keys a query sees.
    pub mask: Mask,
}

/// Gradient of [`Attention`], from `q, k, v, pos, o, lse, do` and `starts` where it has them; results
/// `dq, dk, dv`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AttentionGrad(
    /// The op differentiated.
    pub Attention,
);

/// `[b, s, hk, d]` (or `[b, t, h, d]`) with heads outside: `[b, hk, s, d]`.
fn heads_out(b: &mut Builder, x: NodeId) -> Result<NodeId> {
    b.permute(x, &[0, 2, 1, 3])
}

/// Keys or values for every query head: `[b, s, hk, d]` to `[b, h, s, d]`.
fn repeat_heads(b: &mut Builder, x: NodeId, h: usize) -> Result<NodeId> {
    let s = b.shape(x).0.clone();
    let x = heads_out(b, x)?;
    let x = b.reshape(x, [s[0], s[2], 1, s[1], s[3]])?;
    let x = b.broadcast(x, &[s[0], s[2], h / s[2], s[1], s[3]].into())?;
    b.reshape(x, [s[0], h, s[1], s[3]])
}

/// A query's position and the start of its document, where rows hold several; both `[b, t]`.
#[derive(Clone, Copy)]
struct Queries {
    pos: NodeId,
    starts: Option<NodeId>,
}

/// 1 where query row sees the key, else 0, `[b, 1, t, s]`; and 1 for rows that are not padding, `[b, 1, t, 1]`.
fn visible(
    b: &mut Builder,
    mask: Mask,
    queries: Queries,
    s: usize,
) -> Result<Option<(NodeId, NodeId)>> {
    let Mask::Causal { window } = mask else {
        return Ok(None);
    };
    let [n, t] = [0, 1].map(|i| b.shape(queries.pos).0[i]);
    let column = |b: &mut Builder, x: NodeId| {
        let x = b.cast(x, DType::F32)?;
        b.reshape(x, [n, 1, t, 1])
    };
    let p = column(b, queries.pos)?;
    let key = b.push(Op::Iota([1, 1, 1, s].into(), 3), &[])?;
    let next = b.map_const(Add, p, 1.0)?;
    let mut see = b.map(Less, &[key, next])?;
    if let Some(w) = window {
        let last = b.map_const(Add, key, w as f32)?;
        let near = b.map(Less, &[p, last])?;
        see = b.map(Mul, &[see, near])?;
    }
    let count = b.scalar(s as f32);
    let mut real = b.map(Less, &[p, count])?;
    if let Some(starts) = queries.starts {
        let start = column(b, starts)?;
        let after = b.map_const(Add, key, 1.0)?;
        let within = b.map(Less, &[start, after])?;
        see = b.map(Mul, &[see, within])?;
        let begun = b.map(Less, &[start, next])?;
        real = b.map(Mul, &[real, begun])?;
    }
    Ok(Some((see, real)))
}

/// Scores with hidden keys pushed far down, `[b, h, t, s]`, and the rows that are not padding.
fn scores(
    b: &mut Builder,
    a: &Attention,
    ins: &[NodeId],
    starts: Option<NodeId>,
) -> Result<(NodeId, Option<NodeId>)> {
    let h = b.shape(ins[0]).0[2];
    let s = b.shape(ins[1]).0[1];
    let q = heads_out(b, ins[0])?;
    let k = repeat_heads(b, ins[1], h)?;
    let raw = b.matmul(q, false, k, true)?;
    let raw = b.map_const(Mul, raw, a.scale.get())?;
    let pos = ins[3];
    match visible(b, a.mask, Queries { pos, starts }, s)? {
        None => Ok((raw, None)),
        Some((see, real)) => {
            let low = b.scalar(-1e30);
            Ok((b.map(Select, &[see, raw, low])?, Some(real)))
        }
    }
}

fn check(name: &'static str, ins: &[&TensorType]) -> Result<[usize; 6]> {
    if let [q, k, v, pos, ..] = ins
        && let ([b, t, h, d], [kb, s, hk, kd]) = (&q.shape.0[..], &k.shape.0[..])
        && k == v
        && (b, d) == (kb, kd)
        && *hk > 0
        && h % hk == 0
        && **pos == TensorType::u32([*b, *t])
        && q.dtype == DType::F32
        && k.dtype == DType::F32
    {
        return Ok([*b, *t, *h, *d, *s, *hk]);
    }
    misfit(
        name,
        "f32 q [b, t, h, d], k and v [b, s, hk, d] with h a multiple of hk, u32 pos [b, t]",
        ins,
    )
}

/// Do the operands from `count` on fit: none, or `starts` beside a causal mask?
fn starts_fit(a: &Attention, ins: &[&TensorType], count: usize) -> bool {
    match ins.get(count..) {
        Some([]) => true,
        Some([starts]) => a.mask != Mask::Full && *starts == ins[3],
        _ => false,
    }
}

fn examples() -> Vec<(Attention, Vec<TensorType>)> {
    let none = Mask::Causal { window: None };
    let near = Mask::Causal { window: Some(3) };
    // b, t, h, hk, d, s; the mask; are there starts
    let sizes = [
        ([1, 1, 1, 1, 2, 1], none, false),
        ([2, 5, 4, 2, 6, 5], none, false),
        ([1, 33, 2, 1, 32, 33], near, false),
        ([2, 7, 3, 3, 16, 7], Mask::Full, false),
        ([1, 1, 6, 2, 32, 67], none, false),
        ([1, 130, 2, 2, 24, 130], none, false),
        ([1, 4, 4, 2, 8, 19], near, false),
        ([2, 7, 2, 1, 8, 7], none, true),
        (
            [1, 130, 4, 2, 16, 230],
            Mask::Causal { window: Some(60) },
            true,
        ),
        ([3, 1, 2, 2, 8, 40], none, true),
    ];
    let make = |([b, t, h, hk, d, s], mask, starts): ([usize; 6], Mask, bool)| {
        let scale = (1.0 / (d as f32).sqrt()).into();
        let kv = TensorType::f32([b, s, hk, d]);
        let q = TensorType::f32([b, t, h, d]);
        let mut ins = vec![q, kv.clone(), kv, TensorType::u32([b, t])];
        ins.extend(starts.then(|| TensorType::u32([b, t])));
        (Attention { scale, mask }, ins)
    };
    sizes.into_iter().map(make).collect()
}

impl CompositeOp for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        let [b, t, h, ..] = check(self.name(), ins)?;
        if !starts_fit(self, ins, 4) {
            let want = "q, k, v, pos and, under a causal mask, perhaps starts like pos";
            return misfit(self.name(), want, ins);
        }
        Ok(vec![ins[0].clone(), TensorType::f32([b, h, t])])
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let [n, t, h] = [0, 1, 2].map(|i| b.shape(ins[0]).0[i]);
        let (sc, real) = scores(b, self, ins, ins.get(4).copied())?;
        let m = b.reduce(ReduceOp::Max, 3, sc)?;
        let d = b.map(Sub, &[sc, m])?;
        let e = b.map(Exp, &[d])?;
        let sum = b.reduce(ReduceOp::Sum, 3, e)?;
        let p = b.map(Div, &[e, sum])?;
        let log = b.map(Log, &[sum])?;
        let mut lse = b.map(Add, &[log, m])?;
        let v = repeat_heads(b, ins[2], h)?;
        let mut o = b.matmul(p, false, v, false)?;
        if let Some(real) = real {
            let zero = b.scalar(0.0);
            o = b.map(Select, &[real, o, zero])?;
            lse = b.map(Select, &[real, lse, zero])?;
        }
        let o = heads_out(b, o)?;
        let lse = b.reshape(lse, [n, h, t])?;
        Ok(vec![o, lse])
    }
    fn vjp(&self, cx: &mut VjpCx) -> Result<Option<Vec<Option<NodeId>>>> {
        if cx.cts[1].is_some() {
            return Ok(None);
        }
        let Some(d) = cx.cts[0] else {
            return Ok(Some(vec![None; cx.ins.len()]));
        };
        let (first, starts) = cx.ins.split_at(4);
        let ins = [first, &[cx.outs[0], cx.outs[1], d], starts].concat();
        let g = cx.b.composite(AttentionGrad(self.clone()), &ins)?;
        let mut all: Vec<Option<NodeId>> = g.into_iter().map(Some).collect();
        all.resize(cx.ins.len(), None);
        Ok(Some(all))
    }
    fn flops(&self, ins: &[&TensorType], _: &[bool]) -> f64 {
        visible_flops(self, ins) * 2.0
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        examples()
    }
}

/// Arithmetic of one product of scores or values over what the mask lets through.
fn visible_flops(a: &Attention, ins: &[&TensorType]) -> f64 {
    let (q, s) = (ins[0].shape.numel() as f64, ins[1].shape.0[1] as f64);
    let t = ins[0].shape.0[1] as f64;
    match a.mask {
        Mask::Full => 2.0 * q * s,
        // A causal query sees half the keys on average; a decoded one all.
        Mask::Causal { window } => {
            let seen = if t > 1.0 { s - t / 2.0 } else { s };
            2.0 * q * window.map_or(seen, |w| seen.min(f64::from(w)))
        }
    }
}

impl CompositeOp for AttentionGrad {
    fn name(&self) -> &'static str {
        "attention_grad"
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        let [b, t, h, ..] = check(self.name(), ins)?;
        match ins {
            [q, k, v, _, o, lse, d, ..]
                if o == q
                    && d == q
                    && **lse == TensorType::f32([b, h, t])
                    && starts_fit(&self.0, ins, 7) =>
            {
                Ok(vec![(*q).clone(), (*k).clone(), (*v).clone()])
            }
            _ => misfit(
                self.name(),
                "q, k, v, pos, o, lse [b, h, t], do and perhaps starts",
                ins,
            ),
        }
    }
    /// With `p = exp(s - lse)`: `dv = pᵀ do`, `ds = p (do vᵀ - rowsum(do o))`, `dq = scale ds k`, `dk = scale dsᵀ q`.
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let a = &self.0;
        let [n, t, h, _, s, hk] = check(
            "attention_grad",
            &ins.iter().map(|i| b.ty(*i)).collect::<Vec<_>>(),
        )?;
        let d = b.shape(ins[0]).0[3];
        let (sc, real) = scores(b, a, &ins[..4], ins.get(7).copied())?;
        let lse = b.reshape(ins[5], [n, h, t, 1])?;
        let diff = b.map(Sub, &[sc, lse])?;
        let mut p = b.map(Exp, &[diff])?;
        if let Some(real) = real {
            let zero = b.scalar(0.0);
            p = b.map(Select, &[real, p, zero])?;
        }
        let go = heads_out(b, ins[6])?;
        let o = heads_out(b, ins[4])?;
        let v = repeat_heads(b, ins[2], h)?;
        let dp = b.matmul(go, false, v, true)?;
        let weighted = b.map(Mul, &[go, o])?;
        let delta = b.sum_last(weighted)?;
        let centred = b.map(Sub, &[dp, delta])?;
        let ds = b.map(Mul, &[p, centred])?;
        let ds = b.map_const(Mul, ds, a.scale.get())?;
        let k = repeat_heads(b, ins[1], h)?;
        let q = heads_out(b, ins[0])?;
        let dq = b.matmul(ds, false, k, false)?;
        let dq = heads_out(b, dq)?;
        let dk = b.matmul(ds, true, q, false)?;
        let dv = b.matmul(p, true, go, false)?;
        let mut to_kv = |x: NodeId| {
            let x = b.reshape(x, [n, hk, h / hk, s, d])?;
            let x = b.reduce(ReduceOp::Sum, 2, x)?;
            let x = b.reshape(x, [n, hk, s, d])?;
            heads_out(b, x)
        };
        Ok(vec![dq, to_kv(dk)?, to_kv(dv)?])
    }
    fn flops(&self, ins: &[&TensorType], _: &[bool]) -> f64 {
        visible_flops(&self.0, ins) * 5.0
    }
    fn examples() -> Vec<(Self, Vec<TensorType>)> {
        let make = |(a, ins): (Attention, Vec<TensorType>)| {
            let q = ins[0].clone();
            let lse = TensorType::f32([q.shape.0[0], q.shape.0[2], q.shape.0[1]]);
            let (first, starts) = ins.split_at(4);
            let ins = [first, &[q.clone(), lse, q], starts].concat();
            (AttentionGrad(a), ins)
        };
        examples().into_iter().map(make).collect()
    }
}
