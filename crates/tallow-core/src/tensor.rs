//! What model code sees: an immutable, cheap-to-clone, lazy handle. Nothing runs until a
//! [`Session`](crate::session::Session) is asked.
//! Invariant: shapes are checked when a handle is made, so an error names the caller's line.
//! Absent on purpose: a device; only leaves hold buffers.
use crate::{
    Error, Result,
    backend::Buffer,
    graph::{Builder, Graph, NodeId, Update},
    op::{Composite, Op, Role},
    types::{DType, Shape, TensorType},
};
use std::{
    collections::{HashMap, HashSet},
    panic::Location,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

mod grads;
mod ops;
pub use grads::{Grads, value_and_grad, values_and_grads};
pub use ops::LoraWeights;

/// A lazy tensor.
#[derive(Clone)]
pub struct Tensor(Arc<Inner>);

struct Inner {
    /// Counts handles in the order they were made: an order in which they can be computed.
    made: u64,
    kind: Kind,
    ty: TensorType,
    /// All result types of a composite with several.
    parts: Vec<TensorType>,
}

enum Kind {
    Leaf(Buffer, Role),
    Apply(Op, Vec<Tensor>),
}

impl Inner {
    fn new(kind: Kind, ty: TensorType, parts: Vec<TensorType>) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let made = NEXT.fetch_add(1, Ordering::Relaxed);
        Arc::new(Inner {
            made,
            kind,
            ty,
            parts,
        })
    }
}

impl Drop for Inner {
    /// Iterative, so that a long chain of lazy ops cannot overflow the stack.
    fn drop(&mut self) {
        let Kind::Apply(_, ins) = &mut self.kind else {
            return;
        };
        let mut todo = std::mem::take(ins);
        while let Some(t) = todo.pop() {
            if let Some(mut i) = Arc::into_inner(t.0)
                && let Kind::Apply(_, ins) = &mut i.kind
            {
                todo.append(ins);
            }
        }
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = match &self.0.kind {
            Kind::Leaf(_, role) => format!("{role:?}").to_lowercase(),
            Kind::Apply(op, _) => op.name().into(),
        };
        write!(f, "Tensor({what} {})", self.0.ty)
    }
}

impl Tensor {
    /// A handle on device memory.
    pub fn leaf(buf: Buffer, ty: TensorType, role: Role) -> Self {
        Tensor(Inner::new(Kind::Leaf(buf, role), ty, vec![]))
    }
    /// Shape and dtype.
    pub fn ty(&self) -> &TensorType {
        &self.0.ty
    }
    /// Extents.
    pub fn shape(&self) -> &Shape {
        &self.0.ty.shape
    }
    /// Extents as a slice.
    pub fn dims(&self) -> &[usize] {
        &self.0.ty.shape.0
    }
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.0.ty.dtype
    }
    /// The buffer of a leaf; `None` for anything still to be computed.
    pub fn buffer(&self) -> Option<&Buffer> {
        match &self.0.kind {
            Kind::Leaf(b, _) => Some(b),
            Kind::Apply(..) => None,
        }
    }
    /// The role of a leaf.
    pub fn role(&self) -> Option<Role> {
        match &self.0.kind {
            Kind::Leaf(_, r) => Some(*r),
            Kind::Apply(..) => None,
        }
    }
    /// The result of `op`. The building block of every method here.
    #[track_caller]
    pub fn apply(op: Op, ins: &[&Tensor]) -> Result<Self> {
        let at = Location::caller();
        let tys: Vec<_> = ins.iter().map(|t| t.ty()).collect();
        let mut parts = op.infer(&tys).map_err(|e| e.located(at))?;
        let ty = parts[0].clone();
        if parts.len() == 1 {
            parts.clear();
        }
        let ins = ins.iter().map(|t| (*t).clone()).collect();
        Ok(Tensor(Inner::new(Kind::Apply(op, ins), ty, parts)))
    }
    /// All results of a composite, in order.
    #[track_caller]
    pub fn composite(c: impl Into<Composite>, ins: &[&Tensor]) -> Result<Vec<Self>> {
        let t = Self::apply(Op::Composite(c.into()), ins)?;
        if t.0.parts.is_empty() {
            return Ok(vec![t]);
        }
        let part = |k: usize| {
            let kind = Kind::Apply(Op::Part(k), vec![t.clone()]);
            Tensor(Inner::new(kind, t.0.parts[k].clone(), vec![]))
        };
        Ok((0..t.0.parts.len()).map(part).collect())
    }
}

