//! The device-free rewrites in their order: simplify, group, simplify.
//! Invariant: running it on its own result changes nothing, so gradients taken from a canonical
//! graph share its forward pass.
use super::{group::group, simplify::simplify};
use crate::{Result, graph::Graph};

/// The canonical form of user code, and what was rewritten.
pub fn canonical(g: &Graph) -> Result<(Graph, Vec<String>)> {
    let g = simplify(g)?;
    let (g, notes) = group(&g)?;
    Ok((simplify(&g)?, notes))
}
