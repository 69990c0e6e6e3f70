//! Reverse-mode gradients, graph to graph.
//! Invariant: a node that does not depend on what is asked for is never differentiated, so frozen
//! weights cost nothing; a composite differentiates itself or is decomposed first.
//! Absent on purpose: recomputation.
use crate::{
    Error, Result,
    graph::{Builder, Graph, NodeId},
    op::{Op, VjpCx},
    pass::expand::expand_once,
    scalar::ScalarOp,
};

pub mod check;
mod map;
mod structural;
#[cfg(test)]
mod tests;

/// The graph of `[loss, d loss / d wrt[0], ..]`, without updates, where the loss is the first
/// output of `g`; of several losses in one tensor it is the gradient of their sum. Any node may be asked for; differentiation stops at it, so of a node and a view
/// of it only the view sees what is read through the view. What the loss does not reach gets zeros.
///
/// # Errors
/// [`Error::NoGradient`] if the loss or something asked for is not float.
pub fn grad(g: &Graph, wrt: &[NodeId]) -> Result<Graph> {
    let Some(loss) = g.outputs.first() else {
        return no_gradient("a graph", "it has no output to take as the loss");
    };
    let ty = g.ty(*loss);
    if !ty.dtype.is_float() {
        let why = format!("the loss must be a float, not {ty}");
        return no_gradient(g.node(*loss).op.name(), why);
    }
    for w in wrt {
        let n = g.node(*w);
        if !n.ty.dtype.is_float() || !n.parts.is_empty() {
            let why = format!("{} is not one float tensor", n.ty);
            return no_gradient(n.op.name(), why);
        }
    }
    let mut outputs = vec![*loss];
    outputs.extend(wrt);
    // What is asked for are outputs from here on, so that they keep their identity in rewrites.
    let mut g = Graph {
        nodes: g.nodes.clone(),
        outputs,
        updates: vec![],
    };
    loop {
        match Backward::new(&g).run()? {
            Outcome::Done(done) => return Ok(done),
            Outcome::Declined(node) => g = expand_once(&g, |c| Ok(c.id != node))?.0,
        }
    }
}

fn no_gradient<T>(op: &str, why: impl Into<String>) -> Result<T> {
    Err(Error::NoGradient {
        op: op.into(),
        why: why.into(),
    })
}

enum Outcome {
    Done(Graph),
    /// This composite has no gradient of its own for what was asked.
    Declined(NodeId),
}

/// One backward sweep. Output 0 is the loss, the others are what is asked for.
struct Backward<'a> {
    g: &'a Graph,
    b: Builder,
    /// Nodes where differentiation stops.
    leaf: Vec<bool>,
    /// Nodes that depend on a leaf through differentiable ops.
    needs: Vec<bool>,
    /// Cotangent of each result of each node; `None` is zero.
    cts: Vec<Vec<Option<NodeId>>>,
}

impl<'a> Backward<'a> {
    fn new(g: &'a Graph) -> Self {
        let mut leaf = vec![false; g.nodes.len()];
        for w in &g.outputs[1..] {
            leaf[w.index()] = true;
        }
        let mut needs = leaf.clone();
        for (id, n) in g.iter() {
            let smooth = !matches!(n.op, Op::Map(s) if map::is_flat(s));
            let float = n.ty.dtype.is_float() || !n.parts.is_empty();
            let below = n.inputs.iter().any(|i| needs[i.index()]);
            needs[id.index()] |= smooth && float && below;
        }
        let cts = g.nodes.iter().map(|n| vec![None; n.parts.len().max(1)]);
        Backward {
            cts: cts.collect(),
            b: Builder::resume(g),
            g,
            leaf,
            needs,
        }
    }

    fn run(mut self) -> Result<Outcome> {
        let loss = self.g.outputs[0];
        let one = self.constant(1.0, loss)?;
        self.cts[loss.index()][0] = Some(one);
        for (id, n) in self.g.iter().rev() {
            let i = id.index();
            if self.leaf[i] || !self.needs[i] || self.cts[i].iter().all(Option::is_none) {
                continue;
            }
            let needs: Vec<bool> = n.inputs.iter().map(|x| self.needs[x.index()]).collect();
            let cts = self.cts[i].clone();
            let ds = match &n.op {
                Op::Part(k) => {
                    self.add(n.inputs[0], *k, cts[0])?;
                    continue;
                }
                Op::Composite(c) => {
                    let outs = self.b.results(id)?;
                    let found = c.vjp(&mut VjpCx {
                        b: &mut self.b,
                        ins: &n.inputs,
                        outs: &outs,
                        cts: &cts,
                        needs: &needs,
                    })?;
                    match found {
                        Some(ds) => ds,
                        None => return Ok(Outcome::Declined(id)),
                    }
                }
                op => match cts[0] {
                    Some(d) => structural::vjp(&mut self.b, op, &n.inputs, id, d, &needs)?,
                    None => continue,
                },
            };
            for (x, d) in n.inputs.iter().zip(ds) {
                self.add(*x, 0, d)?;
            }
        }
        let mut outputs = vec![loss];
        for w in &self.g.outputs[1..] {
            let d = self.cts[w.index()][0];
            outputs.push(match d {
                Some(d) => d,
                None => self.constant(0.0, *w)?,
            });
        }
        Ok(Outcome::Done(self.b.finish(outputs, vec![])))
    }

    /// `v` in the type of node `like`.
    fn constant(&mut self, v: f32, like: NodeId) -> Result<NodeId> {
        let ty = self.g.ty(like).clone();
        let c = self.b.scalar(v);
        let c = self.b.cast(c, ty.dtype)?;
        self.b.broadcast(c, &ty.shape)
    }

    /// Adds `d` to the cotangent of result `k` of `x`.
    fn add(&mut self, x: NodeId, k: usize, d: Option<NodeId>) -> Result<()> {
        if !self.needs[x.index()] {
            return Ok(());
        }
        let slot = &mut self.cts[x.index()][k];
        *slot = match (*slot, d) {
            (Some(a), Some(d)) => Some(self.b.map(ScalarOp::Add, &[a, d])?),
            (a, d) => a.or(d),
        };
        Ok(())
    }
}