/// A lowered set of tensors: the graph and the leaf bound to each input slot.
pub struct Lowered {
    /// The computation.
    pub graph: Graph,
    /// Leaf tensors by input slot.
    pub leaves: Vec<Tensor>,
}

/// Flattens lazy handles into a graph. Leaves become input slots in first-visit order, so the slots
/// depend on structure only; the rest stands in the order it was made, so that what frees memory early
/// (a weight's gradient, right behind what it is made of) does so, and two runs of one code hash alike.
/// `updates`: state leaves and their next values, in order.
pub fn lower(outs: &[Tensor], updates: &[(Tensor, Tensor)]) -> Result<Lowered> {
    let mut b = Builder::default();
    let mut seen = HashMap::<*const Inner, NodeId>::new();
    let mut leaves: Vec<Tensor> = vec![];
    let roots = || outs.iter().chain(updates.iter().flat_map(|(s, v)| [s, v]));
    for t in reached(roots(), &mut b, &mut seen, &mut leaves) {
        let Kind::Apply(op, ins) = &t.0.kind else {
            continue;
        };
        let ids: Vec<NodeId> = ins.iter().map(|i| seen[&Arc::as_ptr(&i.0)]).collect();
        seen.insert(Arc::as_ptr(&t.0), b.push(op.clone(), &ids)?);
    }
    let id = |t: &Tensor| seen[&Arc::as_ptr(&t.0)];
    let mut ups: Vec<Update> = vec![];
    for (state, value) in updates {
        let slot = match b.node(id(state)).op {
            Op::Input(slot, Role::State) if state.ty() == value.ty() => slot,
            _ => {
                return Err(Error::shape(
                    "update",
                    "a state leaf and a value of its type",
                    &[state.ty(), value.ty()],
                ));
            }
        };
        if ups.iter().any(|u| u.slot == slot) {
            return Err(Error::shape("update", "each state once", &[state.ty()]));
        }
        let value = id(value);
        ups.push(Update { slot, value });
    }
    let outputs = outs.iter().map(id).collect();
    Ok(Lowered {
        graph: b.finish(outputs, ups),
        leaves,
    })
}

/// Makes inputs of all leaves below `roots`; gives back everything else there, in the order it was made.
fn reached<'a>(
    roots: impl Iterator<Item = &'a Tensor>,
    b: &mut Builder,
    seen: &mut HashMap<*const Inner, NodeId>,
    leaves: &mut Vec<Tensor>,
) -> Vec<&'a Tensor> {
    let mut slots = HashMap::<(u64, usize), NodeId>::new();
    let mut visited = HashSet::<*const Inner>::new();
    let mut made = vec![];
    let mut stack: Vec<&Tensor> = roots.collect();
    stack.reverse();
    while let Some(t) = stack.pop() {
        let key = Arc::as_ptr(&t.0);
        if !visited.insert(key) {
            continue;
        }
        let id = match &t.0.kind {
            // Two handles on one buffer are one input, or an update would not be seen by both.
            Kind::Leaf(buf, role) => match slots.get(&(buf.raw, buf.bytes)) {
                Some(id) if b.ty(*id) == t.ty() => *id,
                _ => {
                    let id = b.input(*role, t.ty().clone());
                    slots.insert((buf.raw, buf.bytes), id);
                    leaves.push(t.clone());
                    id
                }
            },
            Kind::Apply(_, ins) => {
                made.push(t);
                stack.extend(ins.iter().rev());
                continue;
            }
        };
        seen.insert(key, id);
    }
    made.sort_by_key(|t| t.0.made);
    made
}

/// Lazy handles for the outputs of a graph over given leaves: the inverse of [`lower`].
pub fn lift(g: &Graph, leaves: &[Tensor]) -> Vec<Tensor> {
    let mut made: Vec<Tensor> = Vec::with_capacity(g.nodes.len());
    for n in &g.nodes {
        let t = match n.op {
            Op::Input(slot, _) => leaves[slot as usize].clone(),
            _ => {
                let ins = n.inputs.iter().map(|i| made[i.index()].clone());
                let kind = Kind::Apply(n.op.clone(), ins.collect());
                Tensor(Inner::new(kind, n.ty.clone(), n.parts.clone()))
            }
        };
        made.push(t);
    }
    g.outputs.iter().map(|o| made[o.index()].clone()).collect()
}
