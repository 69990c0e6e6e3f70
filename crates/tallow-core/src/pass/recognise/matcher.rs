//! Questions that patterns ask of a graph.
//! Invariant: nothing is changed here.
//! Absent on purpose: patterns.
use super::super::simplify::uniform;
use crate::{
    graph::{Builder, Node, NodeId},
    op::{Op, ReduceOp},
    scalar::ScalarOp::{self, Add, Div, Mul, Recip, Sqrt},
    types::{DType, Shape},
};

/// The nodes of an edit under way; ids are those of the graph before it.
#[derive(Clone, Copy)]
pub(super) struct Match<'a> {
    pub(super) b: &'a Builder,
    pub(super) uses: &'a [u32],
}

/// A product taken apart: `Π num / Π den`, and the nodes that were multiplications in it.
pub(super) struct Factors {
    pub(super) num: Vec<NodeId>,
    pub(super) den: Vec<NodeId>,
    pub(super) inner: Vec<NodeId>,
}

impl<'a> Match<'a> {
    pub(super) fn node(&self, id: NodeId) -> &'a Node {
        self.b.node(id)
    }
    pub(super) fn shape(&self, id: NodeId) -> &'a Shape {
        &self.node(id).ty.shape
    }
    /// Operands, if `id` is this elementwise op.
    pub(super) fn map(&self, id: NodeId, s: ScalarOp) -> Option<&'a [NodeId]> {
        let n = self.node(id);
        (n.op == Op::Map(s)).then_some(&n.inputs[..])
    }
    /// The operand, if `id` is this elementwise op of one.
    pub(super) fn unary(&self, id: NodeId, s: ScalarOp) -> Option<NodeId> {
        self.map(id, s).map(|x| x[0])
    }
    /// Both orders of the operands, if `id` is this elementwise op of two.
    pub(super) fn pair(&self, id: NodeId, s: ScalarOp) -> Vec<(NodeId, NodeId)> {
        self.map(id, s)
            .map_or(vec![], |x| vec![(x[0], x[1]), (x[1], x[0])])
    }
    /// The constant that fills `id`.
    pub(super) fn uniform(&self, id: NodeId) -> Option<f64> {
        uniform(self.b, id)
    }
    /// Is `id` a repeated smaller value?
    pub(super) fn repeated(&self, id: NodeId) -> bool {
        matches!(self.node(id).op, Op::Broadcast(_))
    }
    /// What a stretched `[.., 1]` was stretched from to `[.., c]`.
    pub(super) fn per_row(&self, id: NodeId) -> Option<NodeId> {
        let n = self.node(id);
        let from = *n.inputs.first()?;
        let rows = self.repeated(id) && *self.shape(from) == n.ty.shape.with_last(1);
        rows.then_some(from)
    }
    /// What is reduced, if `id` reduces the innermost axis.
    pub(super) fn reduced(&self, id: NodeId, r: ReduceOp) -> Option<NodeId> {
        let n = self.node(id);
        let Op::Reduce(op, axis) = n.op else {
            return None;
        };
        (op == r && axis + 1 == n.ty.shape.rank()).then(|| n.inputs[0])
    }
    /// `v` if `id` is `1 / v` (any writing).
    pub(super) fn inverse(&self, id: NodeId) -> Option<NodeId> {
        if let Some(v) = self.unary(id, Recip) {
            return Some(v);
        }
        let x = self.map(id, Div)?;
        (self.uniform(x[0]) == Some(1.0)).then(|| x[1])
    }
    /// `v` if `id` is `1 / sqrt(v)` (any writing), and the square root where there is one.
    pub(super) fn inverse_root(&self, id: NodeId) -> Option<(NodeId, Option<NodeId>)> {
        if let Some(v) = self.unary(id, ScalarOp::Rsqrt) {
            return Some((v, None));
        }
        let root = self.inverse(id)?;
        Some((self.unary(root, Sqrt)?, Some(root)))
    }
    /// Takes the product at `root` apart, through multiplications nobody else reads.
    pub(super) fn factors(&self, root: NodeId) -> Option<Factors> {
        let mut f = Factors {
            num: vec![],
            den: vec![],
            inner: vec![],
        };
        let mut todo = vec![(root, true)];
        while let Some((id, up)) = todo.pop() {
            let s = match self.node(id).op {
                Op::Map(s @ (Mul | Div)) if id == root || self.uses[id.index()] == 1 => s,
                _ if up => {
                    f.num.push(id);
                    continue;
                }
                _ => {
                    f.den.push(id);
                    continue;
                }
            };
            if id != root {
                f.inner.push(id);
            }
            let x = &self.node(id).inputs;
            todo.push((x[1], (s == Mul) == up));
            todo.push((x[0], up));
        }
        matches!(self.node(root).op, Op::Map(Mul | Div)).then_some(f)
    }
    /// Takes the sum at `root` apart, through additions nobody else reads: terms and inner additions.
    pub(super) fn terms(&self, root: NodeId) -> Option<(Vec<NodeId>, Vec<NodeId>)> {
        let (mut terms, mut inner) = (vec![], vec![]);
        let mut todo: Vec<NodeId> = self.map(root, Add)?.iter().rev().copied().collect();
        while let Some(id) = todo.pop() {
            match self.map(id, Add) {
                Some(x) if self.uses[id.index()] == 1 => {
                    inner.push(id);
                    todo.extend([x[1], x[0]]);
                }
                _ => terms.push(id),
            }
        }
        Some((terms, inner))
    }
    /// Is every node of `inner` read only by the others and by `root`?
    pub(super) fn closed(&self, inner: &[NodeId], root: NodeId) -> bool {
        let mut inner = inner.to_vec();
        inner.sort_unstable();
        inner.dedup();
        let reads = |i: NodeId| {
            let readers = inner.iter().chain([&root]);
            let ins = readers.flat_map(|r| &self.node(*r).inputs);
            ins.filter(|x| **x == i).count() as u32
        };
        inner.iter().all(|i| self.uses[i.index()] == reads(*i))
    }
    /// Is `id` of type f32 with at least one axis?
    pub(super) fn f32_rows(&self, id: NodeId) -> bool {
        let ty = &self.node(id).ty;
        ty.dtype == DType::F32 && ty.shape.rank() > 0
    }
}

/// `y * Π num / Π den`.
pub(super) fn times(
    b: &mut Builder,
    mut y: NodeId,
    num: &[NodeId],
    den: &[NodeId],
) -> crate::Result<NodeId> {
    for x in num {
        y = b.map(Mul, &[y, *x])?;
    }
    for x in den {
        y = b.map(Div, &[y, *x])?;
    }
    Ok(y)
}

/// Removes the first `x` from `from`; was it there?
pub(super) fn take(from: &mut Vec<NodeId>, x: NodeId) -> bool {
    match from.iter().position(|f| *f == x) {
        Some(i) => {
            from.remove(i);
            true
        }
        None => false,
    }
}
