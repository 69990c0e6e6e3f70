//! Cross entropy over a projection.
//! Invariant: what it reads of the weights is packed as for a linear, or lies in rows.
//! Absent on purpose: logits; the kernel holds a few at a time.
use super::{Io, NK_F32, NK_PAIRS, Offer, Weights, order, row_stride};
use crate::{
    device::Cpu,
    linear::packed_len,
    loss::{self, PairWeights, WeightLayout},
    tile::{Element, Pairs},
};
use tallow_core::{
    kernel::{Format, KernelSpec},
    op::Bits,
    types::DType,
};

/// Panels of pairs as for the forward product, and behind them as for the backward one.
pub(super) const BOTH_PAIRS: &str = "panels32_both_bf16_pairs";

/// Elements of the forward panels of `[v, c]`, and of the backward ones.
pub(super) fn both(v: usize, c: usize) -> (usize, usize) {
    (packed_len(v, Pairs::rows(c)), packed_len(c, Pairs::rows(v)))
}

/// Cross entropy of rows under a projection: f32 weights are read where they lie, others from panels.
pub(in super::super) fn cross_entropy(cpu: &Cpu, spec: &KernelSpec) -> Option<Offer> {
    let (x, w) = (&spec.inputs[0], &spec.inputs[1]);
    let packable = order(w).filter(|_| w.frozen && w.dtype.is_float());
    let pairs = packable.is_some() && Weights::of(cpu) == Weights::Pairs;
    let in_place = !pairs && w.dtype == DType::F32 && w.is_dense();
    if !in_place {
        packable?;
    }
    let (rows, c, v) = (
        x.layout.shape.0[0],
        x.layout.shape.0[1],
        w.layout.shape.0[0],
    );
    let x_row = row_stride(x)?;
    let dx_row = match &spec.outputs[1] {
        Some(o) => row_stride(o)?,
        None => 0,
    };
    spec.outputs[0].as_ref().filter(|o| o.is_dense())?;
    let (forward, backward) = both(v, c);
    let gradient = spec.outputs[1].is_some();
    let (name, bytes) = match (pairs, gradient) {
        (false, _) => (NK_F32, packed_len(v, c) * 4),
        (true, false) => (NK_PAIRS, forward * 2),
        (true, true) => (BOTH_PAIRS, (forward + backward) * 2),
    };
    let format = Format {
        name,
        bytes,
        scale: Bits::from(1.0),
    };
    let scratch = loss::CrossEntropy::workspace_elems(rows, c, cpu.threads());
    let run = move |io: &Io| {
        let job = loss::CrossEntropy {
            rows,
            c,
            v,
            x: crate::norm::Rows {
                ptr: io.read(0),
                ld: x_row,
            },
            w: io.read(1),
            layout: match (pairs, in_place) {
                (true, _) => WeightLayout::Pairs(PairWeights {
                    forward: io.read(1),
                    backward: match gradient {
                        true => io.read::<Pairs>(1).wrapping_add(forward),
                        false => std::ptr::null(),
                    },
                }),
                (false, true) => WeightLayout::Rows(c),
                (false, false) => WeightLayout::Panels,
            },
            targets: io.read(2),
            nll: io.write(0),
            dx: crate::norm::Rows {
                ptr: io.write(1),
                ld: dx_row,
            },
            workspace: io.workspace.0.cast(),
        };
        // SAFETY: the plan's spans hold these arrays; results and workspace overlap nothing.
        unsafe { job.run(io.exec) };
    };
    let name = match (pairs, in_place) {
        (true, _) => "cross_entropy_panels_bf16_pairs",
        (false, true) => "cross_entropy_rows_f32",
        (false, false) => "cross_entropy_panels_f32",
    };
    let offer = Offer::new(name, run);
    Some(Offer {
        prepare: if in_place { vec![] } else { vec![(1, format)] },
        ..offer.scratch(scratch)
    })
}
