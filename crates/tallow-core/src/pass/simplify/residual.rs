//! Additions folded into the op that made one of the terms.
//! Invariant: the other term does not depend on that op, so no cycle can arise.
//! Absent on purpose: additions whose term has other readers; both values are needed then.
use super::Edit;
use crate::{
    Result,
    graph::{Graph, NodeId},
    op::{Composite, Linear, LinearGrad, Op, RmsNormGrad},
    scalar::ScalarOp::Add,
};

pub(super) fn fold(g: &Graph) -> Result<Graph> {
    let uses = g.use_counts();
    let mut e = Edit::new(g);
    for (id, n) in g.iter() {
        if n.op != Op::Map(Add) {
            continue;
        }
        let term = |k: usize| {
            let (p, r) = (n.inputs[k], n.inputs[1 - k]);
            let once = p != r && uses[p.index()] == 1;
            let (order, tuple, c) = takes_residual(g, p).filter(|_| once)?;
            Some((order, tuple, c, r))
        };
        let mut found: Vec<_> = [0, 1].into_iter().filter_map(term).collect();
        found.sort_by_key(|f| f.0);
        for (_, tuple, c, r) in found {
            // A repeated row is a bias, not a value like the result.
            let repeated = matches!(g.node(r).op, Op::Broadcast(_));
            if repeated || e.depends(r, tuple) {
                continue;
            }
            let ins = [&g.node(tuple).inputs[..], &[r]].concat();
            let old = e.b.results(tuple)?;
            let new = e.b.composite(c, &ins)?;
            e.redirect(id, new[0]);
            for (o, n) in old.iter().zip(&new).skip(1) {
                e.redirect(*o, *n);
            }
            break;
        }
    }
    e.finish()
}

/// If `p` is the first result of an op that can add a residual: preference, node, the op with it.
fn takes_residual(g: &Graph, p: NodeId) -> Option<(u8, NodeId, Composite)> {
    let tuple = match g.node(p).op {
        Op::Part(0) => g.node(p).inputs[0],
        _ => p,
    };
    let Op::Composite(c) = &g.node(tuple).op else {
        return None;
    };
    let residual = true;
    let (order, with) = match c {
        Composite::Linear(l) if !l.residual => {
            let blocks = l.blocks.clone();
            (0, Linear { blocks, residual }.into())
        }
        Composite::RmsNormGrad(n) if !n.residual => {
            let eps = n.eps;
            (1, RmsNormGrad { eps, residual }.into())
        }
        Composite::LinearGrad(l) if !l.residual => {
            let blocks = l.blocks.clone();
            (2, LinearGrad { blocks, residual }.into())
        }
        _ => return None,
    };
    Some((order, tuple, with))
}
