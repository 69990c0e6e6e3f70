//! The device-free rewrites in their order.
use crate::{Result, graph::Graph};

/// The canonical form of user code, and what was rewritten.
pub fn canonical(g: &Graph) -> Result<(Graph, Vec<String>)> {
    Ok((g.clone(), vec![]))
}
