//! Products with few columns on one side under a long sum over rows: `dA = dhᵀ x`, `dB = s dyᵀ h`.
//! Invariant: sums of chunks of rows are joined in one order, so a result is the same on every run.
//! Absent on purpose: short sums and wide results; those are tiled.
use super::{Offer, Target, one_float, rows::part, word};
use crate::{
    launch::{Arg, read, scratch, write},
    shader::{Draft, kernel, line},
};
use tallow_core::{kernel::KernelSpec, types::DType};

const FILE: &str = include_str!("outer.wgsl");
/// Most columns of the narrow side.
const NARROW: usize = 32;
/// Least rows of the sum.
const LONG: usize = 64;
/// Workgroups that keep a large GPU busy.
const BUSY: usize = 512;

/// The product as these kernels see it.
struct Outer {
    rows: usize,
    few: usize,
    many: usize,
    /// Operand that is narrow, operand that is wide, and their types.
    at: [(usize, DType); 2],
    /// Row strides of the narrow operand, the wide one and the result.
    row: [usize; 3],
    /// Is the result `[many, few]`?
    turned: bool,
}

fn outer(ta: bool, tb: bool, spec: &KernelSpec) -> Option<Outer> {
    let (a, b, c) = (&spec.inputs[0], &spec.inputs[1], spec.outputs[0].as_ref()?);
    if !ta || tb || c.dtype != DType::F32 || a.layout.shape.rank() != 2 {
        return None;
    }
    let types = [one_float([a])?, one_float([b])?];
    let (rows, p, q) = (
        a.layout.shape.0[0],
        a.layout.shape.0[1],
        b.layout.shape.0[1],
    );
    let (few, many, turned) = (p.min(q), p.max(q), p > q);
    if few == 0 || few > NARROW || rows < LONG {
        return None;
    }
    let (ar, br) = (a.layout.row_stride()?, b.layout.row_stride()?);
    let cr = c.layout.row_stride()?;
    let (mut at, mut row) = ([(0, types[0]), (1, types[1])], [ar, br, cr]);
    if turned {
        at.swap(0, 1);
        row.swap(0, 1);
    }
    Some(Outer {
        rows,
        few,
        many,
        at,
        row,
        turned,
    })
}

pub(super) fn offer(
    t: &Target,
    ta: bool,
    tb: bool,
    alpha: f32,
    spec: &KernelSpec,
) -> Option<Offer> {
    let o = outer(ta, tb, spec)?;
    let columns = o.many.div_ceil(128);
    let chunk = o.rows.div_ceil((BUSY / columns).max(1));
    let chunk = chunk.next_multiple_of(16).max(32);
    let chunks = o.rows.div_ceil(chunk);
    let bytes = chunks * o.few * o.many * 4;
    let parts = scratch("part", 0, bytes, DType::F32);
    let [narrow, broad] = o.at;
    let args = vec![
        read("few", narrow.0, narrow.1),
        read("many", broad.0, broad.1),
        parts.clone(),
        word("rows", o.rows)?,
        word("chunk", chunk)?,
        word("many", o.many)?,
        word("fr", o.row[0])?,
        word("mr", o.row[1])?,
    ];
    let few = ("FEW", format!("{}u", o.few));
    let first = Draft {
        entry: "outer_parts",
        body: part(FILE, "outer_parts"),
        consts: std::slice::from_ref(&few),
        threads: 128,
        grid: [u32::try_from(columns).ok()?, u32::try_from(chunks).ok()?, 1],
        args,
    };
    let args = vec![
        parts,
        write("c", 0, DType::F32),
        word("chunks", chunks)?,
        word("many", o.many)?,
        word("cr", o.row[2])?,
        Arg::F32("alpha".into(), alpha),
    ];
    let second = Draft {
        entry: "outer_join",
        body: part(FILE, "outer_join"),
        consts: &[few.clone(), ("TURNED", o.turned.to_string())],
        threads: 256,
        grid: line((o.few * o.many).div_ceil(256))?,
        args,
    };
    let jobs = vec![kernel(t, spec, first)?, kernel(t, spec, second)?];
    Some(Offer::new("matmul_tn_outer", jobs).scratch(bytes))
}
