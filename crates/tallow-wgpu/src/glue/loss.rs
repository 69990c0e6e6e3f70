//! Cross entropy, of logits and of a projection.
//! Invariant: the logits of a projection exist for one chunk of rows at a time.
//! Absent on purpose: gradients of the projection; whoever trains it gets the decomposition.
use super::{
    THREADS,
    matmul::{Product, Side},
    word,
};
use crate::{
    launch::{Arg, Kernel, Offer, Ty, read, scratch, wide, write},
    shader::{Draft, Target, kernel, line},
};
use tallow_core::{
    kernel::{KernelSpec, Operand},
    types::DType,
};

const FILE: &str = include_str!("cross_entropy.wgsl");
/// Bytes of logits held at a time: half of what every adapter can bind.
const CHUNK_BYTES: usize = 64 << 20;

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

/// A product `[m, n]` over `k` that adds nothing.
fn product(sizes: [usize; 3], [x, w, y]: [Side; 3]) -> Product {
    Product {
        sizes,
        x,
        w,
        y,
        alpha: 1.0,
        tail: None,
        bias: None,
        past: None,
        add: false,
    }
}

fn side(arg: Arg, at: usize, strides: [usize; 2]) -> Side {
    Side { arg, at, strides }
}

pub(super) fn cross_entropy(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let (x, w) = (&spec.inputs[0], &spec.inputs[1]);
    if !fits(spec, 2) {
        return None;
    }
    let ([n, c], v) = ([0, 1].map(|i| x.layout.shape.0[i]), w.layout.shape.0[0]);
    let (x_row, [wr, wc]) = (
        x.layout.row_stride()?,
        [w.layout.strides[0], w.layout.strides[1]],
    );
    u32::try_from(w.layout.end()).ok()?;
    // Rows of logits begin where four can be read at once.
    let pitch = v.next_multiple_of(4);
    let fit = (CHUNK_BYTES / (pitch * 4)).max(1);
    let chunk = if fit > 64 { fit / 64 * 64 } else { fit }.min(n);
    let bytes = chunk * pitch * 4;
    let logits = |name, ty| Arg::Scratch {
        name: std::borrow::Cow::Borrowed(name),
        at: 0,
        bytes,
        ty,
    };
    // The gradient lies in place of the logits.
    let live = spec.outputs[1].is_some();
    let body = format!(
        "const LIVE_dl = {live};\n{}",
        FILE.replace("st_dl(", "st_l(")
    );
    let mut jobs = vec![];
    for first in (0..n).step_by(chunk.max(1)) {
        let m = chunk.min(n - first);
        let made = product(
            [m, v, c],
            [
                side(wide("x", 0, DType::F32), first * x_row, [x_row, 1]),
                side(wide("w", 1, w.dtype), 0, [wr, wc]),
                side(scratch("y", 0, bytes, DType::F32), 0, [pitch, 1]),
            ],
        );
        jobs.push(made.alone(t, spec)?);
        let buffers = vec![
            logits("l", Ty::Plain(DType::F32)),
            read("goal", 2, DType::U32),
            write("nll", 0, DType::F32),
        ];
        jobs.push(rows(t, spec, &body, m, buffers, [v, pitch, pitch, first])?);
        if let Some(dx) = &spec.outputs[1] {
            let row = dx.layout.row_stride()?;
            let back = product(
                [m, c, v],
                [
                    side(logits("x", Ty::Wide(DType::F32)), 0, [pitch, 1]),
                    side(wide("w", 1, w.dtype), 0, [wc, wr]),
                    side(write("y", 1, DType::F32), first * row, [row, 1]),
                ],
            );
            jobs.push(back.alone(t, spec)?);
        }
    }
    Some(Offer::new("cross_entropy_chunks_f32", jobs).scratch(bytes))
}
