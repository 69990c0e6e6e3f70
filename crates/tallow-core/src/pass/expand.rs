//! Replaces composites by their meaning where the caller does not want to keep them.
//! Invariant: afterwards every composite left is one that `keep` accepted.
//! Absent on purpose: a choice. Who has a kernel for what is the caller's business.
use crate::{
    Result,
    graph::{Builder, Graph, NodeId},
    op::{Composite, Op},
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

/// `g` with every composite that `keep` refuses replaced by its decomposition, and what appears in
/// there likewise. `keep` sees the op, its operand types and which of its results are read.
pub fn expand(
    g: &Graph,
    mut keep: impl FnMut(&Composite, &[&TensorType], &[bool]) -> Result<bool>,
) -> Result<Graph> {
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
    expand(g, |_, _, _| Ok(false))
}

fn expand_once(
    g: &Graph,
    keep: &mut impl FnMut(&Composite, &[&TensorType], &[bool]) -> Result<bool>,
) -> Result<(Graph, bool)> {
    let live = live_results(g);
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
                if keep(c, &tys, &live[id.index()])? {
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
    use crate::op::{CompositeOp, Linear, Role};

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
        let adapted = |(c, _): &(Linear, Vec<TensorType>)| c.rank() > 0;
        let (c, tys) = Linear::examples().into_iter().find(adapted).unwrap();
        let mut b = Builder::default();
        let ins: Vec<_> = tys.iter().map(|t| b.input(Role::Data, t.clone())).collect();
        let outs = b.composite(c, &ins).unwrap();
        let g = b.finish(vec![outs[0]], vec![]);
        let mut seen = vec![];
        let kept = expand(&g, |_, _, live| {
            seen.push(live.to_vec());
            Ok(true)
        });
        assert_eq!(kept.unwrap(), g);
        assert_eq!(seen, vec![vec![true, false]]);
    }
}
