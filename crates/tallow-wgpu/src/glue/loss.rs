//! Cross entropy, of logits and of a projection.
//! Invariant: the logits of a projection exist for one chunk of rows at a time.
//! Absent on purpose: gradients of the projection; whoever trains it gets the decomposition.
use super::{THREADS, word};
use crate::{
    launch::{Arg, Kernel, Offer, read, write},
    shader::{Draft, Target, kernel, line},
};
use tallow_core::{
    kernel::{KernelSpec, Operand},
    types::DType,
};

const FILE: &str = include_str!("cross_entropy.wgsl");

/// The kernel over `n` rows of logits: losses, and the gradient where wanted.
/// `buffers`: logits, targets, losses, gradient; `sizes`: columns, row strides of both, first row of targets and losses.
fn rows(
    t: &Target,
    spec: &KernelSpec,
    body: &str,
    n: usize,
    buffers: Vec<Arg>,
    sizes: [usize; 4],
) -> Option<Kernel> {
    let mut args = buffers;
    args.push(word("n", n)?);
    for (name, v) in ["v", "ls", "ds", "first"].into_iter().zip(sizes) {
        args.push(word(name, v)?);
    }
    let draft = Draft {
        entry: "cross_entropy",
        body,
        consts: &[],
        threads: THREADS,
        grid: line(n)?,
        args,
    };
    kernel(t, spec, draft)
}

/// Are targets and losses dense, and all numbers f32?
fn fits(spec: &KernelSpec, target: usize) -> bool {
    let dense = |o: &Operand| o.is_dense();
    let floats = |o: &&Operand| o.dtype == DType::F32;
    dense(&spec.inputs[target])
        && spec.outputs[0].as_ref().is_none_or(dense)
        && spec
            .outputs
            .iter()
            .flatten()
            .chain([&spec.inputs[0]])
            .all(|o| floats(&o))
}

pub(super) fn of_logits(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let l = &spec.inputs[0];
    if !fits(spec, 1) {
        return None;
    }
    let (n, v) = (l.layout.shape.0[0], l.layout.shape.0[1]);
    let dl_row = match &spec.outputs[1] {
        Some(o) => o.layout.row_stride()?,
        None => 0,
    };
    let buffers = vec![
        read("l", 0, DType::F32),
        read("goal", 1, DType::U32),
        write("nll", 0, DType::F32),
        write("dl", 1, DType::F32),
    ];
    let sizes = [v, l.layout.row_stride()?, dl_row, 0];
    let job = rows(t, spec, FILE, n, buffers, sizes)?;
    Some(Offer::new("logits_cross_entropy_f32", vec![job]))
}
