//! `x * rsqrt(mean(x²) + eps) * w`, with the factors in any order.
//! Invariant: the mean is over the innermost axis, by its exact length.
//! Absent on purpose: norms without a weight, and layer norm.
use super::{
    Edit, Found, Match,
    matcher::{Factors, take, times},
};
use crate::{
    Result,
    graph::NodeId,
    op::{ReduceOp, RmsNorm},
    scalar::ScalarOp::{Add, Div, Mul, Sqrt},
};

struct Norm {
    x: NodeId,
    w: NodeId,
    eps: f32,
    /// Factors that are no part of the norm.
    rest: Factors,
}

pub(super) fn find(e: &mut Edit<'_>, uses: &[u32], id: NodeId) -> Result<Option<Found>> {
    let Some(n) = norm(Match { b: &e.b, uses }, id) else {
        return Ok(None);
    };
    let eps = n.eps.into();
    let y = e.b.composite(RmsNorm { eps }, &[n.x, n.w])?[0];
    let note = format!("rms_norm of {}: from x rsqrt(mean(x x) + eps) w", e.b.ty(y));
    let new = times(&mut e.b, y, &n.rest.num, &n.rest.den)?;
    let inner = n.rest.inner;
    Ok(Some(Found { new, inner, note }))
}

/// What the inverse root mean square of some `x` was computed from.
struct InverseRms {
    x: NodeId,
    eps: f32,
    inner: Vec<NodeId>,
}

fn norm(m: Match<'_>, id: NodeId) -> Option<Norm> {
    let f = m.factors(id).filter(|_| m.f32_rows(id))?;
    let c = m.shape(id).last();
    let over = |t: &NodeId| Some((*t, true, inverse_rms(m, m.per_row(*t)?, false)?));
    let under = |t: &NodeId| Some((*t, false, inverse_rms(m, m.per_row(*t)?, true)?));
    let found = f.num.iter().find_map(over);
    let (at, up, r) = found.or_else(|| f.den.iter().find_map(under))?;
    let row = |t: &NodeId| {
        let from = *m.node(*t).inputs.first()?;
        let fits = m.repeated(*t) && *m.shape(from) == [c].into();
        fits.then_some((*t, from))
    };
    let (wide_w, w) = f.num.iter().find_map(row)?;
    let mut rest = f;
    take(&mut rest.num, wide_w);
    take(if up { &mut rest.num } else { &mut rest.den }, at);
    if !take(&mut rest.num, r.x) {
        return None;
    }
    rest.inner.push(at);
    rest.inner.extend(r.inner);
    m.closed(&rest.inner, id).then_some(Norm {
        x: r.x,
        w,
        eps: r.eps,
        rest,
    })
}

/// `id` is `1 / sqrt(mean(x x) + eps)`, or with `root` the square root itself.
fn inverse_rms(m: Match<'_>, id: NodeId, root: bool) -> Option<InverseRms> {
    let mut inner = vec![id];
    let v = if root {
        m.unary(id, Sqrt)?
    } else {
        let (v, sqrt) = m.inverse_root(id)?;
        inner.extend(sqrt);
        v
    };
    let eps_of = |(a, b)| Some((a, m.uniform(b)?));
    let (mean, eps) = m.pair(v, Add).into_iter().find_map(eps_of)?;
    let by = |(a, b)| Some((a, m.uniform(b)?));
    let (sum, factor) = match m.map(mean, Div) {
        Some(x) => (x[0], 1.0 / m.uniform(x[1])?),
        None => m.pair(mean, Mul).into_iter().find_map(by)?,
    };
    let squares = m.reduced(sum, ReduceOp::Sum)?;
    let x = m.map(squares, Mul).filter(|x| x[0] == x[1])?[0];
    let c = m.shape(x).last() as f64;
    let is_mean = (factor * c - 1.0).abs() < 1e-6;
    inner.extend([v, mean, sum, squares]);
    (is_mean && eps >= 0.0).then_some(InverseRms {
        x,
        eps: eps as f32,
        inner,
    })
}
