//! Structural ops on the layouts and dtypes that kernels exist for.
//! Invariant: `None` here only ever means the slow road, never a wrong result.
use super::super::{Io, Offer, row_stride};
use crate::{
    device::Cpu,
    elementwise::{self, Elementwise},
    gather::{Copy, Gather, MAX_RANK, ScatterAdd, fill, iota},
    norm::Rows,
    philox::Uniform,
    reduce::{Reduce, Reduction},
};
use tallow_core::{
    kernel::{Body, KernelSpec, Operand},
    op::ReduceOp,
    scalar::ScalarProgram,
    types::DType,
};

pub(super) fn offer(cpu: &Cpu, spec: &KernelSpec) -> Option<Offer> {
    let out = spec.outputs[0].as_ref()?;
    match &spec.body {
        Body::Map(p) => map(cpu, p, spec),
        Body::Copy => copy(&spec.inputs[0], out),
        Body::Fill(v) => {
            let (n, dtype, v) = (out.layout.shape.numel(), out.dtype, v.get());
            out.is_dense().then(|| {
                // SAFETY: the plan's span holds the `n` elements of the result.
                Offer::new("fill_dense", move |io| unsafe {
                    fill(io.write(0), dtype, n, v)
                })
            })
        }
        Body::Reduce(r, axis) => reduce(*r, *axis, &spec.inputs[0], out),
        Body::Gather => gather(&spec.inputs[0], &spec.inputs[1], out),
        Body::ScatterAdd => scatter_add(&spec.inputs[0], &spec.inputs[1], out),
        Body::Iota(axis) => {
            let s = &out.layout.shape.0;
            let shape = [
                s[..*axis].iter().product(),
                s[*axis],
                s[axis + 1..].iter().product(),
            ];
            let fits = out.is_dense() && out.dtype == DType::F32;
            // SAFETY: the plan's span holds the dense result.
            fits.then(|| Offer::new("iota_f32", move |io| unsafe { iota(io.write(0), shape) }))
        }
        Body::Random(id) => {
            let (n, id) = (out.layout.shape.numel(), *id);
            out.is_dense().then(|| {
                Offer::new("random_philox_f32", move |io| {
                    let job = Uniform {
                        n,
                        id,
                        seed: io.read(0),
                        y: io.write(0),
                    };
                    // SAFETY: the plan's spans hold the seed and the `n` elements of the result.
                    unsafe { job.run(io.exec) };
                })
            })
        }
        Body::MatMul { .. } | Body::Composite(_) => None,
    }
}

/// Axes the elementwise kernel walks.
const MAX_AXES: usize = 8;

fn map(cpu: &Cpu, p: &ScalarProgram, spec: &KernelSpec) -> Option<Offer> {
    let out = spec.outputs[0].as_ref()?;
    let shape = &out.layout.shape.0;
    if shape.iter().filter(|n| **n != 1).count() > MAX_AXES {
        return None;
    }
    let operand = |o: &Operand| elementwise::Operand {
        dtype: o.dtype,
        strides: o.layout.strides.clone(),
    };
    let ins: Vec<_> = spec.inputs.iter().map(operand).collect();
    let code = Elementwise::new(p, shape, &ins, &[operand(out)]);
    let (name, scratch) = (code.name(), code.workspace_elems(cpu.threads()));
    let run = move |io: &Io| {
        // SAFETY: the plan's spans hold the operands with these strides; the planner lets a result
        // lie only exactly where an operand of its type does.
        unsafe { code.run(io.exec, io.reads, io.writes, io.workspace.0.cast()) };
    };
    Some(Offer::new(name, run).scratch(scratch))
}

/// Extents or strides, right-aligned in the kernel's fixed rank.
fn aligned(v: &[usize], empty: usize) -> Option<[usize; MAX_RANK]> {
    let mut out = [empty; MAX_RANK];
    out.get_mut(MAX_RANK.checked_sub(v.len())?..)?
        .copy_from_slice(v);
    Some(out)
}

