//! Sums and maxima along one axis.
//! Invariant: the order of a sum depends on the extents alone, so a result is the same on every run.
//! Absent on purpose: sums in pieces over several workgroups.
use super::{Offer, Target, elementwise::index, one_float, word};
use crate::{
    gpu::ALIGN,
    launch::{Arg, Kernel, Ty, read, write},
    shader::{Draft, kernel, line},
};
use tallow_core::{kernel::KernelSpec, op::ReduceOp};

const FILE: &str = include_str!("reduce.wgsl");
/// Threads of a workgroup.
const WIDE: usize = 256;

pub(super) fn offer(t: &Target, r: ReduceOp, axis: usize, spec: &KernelSpec) -> Option<Offer> {
    let (x, y) = (&spec.inputs[0], spec.outputs[0].as_ref()?);
    let dtype = one_float([x])?;
    one_float([y])?;
    u32::try_from(x.layout.end()).ok()?;
    let (rows, row) = (x.layout.shape.0[0], x.layout.strides[0]);
    let size = x.dtype.bytes();
    // Rows of x that are bound at once; all of it where the sum runs over them.
    let most = match axis > 0 && x.is_dense() && row > 0 {
        true => ((t.binding as usize).saturating_sub(2 * ALIGN) / (row * size)).max(1),
        false => rows.max(1),
    };
    let jobs = (0..rows.max(1)).step_by(most).map(|first| {
        let count = most.min(rows - first);
        let part = match count == rows {
            true => read("x", 0, dtype),
            false => Arg::Part {
                name: "x".into(),
                operand: 0,
                at: first * row * size,
                bytes: count * row * size,
                ty: Ty::Plain(dtype),
            },
        };
        let mut shape = y.layout.shape.0.clone();
        if count < rows {
            shape[0] = count;
        }
        piece(
            t,
            spec,
            (r, axis),
            (part, &shape, first * y.layout.strides[0]),
        )
    });
    let jobs: Vec<Kernel> = jobs.collect::<Option<_>>()?;
    let name = match (jobs[0].entry, r) {
        ("across", ReduceOp::Sum) => "sum_across",
        ("across", ReduceOp::Max) => "max_across",
        (_, ReduceOp::Sum) => "sum_along",
        (_, ReduceOp::Max) => "max_along",
    };
    Some(Offer::new(name, jobs))
}

/// The results of extents `shape` from element `first` of y on, of this part of x.
fn piece(
    t: &Target,
    spec: &KernelSpec,
    (r, axis): (ReduceOp, usize),
    (part, shape, first): (Arg, &[usize], usize),
) -> Option<Kernel> {
    let (x, y) = (&spec.inputs[0], spec.outputs[0].as_ref()?);
    let strides = [("ox", &x.layout.strides[..]), ("oy", &y.layout.strides[..])];
    let find = index("r", shape, &strides)?;
    let (count, along) = (x.layout.shape.0[axis], x.layout.strides[axis]);
    let results = shape.iter().product::<usize>();
    // Neighbours along the axis lie apart: a thread for each result reads side by side with its neighbours.
    let across = along != 1 && results >= 32 || count < 16;
    let (entry, groups) = match across {
        true => ("across", results.div_ceil(WIDE)),
        false => ("along", results),
    };
    let body = FILE.replace("FIND", &find);
    let draft = Draft {
        entry,
        body: &body,
        consts: &[
            ("RESULTS", format!("{}u", u32::try_from(results).ok()?)),
            ("COUNT", format!("{count}u")),
            ("ALONG", format!("{along}u")),
            ("MAX", (r == ReduceOp::Max).to_string()),
        ],
        threads: WIDE as u32,
        grid: line(groups)?,
        args: vec![part, write("y", 0, y.dtype), word("first", first)?],
    };
    kernel(t, spec, draft)
}
