//! Gradient checkpointing: what lies between two barriers of a forward pass is computed again in the backward
//! pass instead of being kept.
//! Invariant: the values stay what they were; a piece is computed again after the gradients of what follows it,
//! so that one piece at a time is in memory; the piece behind the last barrier is kept, for its backward comes first.
//! Absent on purpose: choosing where the barriers stand.
use crate::{
    Result,
    graph::{Builder, Graph, NodeId},
    op::Op,
};

/// `g` with the loss as its first output and gradients behind it: what gradients read of the loss's forward pass
/// comes from a second run of its piece. Without two barriers nothing changes.
pub fn recompute(g: &Graph) -> Result<Graph> {
    let pieces = Pieces::new(g);
    if pieces.barriers.len() < 2 {
        return Ok(g.clone());
    }
    let mut again = Again {
        g,
        wanted: pieces.wanted(g),
        pieces,
        b: Builder::default(),
        map: vec![],
        copies: vec![None; g.nodes.len()],
        newest: None,
    };
    for (id, n) in g.iter() {
        let new = match n.op {
            Op::Input(slot, role) => again.b.input_at(slot, role, n.ty.clone()),
            _ if again.pieces.forward[id.index()] => {
                let ins: Vec<NodeId> = n.inputs.iter().map(|i| again.map[i.index()]).collect();
                again.b.push(n.op.clone(), &ins)?
            }
            _ => again.backward(id)?,
        };
        again.map.push(new);
    }
    let Again { b, map, .. } = again;
    Ok(g.finish_from(b, &map))
}

/// A forward pass cut at its barriers.
struct Pieces {
    /// What the loss is computed from.
    forward: Vec<bool>,
    /// Barriers of the forward pass, in order.
    barriers: Vec<NodeId>,
    /// The newest barrier each forward node depends on.
    of: Vec<Option<usize>>,
}

impl Pieces {
    fn new(g: &Graph) -> Self {
        let mut forward = vec![false; g.nodes.len()];
        if let Some(loss) = g.outputs.first() {
            forward[loss.index()] = true;
        }
        for (id, n) in g.iter().rev() {
            if forward[id.index()] {
                n.inputs.iter().for_each(|i| forward[i.index()] = true);
            }
        }
        let (mut barriers, mut of) = (vec![], vec![None; g.nodes.len()]);
        for (id, n) in g.iter().filter(|(id, _)| forward[id.index()]) {
            of[id.index()] = n.inputs.iter().filter_map(|i| of[i.index()]).max();
            if matches!(n.op, Op::Barrier(_)) {
                of[id.index()] = Some(barriers.len());
                barriers.push(id);
            }
        }
        Pieces {
            forward,
            barriers,
            of,
        }
    }

    /// The piece that `id` is computed again with; `None` for what is kept.
    fn again(&self, id: NodeId) -> Option<usize> {
        let piece = self.of[id.index()]?;
        let kept = piece + 1 == self.barriers.len() || self.barriers[piece] == id;
        (self.forward[id.index()] && !kept).then_some(piece)
    }

    /// Which nodes gradients need from a second run.
    fn wanted(&self, g: &Graph) -> Vec<bool> {
        let mut wanted = vec![false; g.nodes.len()];
        for (id, n) in g.iter().rev() {
            if self.forward[id.index()] && !wanted[id.index()] {
                continue;
            }
            let piece = self.again(id);
            for i in &n.inputs {
                let same = piece.is_none() || self.again(*i) == piece;
                wanted[i.index()] |= same && self.again(*i).is_some();
            }
        }
        wanted
    }
}

struct Again<'a> {
    g: &'a Graph,
    pieces: Pieces,
    wanted: Vec<bool>,
    b: Builder,
    /// Images of the nodes so far.
    map: Vec<NodeId>,
    /// Second runs of forward nodes.
    copies: Vec<Option<NodeId>>,
    /// The newest gradient: what a second run waits for.
    newest: Option<NodeId>,
}

