//! Kernels that make a row of the result from a row of the operands: norms, softmax, and their gradients.
//! Invariant: a block or a warp makes a whole row, so the result does not depend on how rows are spread.
//! Absent on purpose: rows in pieces.
use super::{Arg, Job, Offer, c_type, early, elementwise::one_type, kernel, source, word};
use tallow_core::{
    kernel::KernelSpec,
    op::{Bits, RmsNormGrad},
    types::DType,
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

/// Rows from which a warp makes one, and the longest that it makes.
const MANY_ROWS: [usize; 2] = [512, 4096];

/// The grid and the block of a kernel, and how many rows there are if a warp makes one.
type Spread = (u32, u32, Option<usize>);

fn grid(blocks: usize) -> Option<u32> {
    u32::try_from(blocks)
        .ok()
        .filter(|g| *g > 0 && *g < 1 << 31)
}

/// A block for each of `rows` of `c` elements.
fn by_blocks([rows, c]: [usize; 2]) -> Option<Spread> {
    Some((grid(rows)?, threads(c), None))
}

/// A warp for each where there are many, for kernels that can.
fn spread([rows, c]: [usize; 2]) -> Option<Spread> {
    match rows >= MANY_ROWS[0] && c <= MANY_ROWS[1] {
        true => Some((grid(rows.div_ceil(8))?, 256, Some(rows))),
        false => by_blocks([rows, c]),
    }
}

/// `rows`: how many there are if a warp makes one.
fn text(entry: &str, rows: Option<usize>, types: &[(&'static str, DType)]) -> std::sync::Arc<str> {
    let mut defines = vec![("KERNEL", format!("KERNEL_{entry}"))];
    defines.extend(rows.map(|n| ("ROWS", format!("{n}u"))));
    defines.extend(types.iter().map(|(name, d)| (*name, c_type(*d).to_owned())));
    source(FILE, &defines)
}

/// One block a row. Arguments: operands, results, `c`, row strides of the first `rows` operands, of the results.
fn offer(
    entry: &'static str,
    spec: &KernelSpec,
    row_ins: &[usize],
    extra: &[Arg],
) -> Option<Offer> {
    typed(entry, spec, row_ins, extra, &[], by_blocks)
}

/// The same for a kernel that takes several types, its rows spread by `over`; one that names none takes f32 alone.
fn typed(
    entry: &'static str,
    spec: &KernelSpec,
    row_ins: &[usize],
    extra: &[Arg],
    types: &[(&'static str, DType)],
    over: fn([usize; 2]) -> Option<Spread>,
) -> Option<Offer> {
    let mut all = spec.inputs.iter().chain(spec.outputs.iter().flatten());
    if types.is_empty() && all.any(|o| o.dtype != DType::F32) {
        return None;
    }
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
    let (grid, block, warps) = over([shape.rows(), shape.last()])?;
    let source = text(entry, warps, types);
    Some(Offer::new(
        entry,
        vec![kernel(entry, source, grid, block, args)],
    ))
}

pub(super) fn rms_norm(eps: Bits, spec: &KernelSpec) -> Option<Offer> {
    let types = [
        ("X", one_type(&spec.inputs[..1])?),
        ("Y", one_type(spec.outputs.iter().flatten())?),
    ];
    let extra = [Arg::F32(eps.get())];
    typed("rms_norm", spec, &[0], &extra, &types, spread)
}

pub(super) fn add_rms_norm(eps: Bits, spec: &KernelSpec) -> Option<Offer> {
    offer("add_rms_norm_f32", spec, &[0, 1], &[Arg::F32(eps.get())])
}

pub(super) fn layer_norm(eps: Bits, spec: &KernelSpec) -> Option<Offer> {
    offer("layer_norm_f32", spec, &[0], &[Arg::F32(eps.get())])
}

pub(super) fn top(spec: &KernelSpec) -> Option<Offer> {
    let mut offer = offer("top_f32", spec, &[0], &[])?;
    offer.jobs = offer.jobs.into_iter().map(early).collect();
    for job in &mut offer.jobs {
        if let Job::Kernel(k) = job {
            k.block = 1024;
        }
    }
    Some(offer)
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
    let dx_type = spec.outputs[0].as_ref().map_or(DType::F32, |o| o.dtype);
    let types = [
        ("X", x.dtype),
        ("D", dy.dtype),
        ("R", spec.inputs.get(3).map_or(DType::F32, |o| o.dtype)),
        ("Y", dx_type),
    ];
    let (grid, block, warps) = spread([rows, c])?;
    let source = text("rms_norm_grad", warps, &types);
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
        jobs.push(kernel("rms_norm_grad", source.clone(), grid, block, args));
    }
    if live(1).is_some_and(|o| !o.is_dense()) {
        return None;
    }
    if live(1).is_some() {
        let chunks = rows.div_ceil(CHUNK);
        let parts = (rows * 4).next_multiple_of(256);
        scratch = parts + chunks * c * 4;
        let args = vec![Arg::Read(0), inverse, word(c)?, xs, Arg::F32(n.eps.get())];
        jobs.push(kernel("inverse_rms", source.clone(), grid, block, args));
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
            start: crate::launch::Start::After,
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
    Some(Offer::new("rms_norm_grad", jobs).scratch(scratch))
}
