//! What tests of passes share: graphs from closures, and equality under the oracle.
//! Invariant: a graph is compared on random inputs of every slot.
//! Absent on purpose: tolerances other than that of constants rounded to f32.
use crate::{
    Result,
    graph::{Builder, Graph, NodeId},
    op::{Composite, Op, Role},
    oracle::{Value, eval, sample},
    types::TensorType,
};

/// A graph of inputs of the given roles and types.
pub(super) fn build(
    ins: &[(Role, TensorType)],
    f: impl FnOnce(&mut Builder, &[NodeId]) -> Result<Vec<NodeId>>,
) -> Graph {
    let mut b = Builder::default();
    let x: Vec<NodeId> = ins.iter().map(|(r, t)| b.input(*r, t.clone())).collect();
    let out = f(&mut b, &x).unwrap();
    b.finish(out, vec![])
}

/// f32 inputs of role [`Role::State`].
pub(super) fn f32s(
    shapes: &[&[usize]],
    f: impl FnOnce(&mut Builder, &[NodeId]) -> Result<Vec<NodeId>>,
) -> Graph {
    let state = |s: &&[usize]| (Role::State, TensorType::f32(*s));
    build(&shapes.iter().map(state).collect::<Vec<_>>(), f)
}

/// Random inputs for `g`; integers are below 5.
pub(super) fn inputs(g: &Graph, seed: u32) -> Vec<Value> {
    let one = |(i, (_, _, ty)): (usize, (NodeId, Role, TensorType))| {
        sample::random(&ty, 5, seed, i as u32)
    };
    g.inputs().into_iter().enumerate().map(one).collect()
}

/// Asserts that both graphs compute the same.
#[track_caller]
pub(super) fn same(before: &Graph, after: &Graph) {
    for seed in 0..2 {
        let x = inputs(before, seed);
        let (a, b) = (eval(before, &x).unwrap(), eval(after, &x).unwrap());
        assert_eq!(a.len(), b.len());
        for (a, b) in a.iter().zip(&b) {
            assert_eq!(a.ty, b.ty);
            let size = a.data.iter().fold(1.0, |s: f64, v| s.max(v.abs()));
            for (x, y) in a.data.iter().zip(&b.data) {
                assert!((x - y).abs() <= 1e-6 * size, "{x} is now {y}\n{after:#?}");
            }
        }
    }
}

/// The names of the composites in `g`, in order.
pub(super) fn composites(g: &Graph) -> Vec<&'static str> {
    let name = |n: &crate::graph::Node| match &n.op {
        Op::Composite(c) => Some(c.name()),
        _ => None,
    };
    g.nodes.iter().filter_map(name).collect()
}

/// The only composite of `g`.
#[track_caller]
pub(super) fn only(g: &Graph) -> Composite {
    let mut all = g.nodes.iter().filter_map(|n| match &n.op {
        Op::Composite(c) => Some(c.clone()),
        _ => None,
    });
    let first = all.next().expect("a composite");
    assert_eq!(all.next(), None, "one composite");
    first
}
