//! Replaces composites by their meaning where the caller does not want to keep them.
//! Invariant: afterwards every composite left is one that `keep` accepted.
//! Absent on purpose: a choice. Who has a kernel for what is the caller's business.
use crate::{
    Result,
    graph::{Builder, Graph, NodeId},
    op::{Composite, Op, Role},
    types::TensorType,
};

/// Which results of each node are read, `[node][result]`.
pub fn live_results(g: &Graph) -> Vec<Vec<bool>> {
    let mut live: Vec<Vec<bool>> = g
        .nodes
        .iter()
        .map(|n| vec![n.parts.is_empty(); n.parts.len().max(1)])
        .collect();
    for n in &g.nodes {
        if let Op::Part(k) = n.op {
            live[n.inputs[0].index()][k] = true;
        }
    }
    live
}

/// A composite and what is known of it where it stands.
pub struct Asked<'a> {
    /// Its node.
    pub id: NodeId,
    /// The op.
    pub op: &'a Composite,
    /// Operand types.
    pub ins: &'a [&'a TensorType],
    /// Which operands never change: frozen inputs and views of them.
    pub frozen: &'a [bool],
    /// Which results are read.
    pub live: &'a [bool],
}

/// Which nodes are frozen inputs or views of them.
pub(super) fn frozen(g: &Graph) -> Vec<bool> {
    let mut frozen: Vec<bool> = Vec::with_capacity(g.nodes.len());
    for n in &g.nodes {
        frozen.push(match n.op {
            Op::Input(_, role) => role == Role::Frozen,
            Op::Reshape(_) | Op::Permute(_) | Op::Slice { .. } | Op::Barrier(_) => {
                frozen[n.inputs[0].index()]
            }
            _ => false,
        });
    }
    frozen
}

/// `g` with every composite that `keep` refuses replaced by its decomposition, and what appears in
/// there likewise.
pub fn expand(g: &Graph, mut keep: impl FnMut(&Asked<'_>) -> Result<bool>) -> Result<Graph> {
    let mut g = g.clone();
    loop {
        let (next, changed) = expand_once(&g, &mut keep)?;
        g = next;
        if !changed {
            return Ok(g);
        }
    }
}

/// Everything in structural ops.
pub fn expand_all(g: &Graph) -> Result<Graph> {
    expand(g, |_| Ok(false))
}

/// One round of [`expand`]. Composites that appear are left. True
/// if anything was replaced.
pub(crate) fn expand_once(
    g: &Graph,
    mut keep: impl FnMut(&Asked<'_>) -> Result<bool>,
) -> Result<(Graph, bool)> {
    let live = live_results(g);
    let frozen = frozen(g);
    let mut b = Builder::default();
    // Results of each node; empty for the tuple of a composite that is kept.
    let mut made: Vec<Vec<NodeId>> = Vec::with_capacity(g.nodes.len());
    let mut changed = false;
    for (id, n) in g.iter() {
        let ins: Vec<NodeId> = n.inputs.iter().map(|i| made[i.index()][0]).collect();
        let new = match &n.op {
            Op::Input(slot, role) => vec![b.input_at(*slot, *role, n.ty.clone())],
            Op::Part(k) => vec![made[n.inputs[0].index()][*k]],
            Op::Composite(c) => {
                let tys: Vec<&TensorType> = n.inputs.iter().map(|i| g.ty(*i)).collect();
                let still: Vec<bool> = n.inputs.iter().map(|i| frozen[i.index()]).collect();
                let asked = Asked {
                    id,
                    op: c,
                    ins: &tys,
                    frozen: &still,
                    live: &live[id.index()],
                };
                if keep(&asked)? {
                    let tuple = b.push(n.op.clone(), &ins)?;
                    b.results(tuple)?
                } else {
                    changed = true;
                    c.decompose(&mut b, &ins)?
                }
            }
            op => vec![b.push(op.clone(), &ins)?],
        };
        made.push(new);
    }
    let map: Vec<NodeId> = made.into_iter().map(|m| m[0]).collect();
    Ok((g.finish_from(b, &map), changed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{CompositeOp, Linear};

    fn composites(g: &Graph) -> usize {
        let is = |n: &&crate::graph::Node| matches!(n.op, Op::Composite(_));
        g.nodes.iter().filter(is).count()
    }

    #[test]
    fn decompositions_have_the_types_that_infer_promises() {
        for (c, tys) in Composite::examples() {
            let mut b = Builder::default();
            let ins: Vec<_> = tys.iter().map(|t| b.input(Role::Data, t.clone())).collect();
            let outs = b.composite(c.clone(), &ins).unwrap();
            let want: Vec<_> = outs.iter().map(|o| b.ty(*o).clone()).collect();
            let g = b.finish(outs, vec![]);
            let e = expand_all(&g).unwrap();
            assert_eq!(composites(&e), 0, "{c:?}");
            let got: Vec<_> = e.outputs.iter().map(|o| e.ty(*o).clone()).collect();
            assert_eq!(got, want, "{c:?}");
            assert_eq!(
                e.inputs(),
                g.inputs()
                    .into_iter()
                    .enumerate()
                    .map(|(i, x)| (NodeId(i as u32), x.1, x.2))
                    .collect::<Vec<_>>()
            );
        }
    }

    #[test]
    fn keeps_what_it_is_told_to_and_reports_live_results() {
        let adapted = |(c, _): &(Linear, Vec<TensorType>)| c.is_adapted();
        let (c, tys) = Linear::examples().into_iter().find(adapted).unwrap();
        let mut b = Builder::default();
        let ins: Vec<_> = tys.iter().map(|t| b.input(Role::Data, t.clone())).collect();
        let outs = b.composite(c, &ins).unwrap();
        let g = b.finish(vec![outs[0]], vec![]);
        let mut seen = vec![];
        let kept = expand(&g, |c| {
            seen.push(c.live.to_vec());
            Ok(true)
        });
        assert_eq!(kept.unwrap(), g);
        assert_eq!(seen, vec![vec![true, false]]);
    }
}
