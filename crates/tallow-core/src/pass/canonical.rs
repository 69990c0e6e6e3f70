//! The device-free rewrites in their order: recognise, group, simplify.
//! Invariant: running it on its own result changes nothing, so gradients taken from a canonical
//! graph share its forward pass.
use super::{group::group, recognise::recognise, simplify::simplify};
use crate::{Result, graph::Graph};

#[cfg(test)]
mod tests;

/// The canonical form of user code, and what was rewritten.
pub fn canonical(g: &Graph) -> Result<(Graph, Vec<String>)> {
    let (g, mut notes) = recognise(g)?;
    let (g, groups) = group(&g)?;
    notes.extend(groups);
    Ok((simplify(&g)?, notes))
}
