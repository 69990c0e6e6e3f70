//! Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762) with grouped heads
//! (Ainslie et al. 2023, arXiv:2305.13245), sliding windows, and rows of several documents; the index
//! of a key is its position.
//! Invariant: kernels and the gradient never form `[t, s]` for all heads; only the decomposition does.
use super::{composite::misfit, *};
use crate::graph::{Builder, NodeId};
use ScalarOp::{Add, Div, Exp, Less, Log, Mul, Select, Sub, Tanh};

/// What a cap may be: with its reciprocal well inside f32, and below what stands for a hidden score.
const CAPS: std::ops::RangeInclusive<f32> = 1e-30..=1e29;

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

/// `o = softmax(scale * q kᵀ, masked) v`, scores perhaps capped. Operands `q [b, t, h, d]`, `k`, `v [b, s, hk, d]`,
/// `pos [b, t] u32`, f32; head `j` reads key head `j / (h / hk)`. Results `o [b, t, h, d]` and
/// `lse [b, h, t]`, the log of the softmax denominator. Under a causal mask a query at or past `s`
/// is padding: its `o`, `lse` and gradients are 0.
///
/// A fifth operand `starts [b, t] u32`, under a causal mask only, hides the keys before it: where a row holds
/// several documents, the index of the first token of the query's own. A query before its start is padding.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Attention {
    /// Factor of the scores, usually `1 / sqrt(d)`.
    pub scale: Bits,
    /// Which keys a query sees.
    pub mask: Mask,
    /// If there, a scaled score `x` becomes `cap * tanh(x / cap)` before the mask (Gemma 2, arXiv:2408.00118);
    /// from 1e-30 to 1e29.
    pub cap: Option<Bits>,
}

impl Attention {
    /// `[scale / cap, cap / scale]`, where there is a cap and both are normal numbers: for kernels that bend scores before
    /// they scale them, `x` to `y = cap / scale * tanh(x * scale / cap)`, so that `scale * y` is the score.
    pub fn cap_around_scale(&self) -> Option<[f32; 2]> {
        let (scale, cap) = (f64::from(self.scale.get()), f64::from(self.cap?.get()));
        let factors = [scale / cap, cap / scale].map(|f| f as f32);
        factors.iter().all(|f| f.is_normal()).then_some(factors)
    }
    /// Is there no cap, or one for which such kernels have their numbers?
    pub fn bends_before_scaling(&self) -> bool {
        self.cap.is_none() || self.cap_around_scale().is_some()
    }
}

/// As derived, but silent on a cap that is not there: tables on disk name kernels by this text.
impl std::fmt::Debug for Attention {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut all = f.debug_struct("Attention");
        all.field("scale", &self.scale).field("mask", &self.mask);
        if let Some(cap) = self.cap {
            all.field("cap", &cap);
        }
        all.finish()
    }
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

/// What the queries make of the keys.
struct Scores {
    /// With hidden keys pushed far down, `[b, h, t, s]`.
    masked: NodeId,
    /// Under a cap `tanh(score / cap)`, like `masked`, of hidden keys too.
    bent: Option<NodeId>,
    /// 1 for rows that are not padding, `[b, 1, t, 1]`; none: all.
    real: Option<NodeId>,
}

fn scores(
    b: &mut Builder,
    a: &Attention,
    ins: &[NodeId],
    starts: Option<NodeId>,
) -> Result<Scores> {
    let h = b.shape(ins[0]).0[2];
    let s = b.shape(ins[1]).0[1];
    let q = heads_out(b, ins[0])?;
    let k = repeat_heads(b, ins[1], h)?;
    let raw = b.matmul(q, false, k, true)?;
    let mut raw = b.map_const(Mul, raw, a.scale.get())?;
    let mut bent = None;
    if let Some(cap) = a.cap {
        let part = b.map_const(Div, raw, cap.get())?;
        let t = b.map(Tanh, &[part])?;
        raw = b.map_const(Mul, t, cap.get())?;
        bent = Some(t);
    }
    let (mut masked, mut rows, pos) = (raw, None, ins[3]);
    if let Some((see, real)) = visible(b, a.mask, Queries { pos, starts }, s)? {
        let low = b.scalar(-1e30);
        masked = b.map(Select, &[see, raw, low])?;
        rows = Some(real);
    }
    let real = rows;
    Ok(Scores { masked, bent, real })
}

