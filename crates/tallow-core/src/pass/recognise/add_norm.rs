//! A sum that a norm reads: one op makes both.
//! Invariant: the sum may have other readers; it is a result of the new op.
//! Absent on purpose: sums a linear layer can make, which `simplify` has moved there before.
use super::{Edit, Found, Match};
use crate::{
    Result,
    graph::NodeId,
    op::{AddRmsNorm, Composite, Op},
    scalar::ScalarOp::Add,
};

pub(super) fn find(e: &mut Edit<'_>, uses: &[u32], id: NodeId) -> Result<Option<Found>> {
    let m = Match { b: &e.b, uses };
    let n = m.node(id);
    let Op::Composite(Composite::RmsNorm(norm)) = &n.op else {
        return Ok(None);
    };
    let (eps, sum, w) = (norm.eps, n.inputs[0], n.inputs[1]);
    let Some(&[x, y]) = m.map(sum, Add) else {
        return Ok(None);
    };
    let small = |t: NodeId| m.repeated(t) || m.uniform(t).is_some();
    if small(x) || small(y) || e.resolve(sum) != sum || e.depends(w, sum) {
        return Ok(None);
    }
    let out = e.b.composite(AddRmsNorm { eps }, &[x, y, w])?;
    let note = format!(
        "add_rms_norm of {}: from a sum that a norm reads",
        e.b.ty(sum)
    );
    e.redirect(sum, out[0]);
    let inner = vec![];
    let new = out[1];
    Ok(Some(Found { new, inner, note }))
}
