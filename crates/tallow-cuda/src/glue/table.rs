//! Rows of tables and caches by number.
//! Invariant: a number past the end reads zeros and writes nothing.
//! Absent on purpose: atomics; sums of rows are made in order.
use super::{
    Arg, Job, Offer, THREADS, Target, blocks, c_type, elementwise::head_strides, kernel, source,
    word,
};
use tallow_core::kernel::{KernelSpec, Operand};

const FILE: &str = include_str!("table.cu");

fn text(entry: &str, x: &Operand, y: &Operand) -> std::sync::Arc<str> {
    let defines = [
        ("KERNEL", format!("KERNEL_{entry}")),
        ("X", c_type(x.dtype).to_owned()),
        ("Y", c_type(y.dtype).to_owned()),
    ];
    source(FILE, &defines)
}

pub(super) fn gather(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let (table, ids, out) = (&spec.inputs[0], &spec.inputs[1], spec.outputs[0].as_ref()?);
    if !ids.is_dense() {
        return None;
    }
    let n = out.layout.shape.numel();
    let mut args = vec![Arg::Read(0), Arg::Read(1), Arg::Write(0)];
    let row = |o: &Operand| o.layout.row_stride();
    for v in [
        n,
        out.layout.shape.last(),
        table.layout.shape.0[0],
        row(table)?,
        row(out)?,
    ] {
        args.push(word(v)?);
    }
    let job = kernel(
        "gather",
        text("gather", table, out),
        blocks(t, n),
        THREADS,
        args,
    );
    Some(Offer::new("gather_rows", vec![job]))
}

pub(super) fn scatter_add(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let (ids, rows, out) = (&spec.inputs[0], &spec.inputs[1], spec.outputs[0].as_ref()?);
    if !ids.is_dense() {
        return None;
    }
    let (n, c, v) = (
        ids.layout.shape.0[0],
        out.layout.shape.last(),
        out.layout.shape.0[0],
    );
    let source = text("scatter", rows, out);
    let out_row = word(out.layout.row_stride()?)?;
    let args = vec![Arg::Write(0), word(v * c)?, word(c)?, out_row];
    let clear = kernel("clear", source.clone(), blocks(t, v * c), THREADS, args);
    let args = vec![
        Arg::Read(0),
        Arg::Read(1),
        Arg::Write(0),
        word(n)?,
        word(c)?,
        word(v)?,
        word(rows.layout.row_stride()?)?,
        out_row,
    ];
    let add = kernel("scatter", source, word(n).map(|_| n as u32)?, THREADS, args);
    Some(Offer::new("scatter_add_rows", vec![clear, add]))
}

pub(super) fn kv_write(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let (cache, new, pos, out) = (
        &spec.inputs[0],
        &spec.inputs[1],
        &spec.inputs[2],
        spec.outputs[0].as_ref()?,
    );
    if !cache.is_dense() || !out.is_dense() || !pos.is_dense() {
        return None;
    }
    let &[b, s, h, d] = &cache.layout.shape.0[..] else {
        return None;
    };
    let tokens = new.layout.shape.0[1];
    let source = text("kv", new, out);
    let n = b * s * h * d;
    let same = (Arg::Read(0), Arg::Write(0));
    let mut copy = kernel(
        "keep",
        source.clone(),
        blocks(t, n),
        THREADS,
        vec![same.0, same.1, word(n)?],
    );
    if let Job::Kernel(k) = &mut copy {
        k.unless_same = Some(same);
    }
    let mut args = vec![Arg::Read(1), Arg::Read(2), Arg::Write(0)];
    for v in [s, tokens, h, d].into_iter().chain(head_strides(new)?) {
        args.push(word(v)?);
    }
    let write = kernel("kv", source, (b * tokens) as u32, 128, args);
    Some(Offer::new("kv_write", vec![copy, write]))
}
