//! Rules for what only moves elements.
//! Invariant: of two views in a row one remains wherever one can say both.
//! Absent on purpose: strides; see the planner.
use crate::{
    Result,
    graph::{Builder, NodeId},
    op::Op,
    scalar::ScalarOp,
    types::Shape,
};

pub(super) fn simplify(b: &mut Builder, op: &Op, ins: &[NodeId]) -> Result<NodeId> {
    let x = ins.first().copied();
    match (op, x) {
        (Op::Broadcast(to), Some(x)) => broadcast(b, x, to),
        (Op::Reshape(to), Some(x)) => b.reshape(x, to.clone()),
        (Op::Permute(axes), Some(x)) => permute(b, x, axes),
        (Op::Slice { axis, start, len }, Some(x)) => slice(b, x, *axis, *start, *len),
        (Op::Concat(axis), _) => concat(b, *axis, ins),
        (
            Op::Pad {
                before: 0,
                after: 0,
                ..
            },
            Some(x),
        ) => Ok(x),
        _ => b.push(op.clone(), ins),
    }
}

fn broadcast(b: &mut Builder, x: NodeId, to: &Shape) -> Result<NodeId> {
    let n = b.node(x);
    match &n.op {
        Op::Broadcast(_) => {
            let inner = n.inputs[0];
            b.broadcast(inner, to)
        }
        // Extents of 1 in front come from the stretching itself.
        Op::Reshape(s) => {
            let inner = n.inputs[0];
            let from = b.shape(inner);
            let lead = s.rank().checked_sub(from.rank());
            let only_ones =
                lead.is_some_and(|l| s.0[..l].iter().all(|n| *n == 1) && s.0[l..] == from.0[..]);
            b.broadcast(if only_ones { inner } else { x }, to)
        }
        _ => b.broadcast(x, to),
    }
}

fn permute(b: &mut Builder, x: NodeId, axes: &[usize]) -> Result<NodeId> {
    if let Op::Permute(first) = &b.node(x).op {
        let both: Vec<usize> = axes.iter().map(|a| first[*a]).collect();
        let inner = b.node(x).inputs[0];
        return permute(b, inner, &both);
    }
    if axes.iter().copied().eq(0..axes.len()) {
        return Ok(x);
    }
    b.permute(x, axes)
}

fn slice(b: &mut Builder, x: NodeId, axis: usize, start: usize, len: usize) -> Result<NodeId> {
    let n = b.node(x).clone();
    match n.op {
        Op::Slice {
            axis: a, start: s, ..
        } if a == axis => b.slice(n.inputs[0], axis, s + start, len),
        Op::Concat(a) if a == axis => match of_concat(b, &n.inputs, axis, start, len)? {
            Some(y) => Ok(y),
            None => b.slice(x, axis, start, len),
        },
        Op::Pad {
            axis: a, before, ..
        } if a == axis => {
            let inner = n.inputs[0];
            let end = before + b.shape(inner).0[axis];
            if start >= before && start + len <= end {
                return slice(b, inner, axis, start - before, len);
            }
            b.slice(x, axis, start, len)
        }
        // Columns of flattened rows are the flattened rows of the columns.
        Op::Reshape(ref to) if axis + 1 == to.rank() => {
            let inner = n.inputs[0];
            let s = b.shape(inner).clone();
            let side_by_side = b.node(inner).op == Op::Concat(s.rank().saturating_sub(1));
            if side_by_side && s.last() == to.last() {
                let part = slice(b, inner, s.rank() - 1, start, len)?;
                return b.reshape(part, to.with_last(len));
            }
            b.slice(x, axis, start, len)
        }
        _ => b.slice(x, axis, start, len),
    }
}

/// A window of operands side by side that lies in one of them, or holds some of them whole.
fn of_concat(
    b: &mut Builder,
    parts: &[NodeId],
    axis: usize,
    start: usize,
    len: usize,
) -> Result<Option<NodeId>> {
    let (mut at, mut hit) = (0, vec![]);
    for p in parts {
        let n = b.shape(*p).0[axis];
        let (from, to) = (start.max(at), (start + len).min(at + n));
        if from < to {
            hit.push((*p, from - at, to - from));
        }
        at += n;
    }
    let whole = |(p, from, len): &(NodeId, usize, usize)| *from == 0 && *len == b.shape(*p).0[axis];
    let fewer = hit.len() < parts.len() && hit.iter().all(whole);
    if hit.len() != 1 && !fewer || hit.is_empty() {
        return Ok(None);
    }
    let cut = hit
        .into_iter()
        .map(|(p, from, len)| slice(b, p, axis, from, len))
        .collect::<Result<Vec<_>>>()?;
    b.concat(axis, &cut).map(Some)
}

fn concat(b: &mut Builder, axis: usize, ins: &[NodeId]) -> Result<NodeId> {
    let mut flat = vec![];
    for x in ins {
        match b.node(*x).op {
            Op::Concat(a) if a == axis => flat.extend(&b.node(*x).inputs),
            _ => flat.push(*x),
        }
    }
    // Neighbouring windows of one value are one window.
    let mut joined: Vec<NodeId> = vec![];
    for x in flat {
        let both = joined.last().and_then(|l| adjacent(b, *l, x, axis));
        match both {
            Some((source, start, len)) => {
                joined.pop();
                joined.push(b.slice(source, axis, start, len)?);
            }
            None => joined.push(x),
        }
    }
    b.concat(axis, &joined)
}

fn adjacent(b: &Builder, l: NodeId, r: NodeId, axis: usize) -> Option<(NodeId, usize, usize)> {
    let window = |x: NodeId| match b.node(x).op {
        Op::Slice {
            axis: a,
            start,
            len,
        } if a == axis => Some((b.node(x).inputs[0], start, len)),
        _ => None,
    };
    let ((ls, l0, ll), (rs, r0, rl)) = (window(l)?, window(r)?);
    (ls == rs && l0 + ll == r0).then_some((ls, l0, ll + rl))
}

/// Terms of a sum tree that [`joined`] looks at.
const MAX_TERMS: usize = 64;

/// A sum of padded values that lie next to each other is those values side by side. The gradient of
/// slices is written so.
pub(super) fn joined(b: &mut Builder, x: &[NodeId]) -> Result<Option<NodeId>> {
    let (mut todo, mut parts) = (x.to_vec(), vec![]);
    let mut along = None;
    while let Some(id) = todo.pop() {
        let n = b.node(id);
        match n.op {
            Op::Map(ScalarOp::Add) => todo.extend(&n.inputs),
            Op::Pad { axis, before, .. } if *along.get_or_insert(axis) == axis => {
                parts.push((before, n.inputs[0]));
            }
            _ => return Ok(None),
        }
        if parts.len() + todo.len() > MAX_TERMS {
            return Ok(None);
        }
    }
    let Some(axis) = along else { return Ok(None) };
    parts.sort_unstable();
    let extent = |b: &Builder, x: NodeId| b.shape(x).0[axis];
    let meets = |w: &[(usize, NodeId)]| w[0].0 + extent(b, w[0].1) == w[1].0;
    if !parts.windows(2).all(meets) {
        return Ok(None);
    }
    let before = parts[0].0;
    let whole = extent(b, x[0]);
    let run: Vec<NodeId> = parts.iter().map(|p| p.1).collect();
    let y = concat(b, axis, &run)?;
    let after = whole - before - extent(b, y);
    let pad = Op::Pad {
        axis,
        before,
        after,
    };
    simplify(b, &pad, &[y]).map(Some)
}