/// Is the cap, if there is one, a number to divide by?
fn check_cap(a: &Attention) -> Result<()> {
    match a.cap.map(Bits::get) {
        Some(got) if !CAPS.contains(&got) => Err(Error::Number {
            op: "attention",
            want: "a cap of the scores from 1e-30 to 1e29",
            got,
        }),
        _ => Ok(()),
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
    let far = Mask::Causal { window: Some(60) };
    // b, t, h, hk, d, s; the mask; are there starts; the cap
    let sizes = [
        ([1, 1, 1, 1, 2, 1], none, false, None),
        ([2, 5, 4, 2, 6, 5], none, false, None),
        ([1, 33, 2, 1, 32, 33], near, false, None),
        ([2, 7, 3, 3, 16, 7], Mask::Full, false, None),
        ([1, 1, 6, 2, 32, 67], none, false, None),
        ([1, 130, 2, 2, 24, 130], none, false, None),
        ([1, 4, 4, 2, 8, 19], near, false, None),
        ([2, 7, 2, 1, 8, 7], none, true, None),
        ([1, 130, 4, 2, 16, 230], far, true, None),
        ([3, 1, 2, 2, 8, 40], none, true, None),
        // Caps that bend all scores, some, and hardly any.
        ([1, 1, 1, 1, 2, 1], none, false, Some(0.4)),
        ([2, 5, 4, 2, 6, 5], none, false, Some(0.3)),
        ([1, 33, 2, 1, 32, 33], near, false, Some(50.0)),
        ([2, 7, 3, 3, 16, 7], Mask::Full, false, Some(1.0)),
        ([1, 1, 6, 2, 32, 67], none, false, Some(0.7)),
        ([1, 130, 4, 2, 16, 230], far, true, Some(0.5)),
        ([3, 1, 2, 2, 8, 40], none, true, Some(0.25)),
    ];
    let make = |([b, t, h, hk, d, s], mask, starts, cap): ([usize; 6], Mask, bool, Option<f32>)| {
        let scale = (1.0 / (d as f32).sqrt()).into();
        let cap = cap.map(Bits::from);
        let kv = TensorType::f32([b, s, hk, d]);
        let q = TensorType::f32([b, t, h, d]);
        let mut ins = vec![q, kv.clone(), kv, TensorType::u32([b, t])];
        ins.extend(starts.then(|| TensorType::u32([b, t])));
        (Attention { scale, mask, cap }, ins)
    };
    sizes.into_iter().map(make).collect()
}

impl CompositeOp for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        check_cap(self)?;
        let [b, t, h, ..] = check(self.name(), ins)?;
        if !starts_fit(self, ins, 4) {
            let want = "q, k, v, pos and, under a causal mask, perhaps starts like pos";
            return misfit(self.name(), want, ins);
        }
        Ok(vec![ins[0].clone(), TensorType::f32([b, h, t])])
    }
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let [n, t, h] = [0, 1, 2].map(|i| b.shape(ins[0]).0[i]);
        let sc = scores(b, self, ins, ins.get(4).copied())?;
        let m = b.reduce(ReduceOp::Max, 3, sc.masked)?;
        let d = b.map(Sub, &[sc.masked, m])?;
        let e = b.map(Exp, &[d])?;
        let sum = b.reduce(ReduceOp::Sum, 3, e)?;
        let p = b.map(Div, &[e, sum])?;
        let log = b.map(Log, &[sum])?;
        let mut lse = b.map(Add, &[log, m])?;
        let v = repeat_heads(b, ins[2], h)?;
        let mut o = b.matmul(p, false, v, false)?;
        if let Some(real) = sc.real {
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
        check_cap(&self.0)?;
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
    /// With `p = exp(s - lse)`: `dv = pᵀ do`, `ds = p (do vᵀ - rowsum(do o))`, `dq = scale ds k`, `dk = scale dsᵀ q`;
    /// under a cap `s` is what it leaves, and `ds` is multiplied by `1 - (s / cap)²`.
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let a = &self.0;
        let [n, t, h, _, s, hk] = check(
            "attention_grad",
            &ins.iter().map(|i| b.ty(*i)).collect::<Vec<_>>(),
        )?;
        let d = b.shape(ins[0]).0[3];
        let sc = scores(b, a, &ins[..4], ins.get(7).copied())?;
        let lse = b.reshape(ins[5], [n, h, t, 1])?;
        let diff = b.map(Sub, &[sc.masked, lse])?;
        let mut p = b.map(Exp, &[diff])?;
        if let Some(real) = sc.real {
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
        let mut ds = b.map(Mul, &[p, centred])?;
        if let Some(bent) = sc.bent {
            let square = b.map(Mul, &[bent, bent])?;
            let one = b.scalar(1.0);
            let slope = b.map(Sub, &[one, square])?;
            ds = b.map(Mul, &[ds, slope])?;
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::KernelSpec;

    fn first() -> (Attention, Vec<TensorType>) {
        examples().remove(1)
    }

    #[test]
    fn a_cap_is_a_number_to_divide_by() {
        let (mut a, ins) = first();
        let refs: Vec<&TensorType> = ins.iter().collect();
        for good in [1e-30, 0.5, 50.0, 1e29] {
            a.cap = Some(good.into());
            assert_eq!(a.infer(&refs).unwrap()[0], ins[0]);
        }
        let bad = [0.0, -1.0, f32::MIN_POSITIVE, 1e30, f32::INFINITY, f32::NAN];
        for bad in bad {
            a.cap = Some(bad.into());
            let grad = AttentionGrad(a.clone());
            for e in [a.infer(&refs).unwrap_err(), grad.infer(&refs).unwrap_err()] {
                let Error::Number { op, got, .. } = e else {
                    panic!("{e}")
                };
                assert_eq!((op, got.to_bits()), ("attention", bad.to_bits()));
            }
        }
    }

    /// What names kernels on disk: silent on no cap, different for each cap.
    #[test]
    fn keys_tell_caps_apart() {
        let (mut a, ins) = first();
        let mask = "Causal { window: None }";
        assert_eq!(
            format!("{a:?}"),
            format!("Attention {{ scale: {:?}, mask: {mask} }}", a.scale)
        );
        let refs: Vec<&TensorType> = ins.iter().collect();
        let mut keys = vec![];
        for cap in [None, Some(30.0), Some(50.0)] {
            a.cap = cap.map(Bits::from);
            let c = Composite::from(a.clone());
            let spec = KernelSpec::composite(&c, &refs, &[false; 4], &[true; 2]).unwrap();
            let shown = cap.map_or("f32[".into(), |c| format!("cap {c}, f32["));
            assert!(spec.signature().starts_with(&shown), "{}", spec.signature());
            keys.push(spec.key());
        }
        keys.dedup();
        assert_eq!(keys.len(), 3, "{keys:?}");
    }
}
