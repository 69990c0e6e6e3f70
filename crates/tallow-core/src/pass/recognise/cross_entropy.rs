//! `-Σ onehot(target) * log_softmax(x Wᵀ)` over the vocabulary, row by row.
//! Invariant: a target outside the vocabulary gives 0 in both writings.
//! Absent on purpose: `logsumexp - picked`, which gives such a target the whole logsumexp.
use super::{Edit, Found, Match, softmax::shifted};
use crate::{
    Result,
    graph::NodeId,
    op::{Composite, CrossEntropy, Op, ReduceOp},
    scalar::ScalarOp::{Add, Equal, Exp, Log, Mul, Neg, Select, Sub},
    types::DType,
};

struct Parts {
    x: NodeId,
    w: NodeId,
    /// Is `w` stored `[v, c]`?
    tb: bool,
    target: NodeId,
    /// Was the log-softmax negated before it was picked from?
    negated: bool,
    inner: Vec<NodeId>,
}

pub(super) fn find(e: &mut Edit<'_>, uses: &[u32], id: NodeId) -> Result<Option<Found>> {
    let Some(p) = parts(Match { b: &e.b, uses }, id) else {
        return Ok(None);
    };
    let b = &mut e.b;
    let (rows, c) = (b.shape(p.x).rows(), b.shape(p.x).last());
    let x = b.reshape(p.x, [rows, c])?;
    let w = if p.tb { p.w } else { b.permute(p.w, &[1, 0])? };
    let target = b.reshape(p.target, [rows])?;
    let mut nll = b.composite(CrossEntropy, &[x, w, target])?[0];
    let note = format!(
        "cross_entropy of {} rows over {} classes: from a picked log-softmax",
        rows,
        b.shape(w).0[0]
    );
    if !p.negated {
        nll = b.map(Neg, &[nll])?;
    }
    let new = b.reshape(nll, b.shape(id).clone())?;
    let inner = p.inner;
    Ok(Some(Found { new, inner, note }))
}

fn parts(m: Match<'_>, id: NodeId) -> Option<Parts> {
    let picked = m.reduced(id, ReduceOp::Sum)?;
    let mut inner = vec![picked];
    let zero = |x: NodeId| m.uniform(x) == Some(0.0);
    let chosen = m.map(picked, Select).filter(|x| zero(x[2]));
    let options = match chosen {
        Some(x) => vec![(x[0], x[1])],
        None => m.pair(picked, Mul),
    };
    // The one-hot rows may have other readers: then they stay.
    let pick = |(hot, logp)| Some((target(m, hot)?, logp));
    let (target, mut logp) = options.into_iter().find_map(pick)?;
    let negated = m.unary(logp, Neg);
    if let Some(p) = negated {
        inner.push(logp);
        logp = p;
    }
    let (logits, nodes) = log_softmax(m, logp)?;
    inner.extend(nodes);
    let (x, w, tb, nodes) = projection(m, logits)?;
    inner.extend(nodes);
    let fits = m.f32_rows(x) && m.shape(x).rows() == m.shape(target).numel();
    (fits && m.closed(&inner, id)).then_some(Parts {
        x,
        w,
        tb,
        target,
        negated: negated.is_some(),
        inner,
    })
}

/// The u32 targets if `id` is `index == target` over the innermost axis, as a number.
fn target(m: Match<'_>, id: NodeId) -> Option<NodeId> {
    let equal = match m.node(id).op {
        Op::Cast(_) => m.node(id).inputs[0],
        _ => id,
    };
    let side = |(index, t)| {
        let v = m.shape(index).last();
        let below = |id: NodeId| m.node(id).inputs[0];
        let mut iota = index;
        while matches!(m.node(iota).op, Op::Broadcast(_) | Op::Cast(_)) {
            iota = below(iota);
        }
        let Op::Iota(s, axis) = &m.node(iota).op else {
            return None;
        };
        (*axis + 1 == s.rank() && s.last() == v).then_some(())?;
        let mut t = m.per_row(t)?;
        while m.node(t).ty.dtype != DType::U32 {
            t = match m.node(t).op {
                Op::Reshape(_) | Op::Cast(_) => below(t),
                _ => return None,
            };
        }
        Some(t)
    };
    m.pair(equal, Equal).into_iter().find_map(side)
}

/// The logits `id` is the log-softmax of, with the nodes in between.
fn log_softmax(m: Match<'_>, id: NodeId) -> Option<(NodeId, Vec<NodeId>)> {
    if let Some(p) = m.unary(id, Log) {
        let n = m.node(p);
        let is = n.op == Op::Composite(Composite::Softmax(crate::op::Softmax));
        return is.then(|| (n.inputs[0], vec![id, p]));
    }
    let [l, wide] = *m.map(id, Sub)? else {
        return None;
    };
    let lse = m.per_row(wide)?;
    let mut inner = vec![id, wide, lse];
    // (l - max) - log sum exp (l - max)
    if let (Some((logits, nodes)), Some(d)) = (shifted(m, l), log_sum_exp(m, lse, &mut inner)) {
        inner.extend(nodes);
        return (d == l).then_some((logits, inner));
    }
    // l - (log sum exp (l - max) + max)
    let parts = |(log, max): (NodeId, NodeId)| {
        let mut inner = inner.clone();
        inner.push(log);
        let d = log_sum_exp(m, log, &mut inner)?;
        let (logits, nodes) = shifted(m, d)?;
        inner.extend(nodes);
        let same = logits == l && m.reduced(max, ReduceOp::Max) == Some(l);
        same.then_some((logits, inner))
    };
    m.pair(lse, Add).into_iter().find_map(parts)
}

/// `d` if `id` is `log sum exp d` over the innermost axis.
fn log_sum_exp(m: Match<'_>, id: NodeId, inner: &mut Vec<NodeId>) -> Option<NodeId> {
    let sum = m.unary(id, Log)?;
    let exp = m.reduced(sum, ReduceOp::Sum)?;
    inner.extend([sum, exp]);
    m.unary(exp, Exp)
}

/// `x` and `w` if `id` is their plain product: a bare linear layer, or a matrix product of rows.
fn projection(m: Match<'_>, mut id: NodeId) -> Option<(NodeId, NodeId, bool, Vec<NodeId>)> {
    let mut inner = vec![id];
    if let Op::Reshape(_) = m.node(id).op {
        let y = m.node(id).inputs[0];
        if m.shape(y).last() == m.shape(id).last() {
            inner.push(y);
            id = y;
        }
    }
    let n = m.node(id);
    match &n.op {
        Op::Composite(Composite::Linear(l)) => {
            let bare = !l.residual && l.blocks.len() == 1 && !l.blocks[0].bias;
            (bare && !l.is_adapted()).then(|| (n.inputs[0], n.inputs[1], true, inner))
        }
        Op::MatMul {
            ta: false,
            tb,
            alpha,
        } if alpha.get() == 1.0 && n.ty.shape.rank() == 2 => {
            (n.inputs[0], n.inputs[1], *tb, inner).into()
        }
        _ => None,
    }
}
