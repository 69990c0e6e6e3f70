//! Rows of tables and caches by number.
//! Invariant: a number past the end reads zeros and writes nothing; sums of rows are made in order.
//! Absent on purpose: sums by atomics.
use super::{THREADS, attention::head_strides, word};
use crate::{
    gpu::ALIGN,
    launch::{Arg, Offer, Ty, read, write},
    shader::{Draft, Target, kernel, line, number},
};
use tallow_core::{
    kernel::{KernelSpec, Operand},
    types::DType,
};

const GATHER: &str = include_str!("gather.wgsl");
const CLEAR: &str = include_str!("scatter_clear.wgsl");
const SCATTER: &str = include_str!("scatter.wgsl");
const KEEP: &str = include_str!("kv_keep.wgsl");
const KV_WRITE: &str = include_str!("kv_write.wgsl");

/// Zero in the type that kernels see of `d`.
fn zero(d: DType) -> Vec<(&'static str, String)> {
    let zero = match number(d) {
        "f32" => "0.0f",
        "u32" => "0u",
        _ => "0i",
    };
    vec![("ZERO", zero.to_owned())]
}

pub(super) fn gather(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let (table, ids, out) = (&spec.inputs[0], &spec.inputs[1], spec.outputs[0].as_ref()?);
    if !ids.is_dense() || number(table.dtype) != number(out.dtype) {
        return None;
    }
    let (n, v) = (out.layout.shape.numel(), table.layout.shape.0[0]);
    let row = table.layout.row_stride()?;
    let mut jobs = vec![];
    for (first, rows) in pieces(t, table, v) {
        let args = vec![
            rows_of("table", 0, table, [first, rows], Ty::Plain(table.dtype)),
            read("ids", 1, DType::U32),
            write("y", 0, out.dtype),
            word("n", n)?,
            word("c", out.layout.shape.last())?,
            word("v", v)?,
            word("first", first)?,
            word("rows", rows)?,
            word("xs", row)?,
            word("ys", out.layout.row_stride()?)?,
        ];
        let draft = Draft {
            entry: "gather",
            body: GATHER,
            consts: &zero(out.dtype),
            threads: THREADS,
            grid: line(n.div_ceil(THREADS as usize))?,
            args,
        };
        jobs.push(kernel(t, spec, draft)?);
    }
    Some(Offer::new("gather_rows", jobs))
}

/// First row and number of rows of each piece of a table `[v, c]` that can be bound at once; one piece where it lies so
/// that no cut helps.
fn pieces(t: &Target, table: &Operand, v: usize) -> Vec<(usize, usize)> {
    let most = rows_bound(t, table).unwrap_or(v).max(1);
    let firsts = (0..v.max(1)).step_by(most);
    firsts.map(|first| (first, most.min(v - first))).collect()
}

/// Most rows of a matrix that can be bound at once; `None` where its rows are not dense, or one is too long.
pub(super) fn rows_bound(t: &Target, table: &Operand) -> Option<usize> {
    let row = table.layout.row_stride()?;
    // A window begins at a multiple of `ALIGN` bytes before its first element.
    let room = (t.binding as usize).saturating_sub(2 * ALIGN);
    let rows = room / (row.max(table.layout.shape.last()) * table.dtype.bytes()).max(1);
    (rows > 0).then_some(rows)
}

/// Rows `[first, count]` of a matrix.
pub(super) fn rows_of(
    name: &'static str,
    operand: usize,
    o: &Operand,
    [first, count]: [usize; 2],
    ty: Ty,
) -> Arg {
    let name = name.into();
    match part(o, [first, count]) {
        None => Arg::Read { name, operand, ty },
        Some([at, bytes]) => Arg::Part {
            name,
            operand,
            at,
            bytes,
            ty,
        },
    }
}

/// First byte and number of bytes of rows `[first, count]` of a matrix; `None` if these are all.
fn part(o: &Operand, [first, count]: [usize; 2]) -> Option<[usize; 2]> {
    let (row, size) = (o.layout.row_stride().unwrap_or(0), o.dtype.bytes());
    let bytes = ((count - 1) * row + o.layout.shape.last()) * size;
    (count < o.layout.shape.0[0]).then_some([first * row * size, bytes])
}

pub(super) fn scatter_add(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let (ids, rows, out) = (&spec.inputs[0], &spec.inputs[1], spec.outputs[0].as_ref()?);
    if !ids.is_dense() || rows.dtype != DType::F32 || out.dtype != DType::F32 {
        return None;
    }
    let n = ids.layout.shape.0[0];
    let (v, c) = (out.layout.shape.0[0], out.layout.shape.last());
    let ys = word("ys", out.layout.row_stride()?)?;
    let mut jobs = vec![];
    for (first, count) in pieces(t, out, v) {
        let y = Arg::Write {
            name: "y".into(),
            result: 0,
            part: part(out, [first, count]),
            ty: Ty::Plain(DType::F32),
        };
        let clear = Draft {
            entry: "clear",
            body: CLEAR,
            consts: &zero(DType::F32),
            threads: THREADS,
            grid: line((count * c).div_ceil(THREADS as usize))?,
            args: vec![y.clone(), word("n", count * c)?, word("c", c)?, ys.clone()],
        };
        let add = Draft {
            entry: "scatter",
            body: SCATTER,
            consts: &[],
            threads: THREADS,
            grid: line(n)?,
            args: vec![
                read("ids", 0, DType::U32),
                read("x", 1, DType::F32),
                y,
                word("n", n)?,
                word("c", c)?,
                word("first", first)?,
                word("rows", count)?,
                word("xs", rows.layout.row_stride()?)?,
                ys.clone(),
            ],
        };
        jobs.extend([kernel(t, spec, clear)?, kernel(t, spec, add)?]);
    }
    Some(Offer::new("scatter_add_rows", jobs))
}

pub(super) fn kv_write(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let (cache, new, pos) = (&spec.inputs[0], &spec.inputs[1], &spec.inputs[2]);
    let out = spec.outputs[0].as_ref()?;
    let one_type = [cache, new].iter().all(|o| o.dtype == out.dtype);
    if !one_type || ![cache, out, pos].into_iter().all(Operand::is_dense) {
        return None;
    }
    let &[b, s, h, d] = &cache.layout.shape.0[..] else {
        return None;
    };
    let (tokens, n) = (new.layout.shape.0[1], b * s * h * d);
    let y = write("y", 0, out.dtype);
    let keep = Draft {
        entry: "keep",
        body: KEEP,
        consts: &[],
        threads: THREADS,
        grid: line(n.div_ceil(THREADS as usize))?,
        args: vec![read("x", 0, cache.dtype), y.clone(), word("n", n)?],
    };
    let mut keep = kernel(t, spec, keep)?;
    keep.unless_same = Some((0, 0));
    let mut args = vec![read("x", 1, new.dtype), read("pos", 2, DType::U32), y];
    let sizes = [
        ("n", b * tokens),
        ("t", tokens),
        ("s", s),
        ("h", h),
        ("d", d),
    ];
    let strides = ["xb", "xt", "xh"].into_iter().zip(head_strides(new)?);
    for (name, v) in sizes.into_iter().chain(strides) {
        args.push(word(name, v)?);
    }
    let put = Draft {
        entry: "kv_write",
        body: KV_WRITE,
        consts: &[],
        threads: THREADS,
        grid: line(b * tokens)?,
        args,
    };
    Some(Offer::new("kv_write", vec![keep, kernel(t, spec, put)?]))
}
