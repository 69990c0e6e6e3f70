//! Linear layers that read the same value become blocks of one.
//! Invariant: members do not depend on one another, directly or through other groups.
//! Absent on purpose: layers with a residual, which belongs to one result.
use super::{edit::Edit, expand::frozen};
use crate::{
    Result,
    graph::{Graph, NodeId},
    op::{Composite, Linear, Op},
    types::DType,
};

#[cfg(test)]
mod tests;

/// `g` with its groups merged, and a line for each group.
pub fn group(g: &Graph) -> Result<(Graph, Vec<String>)> {
    let mut e = Edit::new(g);
    let mut notes = vec![];
    for mut members in candidates(g) {
        while members.len() > 1 {
            let (mut together, mut left) = (vec![], vec![]);
            for m in members {
                let free = |t: &NodeId| !e.depends(m, *t) && !e.depends(*t, m);
                if together.iter().all(free) {
                    together.push(m);
                } else {
                    left.push(m);
                }
            }
            if together.len() > 1 {
                notes.push(merge(&mut e, &together)?);
            }
            members = left;
        }
    }
    Ok((e.finish()?, notes))
}

fn linear(g: &Graph, id: NodeId) -> Option<&Linear> {
    match &g.node(id).op {
        Op::Composite(Composite::Linear(l)) if !l.residual => Some(l),
        _ => None,
    }
}

/// Layers with equal operands and as many shares, and weights of one kind: dtype, and frozen or not.
fn candidates(g: &Graph) -> Vec<Vec<NodeId>> {
    let frozen = frozen(g);
    type Key = ((NodeId, DType, bool), usize);
    let mut all: Vec<(Key, Vec<NodeId>)> = vec![];
    for (id, n) in g.iter() {
        let Some(l) = linear(g, id) else { continue };
        let weights: Vec<NodeId> = l.ins().iter().map(|i| n.inputs[i.w]).collect();
        let kind = |w: &NodeId| (n.inputs[0], g.ty(*w).dtype, frozen[w.index()]);
        let key = (kind(&weights[0]), l.shares());
        if !weights.iter().all(|w| kind(w) == key.0) {
            continue;
        }
        match all.iter_mut().find(|(k, _)| *k == key) {
            Some((_, members)) => members.push(id),
            None => all.push((key, vec![id])),
        }
    }
    all.into_iter().map(|(_, members)| members).collect()
}

/// Puts one layer in the place of `members`; their readers get windows of its results.
fn merge(e: &mut Edit<'_>, members: &[NodeId]) -> Result<String> {
    let x = e.g.node(members[0]).inputs[0];
    let (mut blocks, mut ins) = (vec![], vec![x]);
    let layers: Vec<Linear> = members
        .iter()
        .filter_map(|m| linear(e.g, *m).cloned())
        .collect();
    for (m, l) in members.iter().zip(&layers) {
        blocks.extend(l.blocks.iter().cloned());
        ins.extend(&e.g.node(*m).inputs[1..]);
    }
    let widths: Vec<String> = layers.iter().map(|l| l.n().to_string()).collect();
    let residual = false;
    let whole = Linear { blocks, residual };
    let number = whole.hidden();
    let new = e.b.composite(whole, &ins)?;
    let axis = e.b.shape(x).rank() - 1;
    let (mut n0, mut r0) = (0, vec![0; number.len()]);
    for (m, l) in members.iter().zip(&layers) {
        let old = e.b.results(*m)?;
        let y = e.b.slice(new[0], axis, n0, l.n())?;
        e.redirect(old[0], y);
        n0 += l.n();
        for (g, (was, rank)) in l.hidden().into_iter().zip(l.ranks()).enumerate() {
            if let (Some(was), Some(now)) = (was, number[g]) {
                let part = e.b.slice(new[now], axis, r0[g], rank)?;
                e.redirect(old[was], part);
                r0[g] += rank;
            }
        }
    }
    Ok(format!(
        "{} linear layers of one input {}, outputs {}, in one product",
        members.len(),
        e.b.ty(x),
        widths.join(" + ")
    ))
}
