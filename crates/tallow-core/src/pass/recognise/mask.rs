//! Which keys a mask lets through, found by evaluating it.
//! Invariant: a mask is what its elements say, however it was written; only constants and indices
//! are evaluated.
//! Absent on purpose: masks that depend on data.
use super::Match;
use crate::{
    graph::{Builder, NodeId},
    op::{Mask, Op},
    oracle,
};
use std::collections::HashMap;

/// Largest mask that is evaluated, in elements.
const MAX_ELEMS: usize = 1 << 22;
/// Largest expression that is evaluated, in nodes.
const MAX_NODES: usize = 64;
/// What is added to a score to hide it, at most.
pub(super) const HIDDEN: f64 = -1e4;

/// How `id`, of shape `[.., t, s]`, reads as a mask.
#[derive(Clone, Copy)]
pub(super) enum Reading {
    /// Added to the scores: 0 or hidden.
    Added,
    /// A condition that is not 0 where a key is seen.
    SeenWhere,
    /// A condition that is 0 where a key is seen.
    HiddenWhere,
}

/// The mask, and the position of the first query.
pub(super) fn read(m: Match<'_>, id: NodeId, how: Reading) -> Option<(Mask, usize)> {
    let full = &m.shape(id).0;
    let [t, s] = full[full.len().checked_sub(2)?..] else {
        return None;
    };
    let small = if m.repeated(id) {
        m.node(id).inputs[0]
    } else {
        id
    };
    let lead = m.shape(small).0.strip_suffix(&[t, s])?;
    if lead.iter().any(|n| *n != 1) || t * s > MAX_ELEMS || t > s {
        return None;
    }
    let seen = evaluate(m, small)?.into_iter().map(|v| match how {
        Reading::SeenWhere => Some(v != 0.0),
        Reading::HiddenWhere => Some(v == 0.0),
        Reading::Added if v == 0.0 => Some(true),
        Reading::Added => (v <= HIDDEN).then_some(false),
    });
    causal(&seen.collect::<Option<Vec<bool>>>()?, t, s)
}

/// The elements of an expression of constants and indices.
fn evaluate(m: Match<'_>, root: NodeId) -> Option<Vec<f64>> {
    let mut b = Builder::default();
    let mut map = HashMap::new();
    let new = copy(m, root, &mut b, &mut map)?;
    let g = b.finish(vec![new], vec![]);
    Some(oracle::eval(&g, &[]).ok()?.remove(0).data)
}

fn copy(
    m: Match<'_>,
    id: NodeId,
    b: &mut Builder,
    map: &mut HashMap<NodeId, NodeId>,
) -> Option<NodeId> {
    if let Some(new) = map.get(&id) {
        return Some(*new);
    }
    let n = m.node(id);
    let constant = match n.op {
        Op::Const(_)
        | Op::Map(_)
        | Op::Cast(_)
        | Op::Broadcast(_)
        | Op::Reshape(_)
        | Op::Permute(_)
        | Op::Slice { .. }
        | Op::Iota(..) => n.ty.shape.numel() <= MAX_ELEMS,
        Op::Input(..)
        | Op::Reduce(..)
        | Op::Concat(_)
        | Op::Pad { .. }
        | Op::MatMul { .. }
        | Op::Gather(_)
        | Op::ScatterAdd(_)
        | Op::Random { .. }
        | Op::Barrier(_)
        | Op::Part(_)
        | Op::Composite(_) => false,
    };
    if !constant || map.len() >= MAX_NODES {
        return None;
    }
    let copied = n.inputs.iter().map(|i| copy(m, *i, b, map));
    let ins = copied.collect::<Option<Vec<NodeId>>>()?;
    let new = b.push(n.op.clone(), &ins).ok()?;
    map.insert(id, new);
    Some(new)
}

/// The rule behind `seen [t, s]`, if it is one: all keys, or query `i` at position `first + i` sees
/// those at or before it, perhaps within a window.
fn causal(seen: &[bool], t: usize, s: usize) -> Option<(Mask, usize)> {
    if seen.iter().all(|v| *v) && t * s > 0 {
        // One query that sees every key is the last of them; of several, all see all.
        return Some((Mask::Full, 0));
    }
    let last = |row: usize| (0..s).rev().find(|k| seen[row * s + k]);
    let first = last(0)?;
    let end = last(t - 1)?;
    let count = seen[(t - 1) * s..].iter().filter(|v| **v).count();
    let window = (count <= end).then_some(count);
    let rule = |i: usize, k: usize| {
        let pos = first + i;
        k <= pos && window.is_none_or(|w| k + w > pos)
    };
    let holds = (0..t * s).all(|e| seen[e] == rule(e / s, e % s));
    let window = window.map(|w| w as u32);
    (holds && first + t <= s).then_some((Mask::Causal { window }, first))
}
