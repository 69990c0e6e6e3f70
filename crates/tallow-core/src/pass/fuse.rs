//! Groups the graph into launches over storage roots. Views (reshape, permute, slice, broadcast)
//! become strided windows of their operand; a map swallows maps that feed only it; the parts of a
//! concatenation are written where they end up.
//! Invariant: every value is a window of exactly one root; no group writes what it reads, except
//! elementwise in place, which only the planner decides.
//! Absent on purpose: offsets in memory.
use crate::{
    Result,
    graph::{Graph, Node, NodeId},
    kernel::Body,
    op::{Bits, Op, Role},
    scalar::{Inst, ScalarProgram},
    types::{DType, Layout, Shape},
};
use std::collections::HashMap;

/// Index of a storage root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RootId(pub u32);
impl RootId {
    /// Position in [`Fused::roots`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Where a root's storage comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RootKind {
    /// Bound input.
    Input(u32, Role),
    /// Written by groups.
    Computed,
}

/// One piece of storage.
#[derive(Clone, Debug)]
pub struct Root {
    /// Size in elements.
    pub elems: usize,
    /// Element type.
    pub dtype: DType,
    /// Where it comes from.
    pub kind: RootKind,
}

/// A strided window of a root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Storage.
    pub root: RootId,
    /// Window, with its offset.
    pub layout: Layout,
}

/// One launch: what it computes and which windows it reads and writes.
#[derive(Clone, Debug)]
pub struct Group {
    /// The computation.
    pub body: Body,
    /// Operands.
    pub reads: Vec<View>,
    /// Results; `None` where nobody wants one.
    pub writes: Vec<Option<View>>,
    /// The node whose value this is, for notes.
    pub origin: NodeId,
    /// What fusion did, for `explain`.
    pub note: String,
}

/// The graph as launches over roots.
#[derive(Debug, Default)]
pub struct Fused {
    /// Launches in order.
    pub groups: Vec<Group>,
    /// Storage.
    pub roots: Vec<Root>,
    /// Root of each output: computed, dense, and of this output only.
    pub outputs: Vec<RootId>,
    /// State changes: input slot and the view of its next value.
    pub updates: Vec<(u32, View)>,
}

struct Fuser<'g> {
    g: &'g Graph,
    inlined: Vec<bool>,
    /// Windows assigned before their writer runs: parts of a concatenation.
    steered: HashMap<NodeId, View>,
    views: Vec<Option<View>>,
    out: Fused,
}

/// Groups `g` into launches.
pub fn fuse(g: &Graph) -> Result<Fused> {
    let mut f = Fuser {
        g,
        inlined: inlined(g),
        steered: HashMap::new(),
        views: vec![None; g.nodes.len()],
        out: Fused::default(),
    };
    f.steer();
    for (id, n) in g.iter() {
        f.visit(id, n);
    }
    f.finish();
    Ok(f.out)
}

/// Constants seen through broadcasts.
fn constant(g: &Graph, id: NodeId) -> Option<Bits> {
    match &g.node(id).op {
        Op::Const(b) => Some(*b),
        Op::Broadcast(_) | Op::Reshape(_) => constant(g, g.node(id).inputs[0]),
        _ => None,
    }
}

/// Maps that are computed inside their only reader, another map.
fn inlined(g: &Graph) -> Vec<bool> {
    let uses = g.use_counts();
    let mut read_by_map = vec![false; g.nodes.len()];
    for n in g.nodes.iter().filter(|n| matches!(n.op, Op::Map(_))) {
        for i in &n.inputs {
            read_by_map[i.index()] = true;
        }
    }
    let mut inlined = vec![false; g.nodes.len()];
    let mut depth = vec![0usize; g.nodes.len()];
    for (i, n) in g.iter().filter(|(_, n)| matches!(n.op, Op::Map(_))) {
        let inner = n.inputs.iter().filter(|x| inlined[x.index()]);
        depth[i.index()] = 1 + inner.map(|x| depth[x.index()]).sum::<usize>();
        inlined[i.index()] =
            uses[i.index()] == 1 && read_by_map[i.index()] && depth[i.index()] < MAX_MAPS;
    }
    inlined
}

/// Largest number of maps in one launch; bounds registers, and the recursion of this pass.
const MAX_MAPS: usize = 64;

