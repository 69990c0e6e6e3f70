//! Sums and maxima along one axis, with any strides.
//! Invariant: the order of a sum depends on shapes alone, so equal runs give equal bits.
//! Absent on purpose: several axes at once.
use super::{Arg, Offer, c_type, kernel, source, word};
use tallow_core::{
    kernel::KernelSpec,
    op::ReduceOp,
    types::{DType, Walk},
};

const FILE: &str = include_str!("reduce.cu");

/// Axes, after merging, over which the results lie.
const AXES: usize = 4;

/// Elements of a piece of a long sum.
const PIECE: usize = 8192;

/// Each result in pieces of [`PIECE`], then one block for each result over its pieces.
fn pieces(
    op: ReduceOp,
    (results, count): (usize, usize),
    spec: &KernelSpec,
    mut args: Vec<Arg>,
) -> Option<Offer> {
    let (x, y) = (&spec.inputs[0], spec.outputs[0].as_ref()?);
    let n = count.div_ceil(PIECE);
    let text = |x, y| {
        let defines = [
            ("X", c_type(x).to_owned()),
            ("Y", c_type(y).to_owned()),
            ("MAX", usize::from(op == ReduceOp::Max).to_string()),
            ("ACROSS", "0".to_owned()),
            ("PIECE", format!("{PIECE}u")),
        ];
        source(FILE, &defines)
    };
    let mut first = args.clone();
    first[1] = Arg::Scratch(0);
    let grid = u32::try_from(results * n).ok()?;
    let parts = kernel("pieces", text(x.dtype, DType::F32), grid, 256, first);
    // The pieces of a result lie side by side: it is the same reduction over another operand.
    let axes = args.len() - 3 * AXES;
    (args[0], args[3]) = (Arg::Scratch(0), word(n)?);
    let mut outer = n;
    for i in (0..AXES).rev() {
        let Arg::U32(extent) = args[axes + i] else {
            return None;
        };
        args[axes + AXES + i] = word(outer)?;
        outer *= extent as usize;
    }
    let join = kernel(
        "reduce",
        text(DType::F32, y.dtype),
        results as u32,
        256,
        args,
    );
    Some(Offer::new("reduce_pieces", vec![parts, join]).scratch(results * n * 4))
}

pub(super) fn offer(op: ReduceOp, axis: usize, spec: &KernelSpec) -> Option<Offer> {
    let (x, y) = (&spec.inputs[0], spec.outputs[0].as_ref()?);
    let (count, along) = (x.layout.shape.0[axis], x.layout.strides[axis]);
    let results = y.layout.shape.numel();
    // The strides of a result's first term are those of `x` with the axis gone.
    let w = Walk::over(&y.layout.shape.0, &[&x.layout.strides, &y.layout.strides]);
    if w.shape.len() > AXES {
        return None;
    }
    let mut args = vec![
        Arg::Read(0),
        Arg::Write(0),
        word(results)?,
        word(count)?,
        word(along)?,
    ];
    let pad = AXES - w.shape.len();
    for v in [&w.shape, &w.strides[0], &w.strides[1]] {
        args.extend(vec![Arg::U32(1); pad]);
        for n in v {
            args.push(word(*n)?);
        }
    }
    // Neighbouring results read neighbouring elements: a thread a result; else a block a result.
    // Few long sums keep the card busy only in pieces, which are then joined in order.
    if results * 16 < PIECE && along == 1 && count > 8 * PIECE {
        return pieces(op, (results, count), spec, args);
    }
    let across = w.strides[0].last() == Some(&1) && along != 1 && results > 1;
    let defines = [
        ("X", c_type(x.dtype).to_owned()),
        ("Y", c_type(y.dtype).to_owned()),
        ("MAX", usize::from(op == ReduceOp::Max).to_string()),
        ("ACROSS", usize::from(across).to_string()),
    ];
    let (name, grid, block) = match across {
        true => ("reduce_across", results.div_ceil(32), 512),
        false => ("reduce_along", results, if count >= 512 { 256 } else { 32 }),
    };
    let grid = u32::try_from(grid).ok().filter(|g| *g < 1 << 31)?;
    Some(Offer::new(
        name,
        vec![kernel("reduce", source(FILE, &defines), grid, block, args)],
    ))
}
