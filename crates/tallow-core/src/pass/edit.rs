//! A graph under change: new nodes are appended, old ones redirected to them, and the result is put
//! in order again.
//! Invariant: what is not redirected keeps its order; a new node stands where it is first needed.
//! Absent on purpose: rules. Those are the passes.
use crate::{
    Error, Result,
    graph::{Builder, Graph, NodeId},
    op::Op,
};
use std::collections::{HashMap, HashSet};

/// See the module.
pub(super) struct Edit<'a> {
    /// The graph before.
    pub(super) g: &'a Graph,
    /// Holds the old nodes under their old ids; new ones are pushed here, reading old ids.
    pub(super) b: Builder,
    to: Vec<Option<NodeId>>,
    changed: bool,
}

impl<'a> Edit<'a> {
    pub(super) fn new(g: &'a Graph) -> Self {
        Edit {
            g,
            b: Builder::resume(g),
            to: vec![],
            changed: false,
        }
    }
    /// Whoever reads `old` reads `new` instead. Nothing `new` is made of may depend on `old`.
    pub(super) fn redirect(&mut self, old: NodeId, new: NodeId) {
        if self.resolve(new) == old {
            return;
        }
        if self.to.len() <= old.index() {
            self.to.resize(old.index() + 1, None);
        }
        self.to[old.index()] = Some(new);
        self.changed = true;
    }
    /// Where a node leads now.
    pub(super) fn resolve(&self, mut id: NodeId) -> NodeId {
        while let Some(Some(next)) = self.to.get(id.index()) {
            id = *next;
        }
        id
    }
    /// Does `from` depend on `on`, redirections included?
    pub(super) fn depends(&self, from: NodeId, on: NodeId) -> bool {
        let on = self.resolve(on);
        let mut seen = HashSet::new();
        let mut todo = vec![self.resolve(from)];
        while let Some(id) = todo.pop() {
            if id == on {
                return true;
            }
            if seen.insert(id) {
                let ins = &self.b.node(id).inputs;
                todo.extend(ins.iter().map(|i| self.resolve(*i)));
            }
        }
        false
    }
    /// The graph after.
    pub(super) fn finish(self) -> Result<Graph> {
        if !self.changed {
            return Ok(self.g.clone());
        }
        let live = self.live();
        let mut out = Builder::default();
        let mut map = HashMap::new();
        for (id, n) in self.g.iter() {
            let id = self.resolve(id);
            let input = matches!(n.op, Op::Input(..));
            if input || live.contains(&id) {
                self.emit(id, &mut out, &mut map)?;
            }
        }
        let old: Vec<NodeId> = (0..self.g.nodes.len() as u32).map(NodeId).collect();
        let at = |id: &NodeId| map.get(&self.resolve(*id)).copied();
        // Nodes that died have no image and no reader.
        let map: Vec<NodeId> = old.iter().map(|id| at(id).unwrap_or(NodeId(0))).collect();
        Ok(self.g.finish_from(out, &map))
    }

    fn live(&self) -> HashSet<NodeId> {
        let mut live = HashSet::new();
        let mut todo: Vec<NodeId> = self.g.roots().map(|r| self.resolve(r)).collect();
        while let Some(id) = todo.pop() {
            if live.insert(id) {
                let ins = &self.b.node(id).inputs;
                todo.extend(ins.iter().map(|i| self.resolve(*i)));
            }
        }
        live
    }

    /// Pushes `root` after everything it reads.
    fn emit(
        &self,
        root: NodeId,
        out: &mut Builder,
        map: &mut HashMap<NodeId, NodeId>,
    ) -> Result<()> {
        // A node is opened once to push what it reads, and closed once all that has been pushed.
        let mut open = HashSet::new();
        let mut todo = vec![root];
        while let Some(&id) = todo.last() {
            if map.contains_key(&id) {
                todo.pop();
                continue;
            }
            let n = self.b.node(id);
            let reads = || n.inputs.iter().map(|i| self.resolve(*i));
            if open.insert(id) {
                todo.extend(reads().filter(|i| !map.contains_key(i)));
                continue;
            }
            let ins: Option<Vec<NodeId>> = reads().map(|i| map.get(&i).copied()).collect();
            let Some(ins) = ins else {
                let want = "a rewrite without cycles (bug in tallow)";
                return Err(Error::shape(n.op.name(), want, &[&n.ty]));
            };
            let new = match n.op {
                Op::Input(slot, role) => out.input_at(slot, role, n.ty.clone()),
                _ => out.push(n.op.clone(), &ins)?,
            };
            map.insert(id, new);
            todo.pop();
        }
        Ok(())
    }
}
