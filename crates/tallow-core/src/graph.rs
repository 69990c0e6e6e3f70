//! The compiler's view: a flat, typed SSA list. Node `i` reads only nodes `< i`, so a pass is one
//! forward or one backward loop. Pushing an equal node twice returns the first id.
//! Invariant: state changes only through [`Graph::updates`], which is ordered and never interned.
//! Absent on purpose: buffers and devices.
use crate::{
    Error, Result,
    op::{Bits, Composite, Op, ReduceOp, Role},
    scalar::ScalarOp,
    types::{DType, Shape, TensorType},
};
use std::collections::HashMap;

/// Index of a node in its graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u32);
impl NodeId {
    /// Position in [`Graph::nodes`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// One operation with its operands and result type.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    /// What is computed.
    pub op: Op,
    /// Operands.
    pub inputs: Vec<NodeId>,
    /// Type of the (first) result.
    pub ty: TensorType,
    /// All result types of a composite with several; empty otherwise. Read through [`Op::Part`].
    pub parts: Vec<TensorType>,
}

/// After a replay, input `slot` holds `value`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Update {
    /// A [`Role::State`] input.
    pub slot: u32,
    /// Its next value.
    pub value: NodeId,
}

/// Immutable once built; `Eq + Hash`, so it is its own cache key.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Graph {
    /// Operations in an order in which they can run.
    pub nodes: Vec<Node>,
    /// Values the host reads.
    pub outputs: Vec<NodeId>,
    /// State changes, in order.
    pub updates: Vec<Update>,
}

impl Graph {
    /// Nodes with their ids.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (NodeId, &Node)> {
        let id = |(i, n)| (NodeId(i as u32), n);
        self.nodes.iter().enumerate().map(id)
    }
    /// One node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }
    /// Type of a node's (first) result.
    pub fn ty(&self, id: NodeId) -> &TensorType {
        &self.node(id).ty
    }
    /// Inputs by slot: node, role and type.
    pub fn inputs(&self) -> Vec<(NodeId, Role, TensorType)> {
        let mut v: Vec<_> = self
            .iter()
            .filter_map(|(id, n)| match n.op {
                Op::Input(slot, role) => Some((slot, (id, role, n.ty.clone()))),
                _ => None,
            })
            .collect();
        v.sort_by_key(|x| x.0);
        v.into_iter().map(|x| x.1).collect()
    }
    /// Values that must exist after a run: outputs, then updates.
    pub fn roots(&self) -> impl Iterator<Item = NodeId> + '_ {
        let updates = self.updates.iter().map(|u| u.value);
        self.outputs.iter().copied().chain(updates)
    }
    /// How many nodes, outputs and updates read each node.
    pub fn use_counts(&self) -> Vec<u32> {
        let mut c = vec![0; self.nodes.len()];
        for i in self.nodes.iter().flat_map(|n| &n.inputs) {
            c[i.index()] += 1;
        }
        for r in self.roots() {
            c[r.index()] += 1;
        }
        c
    }
    /// Rebuilds the graph node by node: `f` returns the replacement of each node, given the
    /// builder, the node's old id and its already rebuilt operands.
    /// Inputs keep their slots.
    pub fn rewrite(
        &self,
        mut f: impl FnMut(&mut Builder, NodeId, &Node, &[NodeId]) -> Result<NodeId>,
    ) -> Result<Graph> {
        let mut b = Builder::default();
        let mut map: Vec<NodeId> = Vec::with_capacity(self.nodes.len());
        for (id, n) in self.iter() {
            let ins: Vec<NodeId> = n.inputs.iter().map(|i| map[i.index()]).collect();
            let new = match n.op {
                Op::Input(slot, role) => b.input_at(slot, role, n.ty.clone()),
                _ => f(&mut b, id, n, &ins)?,
            };
            map.push(new);
        }
        Ok(self.finish_from(b, &map))
    }
    /// Freezes `b` with this graph's outputs and updates under `map`.
    pub fn finish_from(&self, b: Builder, map: &[NodeId]) -> Graph {
        let outputs = self.outputs.iter().map(|o| map[o.index()]).collect();
        let updates = self
            .updates
            .iter()
            .map(|u| Update {
                slot: u.slot,
                value: map[u.value.index()],
            })
            .collect();
        b.finish(outputs, updates)
    }
}

