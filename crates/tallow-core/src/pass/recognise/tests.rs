//! Every pattern in its usual writings, and near misses that must stay as they are.
use super::{
    super::testing::{build, composites, f32s, only, same},
    *,
};
use crate::{
    graph::Builder,
    op::{Composite, Op, ReduceOp, Role},
    scalar::ScalarOp::{self, *},
    types::{DType, TensorType},
};

mod attention;
mod blocks;
mod cross_entropy;
mod linear;

/// Asserts that `g` is rewritten to the composites `names`, computes the same, and stays so.
#[track_caller]
fn becomes(g: &Graph, names: &[&str]) -> Graph {
    let (r, notes) = recognise(g).unwrap();
    assert_eq!(composites(&r), names, "{r:#?}");
    same(g, &r);
    assert_eq!(notes.is_empty(), names.is_empty());
    assert_eq!(recognise(&r).unwrap(), (r.clone(), vec![]));
    r
}

/// Asserts that nothing is recognised in `g`.
#[track_caller]
fn stays(g: &Graph) {
    becomes(g, &[]);
}
