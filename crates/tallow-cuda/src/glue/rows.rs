//! Kernels that make a row of the result from a row of the operands: norms, softmax, and their gradients.
//! Invariant: a block makes a whole row, so the result does not depend on how rows are spread.
//! Absent on purpose: rows in pieces.
use super::{Arg, Job, Offer, kernel, source, word};
use tallow_core::{
    kernel::KernelSpec,
    op::{Bits, RmsNormGrad},
};

const FILE: &str = include_str!("rows.cu");

/// Threads for a row of `c` elements.
fn threads(c: usize) -> u32 {
    match c {
        0..=256 => 64,
        257..=2048 => 256,
        _ => 512,
    }
}

/// One block a row. Arguments: operands, results, `c`, row strides of the first `rows` operands, of the results.
fn offer(
    entry: &'static str,
    spec: &KernelSpec,
    row_ins: &[usize],
    extra: &[Arg],
) -> Option<Offer> {
    let shape = &spec.inputs[row_ins[0]].layout.shape;
    let vectors = (0..spec.inputs.len()).filter(|i| !row_ins.contains(i));
    if vectors.into_iter().any(|i| !spec.inputs[i].is_dense()) {
        return None;
    }
    let mut args: Vec<Arg> = (0..spec.inputs.len()).map(Arg::Read).collect();
    args.extend((0..spec.outputs.len()).map(Arg::Write));
    args.push(word(shape.last())?);
    for i in row_ins {
        args.push(word(spec.inputs[*i].layout.row_stride()?)?);
    }
    for o in &spec.outputs {
        let row = o.as_ref().map_or(Some(0), |o| o.layout.row_stride());
        args.push(word(row?)?);
    }
    args.extend(extra);
    let source = source(FILE, &[("KERNEL", format!("KERNEL_{entry}"))]);
    let grid = u32::try_from(shape.rows())
        .ok()
        .filter(|g| *g > 0 && *g < 1 << 31)?;
    Some(Offer::new(
        entry,
        vec![kernel(entry, source, grid, threads(shape.last()), args)],
    ))
}

pub(super) fn rms_norm(eps: Bits, spec: &KernelSpec) -> Option<Offer> {
    offer("rms_norm_f32", spec, &[0], &[Arg::F32(eps.get())])
}

pub(super) fn add_rms_norm(eps: Bits, spec: &KernelSpec) -> Option<Offer> {
    offer("add_rms_norm_f32", spec, &[0, 1], &[Arg::F32(eps.get())])
}

pub(super) fn layer_norm(eps: Bits, spec: &KernelSpec) -> Option<Offer> {
    offer("layer_norm_f32", spec, &[0], &[Arg::F32(eps.get())])
}

pub(super) fn softmax(spec: &KernelSpec) -> Option<Offer> {
    offer("softmax_f32", spec, &[0], &[])
}

pub(super) fn softmax_grad(spec: &KernelSpec) -> Option<Offer> {
    offer("softmax_grad_f32", spec, &[0, 1], &[])
}

/// Rows of a chunk of the sum that is the weight's gradient.
const CHUNK: usize = 64;

pub(super) fn rms_norm_grad(n: &RmsNormGrad, spec: &KernelSpec) -> Option<Offer> {
    let (x, dy) = (&spec.inputs[0], &spec.inputs[2]);
    let (rows, c) = (x.layout.shape.rows(), x.layout.shape.last());
    if !spec.inputs[1].is_dense() || rows == 0 {
        return None;
    }
    let (xs, ds) = (
        word(x.layout.row_stride()?)?,
        word(dy.layout.row_stride()?)?,
    );
    let source = source(FILE, &[("KERNEL", "KERNEL_rms_norm_grad_f32".into())]);
    let (mut jobs, mut scratch): (Vec<Job>, usize) = (vec![], 0);
    // One inverse rms a row, for the sum over rows below.
    let inverse = Arg::Scratch(0);
    let live = |i: usize| spec.outputs.get(i).and_then(Option::as_ref);
    if let Some(dx) = live(0) {
        let (r, rs) = match n.residual {
            true => (Arg::Read(3), word(spec.inputs[3].layout.row_stride()?)?),
            false => (Arg::U64(0), Arg::U32(0)),
        };
        let args = vec![
            Arg::Read(0),
            Arg::Read(1),
            Arg::Read(2),
            r,
            Arg::Write(0),
            word(c)?,
            xs,
            ds,
            rs,
            word(dx.layout.row_stride()?)?,
            Arg::F32(n.eps.get()),
        ];
        jobs.push(kernel(
            "rms_norm_grad_f32",
            source.clone(),
            rows as u32,
            threads(c),
            args,
        ));
    }
    if live(1).is_some_and(|o| !o.is_dense()) {
        return None;
    }
    if live(1).is_some() {
        let chunks = rows.div_ceil(CHUNK);
        let parts = (rows * 4).next_multiple_of(256);
        scratch = parts + chunks * c * 4;
        let args = vec![Arg::Read(0), inverse, word(c)?, xs, Arg::F32(n.eps.get())];
        jobs.push(kernel(
            "inverse_rms",
            source.clone(),
            rows as u32,
            threads(c),
            args,
        ));
        let args = vec![
            Arg::Read(0),
            Arg::Read(2),
            inverse,
            Arg::Scratch(parts),
            word(rows)?,
            word(c)?,
            xs,
            ds,
        ];
        jobs.push(Job::Kernel(crate::launch::Kernel {
            entry: "weight_parts",
            source: source.clone(),
            grid: [c.div_ceil(128) as u32, chunks as u32, 1],
            block: 128,
            shared: 0,
            args,
            unless_same: None,
        }));
        let args = vec![Arg::Scratch(parts), Arg::Write(1), word(chunks)?, word(c)?];
        jobs.push(kernel(
            "weight_join",
            source,
            c.div_ceil(128) as u32,
            128,
            args,
        ));
    }
    Some(Offer::new("rms_norm_grad_f32", jobs).scratch(scratch))
}