/// Append-only constructor of a [`Graph`]; the only way to make one.
#[derive(Default)]
pub struct Builder {
    nodes: Vec<Node>,
    memo: HashMap<(Op, Vec<NodeId>), NodeId>,
    n_inputs: u32,
}

impl Builder {
    /// Type of a node's (first) result.
    pub fn ty(&self, id: NodeId) -> &TensorType {
        &self.nodes[id.index()].ty
    }
    /// Extents of a node's (first) result.
    pub fn shape(&self, id: NodeId) -> &Shape {
        &self.ty(id).shape
    }
    /// A node already pushed.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }
    /// A new input in the next slot.
    pub fn input(&mut self, role: Role, ty: TensorType) -> NodeId {
        self.input_at(self.n_inputs, role, ty)
    }
    /// An input in a given slot.
    pub fn input_at(&mut self, slot: u32, role: Role, ty: TensorType) -> NodeId {
        self.n_inputs = self.n_inputs.max(slot + 1);
        let key = (Op::Input(slot, role), vec![]);
        match self.memo.get(&key) {
            Some(id) => *id,
            None => self.add(key.0, vec![], vec![ty]),
        }
    }
    /// Appends `op`, or returns the equal node that exists. Of a composite with several results
    /// this is the tuple: see [`Builder::composite`].
    pub fn push(&mut self, op: Op, ins: &[NodeId]) -> Result<NodeId> {
        let key = (op, ins.to_vec());
        if let Some(&id) = self.memo.get(&key) {
            return Ok(id);
        }
        let (op, ins) = key;
        let tys = match op {
            Op::Part(k) => match self.node(ins[0]).parts.get(k) {
                Some(t) => vec![t.clone()],
                None => {
                    return Err(Error::shape(
                        "part",
                        format!("result {k}"),
                        &[self.ty(ins[0])],
                    ));
                }
            },
            _ => op.infer(&ins.iter().map(|i| self.ty(*i)).collect::<Vec<_>>())?,
        };
        Ok(self.add(op, ins, tys))
    }
    fn add(&mut self, op: Op, inputs: Vec<NodeId>, mut tys: Vec<TensorType>) -> NodeId {
        let id = NodeId(self.nodes.len() as u32);
        self.memo.insert((op.clone(), inputs.clone()), id);
        let ty = tys[0].clone();
        if tys.len() == 1 {
            tys.clear();
        }
        self.nodes.push(Node {
            op,
            inputs,
            ty,
            parts: tys,
        });
        id
    }
    /// All results of a composite, in order.
    pub fn composite(&mut self, c: impl Into<Composite>, ins: &[NodeId]) -> Result<Vec<NodeId>> {
        let id = self.push(Op::Composite(c.into()), ins)?;
        self.results(id)
    }
    /// The values a node makes: itself, or its parts.
    pub fn results(&mut self, id: NodeId) -> Result<Vec<NodeId>> {
        match self.node(id).parts.len() {
            0 => Ok(vec![id]),
            n => (0..n).map(|k| self.push(Op::Part(k), &[id])).collect(),
        }
    }
    /// f32 scalar constant.
    pub fn scalar(&mut self, v: f32) -> NodeId {
        let key = (Op::Const(Bits::from(v)), vec![]);
        match self.memo.get(&key) {
            Some(id) => *id,
            None => self.add(key.0, vec![], vec![TensorType::f32([])]),
        }
    }
    /// Elementwise op; NumPy broadcasting is made explicit.
    pub fn map(&mut self, s: ScalarOp, ins: &[NodeId]) -> Result<NodeId> {
        let fail = |b: &Self| {
            let tys: Vec<_> = ins.iter().map(|i| b.ty(*i)).collect();
            Error::shape(s.name(), "extents equal or 1", &tys)
        };
        let mut shape = Shape::default();
        for i in ins {
            shape = shape.broadcast(self.shape(*i)).ok_or_else(|| fail(self))?;
        }
        let ins = ins
            .iter()
            .map(|i| self.broadcast(*i, &shape))
            .collect::<Result<Vec<_>>>()?;
        self.push(Op::Map(s), &ins)
    }
    /// `x` combined with a constant.
    pub fn map_const(&mut self, s: ScalarOp, x: NodeId, v: f32) -> Result<NodeId> {
        let c = self.scalar(v);
        let c = self.cast(c, self.ty(x).dtype)?;
        self.map(s, &[x, c])
    }
    /// Conversion; nothing where the type already fits.
    pub fn cast(&mut self, x: NodeId, to: DType) -> Result<NodeId> {
        if self.ty(x).dtype == to {
            return Ok(x);
        }
        self.push(Op::Cast(to), &[x])
    }
    /// Stretch; nothing where the shape already fits.
    pub fn broadcast(&mut self, x: NodeId, to: &Shape) -> Result<NodeId> {
        if self.shape(x) == to {
            return Ok(x);
        }
        self.push(Op::Broadcast(to.clone()), &[x])
    }
    /// Other extents; nothing where the shape already fits.
    pub fn reshape(&mut self, x: NodeId, to: impl Into<Shape>) -> Result<NodeId> {
        let to = to.into();
        if *self.shape(x) == to {
            return Ok(x);
        }
        if let (Op::Reshape(_), Some(inner)) = (&self.node(x).op, self.node(x).inputs.first()) {
            let inner = *inner;
            return self.reshape(inner, to);
        }
        self.push(Op::Reshape(to), &[x])
    }
    /// Axes reordered.
    pub fn permute(&mut self, x: NodeId, axes: &[usize]) -> Result<NodeId> {
        self.push(Op::Permute(axes.to_vec()), &[x])
    }
    /// A window; nothing where it is the whole axis.
    pub fn slice(&mut self, x: NodeId, axis: usize, start: usize, len: usize) -> Result<NodeId> {
        if start == 0 && self.shape(x).0.get(axis) == Some(&len) {
            return Ok(x);
        }
        self.push(Op::Slice { axis, start, len }, &[x])
    }
    /// Operands side by side; nothing for a single one.
    pub fn concat(&mut self, axis: usize, xs: &[NodeId]) -> Result<NodeId> {
        match xs {
            [one] => Ok(*one),
            _ => self.push(Op::Concat(axis), xs),
        }
    }
    /// Reduction that keeps the axis with extent 1.
    pub fn reduce(&mut self, r: ReduceOp, axis: usize, x: NodeId) -> Result<NodeId> {
        if self.shape(x).0.get(axis) == Some(&1) {
            return Ok(x);
        }
        self.push(Op::Reduce(r, axis), &[x])
    }
    /// Sum over the innermost axis, kept with extent 1.
    pub fn sum_last(&mut self, x: NodeId) -> Result<NodeId> {
        let axis = self.shape(x).rank().saturating_sub(1);
        self.reduce(ReduceOp::Sum, axis, x)
    }
    /// `op(a) op(b)`.
    pub fn matmul(&mut self, a: NodeId, ta: bool, b: NodeId, tb: bool) -> Result<NodeId> {
        let alpha = Bits::from(1.0);
        self.push(Op::MatMul { ta, tb, alpha }, &[a, b])
    }
    /// Drops nodes no output or update needs, keeps input slots, freezes.
    pub fn finish(self, outputs: Vec<NodeId>, updates: Vec<Update>) -> Graph {
        let mut live = vec![false; self.nodes.len()];
        for o in outputs
            .iter()
            .copied()
            .chain(updates.iter().map(|u| u.value))
        {
            live[o.index()] = true;
        }
        for i in (0..self.nodes.len()).rev() {
            live[i] |= matches!(self.nodes[i].op, Op::Input(..));
            if live[i] {
                for x in &self.nodes[i].inputs {
                    live[x.index()] = true;
                }
            }
        }
        let mut map = vec![NodeId(u32::MAX); self.nodes.len()];
        let mut nodes = vec![];
        for (i, mut n) in self.nodes.into_iter().enumerate() {
            if !live[i] {
                continue;
            }
            for x in &mut n.inputs {
                *x = map[x.index()];
            }
            map[i] = NodeId(nodes.len() as u32);
            nodes.push(n);
        }
        let outputs = outputs.iter().map(|o| map[o.index()]).collect();
        let updates = updates
            .iter()
            .map(|u| Update {
                slot: u.slot,
                value: map[u.value.index()],
            })
            .collect();
        Graph {
            nodes,
            outputs,
            updates,
        }
    }
    /// Continues on top of a frozen graph.
    pub fn resume(g: &Graph) -> Builder {
        let key = |(i, n): (NodeId, &Node)| ((n.op.clone(), n.inputs.clone()), i);
        Builder {
            memo: g.iter().map(key).collect(),
            n_inputs: g.inputs().len() as u32,
            nodes: g.nodes.clone(),
        }
    }
}
