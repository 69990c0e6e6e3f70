//! The likeliest token of each row.
//! Invariant: values are compared as whole numbers of the same order, so NaN and infinities are what they are.
//! Absent on purpose: anything but the first place; sampling from more is the host's.
use super::{THREADS, word};
use crate::{
    launch::{Offer, read, scratch, write},
    shader::{Draft, Target, kernel},
};
use tallow_core::{kernel::KernelSpec, types::DType};

const KEYS: &str = include_str!("top_keys.wgsl");
const TOP: &str = include_str!("top.wgsl");
const JOIN: &str = include_str!("top_join.wgsl");
/// Values of one workgroup.
const PART: usize = 4096;

pub(super) fn top(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let (x, y) = (&spec.inputs[0], spec.outputs[0].as_ref()?);
    if x.dtype != DType::F32 || y.dtype != DType::F32 {
        return None;
    }
    let (n, c) = (x.layout.shape.0[0], x.layout.shape.0[1]);
    let parts = c.div_ceil(PART);
    let (rows, columns) = (u32::try_from(n).ok()?, word("c", c)?);
    let (xs, ys) = (
        word("xs", x.layout.row_stride()?)?,
        word("ys", y.layout.row_stride()?)?,
    );
    // Bits, not numbers.
    let (x, y) = (read("x", 0, DType::U32), write("y", 0, DType::U32));
    let found = scratch("found", 0, n * parts * 8, DType::U32);
    let count = word("parts_of_row", parts)?;
    let consts = [("PART", format!("{PART}u"))];
    let first = |leave: &str, args| {
        let body = [KEYS, &TOP.replace("LEAVE", leave)].concat();
        let draft = Draft {
            entry: "top",
            body: &body,
            consts: &consts,
            threads: THREADS,
            grid: [parts as u32, rows, 1],
            args,
        };
        kernel(t, spec, draft)
    };
    if parts == 1 {
        let args = vec![x, y, columns, xs, ys];
        let job = first("result(id.w.y, a.c, found);", args)?;
        return Some(Offer::new("top_f32", vec![job]));
    }
    // The result is written by the second kernel alone; the first knows where it will lie.
    let leave = "let at = (id.w.y * a.parts_of_row + id.w.x) * 2u; st_found(at, found.x); st_found(at + 1u, found.y);";
    let args = vec![
        x,
        y.clone(),
        found.clone(),
        columns.clone(),
        xs,
        ys.clone(),
        count.clone(),
    ];
    let one = first(leave, args)?;
    let body = [KEYS, JOIN].concat();
    let join = Draft {
        entry: "top_join",
        body: &body,
        consts: &[],
        threads: THREADS,
        grid: [rows, 1, 1],
        args: vec![found, y, columns, ys, count],
    };
    let jobs = vec![one, kernel(t, spec, join)?];
    Some(Offer::new("top_parts_f32", jobs).scratch(n * parts * 8))
}
