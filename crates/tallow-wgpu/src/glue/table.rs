//! Rows of tables and caches by number.
//! Invariant: a number past the end reads zeros and writes nothing; sums of rows are made in order.
//! Absent on purpose: sums by atomics.
use super::{THREADS, attention::head_strides, word};
use crate::{
    launch::{Offer, read, write},
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
    let n = out.layout.shape.numel();
    let args = vec![
        read("rows", 0, table.dtype),
        read("ids", 1, DType::U32),
        write("y", 0, out.dtype),
        word("n", n)?,
        word("c", out.layout.shape.last())?,
        word("v", table.layout.shape.0[0])?,
        word("xs", table.layout.row_stride()?)?,
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
    Some(Offer::new("gather_rows", vec![kernel(t, spec, draft)?]))
}

pub(super) fn scatter_add(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let (ids, rows, out) = (&spec.inputs[0], &spec.inputs[1], spec.outputs[0].as_ref()?);
    if !ids.is_dense() || rows.dtype != DType::F32 || out.dtype != DType::F32 {
        return None;
    }
    let n = ids.layout.shape.0[0];
    let (v, c) = (out.layout.shape.0[0], out.layout.shape.last());
    let y = write("y", 0, DType::F32);
    let ys = word("ys", out.layout.row_stride()?)?;
    let clear = Draft {
        entry: "clear",
        body: CLEAR,
        consts: &zero(DType::F32),
        threads: THREADS,
        grid: line((v * c).div_ceil(THREADS as usize))?,
        args: vec![y.clone(), word("n", v * c)?, word("c", c)?, ys.clone()],
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
            word("v", v)?,
            word("xs", rows.layout.row_stride()?)?,
            ys,
        ],
    };
    let jobs = vec![kernel(t, spec, clear)?, kernel(t, spec, add)?];
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