impl Again<'_> {
    /// A node behind the loss, reading second runs.
    fn backward(&mut self, id: NodeId) -> Result<NodeId> {
        let n = self.g.node(id);
        let mut ins = Vec::with_capacity(n.inputs.len());
        for i in &n.inputs {
            ins.push(match self.pieces.again(*i) {
                None => self.map[i.index()],
                Some(piece) => {
                    if self.copies[i.index()].is_none() {
                        self.run_again(piece)?;
                    }
                    self.copies[i.index()].unwrap_or(self.map[i.index()])
                }
            });
        }
        let new = self.b.push(n.op.clone(), &ins)?;
        // Constants wait for nothing.
        let first = ins.iter().any(|i| !self.constant(*i));
        if first && n.parts.is_empty() {
            self.newest = Some(new);
        }
        Ok(new)
    }

    fn constant(&self, id: NodeId) -> bool {
        let n = self.b.node(id);
        match n.op {
            Op::Const(_) | Op::Iota(..) => true,
            Op::Broadcast(_) | Op::Reshape(_) | Op::Cast(_) => self.constant(n.inputs[0]),
            _ => false,
        }
    }

    /// Computes the wanted part of a piece a second time, after the newest gradient.
    fn run_again(&mut self, piece: usize) -> Result<()> {
        let start = self.pieces.barriers[piece];
        let mut from = vec![self.map[start.index()]];
        from.extend(self.newest);
        let again = self.b.push(self.g.node(start).op.clone(), &from)?;
        for (id, n) in self.g.iter() {
            if !self.wanted[id.index()] || self.pieces.again(id) != Some(piece) {
                continue;
            }
            let input = |i: &NodeId| match self.copies[i.index()] {
                Some(copy) => copy,
                None if *i == start => again,
                None => self.map[i.index()],
            };
            let ins: Vec<NodeId> = n.inputs.iter().map(input).collect();
            self.copies[id.index()] = Some(self.b.push(n.op.clone(), &ins)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::*, *};
    use crate::{grad::grad, scalar::ScalarOp};

    /// `layers` of `tanh(x w)`, with barriers or without; gradients in the weights.
    fn network(layers: usize, barriers: bool) -> Graph {
        let shapes = vec![&[4_usize, 4][..]; layers + 1];
        let forward = f32s(&shapes, |b, x| {
            let mut y = x[layers];
            for (i, w) in x[..layers].iter().enumerate() {
                if barriers {
                    y = b.push(Op::Barrier(i as u32), &[y])?;
                }
                let z = b.matmul(y, false, *w, false)?;
                y = b.map(ScalarOp::Tanh, &[z])?;
            }
            let y = b.reshape(y, [16])?;
            let y = b.reduce(crate::op::ReduceOp::Sum, 0, y)?;
            Ok(vec![b.reshape(y, [])?])
        });
        let weights: Vec<NodeId> = forward.inputs().iter().map(|i| i.0).take(layers).collect();
        grad(&forward, &weights).unwrap()
    }

    #[test]
    fn gradients_stay_and_pieces_run_again_after_what_follows_them() {
        let before = network(4, true);
        let after = recompute(&before).unwrap();
        same(&before, &after);
        let tanhs = |g: &Graph| {
            let tanh = |n: &&crate::graph::Node| n.op == Op::Map(ScalarOp::Tanh);
            g.nodes.iter().filter(tanh).count()
        };
        // The last of four is kept.
        assert_eq!((tanhs(&before), tanhs(&after)), (4, 7));
        // Each second run stands behind the gradients of the piece after it.
        let barriers: Vec<(usize, u32)> = after
            .iter()
            .filter(|(_, n)| n.inputs.len() == 2)
            .filter_map(|(id, n)| match n.op {
                Op::Barrier(k) => Some((id.index(), k)),
                _ => None,
            })
            .collect();
        let order: Vec<u32> = barriers.iter().map(|b| b.1).collect();
        assert_eq!(order, [2, 1, 0]);
        let grads: Vec<usize> = after.outputs[1..].iter().map(|o| o.index()).collect();
        for (at, k) in barriers {
            assert!(at < grads[k as usize], "{at} {grads:?}");
        }
    }

    #[test]
    fn without_barriers_nothing_changes() {
        let g = network(3, false);
        assert_eq!(recompute(&g).unwrap(), g);
    }
}
