//! Intermediates in half the bytes: f32 values between two kernels become bf16 where the device says that its kernels
//! read and write them so.
//! Invariant: only storage changes, never an op: sums, inputs, states and outputs stay what the graph says. A root is
//! narrowed only if everything that touches it allows it, somebody asks for it, and every kernel is still found.
//! Absent on purpose: which ops gain by it; that is [`Backend::halves`].
use super::{KernelSpec, Result, operand};
use crate::{
    backend::{Backend, Half},
    pass::fuse::{Fused, Group, Root, RootKind, View},
    types::DType,
};

fn spec(roots: &[Root], g: &Group) -> KernelSpec {
    KernelSpec {
        body: g.body.clone(),
        inputs: g.reads.iter().map(|v| operand(roots, v)).collect(),
        outputs: g
            .writes
            .iter()
            .map(|w| w.as_ref().map(|v| operand(roots, v)))
            .collect(),
    }
}

fn touched(g: &Group) -> impl Iterator<Item = Option<&View>> {
    let writes = g.writes.iter().map(Option::as_ref);
    g.reads.iter().map(Some).chain(writes)
}

/// Narrows the roots of `f`; how many.
pub(super) fn narrow(f: &mut Fused, be: &dyn Backend) -> Result<usize> {
    let free = |r: &Root| r.kind == RootKind::Computed && r.dtype == DType::F32;
    let mut may: Vec<bool> = f.roots.iter().map(free).collect();
    let mut wanted = vec![false; f.roots.len()];
    let kept = f.outputs.iter().copied();
    for r in kept.chain(f.updates.iter().map(|(_, v)| v.root)) {
        may[r.index()] = false;
    }
    for g in &f.groups {
        let votes = be.halves(&spec(&f.roots, g));
        for (i, v) in touched(g).enumerate() {
            let Some(v) = v else { continue };
            match votes.get(i) {
                None | Some(Half::Never) => may[v.root.index()] = false,
                Some(Half::May) => {}
                Some(Half::Wanted) => wanted[v.root.index()] = true,
            }
        }
    }
    let all = |(r, (may, wanted)): (&mut Root, (&bool, &bool))| {
        if *may && *wanted {
            r.dtype = DType::BF16;
        }
        *may && *wanted
    };
    let marks = may.iter().zip(&wanted);
    let mut narrowed: Vec<bool> = f.roots.iter_mut().zip(marks).map(all).collect();
    while give_back(f, be, &mut narrowed)? {}
    Ok(narrowed.into_iter().filter(|n| *n).count())
}

/// Widens the roots of groups for which no kernel is found; were there any?
fn give_back(f: &mut Fused, be: &dyn Backend, narrowed: &mut [bool]) -> Result<bool> {
    let mut again = false;
    for g in &f.groups {
        let any = touched(g).flatten().any(|v| narrowed[v.root.index()]);
        if !any || !be.candidates(&spec(&f.roots, g))?.is_empty() {
            continue;
        }
        for v in touched(g).flatten() {
            if std::mem::take(&mut narrowed[v.root.index()]) {
                f.roots[v.root.index()].dtype = DType::F32;
                again = true;
            }
        }
    }
    Ok(again)
}
