//! Kernels over rows: norms, softmax, rope, SwiGLU, the optimizer.
//! Invariant: operands are dense rows at even distances; anything else is declined.
use super::{Io, Offer, row_stride};
use crate::{
    attention::Heads,
    device::Cpu,
    norm::{Residual, RmsNorm, RmsNormBackward, Rows},
    optim, reduce, rope as rotate,
    swiglu::{SwiGlu, SwiGluBackward},
};
use tallow_core::{kernel::KernelSpec, op::RmsNormGrad, types::DType};

/// Operand `i` as rows `ld` apart.
pub(super) fn read(io: &Io, i: usize, ld: usize) -> Rows {
    Rows {
        ptr: io.read(i),
        ld,
    }
}

/// Result `i` as rows `ld` apart.
pub(super) fn write(io: &Io, i: usize, ld: usize) -> Rows<*mut f32> {
    Rows {
        ptr: io.write(i),
        ld,
    }
}

/// Extents `[rows, c]` of the first operand and the row stride of every operand and result.
pub(super) struct Strides {
    pub(super) rows: usize,
    pub(super) c: usize,
    pub(super) ins: Vec<usize>,
    pub(super) outs: Vec<usize>,
}

/// Nothing if one is not dense rows.
pub(super) fn strides(spec: &KernelSpec) -> Option<Strides> {
    let s = &spec.inputs[0].layout.shape;
    let out = |o: &Option<_>| o.as_ref().map_or(Some(0), row_stride);
    Some(Strides {
        rows: s.rows(),
        c: s.last(),
        ins: spec.inputs.iter().map(row_stride).collect::<Option<_>>()?,
        outs: spec.outputs.iter().map(out).collect::<Option<_>>()?,
    })
}

pub(super) fn rms_norm(eps: f32, spec: &KernelSpec) -> Option<Offer> {
    let s = strides(spec)?;
    Some(Offer::new("rms_norm_rows_f32", move |io| {
        let job = RmsNorm {
            rows: s.rows,
            c: s.c,
            eps,
            x: read(io, 0, s.ins[0]),
            residual: None,
            w: io.read(1),
            y: write(io, 0, s.outs[0]),
        };
        // SAFETY: the plan's spans hold these rows, and `y` overlaps nothing that is read.
        unsafe { job.run(io.exec) };
    }))
}

pub(super) fn add_rms_norm(eps: f32, spec: &KernelSpec) -> Option<Offer> {
    let s = strides(spec)?;
    spec.outputs[1].as_ref()?;
    Some(Offer::new("add_rms_norm_rows_f32", move |io| {
        let job = RmsNorm {
            rows: s.rows,
            c: s.c,
            eps,
            x: read(io, 0, s.ins[0]),
            residual: Some(Residual {
                other: read(io, 1, s.ins[1]),
                sum: write(io, 0, s.outs[0]),
            }),
            w: io.read(2),
            y: write(io, 1, s.outs[1]),
        };
        // SAFETY: as in `rms_norm`; without a sum, `y` holds it for the time of a row.
        unsafe { job.run(io.exec) };
    }))
}

pub(super) fn rms_norm_grad(_: &Cpu, n: &RmsNormGrad, spec: &KernelSpec) -> Option<Offer> {
    let s = strides(spec)?;
    spec.outputs[0].as_ref()?;
    let (eps, residual) = (n.eps.get(), n.residual);
    let scratch = match &spec.outputs[1] {
        Some(_) => RmsNormBackward::workspace_elems(s.rows, s.c),
        None => 0,
    };
    let run = move |io: &Io| {
        let job = RmsNormBackward {
            rows: s.rows,
            c: s.c,
            eps,
            x: read(io, 0, s.ins[0]),
            w: io.read(1),
            dy: read(io, 2, s.ins[2]),
            residual: residual.then(|| read(io, 3, s.ins[3])),
            dx: write(io, 0, s.outs[0]),
            dw: io.write(1),
            workspace: io.workspace.0.cast(),
        };
        // SAFETY: as in `rms_norm`.
        unsafe { job.run(io.exec) };
    };
    Some(Offer::new("rms_norm_grad_rows_f32", run).scratch(scratch))
}

pub(super) fn softmax(spec: &KernelSpec) -> Option<Offer> {
    let s = strides(spec)?;
    Some(Offer::new("softmax_rows_f32", move |io| {
        let job = reduce::Softmax {
            rows: s.rows,
            c: s.c,
            x: read(io, 0, s.ins[0]),
            y: write(io, 0, s.outs[0]),
        };
        // SAFETY: as in `rms_norm`.
        unsafe { job.run(io.exec) };
    }))
}

