//! Cross entropy, of logits and of a projection.
//! Invariant: the logits of a projection exist for one chunk of rows at a time.
//! Absent on purpose: gradients of the projection; whoever trains it gets the decomposition.
use super::{Arg, Job, Offer, Target, kernel, linear, matmul::matrix, source, word};
use crate::gemm::Product;
use tallow_core::{kernel::KernelSpec, types::DType};

const FILE: &str = include_str!("loss.cu");
/// Bytes of logits held at a time.
const CHUNK_BYTES: usize = 256 << 20;

/// The kernel over rows of logits: losses, and the gradient where wanted (in place if the addresses are equal).
fn rows(args: Vec<Arg>, n: usize) -> Option<Job> {
    let grid = u32::try_from(n).ok()?;
    Some(kernel("cross_entropy", source(FILE, &[]), grid, 512, args))
}

pub(super) fn of_logits(spec: &KernelSpec) -> Option<Offer> {
    let (l, target) = (&spec.inputs[0], &spec.inputs[1]);
    let (n, v) = (l.layout.shape.0[0], l.layout.shape.0[1]);
    let nll_dense = spec.outputs[0]
        .as_ref()
        .is_none_or(|o| o.layout.shape.numel() == 1 || o.layout.strides[0] == 1);
    if !target.is_dense() || !nll_dense {
        return None;
    }
    let dl_row = match &spec.outputs[1] {
        Some(o) => o.layout.row_stride()?,
        None => 0,
    };
    let args = vec![
        Arg::Read(0),
        Arg::Read(1),
        Arg::Write(0),
        Arg::Write(1),
        word(v)?,
        word(l.layout.row_stride()?)?,
        word(dl_row)?,
    ];
    Some(Offer::new("logits_cross_entropy_f32", vec![rows(args, n)?]))
}

pub(super) fn cross_entropy(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let (x, target) = (&spec.inputs[0], &spec.inputs[2]);
    let (n, c) = (x.layout.shape.0[0], x.layout.shape.0[1]);
    let v = spec.inputs[1].layout.shape.0[0];
    let nll = spec.outputs[0].as_ref();
    if !target.is_dense() || nll.is_some_and(|o| !o.is_dense()) {
        return None;
    }
    let w = linear::one_weight(t, spec, 1)?;
    let x_row = x.layout.row_stride()?;
    let dx_row = match &spec.outputs[1] {
        Some(o) => Some(o.layout.row_stride()?),
        None => None,
    };
    let pitch = v.next_multiple_of(64);
    let chunk = (CHUNK_BYTES / (pitch * 4)).clamp(1, n.max(1)).min(4096);
    let nll_scratch = (chunk * pitch * 4).next_multiple_of(256);
    let mut jobs = vec![];
    for first in (0..n).step_by(chunk) {
        let m = chunk.min(n - first);
        let logits = matrix(Arg::Scratch(0), DType::F32, [m, v], [pitch, 1], 0)?;
        let mut rows_of_x = matrix(Arg::Read(0), DType::F32, [m, c], [x_row.max(c), 1], 0)?;
        rows_of_x.offset = first * x_row;
        let product = |m, n, k, a, b, out| {
            Job::Gemm(Product {
                count: 1,
                m,
                n,
                k,
                alpha: 1.0,
                beta: 0.0,
                a,
                b,
                out,
            })
        };
        let [wr, wc] = w.stride;
        jobs.push(product(
            m,
            v,
            c,
            rows_of_x,
            matrix(Arg::Read(1), DType::F32, [c, v], [wc, wr], 0)?,
            logits,
        ));
        let nll = match spec.outputs[0] {
            Some(_) => Arg::Write(0),
            None => Arg::Scratch(nll_scratch),
        };
        let dl = if dx_row.is_some() {
            Arg::Scratch(0)
        } else {
            Arg::U64(0)
        };
        let args = vec![
            Arg::Scratch(0),
            Arg::Read(2),
            nll,
            dl,
            word(v)?,
            word(pitch)?,
            word(pitch)?,
            word(first)?,
        ];
        jobs.push(kernel(
            "cross_entropy_chunk",
            source(FILE, &[]),
            m as u32,
            512,
            args,
        ));
        if let Some(row) = dx_row {
            let mut out = matrix(Arg::Write(1), DType::F32, [m, c], [row.max(c), 1], 0)?;
            out.offset = first * row;
            jobs.push(product(
                m,
                c,
                v,
                logits,
                matrix(Arg::Read(1), DType::F32, [v, c], [wr, wc], 0)?,
                out,
            ));
        }
    }
    let offer = Offer::new("cross_entropy_chunks_f32", jobs).scratch(nll_scratch + n * 4);
    Some(Offer {
        prepare: w.prepare,
        ..offer
    })
}
