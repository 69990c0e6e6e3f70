//! Sums and maxima along one axis, with any strides.
//! Invariant: the order of a sum depends on shapes alone, so equal runs give equal bits.
//! Absent on purpose: several axes at once.
use super::{Arg, Offer, c_type, elementwise::walk, kernel, source, word};
use tallow_core::{kernel::KernelSpec, op::ReduceOp};

const FILE: &str = include_str!("reduce.cu");

/// Axes, after merging, over which the results lie.
const AXES: usize = 4;

pub(super) fn offer(op: ReduceOp, axis: usize, spec: &KernelSpec) -> Option<Offer> {
    let (x, y) = (&spec.inputs[0], spec.outputs[0].as_ref()?);
    let (count, along) = (x.layout.shape.0[axis], x.layout.strides[axis]);
    let results = y.layout.shape.numel();
    // The strides of a result's first term are those of `x` with the axis gone.
    let w = walk(&y.layout.shape.0, &[&x.layout.strides, &y.layout.strides]);
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