pub(super) fn softmax_grad(spec: &KernelSpec) -> Option<Offer> {
    let s = strides(spec)?;
    Some(Offer::new("softmax_grad_rows_f32", move |io| {
        let job = reduce::SoftmaxBackward {
            rows: s.rows,
            c: s.c,
            y: read(io, 0, s.ins[0]),
            dy: read(io, 1, s.ins[1]),
            dx: write(io, 0, s.outs[0]),
        };
        // SAFETY: as in `rms_norm`.
        unsafe { job.run(io.exec) };
    }))
}

pub(super) fn rope(cpu: &Cpu, inverse: bool, spec: &KernelSpec) -> Option<Offer> {
    let (x, y) = (&spec.inputs[0], spec.outputs[0].as_ref()?);
    let [b, t, h, d] = x.layout.shape.0[..] else {
        return None;
    };
    let dense = |s: &[usize]| s[3] == 1;
    let small = spec.inputs[1].is_dense() && spec.inputs[2].is_dense();
    if !dense(&x.layout.strides) || !dense(&y.layout.strides) || !small {
        return None;
    }
    let (xs, ys) = (x.layout.strides.clone(), y.layout.strides.clone());
    let turn = if inverse {
        rotate::Turn::Back
    } else {
        rotate::Turn::Forward
    };
    let scratch = rotate::Rope::workspace_elems(d, cpu.threads());
    let run = move |io: &Io| {
        let job = rotate::Rope {
            b,
            t,
            h,
            d,
            x: Heads {
                ptr: io.read(0),
                batch: xs[0],
                token: xs[1],
                head: xs[2],
            },
            pos: io.read(1),
            inv_freq: io.read(2),
            turn,
            y: Heads {
                ptr: io.write(0),
                batch: ys[0],
                token: ys[1],
                head: ys[2],
            },
            workspace: io.workspace.0.cast(),
        };
        // SAFETY: the plan's spans hold these views, and `y` overlaps nothing that is read.
        unsafe { job.run(io.exec) };
    };
    Some(Offer::new("rope_heads_f32", run).scratch(scratch))
}

pub(super) fn swiglu(spec: &KernelSpec) -> Option<Offer> {
    let s = strides(spec)?;
    Some(Offer::new("swiglu_rows_f32", move |io| {
        let job = SwiGlu {
            rows: s.rows,
            c: s.c,
            g: read(io, 0, s.ins[0]),
            u: read(io, 1, s.ins[1]),
            y: write(io, 0, s.outs[0]),
        };
        // SAFETY: as in `rms_norm`.
        unsafe { job.run(io.exec) };
    }))
}

pub(super) fn swiglu_grad(spec: &KernelSpec) -> Option<Offer> {
    let s = strides(spec)?;
    if spec.outputs.iter().any(Option::is_none) {
        return None;
    }
    Some(Offer::new("swiglu_grad_rows_f32", move |io| {
        let job = SwiGluBackward {
            rows: s.rows,
            c: s.c,
            g: read(io, 0, s.ins[0]),
            u: read(io, 1, s.ins[1]),
            dy: read(io, 2, s.ins[2]),
            dg: write(io, 0, s.outs[0]),
            du: write(io, 1, s.outs[1]),
        };
        // SAFETY: as in `rms_norm`; the two results do not overlap.
        unsafe { job.run(io.exec) };
    }))
}

pub(super) fn adamw(spec: &KernelSpec) -> Option<Offer> {
    let fits = |o: &tallow_core::kernel::Operand| o.is_dense() && o.dtype == DType::F32;
    let wanted = spec.outputs.iter().all(|o| o.as_ref().is_some_and(fits));
    if !wanted || !spec.inputs.iter().all(fits) {
        return None;
    }
    let n = spec.inputs[0].layout.shape.numel();
    Some(Offer::new("adamw_flat_f32", move |io| {
        for (operand, result) in [(0, 0), (2, 1), (3, 2)] {
            let (from, to) = (io.read::<f32>(operand), io.write::<f32>(result));
            if from != to.cast_const() {
                // SAFETY: both hold `n` floats; the planner lets them be equal or disjoint.
                unsafe { std::ptr::copy_nonoverlapping(from, to, n) };
            }
        }
        let job = optim::AdamW {
            n,
            p: io.write(0),
            g: io.read(1),
            m: io.write(1),
            v: io.write(2),
            numbers: io.read(4),
        };
        // SAFETY: the plan's spans hold `n` floats each and the results do not overlap the gradient.
        unsafe { job.run(io.exec) };
    }))
}
