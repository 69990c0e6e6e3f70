//! Sums and maxima along one axis.
//! Invariant: the order of a sum depends on the extents alone, so a result is the same on every run.
//! Absent on purpose: sums in pieces over several workgroups.
use super::{Offer, Target, elementwise::index, one_float};
use crate::{
    launch::{read, write},
    shader::{Draft, kernel, line},
};
use tallow_core::{kernel::KernelSpec, op::ReduceOp};

const FILE: &str = include_str!("reduce.wgsl");
/// Threads of a workgroup.
const WIDE: usize = 256;

pub(super) fn offer(t: &Target, r: ReduceOp, axis: usize, spec: &KernelSpec) -> Option<Offer> {
    let (x, y) = (&spec.inputs[0], spec.outputs[0].as_ref()?);
    let types = (one_float([x])?, one_float([y])?);
    let shape = &y.layout.shape.0;
    let find = index(
        "r",
        shape,
        &[("ox", &x.layout.strides), ("oy", &y.layout.strides)],
    )?;
    u32::try_from(x.layout.end()).ok()?;
    let (count, along) = (x.layout.shape.0[axis], x.layout.strides[axis]);
    let results = y.layout.shape.numel();
    // Neighbours along the axis lie apart: a thread for each result reads side by side with its neighbours.
    let across = along != 1 && results >= 32 || count < 16;
    let (entry, name, groups) = match (across, r) {
        (true, ReduceOp::Sum) => ("across", "sum_across", results.div_ceil(WIDE)),
        (true, ReduceOp::Max) => ("across", "max_across", results.div_ceil(WIDE)),
        (false, ReduceOp::Sum) => ("along", "sum_along", results),
        (false, ReduceOp::Max) => ("along", "max_along", results),
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
        args: vec![read("x", 0, types.0), write("y", 0, types.1)],
    };
    Some(Offer::new(name, vec![kernel(t, spec, draft)?]))
}
