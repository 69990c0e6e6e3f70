//! Kernels that make a row of the result from a row of the operands: norms, softmax, and their gradients.
//! Invariant: a workgroup makes a whole row, so the result does not depend on how rows are spread.
//! Absent on purpose: rows in pieces.
use super::{Arg, Offer, Target, word};
use crate::{
    launch::{Kernel, read, scratch, write},
    shader::{Draft, kernel, line},
};
use tallow_core::{
    kernel::KernelSpec,
    op::{Bits, RmsNormGrad},
    types::DType,
};

const FILE: &str = include_str!("rows.wgsl");

/// The part of the file for one kernel: what lies between `// == name` and the next such line.
pub(super) fn part<'a>(file: &'a str, name: &str) -> &'a str {
    let mark = format!("// == {name}\n");
    let from = file.find(&mark).map_or(file.len(), |i| i + mark.len());
    let rest = &file[from..];
    &rest[..rest.find("// == ").unwrap_or(rest.len())]
}

/// `text` with the lines between `// each TOKEN` and `// end TOKEN` once for each number below `count`, which stands in
/// place of `_TOKEN` and `TOKENu`. So what a thread holds has names, and no compiler puts it into memory.
pub(super) fn repeated(text: &str, token: &str, count: usize) -> String {
    let mut out = String::new();
    let mut block: Option<String> = None;
    for l in text.lines() {
        let (mark, line) = (l.trim(), format!("{l}\n"));
        match &mut block {
            None if mark == format!("// each {token}") => block = Some(String::new()),
            None => out += &line,
            Some(lines) if mark == format!("// end {token}") => {
                for i in 0..count {
                    let lines = lines.replace(&format!("_{token}"), &format!("_{i}"));
                    out += &lines.replace(&format!("{token}u"), &format!("{i}u"));
                }
                block = None;
            }
            Some(lines) => *lines += &line,
        }
    }
    out
}

/// Threads for a row of `c` elements.
fn threads(c: usize) -> u32 {
    if c <= 256 { 64 } else { 256 }
}

