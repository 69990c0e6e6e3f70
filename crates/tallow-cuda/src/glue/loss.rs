//! Cross entropy, of logits and of a projection.
//! Invariant: the logits of a projection exist for one chunk of rows at a time.
//! Absent on purpose: gradients of the projection; whoever trains it gets the decomposition.
use super::{
    Arg, Job, Offer, Target, c_type, kernel, linear, linear_half, matmul::matrix, source, word,
};
use crate::gemm::{Added, Matrix, Product};
use tallow_core::{kernel::KernelSpec, types::DType};

const FILE: &str = include_str!("loss.cu");
/// Bytes of logits held at a time.
const CHUNK_BYTES: usize = 256 << 20;

/// The kernel over `n` rows of logits: losses, and the gradient where wanted.
/// `args`: logits, targets, losses, gradient; `sizes`: columns, row strides of both, first row of targets and losses.
fn rows(grad: DType, n: usize, args: [Arg; 4], sizes: [usize; 4]) -> Option<Job> {
    let mut all = args.to_vec();
    for v in sizes {
        all.push(word(v)?);
    }
    let source = source(FILE, &[("G", c_type(grad).to_owned())]);
    Some(kernel(
        "cross_entropy",
        source,
        u32::try_from(n).ok()?,
        512,
        all,
    ))
}

pub(super) fn of_logits(spec: &KernelSpec) -> Option<Offer> {
    let (l, target) = (&spec.inputs[0], &spec.inputs[1]);
    let (n, v) = (l.layout.shape.0[0], l.layout.shape.0[1]);
    if !target.is_dense() || spec.outputs[0].as_ref().is_some_and(|o| !o.is_dense()) {
        return None;
    }
    let dl_row = match &spec.outputs[1] {
        Some(o) => o.layout.row_stride()?,
        None => 0,
    };
    let args = [Arg::Read(0), Arg::Read(1), Arg::Write(0), Arg::Write(1)];
    let job = rows(DType::F32, n, args, [v, l.layout.row_stride()?, dl_row, 0])?;
    Some(Offer::new("logits_cross_entropy_f32", vec![job]))
}

/// Where rows, logits and their gradient lie, and as what they are multiplied.
struct Form {
    dtype: DType,
    /// The rows `[n, c]`.
    x: (Arg, usize),
    /// The gradient of a chunk of logits.
    dl: Arg,
    /// The weight `[v, c]`: strides.
    w: [usize; 2],
}

fn product([m, n, k]: [usize; 3], [a, b, out]: [Matrix; 3]) -> Job {
    Job::Gemm(Product {
        count: 1,
        m,
        n,
        k,
        alpha: 1.0,
        added: Added::Nothing,
        bias: None,
        a,
        b,
        out,
    })
}

pub(super) fn cross_entropy(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    let (x, w, target) = (&spec.inputs[0], &spec.inputs[1], &spec.inputs[2]);
    let (n, c, v) = (
        x.layout.shape.0[0],
        x.layout.shape.0[1],
        w.layout.shape.0[0],
    );
    if !target.is_dense() || spec.outputs[0].as_ref().is_some_and(|o| !o.is_dense()) {
        return None;
    }
    let x_row = x.layout.row_stride()?.max(c);
    let pitch = v.next_multiple_of(64);
    let fit = (CHUNK_BYTES / (pitch * 4)).max(1);
    let chunk = if fit > 128 { fit / 128 * 128 } else { fit }.min(n.max(1));
    let logits_bytes = (chunk * pitch * 4).next_multiple_of(256);
    let (mut jobs, mut scratch) = (vec![], logits_bytes);
    let (form, prepare) = if t.weights == DType::BF16 && w.frozen && w.dtype.is_float() {
        let (dl, rows) = (Arg::Scratch(scratch), scratch + chunk * pitch * 2);
        scratch = rows.next_multiple_of(256);
        let half_rows = Arg::Scratch(scratch);
        jobs.push(linear_half::narrow(
            t,
            Arg::Read(0),
            half_rows,
            [n, c, x_row, c],
        )?);
        scratch += (n * c * 2).next_multiple_of(256);
        let form = Form {
            dtype: DType::BF16,
            x: (half_rows, c),
            dl,
            w: [c, 1],
        };
        (form, linear_half::plain(spec, 1).into_iter().collect())
    } else {
        let one = linear::one_weight(t, spec, 1)?;
        let form = Form {
            dtype: DType::F32,
            x: (Arg::Read(0), x_row),
            dl: Arg::Scratch(0),
            w: one.stride,
        };
        (form, one.prepare)
    };
    let nll = match spec.outputs[0] {
        Some(_) => Arg::Write(0),
        None => Arg::U64(0),
    };
    for first in (0..n).step_by(chunk) {
        let m = chunk.min(n - first);
        let logits = matrix(Arg::Scratch(0), DType::F32, [m, v], [pitch, 1], 0)?;
        let x = matrix(form.x.0, form.dtype, [m, c], [form.x.1, 1], 0)?;
        let x = Matrix {
            offset: first * form.x.1,
            ..x
        };
        let [wr, wc] = form.w;
        let turned = matrix(Arg::Read(1), form.dtype, [c, v], [wc, wr], 0)?;
        jobs.push(product([m, v, c], [x, turned, logits]));
        let dl_at = if spec.outputs[1].is_some() {
            form.dl
        } else {
            Arg::U64(0)
        };
        let args = [Arg::Scratch(0), Arg::Read(2), nll, dl_at];
        jobs.push(rows(form.dtype, m, args, [v, pitch, pitch, first])?);
        if let Some(dx) = &spec.outputs[1] {
            let row = dx.layout.row_stride()?.max(c);
            let out = matrix(Arg::Write(1), DType::F32, [m, c], [row, 1], 0)?;
            let out = Matrix {
                offset: first * row,
                ..out
            };
            let dl = matrix(form.dl, form.dtype, [m, v], [pitch, 1], 0)?;
            let w = matrix(Arg::Read(1), form.dtype, [v, c], [wr, wc], 0)?;
            jobs.push(product([m, c, v], [dl, w, out]));
        }
    }
    let name = match form.dtype {
        DType::BF16 => "cross_entropy_chunks_bf16",
        _ => "cross_entropy_chunks_f32",
    };
    let offer = Offer::new(name, jobs).scratch(scratch);
    Some(Offer { prepare, ..offer })
}
