//! Products with few columns on one side under a sum over rows: `dA = dhᵀ x`, `dB = s dyᵀ h`.
//! Invariant: sums of chunks of rows are joined in one order, so a result is the same on every run.
//! Absent on purpose: wide results; those are tiled.
use super::{Offer, Target, one_float, rows::part, word};
use crate::{
    launch::{Arg, read, scratch, write},
    shader::{Draft, kernel, line},
};
use tallow_core::{kernel::KernelSpec, types::DType};

const FILE: &str = include_str!("outer.wgsl");
/// Most columns of the narrow side.
const NARROW: usize = 64;
/// Those that a workgroup takes.
const TOGETHER: usize = 16;
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
    if few == 0 || few > NARROW || rows == 0 {
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
    let together = o.few.min(TOGETHER);
    let blocks = o.few.div_ceil(together);
    let threads = if o.many * blocks < 128 * 128 { 64 } else { 128 };
    let columns = o.many.div_ceil(threads);
    let chunk = o.rows.div_ceil((BUSY / (columns * blocks)).max(1));
    let chunk = chunk.next_multiple_of(16).max(32);
    let chunks = o.rows.div_ceil(chunk);
    let bytes = chunks * o.few * o.many * 4;
    let parts = scratch("part", 0, bytes, DType::F32);
    let alpha = Arg::F32("alpha".into(), alpha);
    let size = |n: usize| u32::try_from(n).ok();
    let (few, many) = (word("few", o.few)?, word("many", o.many)?);
    let result = [write("c", 0, DType::F32), word("cr", o.row[2])?, alpha];
    let [narrow, broad] = o.at;
    let mut args = vec![
        read("narrow", narrow.0, narrow.1),
        read("broad", broad.0, broad.1),
        word("rows", o.rows)?,
        word("chunk", chunk)?,
        few.clone(),
        many.clone(),
        word("fr", o.row[0])?,
        word("mr", o.row[1])?,
    ];
    let alone = chunks == 1;
    match alone {
        true => args.extend(result.clone()),
        false => args.push(parts.clone()),
    }
    let turned = ("TURNED", o.turned.to_string());
    let first = Draft {
        entry: "outer_parts",
        body: &body(alone),
        consts: &[("FEW", format!("{together}u")), turned.clone()],
        threads: threads as u32,
        grid: [size(columns)?, size(chunks)?, size(blocks)?],
        args,
    };
    let mut jobs = vec![kernel(t, spec, first)?];
    if !alone {
        let numbers = [parts, word("chunks", chunks)?, few, many];
        let second = Draft {
            entry: "outer_join",
            body: part(FILE, "outer_join"),
            consts: &[turned],
            threads: 256,
            grid: line((o.few * o.many).div_ceil(256))?,
            args: numbers.into_iter().chain(result).collect(),
        };
        jobs.push(kernel(t, spec, second)?);
    }
    let scratch = if alone { 0 } else { bytes };
    // Steps of 16 rows, one after another; `many` is read again for each block.
    let again = (blocks * o.rows * o.many * 4) as f64 / 5e11;
    Some(Offer {
        extra: (chunk / 16) as f64 * 1e-6 + again,
        ..Offer::new("matmul_tn_outer", jobs).scratch(scratch)
    })
}

/// The kernel of parts, that writes the result itself where there is one part.
fn body(alone: bool) -> String {
    let put = match alone {
        true => "st_c(select(f * a.cr + col, col * a.cr + f, TURNED), a.alpha * acc[j]);",
        false => "st_part((id.w.y * a.few + f) * a.many + col, acc[j]);",
    };
    part(FILE, "outer_parts").replace("PUT", put)
}
