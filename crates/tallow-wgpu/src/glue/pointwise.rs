//! Composites whose elements stand alone: gates, the optimizer, dropout, rotary positions.
//! Invariant: an element is read only by the thread that writes its place, so a result may lie where an operand does.
//! Absent on purpose: f32 that was rounded on its way; all operands are f32.
use super::{THREADS, attention::head_strides, word};
use crate::{
    launch::{Arg, Offer, read, write},
    shader::{Draft, Target, kernel, line},
};
use tallow_core::{
    kernel::{KernelSpec, Operand},
    op::Dropout,
    types::DType::{F32, U32},
};

const SWIGLU: &str = include_str!("swiglu.wgsl");
const SWIGLU_GRAD: &str = include_str!("swiglu_grad.wgsl");
const ADAMW: &str = include_str!("adamw.wgsl");
const DROPOUT: &str = include_str!("dropout.wgsl");
const PHILOX: &str = include_str!("philox.wgsl");
const ROPE: &str = include_str!("rope.wgsl");
const TURN: &str = include_str!("turn.wgsl");

/// Are these all f32?
fn f32s<'a>(all: impl IntoIterator<Item = &'a Operand>) -> bool {
    all.into_iter().all(|o| o.dtype == F32)
}

/// One thread for each of `n` elements.
fn each(
    t: &Target,
    spec: &KernelSpec,
    entry: &'static str,
    body: &str,
    n: usize,
    (consts, args): (&[(&'static str, String)], Vec<Arg>),
) -> Option<Offer> {
    let draft = Draft {
        entry,
        body,
        consts,
        threads: THREADS,
        grid: line(n.div_ceil(THREADS as usize))?,
        args,
    };
    Some(Offer::new(entry, vec![kernel(t, spec, draft)?]))
}

/// Operands and results as rows, f32, under their names, with the names of their row strides; and `n`, `c`.
fn rows(
    spec: &KernelSpec,
    ins: &[(&'static str, &'static str)],
    outs: &[(&'static str, &'static str)],
) -> Option<(usize, Vec<Arg>)> {
    let operands = &spec.inputs[..ins.len()];
    if !f32s(operands.iter().chain(spec.outputs.iter().flatten())) {
        return None;
    }
    let shape = &spec.inputs[0].layout.shape;
    let (mut args, mut numbers) = (vec![], vec![]);
    for (i, (name, stride)) in ins.iter().enumerate() {
        args.push(read(*name, i, F32));
        numbers.push(word(stride, operands[i].layout.row_stride()?)?);
    }
    for (i, (name, stride)) in outs.iter().enumerate() {
        args.push(write(*name, i, F32));
        let row = match &spec.outputs[i] {
            Some(o) => o.layout.row_stride()?,
            None => 0,
        };
        numbers.push(word(stride, row)?);
    }
    args.extend(numbers);
    args.extend([word("n", shape.numel())?, word("c", shape.last())?]);
    Some((shape.numel(), args))
}

pub(super) fn swiglu(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let (n, args) = rows(spec, &[("g", "gs"), ("u", "us")], &[("y", "ys")])?;
    each(t, spec, "swiglu", SWIGLU, n, (&[], args))
}

pub(super) fn swiglu_grad(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let ins = [("g", "gs"), ("u", "us"), ("dy", "ds")];
    let (n, args) = rows(spec, &ins, &[("dg", "dgs"), ("du", "dus")])?;
    each(t, spec, "swiglu_grad", SWIGLU_GRAD, n, (&[], args))
}

pub(super) fn adamw(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let all = || spec.inputs.iter().chain(spec.outputs.iter().flatten());
    if !all().all(Operand::is_dense) || !f32s(all()) {
        return None;
    }
    let n = spec.inputs[0].layout.shape.numel();
    let ins = ["p", "g", "m", "v", "hyper"].into_iter().enumerate();
    let mut args: Vec<Arg> = ins.map(|(i, name)| read(name, i, F32)).collect();
    let outs = ["p2", "m2", "v2"].into_iter().enumerate();
    args.extend(outs.map(|(i, name)| write(name, i, F32)));
    args.push(word("n", n)?);
    each(t, spec, "adamw", ADAMW, n, (&[], args))
}

pub(super) fn dropout(t: &Target, d: &Dropout, spec: &KernelSpec) -> Option<Offer> {
    if !spec.inputs[1].is_dense() {
        return None;
    }
    let (n, mut args) = rows(spec, &[("x", "xs")], &[("y", "ys")])?;
    args.push(read("seed", 1, U32));
    args.push(Arg::U32("draw".into(), d.id));
    let keep = d.keep.get();
    let consts = [
        ("KEEP", format!("{keep:?}f")),
        ("UP", format!("{:?}f", 1.0 / keep)),
    ];
    let body = [PHILOX, DROPOUT].concat();
    each(t, spec, "dropout", &body, n, (&consts, args))
}

pub(super) fn rope(t: &Target, inverse: bool, spec: &KernelSpec) -> Option<Offer> {
    let (x, out) = (&spec.inputs[0], spec.outputs[0].as_ref()?);
    if !spec.inputs[1].is_dense() || !spec.inputs[2].is_dense() || !f32s([x, out]) {
        return None;
    }
    let &[b, tokens, h, d] = &x.layout.shape.0[..] else {
        return None;
    };
    // Few tokens: a thread for each element, so that more of them run side by side.
    let span = if b * tokens >= 256 { 8 } else { 1 };
    let n = b * tokens * h.div_ceil(span) * (d / 2);
    let mut args = vec![
        read("x", 0, F32),
        read("pos", 1, U32),
        read("f", 2, F32),
        write("y", 0, F32),
    ];
    let sizes = [("n", n), ("t", tokens), ("h", h), ("half_d", d / 2)];
    let x_strides = ["xb", "xt", "xh"].into_iter().zip(head_strides(x)?);
    let y_strides = ["yb", "yt", "yh"].into_iter().zip(head_strides(out)?);
    for (name, v) in sizes.into_iter().chain(x_strides).chain(y_strides) {
        args.push(word(name, v)?);
    }
    let sign = if inverse { "-1.0f" } else { "1.0f" };
    let consts = [("SPAN", format!("{span}u")), ("SIGN", sign.to_owned())];
    let body = [TURN, ROPE].concat();
    each(t, spec, "rope", &body, n, (&consts, args))
}
