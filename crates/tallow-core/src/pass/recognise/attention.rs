//! `softmax(q kᵀ scale, masked) v` with heads outside, `[b, h, t, d]` or `[h, t, d]`.
//! Invariant: scores and probabilities have no other readers; masks are constants.
//! Absent on purpose: masks made from data, and capped scores: those models call attention by name.
use super::{
    Edit, Found, Match,
    mask::{self, HIDDEN, Reading},
};
use crate::{
    Result,
    graph::{Builder, NodeId},
    op::{Attention, Composite, Mask, Op},
    scalar::ScalarOp::{Add, Mul, Select},
    types::DType,
};

struct Parts {
    q: Stored,
    k: Stored,
    v: Stored,
    scale: f32,
    mask: Mask,
    /// Position of the first query.
    first: usize,
    /// Factor of the result.
    after: f32,
    inner: Vec<NodeId>,
}

/// A value `[.., rows, d]`, or `[.., d, rows]` where `swapped`.
#[derive(Clone, Copy)]
struct Stored {
    id: NodeId,
    swapped: bool,
}

pub(super) fn find(e: &mut Edit<'_>, uses: &[u32], id: NodeId) -> Result<Option<Found>> {
    let Some(p) = parts(Match { b: &e.b, uses }, id) else {
        return Ok(None);
    };
    let ty = e.b.ty(id).clone();
    let b = &mut e.b;
    let (q, mut k, mut v) = (heads(b, p.q)?, heads(b, p.k)?, heads(b, p.v)?);
    if let (Some(k1), Some(v1)) = (unrepeated(b, p.k)?, unrepeated(b, p.v)?)
        && b.shape(k1) == b.shape(v1)
    {
        (k, v) = (k1, v1);
    }
    if b.shape(k) != b.shape(v) || b.shape(q).last() != b.shape(k).last() {
        return Ok(None);
    }
    let [n, t] = [0, 1].map(|i| b.shape(q).0[i]);
    let pos = b.push(Op::Iota([n, t].into(), 1), &[])?;
    let pos = b.map_const(Add, pos, p.first as f32)?;
    let pos = b.cast(pos, DType::U32)?;
    let (scale, mask, cap) = (p.scale.into(), p.mask, None);
    let op = Attention { scale, mask, cap };
    let o = b.composite(op, &[q, k, v, pos])?[0];
    let mut o = b.permute(o, &[0, 2, 1, 3])?;
    if p.after != 1.0 {
        o = b.map_const(Mul, o, p.after)?;
    }
    let new = b.reshape(o, ty.shape.clone())?;
    let note = format!("attention of {ty}, {mask:?}: from softmax(q k) v");
    let inner = p.inner;
    Ok(Some(Found { new, inner, note }))
}

fn parts(m: Match<'_>, id: NodeId) -> Option<Parts> {
    let n = m.node(id);
    let Op::MatMul {
        ta: false,
        tb,
        alpha: after,
    } = n.op
    else {
        return None;
    };
    let (probs, v) = (n.inputs[0], n.inputs[1]);
    if m.node(probs).op != Op::Composite(Composite::Softmax(crate::op::Softmax)) {
        return None;
    }
    let masked = m.node(probs).inputs[0];
    let (raw, mask, first) = unmasked(m, masked);
    let Op::MatMul { ta, tb: kt, alpha } = m.node(raw).op else {
        return None;
    };
    let mut inner = vec![probs, masked, raw];
    inner.dedup();
    let rank = n.ty.shape.rank();
    let of = |id, swapped| Stored { id, swapped };
    let x = &m.node(raw).inputs;
    let fits = matches!(rank, 3 | 4) && m.f32_rows(id) && m.closed(&inner, id);
    fits.then(|| Parts {
        q: of(x[0], ta),
        k: of(x[1], !kt),
        v: of(v, tb),
        scale: alpha.get(),
        mask,
        first,
        after: after.get(),
        inner,
    })
}

/// The scores below a mask, and what the mask says. No known mask is as good as none: then the node
/// is no product, or one whose every key is seen.
fn unmasked(m: Match<'_>, id: NodeId) -> (NodeId, Mask, usize) {
    let added = m.pair(id, Add).into_iter();
    let mut found =
        added.filter_map(|(raw, mask)| Some((raw, mask::read(m, mask, Reading::Added)?)));
    if let Some((raw, (mask, first))) = found.next() {
        return (raw, mask, first);
    }
    if let Some(&[c, yes, no]) = m.map(id, Select) {
        let hidden = |x: NodeId| m.uniform(x).is_some_and(|v| v <= HIDDEN);
        let read = if hidden(no) {
            mask::read(m, c, Reading::SeenWhere).map(|r| (yes, r))
        } else if hidden(yes) {
            mask::read(m, c, Reading::HiddenWhere).map(|r| (no, r))
        } else {
            None
        };
        if let Some((raw, (mask, first))) = read {
            return (raw, mask, first);
        }
    }
    (id, Mask::Full, 0)
}

/// `[b, h, t, d]` (or `[h, t, d]`) as attention wants it, `[b, t, h, d]`.
fn heads(b: &mut Builder, x: Stored) -> Result<NodeId> {
    let s = b.shape(x.id).0.clone();
    let id = match s[..] {
        [h, r, c] => b.reshape(x.id, [1, h, r, c])?,
        _ => x.id,
    };
    b.permute(
        id,
        if x.swapped {
            &[0, 3, 1, 2]
        } else {
            &[0, 2, 1, 3]
        },
    )
}

/// Keys or values before each head was repeated for the queries that share it, `[b, s, hk, d]`.
fn unrepeated(b: &mut Builder, x: Stored) -> Result<Option<NodeId>> {
    let n = b.node(x.id);
    let Op::Reshape(to) = &n.op else {
        return Ok(None);
    };
    let (to, wide) = (to.0.clone(), n.inputs[0]);
    let n = b.node(wide);
    let Op::Broadcast(s) = &n.op else {
        return Ok(None);
    };
    let (s, from) = (s.0.clone(), n.inputs[0]);
    let ([n, h, r, c], [b0, hk, g, r0, c0]) = (&to[..], &s[..]) else {
        return Ok(None);
    };
    let one = b.shape(from).0 == [*b0, *hk, 1, *r0, *c0];
    if !one || (n, r, c) != (b0, r0, c0) || *h != hk * g {
        return Ok(None);
    }
    let id = b.reshape(from, [*b0, *hk, *r0, *c0])?;
    let swapped = x.swapped;
    heads(b, Stored { id, swapped }).map(Some)
}