fn copy(from: &Operand, to: &Operand) -> Option<Offer> {
    let shape = aligned(&to.layout.shape.0, 1)?;
    let x_strides = aligned(&from.layout.strides, 0)?;
    let y_strides = aligned(&to.layout.strides, 0)?;
    let (from, to) = (from.dtype, to.dtype);
    Some(Offer::new("copy_strided", move |io| {
        let job = Copy {
            shape,
            x: io.read(0),
            from,
            x_strides,
            y: io.write(0),
            to,
            y_strides,
        };
        // SAFETY: the plan's spans hold both views, which do not overlap.
        unsafe { job.run(io.exec) };
    }))
}

fn reduce(r: ReduceOp, axis: usize, x: &Operand, y: &Operand) -> Option<Offer> {
    let (s, n) = (&x.layout.strides, &x.layout.shape.0);
    let inner: usize = n[axis + 1..].iter().product();
    let outer: usize = n[..axis].iter().product();
    // The axes inside must be dense, those outside evenly spaced.
    let inside = x.layout.slice(axis, 0, 1);
    let whole = inside.reshape(&[outer, inner].into())?;
    let dense = inner == 1 || whole.strides[1] == 1;
    let axis_stride = s[axis];
    let f32s = x.dtype == DType::F32 && y.dtype == DType::F32;
    // With one inner element the kernel wants the reduced axis dense.
    let fits = dense && f32s && y.is_dense() && (inner > 1 || axis_stride == 1 || n[axis] == 1);
    if !fits {
        return None;
    }
    let shape = [outer, n[axis], inner];
    let x_strides = [whole.strides[0], axis_stride];
    let reduction = match r {
        ReduceOp::Sum => Reduction::Sum,
        ReduceOp::Max => Reduction::Max,
    };
    Some(Offer::new("reduce_axis_f32", move |io| {
        let job = Reduce {
            reduction,
            shape,
            x: io.read(0),
            x_strides,
            y: io.write(0),
        };
        // SAFETY: the plan's spans hold both views, which do not overlap.
        unsafe { job.run(io.exec) };
    }))
}

fn gather(table: &Operand, ids: &Operand, y: &Operand) -> Option<Offer> {
    let (v, c) = (table.layout.shape.0[0], table.layout.shape.0[1]);
    let (table_ld, y_ld) = (row_stride(table)?, row_stride(y)?);
    let (from, to, n) = (table.dtype, y.dtype, ids.layout.shape.numel());
    if !ids.is_dense() || c == 0 {
        return None;
    }
    Some(Offer::new("gather_rows", move |io| {
        let job = Gather {
            n,
            v,
            c,
            table: io.read(0),
            from,
            table_ld,
            ids: io.read(1),
            y: io.write(0),
            to,
            y_ld,
        };
        // SAFETY: the plan's spans hold table, ids and rows, and the rows overlap neither.
        unsafe { job.run(io.exec) };
    }))
}

fn scatter_add(ids: &Operand, x: &Operand, y: &Operand) -> Option<Offer> {
    let (n, v, c) = (
        ids.layout.shape.numel(),
        y.layout.shape.0[0],
        y.layout.shape.0[1],
    );
    let (x_ld, y_ld) = (row_stride(x)?, row_stride(y)?);
    if !ids.is_dense() || x.dtype != DType::F32 || y.dtype != DType::F32 {
        return None;
    }
    Some(Offer::new("scatter_add_rows_f32", move |io| {
        let job = ScatterAdd {
            n,
            v,
            c,
            ids: io.read(0),
            x: Rows {
                ptr: io.read(1),
                ld: x_ld,
            },
            y: Rows {
                ptr: io.write(0),
                ld: y_ld,
            },
        };
        // SAFETY: as in `gather`.
        unsafe { job.run(io.exec) };
    }))
}
