//! Cheap values computed again instead of kept: where long after its first readers others read a value whose operands
//! are kept anyway, the late ones read a second computation of it.
//! Invariant: the graph computes what it computed before; nothing lives longer than it did but what is asked for again
//! and its operands' last reader.
//! Absent on purpose: which ops are cheap; the device says so. Layers between barriers; see `recompute`.
use crate::{
    Result,
    graph::{Builder, Graph, NodeId},
    op::{Composite, Op},
};

/// Nodes between two readers that make it worth while: less than a layer and its gradient.
const FAR: usize = 48;
/// Barriers made here are numbered down from this, so that no other has their number.
const FIRST_BARRIER: u32 = u32::MAX - 1;

/// For each node: the first of its late readers, if it is to be computed again for them.
fn late_readers(g: &Graph, cheap: impl Fn(&Composite) -> bool) -> Vec<Option<usize>> {
    let mut readers = vec![vec![]; g.nodes.len()];
    for (id, n) in g.iter() {
        for i in &n.inputs {
            readers[i.index()].push(id.index());
        }
    }
    let last = |id: NodeId| readers[id.index()].last().copied().unwrap_or(0);
    let one = |(id, n): (NodeId, &crate::graph::Node)| {
        let Op::Composite(c) = &n.op else { return None };
        if !n.parts.is_empty() || !cheap(c) || g.roots().any(|r| r == id) {
            return None;
        }
        let all = &readers[id.index()];
        let gap = all.windows(2).position(|w| w[1] - w[0] > FAR)?;
        let late = all[gap + 1];
        let kept = |i: &NodeId| matches!(g.node(*i).op, Op::Input(..)) || last(*i) >= late;
        n.inputs.iter().all(kept).then_some(late)
    };
    g.iter().map(one).collect()
}

/// `g` with `cheap` composites computed again for late readers.
pub fn again(g: &Graph, cheap: impl Fn(&Composite) -> bool) -> Result<Graph> {
    let late = late_readers(g, cheap);
    if late.iter().all(Option::is_none) {
        return Ok(g.clone());
    }
    let mut b = Builder::default();
    let mut map: Vec<NodeId> = Vec::with_capacity(g.nodes.len());
    let mut copies: Vec<Option<NodeId>> = vec![None; g.nodes.len()];
    let mut barrier = FIRST_BARRIER;
    for (id, n) in g.iter() {
        let mut ins = Vec::with_capacity(n.inputs.len());
        for i in &n.inputs {
            if late[i.index()].is_none_or(|l| id.index() < l) {
                ins.push(map[i.index()]);
                continue;
            }
            if copies[i.index()].is_none() {
                let from = g.node(*i);
                let mut operands: Vec<NodeId> =
                    from.inputs.iter().map(|x| map[x.index()]).collect();
                // An operand behind a barrier makes it another node.
                operands[0] = b.push(Op::Barrier(barrier), &operands[..1])?;
                barrier -= 1;
                copies[i.index()] = Some(b.push(from.op.clone(), &operands)?);
            }
            ins.push(copies[i.index()].unwrap_or(map[i.index()]));
        }
        map.push(match n.op {
            Op::Input(slot, role) => b.input_at(slot, role, n.ty.clone()),
            _ => b.push(n.op.clone(), &ins)?,
        });
    }
    Ok(g.finish_from(b, &map))
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};
    use crate::{op::SwiGlu, scalar::ScalarOp};

    /// A gated value read at once, and again after `between` other nodes; its operands are read at the end.
    fn graph(between: usize) -> Graph {
        f32s(&[&[3, 4], &[3, 4]], |b, x| {
            let y = b.composite(SwiGlu, x)?[0];
            let mut z = b.map(ScalarOp::Tanh, &[y])?;
            for i in 0..between {
                z = b.map_const(ScalarOp::Add, z, i as f32)?;
            }
            let z = b.map(ScalarOp::Mul, &[z, y])?;
            let z = b.map(ScalarOp::Mul, &[z, x[0]])?;
            Ok(vec![b.map(ScalarOp::Mul, &[z, x[1]])?])
        })
    }

    fn gates(g: &Graph) -> usize {
        let gate = |n: &&crate::graph::Node| matches!(n.op, Op::Composite(Composite::SwiGlu(_)));
        g.nodes.iter().filter(gate).count()
    }

    #[test]
    fn late_readers_read_a_second_computation() {
        let before = graph(FAR);
        let after = again(&before, |_| true).unwrap();
        assert_eq!((gates(&before), gates(&after)), (1, 2));
        same(&before, &after);
    }

    #[test]
    fn near_readers_and_dear_ops_stay() {
        let near = graph(3);
        assert_eq!(again(&near, |_| true).unwrap(), near);
        let far = graph(FAR);
        assert_eq!(again(&far, |_| false).unwrap(), far);
    }
}
