//! `exp(x - max x) / sum exp(x - max x)` over the innermost axis.
//! Invariant: the maximum that is subtracted is that of the same row.
//! Absent on purpose: softmax without the maximum, whose overflow is part of its meaning.
use super::{
    Edit, Found, Match,
    matcher::{Factors, take, times},
};
use crate::{
    Result,
    graph::NodeId,
    op::{ReduceOp, Softmax},
    scalar::ScalarOp::{Exp, Sub},
};

pub(super) fn find(e: &mut Edit<'_>, uses: &[u32], id: NodeId) -> Result<Option<Found>> {
    let Some((x, f)) = softmax(Match { b: &e.b, uses }, id) else {
        return Ok(None);
    };
    let y = e.b.composite(Softmax, &[x])?[0];
    let note = format!("softmax of {}: from exp(x - max) / sum", e.b.ty(y));
    let new = times(&mut e.b, y, &f.num, &f.den)?;
    let inner = f.inner;
    Ok(Some(Found { new, inner, note }))
}

fn softmax(m: Match<'_>, id: NodeId) -> Option<(NodeId, Factors)> {
    let mut f = m.factors(id).filter(|_| m.f32_rows(id))?;
    let sum_of = |t: NodeId| m.reduced(t, ReduceOp::Sum);
    let under = |t: &NodeId| {
        let sum = m.per_row(*t)?;
        Some((*t, false, sum_of(sum)?, vec![*t, sum]))
    };
    let over = |t: &NodeId| {
        let inverse = m.per_row(*t)?;
        let sum = m.inverse(inverse)?;
        Some((*t, true, sum_of(sum)?, vec![*t, inverse, sum]))
    };
    let found = f.den.iter().find_map(under);
    let (at, up, e, inner) = found.or_else(|| f.num.iter().find_map(over))?;
    let (x, below) = shifted(m, m.unary(e, Exp)?)?;
    take(if up { &mut f.num } else { &mut f.den }, at);
    if !take(&mut f.num, e) {
        return None;
    }
    f.inner.extend(inner);
    f.inner.push(e);
    f.inner.extend(below);
    m.closed(&f.inner, id).then_some((x, f))
}

/// `x` if `id` is `x - max x` over the innermost axis, with the nodes of it.
pub(super) fn shifted(m: Match<'_>, id: NodeId) -> Option<(NodeId, Vec<NodeId>)> {
    let d = m.map(id, Sub)?;
    let max = m.per_row(d[1])?;
    let x = m.reduced(max, ReduceOp::Max)?;
    (x == d[0]).then(|| (x, vec![id, d[1], max]))
}