impl Fuser<'_> {
    fn root(&mut self, elems: usize, dtype: DType, kind: RootKind) -> RootId {
        self.out.roots.push(Root { elems, dtype, kind });
        RootId(self.out.roots.len() as u32 - 1)
    }
    fn fresh(&mut self, shape: &Shape, dtype: DType) -> View {
        View {
            root: self.root(shape.numel(), dtype, RootKind::Computed),
            layout: Layout::contiguous(shape),
        }
    }
    /// Decides which values are written straight into a concatenation they end up in.
    fn steer(&mut self) {
        // Consumers before producers, so that nested concatenations steer into the outermost.
        for (id, n) in self.g.iter().rev() {
            let Op::Concat(axis) = n.op else { continue };
            let whole = match self.steered.get(&id) {
                Some(v) => v.clone(),
                None => {
                    let v = self.fresh(&n.ty.shape, n.ty.dtype);
                    self.steered.insert(id, v.clone());
                    v
                }
            };
            let mut at = 0;
            for x in &n.inputs {
                let len = self.g.ty(*x).shape.0[axis];
                let window = View {
                    root: whole.root,
                    layout: whole.layout.slice(axis, at, len),
                };
                at += len;
                self.steer_value(*x, window);
            }
        }
    }
    /// Walks from a concatenated value to its writer through views that can be undone.
    fn steer_value(&mut self, mut id: NodeId, mut v: View) {
        // Other readers of the value read the window; only a second window would need a copy.
        loop {
            if self.steered.contains_key(&id) {
                return;
            }
            let n = self.g.node(id);
            match &n.op {
                Op::Reshape(_) => match v.layout.reshape(&self.g.ty(n.inputs[0]).shape) {
                    Some(l) => v.layout = l,
                    None => return,
                },
                Op::Permute(axes) => {
                    let mut back = vec![0; axes.len()];
                    axes.iter().enumerate().for_each(|(i, a)| back[*a] = i);
                    v.layout = v.layout.permute(&back);
                }
                Op::Map(_)
                | Op::Cast(_)
                | Op::Reduce(..)
                | Op::MatMul { .. }
                | Op::Gather(_)
                | Op::ScatterAdd(_)
                | Op::Part(_)
                | Op::Composite(_)
                | Op::Concat(_) => {
                    self.steered.insert(id, v);
                    return;
                }
                Op::Input(..)
                | Op::Const(_)
                | Op::Broadcast(_)
                | Op::Slice { .. }
                | Op::Pad { .. }
                | Op::Iota(..)
                | Op::Random { .. }
                | Op::Barrier(_) => return,
            }
            id = n.inputs[0];
        }
    }
    /// Where the value of `id` is to be written.
    fn target(&mut self, id: NodeId) -> View {
        match self.steered.remove(&id) {
            Some(v) => v,
            None => {
                let ty = self.g.ty(id);
                self.fresh(&ty.shape, ty.dtype)
            }
        }
    }
    fn view(&self, id: NodeId) -> View {
        self.views[id.index()]
            .clone()
            .expect("operands are visited before their readers (bug in tallow)")
    }
    fn group(
        &mut self,
        id: NodeId,
        body: Body,
        reads: Vec<View>,
        writes: Vec<Option<View>>,
        note: &str,
    ) {
        self.out.groups.push(Group {
            body,
            reads,
            writes,
            origin: id,
            note: note.into(),
        });
    }
    fn copy(&mut self, id: NodeId, from: View, to: View, note: &str) {
        self.group(id, Body::Copy, vec![from], vec![Some(to)], note);
    }

    fn visit(&mut self, id: NodeId, n: &Node) {
        let v = match &n.op {
            Op::Input(slot, role) => View {
                root: self.root(
                    n.ty.shape.numel(),
                    n.ty.dtype,
                    RootKind::Input(*slot, *role),
                ),
                layout: Layout::contiguous(&n.ty.shape),
            },
            Op::Part(_) => return, // written by its composite
            Op::Reshape(_)
            | Op::Permute(_)
            | Op::Slice { .. }
            | Op::Broadcast(_)
            | Op::Barrier(_) => match self.view_of(id, n) {
                Some(v) => v,
                None => return,
            },
            Op::Map(_) if self.inlined[id.index()] => return,
            Op::Const(_) if self.only_read_by_maps(id) => return,
            Op::Concat(axis) => self.concat(id, n, *axis),
            Op::Pad { axis, before, .. } => self.pad(id, n, *axis, *before),
            Op::Composite(_) => return self.composite(id, n),
            Op::Map(_) => self.maps(id, n),
            _ => self.plain(id, n),
        };
        self.views[id.index()] = Some(v);
    }
    /// A window of zeros.
    fn pad(&mut self, id: NodeId, n: &Node, axis: usize, before: usize) -> View {
        let whole = self.target(id);
        let zeros = Body::Fill(0.0.into());
        self.group(id, zeros, vec![], vec![Some(whole.clone())], "");
        let len = self.g.ty(n.inputs[0]).shape.0[axis];
        let window = View {
            root: whole.root,
            layout: whole.layout.slice(axis, before, len),
        };
        let from = self.view(n.inputs[0]);
        self.copy(id, from, window, "inside zeros");
        whole
    }
    /// A map with all maps that only it reads.
    fn maps(&mut self, id: NodeId, n: &Node) -> View {
        let (program, leaves, count) = self.program(id);
        let read = |i: &NodeId| {
            let v = self.view(*i);
            View {
                layout: v.layout.broadcast(&n.ty.shape),
                root: v.root,
            }
        };
        let reads = leaves.iter().map(read).collect();
        let to = self.target(id);
        let note = match count {
            0 | 1 => String::new(),
            n => format!("{n} maps in one"),
        };
        self.group(id, Body::Map(program), reads, vec![Some(to.clone())], &note);
        to
    }
    /// An op that is a kernel of its own.
    fn plain(&mut self, id: NodeId, n: &Node) -> View {
        let body = match &n.op {
            Op::Const(b) => Body::Fill(*b),
            Op::Cast(_) => Body::Copy,
            Op::Reduce(r, axis) => Body::Reduce(*r, *axis),
            Op::MatMul { ta, tb, alpha } => Body::MatMul {
                ta: *ta,
                tb: *tb,
                alpha: *alpha,
            },
            Op::Gather(_) => Body::Gather,
            Op::ScatterAdd(_) => Body::ScatterAdd,
            Op::Iota(_, axis) => Body::Iota(*axis),
            Op::Random { id, .. } => Body::Random(*id),
            _ => unreachable!("`visit` has an arm for every other op (bug in tallow)"),
        };
        let reads = n.inputs.iter().map(|i| self.view(*i)).collect();
        let to = self.target(id);
        self.group(id, body, reads, vec![Some(to.clone())], "");
        to
    }
    fn only_read_by_maps(&self, id: NodeId) -> bool {
        let reads = |n: &Node| n.inputs.contains(&id);
        let mut readers = self.g.iter().filter(|(_, n)| reads(n));
        let by_maps = readers.all(|(i, n)| match n.op {
            Op::Map(_) => true,
            Op::Broadcast(_) | Op::Reshape(_) => self.only_read_by_maps(i),
            _ => false,
        });
        by_maps && !self.g.roots().any(|r| r == id)
    }
    /// The window a view op means, or a copy where strides cannot say it.
    fn view_of(&mut self, id: NodeId, n: &Node) -> Option<View> {
        if constant(self.g, id).is_some() && self.views[n.inputs[0].index()].is_none() {
            return None;
        }
        let v = self.view(n.inputs[0]);
        let layout = match &n.op {
            Op::Reshape(to) => v.layout.reshape(to),
            Op::Permute(axes) => Some(v.layout.permute(axes)),
            Op::Slice { axis, start, len } => Some(v.layout.slice(*axis, *start, *len)),
            Op::Broadcast(to) => Some(v.layout.broadcast(to)),
            _ => Some(v.layout.clone()),
        };
        Some(match layout {
            Some(layout) => View {
                root: v.root,
                layout,
            },
            None => {
                let from_shape = &self.g.ty(n.inputs[0]).shape;
                let to = self.fresh(from_shape, n.ty.dtype);
                let layout = Layout::contiguous(&n.ty.shape);
                let root = to.root;
                self.copy(id, v, to, "reshape of a strided view");
                View { root, layout }
            }
        })
    }
    fn concat(&mut self, id: NodeId, n: &Node, axis: usize) -> View {
        let whole = self.target(id);
        let mut at = 0;
        for x in &n.inputs {
            let len = self.g.ty(*x).shape.0[axis];
            let to = View {
                root: whole.root,
                layout: whole.layout.slice(axis, at, len),
            };
            at += len;
            let from = self.view(*x);
            let same = from.root == to.root && from.layout.offset == to.layout.offset;
            if !same {
                self.copy(id, from, to, "part of a concatenation");
            }
        }
        whole
    }
    fn composite(&mut self, id: NodeId, n: &Node) {
        let Op::Composite(c) = &n.op else { return };
        let reads: Vec<View> = n.inputs.iter().map(|i| self.view(*i)).collect();
        let mut writes = vec![None; n.parts.len().max(1)];
        if n.parts.is_empty() {
            let to = self.target(id);
            writes[0] = Some(to.clone());
            self.views[id.index()] = Some(to);
        } else {
            for (i, p) in self.g.iter().filter(|(_, p)| p.inputs.first() == Some(&id)) {
                if let Op::Part(k) = p.op {
                    let to = self.target(i);
                    writes[k] = Some(to.clone());
                    self.views[i.index()] = Some(to);
                }
            }
        }
        self.group(id, Body::Composite(c.clone()), reads, writes, "");
    }
    /// Flattens the inlined tree under `root` into one program, its leaves, and how many maps it holds.
    fn program(&self, root: NodeId) -> (ScalarProgram, Vec<NodeId>, usize) {
        let mut leaves = vec![];
        self.leaves(root, true, &mut leaves);
        let mut p = ScalarProgram {
            n_inputs: leaves.len() as u16,
            ..Default::default()
        };
        let mut memo = HashMap::new();
        let out = self.emit(root, true, &leaves, &mut memo, &mut p);
        p.outputs = vec![out];
        let count = p.flops();
        (p, leaves, count)
    }
    fn inside(&self, id: NodeId) -> bool {
        self.inlined[id.index()]
    }
    fn leaves(&self, id: NodeId, top: bool, out: &mut Vec<NodeId>) {
        if constant(self.g, id).is_some() {
            return;
        }
        if top || self.inside(id) {
            for x in &self.g.node(id).inputs {
                self.leaves(*x, false, out);
            }
        } else if !out.contains(&id) {
            out.push(id);
        }
    }
    fn emit(
        &self,
        id: NodeId,
        top: bool,
        leaves: &[NodeId],
        memo: &mut HashMap<NodeId, u16>,
        p: &mut ScalarProgram,
    ) -> u16 {
        if let Some(r) = memo.get(&id) {
            return *r;
        }
        if let Some(k) = leaves.iter().position(|l| *l == id) {
            return k as u16;
        }
        let inst = match (constant(self.g, id), &self.g.node(id).op) {
            (Some(c), _) => Inst::Const(c.get().to_bits()),
            (None, Op::Map(s)) if top || self.inside(id) => {
                let ins = &self.g.node(id).inputs;
                let args = ins
                    .iter()
                    .map(|x| self.emit(*x, false, leaves, memo, p))
                    .collect();
                Inst::Apply(*s, args)
            }
            _ => unreachable!("leaves hold every other operand (bug in tallow)"),
        };
        p.insts.push(inst);
        let r = p.n_inputs + p.insts.len() as u16 - 1;
        memo.insert(id, r);
        r
    }
    /// Outputs and updates get storage of their own where they do not have it.
    fn finish(&mut self) {
        let mut taken: Vec<RootId> = vec![];
        for (k, id) in self.g.outputs.clone().into_iter().enumerate() {
            let ty = self.g.ty(id).clone();
            let v = self.view(id);
            let root = &self.out.roots[v.root.index()];
            let updated = self.g.updates.iter().any(|u| {
                self.views[u.value.index()]
                    .as_ref()
                    .is_some_and(|w| w.root == v.root)
            });
            let own = root.kind == RootKind::Computed
                && v.layout.is_contiguous()
                && v.layout.offset == 0
                && root.elems == ty.shape.numel()
                && !taken.contains(&v.root)
                && !updated;
            let root = if own {
                v.root
            } else {
                let to = self.fresh(&ty.shape, ty.dtype);
                let root = to.root;
                self.copy(id, v, to, &format!("output {k} of its own"));
                root
            };
            taken.push(root);
            self.out.outputs.push(root);
        }
        for u in &self.g.updates {
            let v = self.view(u.value);
            self.out.updates.push((u.slot, v));
        }
    }
}
