//! Cross entropy over a projection.
//! Invariant: what it reads of the weights is packed as for a linear, or lies in rows.
//! Absent on purpose: logits; the kernel holds a few at a time.
use super::{Io, NK_F32, Offer, order, row_stride};
use crate::{device::Cpu, linear::packed_len, loss};
use tallow_core::{
    kernel::{Format, KernelSpec},
    op::Bits,
    types::DType,
};

/// Cross entropy of rows under a projection: f32 weights are read where they lie, others from panels.
pub(in super::super) fn cross_entropy(cpu: &Cpu, spec: &KernelSpec) -> Option<Offer> {
    let (x, w) = (&spec.inputs[0], &spec.inputs[1]);
    let in_place = w.dtype == DType::F32 && w.is_dense();
    if !in_place {
        order(w).filter(|_| w.frozen && w.dtype.is_float())?;
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
    let format = Format {
        name: NK_F32,
        bytes: packed_len(v, c) * 4,
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
            layout: match in_place {
                true => loss::WeightLayout::Rows(c),
                false => loss::WeightLayout::Panels,
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
    let name = match in_place {
        true => "cross_entropy_rows_f32",
        false => "cross_entropy_panels_f32",
    };
    let offer = Offer::new(name, run);
    Some(Offer {
        prepare: if in_place { vec![] } else { vec![(1, format)] },
        ..offer.scratch(scratch)
    })
}