/// One operand or result of a kernel of rows: its name, and whether it has rows (or is a vector for all of them).
type Named = (&'static str, bool);

/// One workgroup a row. Numbers: `rows`, `c`, `<name>s` the row stride of each operand and result that has rows.
fn offer(
    t: &Target,
    entry: &'static str,
    spec: &KernelSpec,
    (ins, outs): (&[Named], &[&'static str]),
    extra: &[Arg],
) -> Option<Offer> {
    let shape = &spec.inputs[0].layout.shape;
    let (rows, c) = (shape.rows(), shape.last());
    let mut args = vec![];
    let mut strides = vec![];
    for (i, (name, has_rows)) in ins.iter().enumerate() {
        let o = &spec.inputs[i];
        args.push(read(*name, i, o.dtype));
        match has_rows {
            true => strides.push((format!("{name}s"), o.layout.row_stride()?)),
            false if !o.is_dense() => return None,
            false => {}
        }
    }
    for (i, name) in outs.iter().enumerate() {
        let o = spec.outputs[i].as_ref();
        args.push(write(*name, i, o.map_or(DType::F32, |o| o.dtype)));
        let row = o.map_or(Some(0), |o| o.layout.row_stride())?;
        strides.push((format!("{name}s"), row));
    }
    args.extend([word("rows", rows)?, word("c", c)?]);
    for (name, s) in strides {
        args.push(Arg::U32(name.into(), u32::try_from(s).ok()?));
    }
    args.extend(extra.iter().cloned());
    let draft = Draft {
        entry,
        body: part(FILE, entry),
        consts: &[],
        threads: threads(c),
        grid: line(rows)?,
        args,
    };
    Some(Offer::new(entry, vec![kernel(t, spec, draft)?]))
}

fn eps(v: Bits) -> Arg {
    Arg::F32("eps".into(), v.get())
}

pub(super) fn rms_norm(t: &Target, e: Bits, spec: &KernelSpec) -> Option<Offer> {
    let ins = [("x", true), ("w", false)];
    offer(t, "rms_norm", spec, (&ins, &["y"]), &[eps(e)])
}

pub(super) fn add_rms_norm(t: &Target, e: Bits, spec: &KernelSpec) -> Option<Offer> {
    let ins = [("p", true), ("q", true), ("w", false)];
    offer(t, "add_rms_norm", spec, (&ins, &["sum", "y"]), &[eps(e)])
}

pub(super) fn layer_norm(t: &Target, e: Bits, spec: &KernelSpec) -> Option<Offer> {
    let ins = [("x", true), ("w", false), ("b", false)];
    offer(t, "layer_norm", spec, (&ins, &["y"]), &[eps(e)])
}

pub(super) fn softmax(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    offer(t, "softmax", spec, (&[("x", true)], &["y"]), &[])
}

pub(super) fn softmax_grad(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let ins = [("y", true), ("dy", true)];
    offer(t, "softmax_grad", spec, (&ins, &["dx"]), &[])
}

/// Rows of a chunk of the sum that is the weight's gradient.
const CHUNK: usize = 64;

pub(super) fn rms_norm_grad(t: &Target, n: &RmsNormGrad, spec: &KernelSpec) -> Option<Offer> {
    let (x, dy) = (&spec.inputs[0], &spec.inputs[2]);
    let (rows, c) = (x.layout.shape.rows(), x.layout.shape.last());
    let live = |i: usize| spec.outputs.get(i).and_then(Option::as_ref);
    let vectors = [Some(&spec.inputs[1]), live(1)];
    if rows == 0 || vectors.into_iter().flatten().any(|o| !o.is_dense()) {
        return None;
    }
    let strides = [
        word("xs", x.layout.row_stride()?)?,
        word("dys", dy.layout.row_stride()?)?,
    ];
    let sizes = [word("rows", rows)?, word("c", c)?];
    let job = |entry, grid, threads, mut args: Vec<Arg>| -> Option<Kernel> {
        args.extend(sizes.iter().chain(&strides).cloned());
        let draft = Draft {
            entry,
            body: part(FILE, entry),
            consts: &[("CHUNK", format!("{CHUNK}u"))],
            threads,
            grid,
            args,
        };
        kernel(t, spec, draft)
    };
    let operands = || {
        let (x, dy) = (read("x", 0, x.dtype), read("dy", 2, dy.dtype));
        vec![x, dy]
    };
    let (mut jobs, mut bytes) = (vec![], 0);
    if let Some(dx) = live(0) {
        let mut args = operands();
        args.push(read("w", 1, spec.inputs[1].dtype));
        let past = spec.inputs.get(3).filter(|_| n.residual);
        args.push(match past {
            Some(o) => read("past", 3, o.dtype),
            None => Arg::Absent("past".into()),
        });
        args.push(write("dx", 0, dx.dtype));
        args.push(word(
            "pasts",
            past.map_or(Some(0), |o| o.layout.row_stride())?,
        )?);
        args.extend([word("dxs", dx.layout.row_stride()?)?, eps(n.eps)]);
        jobs.push(job("rms_norm_grad", line(rows)?, threads(c), args)?);
    }
    if live(1).is_some() {
        let chunks = rows.div_ceil(CHUNK);
        let parts_at = (rows * 4).next_multiple_of(256);
        bytes = parts_at + chunks * c * 4;
        let inverse = scratch("inverse", 0, rows * 4, DType::F32);
        let parts = scratch("part", parts_at, chunks * c * 4, DType::F32);
        let args = vec![read("x", 0, x.dtype), inverse.clone(), eps(n.eps)];
        jobs.push(job("inverse_rms", line(rows)?, threads(c), args)?);
        let mut args = operands();
        args.extend([inverse, parts.clone()]);
        let columns = c.div_ceil(64) as u32;
        let grid = [columns, u32::try_from(chunks).ok()?, 1];
        jobs.push(job("weight_parts", grid, 64, args)?);
        let args = vec![parts, write("dw", 1, DType::F32), word("chunks", chunks)?];
        jobs.push(job("weight_join", [columns, 1, 1], 64, args)?);
    }
    Some(Offer::new("rms_norm_grad", jobs).scratch(bytes))
}
