//! Generic user code, rewritten as the composites it spells out.
//! Invariant: what a rewrite swallows has no other readers, and the result is the same.
//! Absent on purpose: anything approximate, and patterns of gradients: those of composites are composites.
use super::{edit::Edit, simplify::simplify};
use crate::{
    Result,
    graph::{Graph, NodeId},
};

mod add_norm;
mod attention;
mod cross_entropy;
mod gate;
mod linear;
mod mask;
mod matcher;
mod norm;
mod softmax;
#[cfg(test)]
mod tests;
use matcher::Match;

/// A rewrite that fits.
struct Found {
    /// What now stands for the node asked about.
    new: NodeId,
    /// Nodes swallowed, which no other rewrite may use as a start.
    inner: Vec<NodeId>,
    /// A line for `explain`.
    note: String,
}

/// A pattern: asked about each node, last first, so that the widest form is seen before its parts.
type Rule = fn(&mut Edit<'_>, &[u32], NodeId) -> Result<Option<Found>>;

/// `g` with composites where it spells them out, and a line for each rewrite.
pub fn recognise(g: &Graph) -> Result<(Graph, Vec<String>)> {
    let mut notes = vec![];
    let rounds: [&[Rule]; 3] = [
        &[linear::find, norm::find, gate::find, softmax::find],
        &[attention::find, cross_entropy::find],
        &[add_norm::find],
    ];
    let mut g = simplify(g)?;
    for rules in rounds {
        let before = notes.len();
        for rule in rules {
            g = sweep(&g, *rule, &mut notes)?;
        }
        if notes.len() > before {
            // Also folds sums into linear layers, before norms take them.
            g = simplify(&g)?;
        }
    }
    Ok((g, notes))
}

fn sweep(g: &Graph, rule: Rule, notes: &mut Vec<String>) -> Result<Graph> {
    let uses = g.use_counts();
    let mut e = Edit::new(g);
    let mut swallowed = vec![false; g.nodes.len()];
    for (id, _) in g.iter().rev() {
        if swallowed[id.index()] {
            continue;
        }
        if let Some(found) = rule(&mut e, &uses, id)? {
            for i in found.inner {
                swallowed[i.index()] = true;
            }
            e.redirect(id, found.new);
            notes.push(found.note);
        }
    }
    e.finish()
}
