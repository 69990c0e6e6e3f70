//! `silu(g) * u`, with the factors in any order and silu in either writing.
//! Invariant: `u` is a value of its own, not a constant or a repeated row.
//! Absent on purpose: silu alone, which fuses as it is.
use super::{
    Edit, Found, Match,
    matcher::{Factors, take, times},
};
use crate::{
    Result,
    graph::NodeId,
    op::SwiGlu,
    scalar::ScalarOp::{Add, Exp, Neg, Sigmoid},
};

pub(super) fn find(e: &mut Edit<'_>, uses: &[u32], id: NodeId) -> Result<Option<Found>> {
    let m = Match { b: &e.b, uses };
    let Some((g, mut f)) = gate(m, id) else {
        return Ok(None);
    };
    let (full, small): (Vec<NodeId>, Vec<NodeId>) = f
        .num
        .iter()
        .partition(|t| !m.repeated(**t) && m.uniform(**t).is_none());
    let Some((u, more)) = full.split_first() else {
        return Ok(None);
    };
    f.num = small;
    let u = times(&mut e.b, *u, more, &[])?;
    let y = e.b.composite(SwiGlu, &[g, u])?[0];
    let note = format!("swiglu of {}: from silu(g) u", e.b.ty(y));
    let new = times(&mut e.b, y, &f.num, &f.den)?;
    let inner = f.inner;
    Ok(Some(Found { new, inner, note }))
}

/// The gate of a product, and the factors besides `silu(gate)`.
fn gate(m: Match<'_>, id: NodeId) -> Option<(NodeId, Factors)> {
    let mut f = m.factors(id).filter(|_| m.f32_rows(id))?;
    let over = |t: &NodeId| {
        let sigmoid = |g| (*t, true, g, vec![*t]);
        if let Some(g) = m.unary(*t, Sigmoid) {
            return Some(sigmoid(g));
        }
        let below = m.inverse(*t)?;
        let (g, mut inner) = one_plus_exp(m, below)?;
        inner.push(*t);
        Some((*t, true, g, inner))
    };
    let under = |t: &NodeId| {
        let (g, inner) = one_plus_exp(m, *t)?;
        Some((*t, false, g, inner))
    };
    let found = f.num.iter().find_map(over);
    let (at, up, g, inner) = found.or_else(|| f.den.iter().find_map(under))?;
    take(if up { &mut f.num } else { &mut f.den }, at);
    if !take(&mut f.num, g) {
        return None;
    }
    f.inner.extend(inner);
    m.closed(&f.inner, id).then_some((g, f))
}

/// `g` if `id` is `1 + exp(-g)`, with the nodes of it.
fn one_plus_exp(m: Match<'_>, id: NodeId) -> Option<(NodeId, Vec<NodeId>)> {
    let one = |(a, b): &(NodeId, NodeId)| m.uniform(*b) == Some(1.0) && m.unary(*a, Exp).is_some();
    let (exp, _) = m.pair(id, Add).into_iter().find(one)?;
    let neg = m.unary(exp, Exp)?;
    let g = m.unary(neg, Neg)?;
    Some((g, vec![id, exp, neg]))
}
