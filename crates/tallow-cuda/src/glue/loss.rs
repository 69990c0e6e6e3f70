//! Cross entropy, of logits and of a projection.
//! Invariant: the logits of a projection exist for one chunk of rows at a time.
//! Absent on purpose: gradients of the projection; whoever trains it gets the decomposition.
use super::{
    Arg, Job, Offer, Target, c_type, elementwise::one_type, kernel, linear, linear_half,
    matmul::matrix, source, word,
};
use crate::gemm::{Added, Matrix, Product};
use tallow_core::{kernel::KernelSpec, types::DType};

const FILE: &str = include_str!("loss.cu");
/// Bytes of logits held at a time.
const CHUNK_BYTES: usize = 256 << 20;

/// The kernel over `n` rows of logits: losses, and the gradient where wanted.
/// `types`: of logits and gradient; `args`: logits, targets, losses, gradient; `sizes`: columns, row strides of both, first row of targets and losses.
fn rows(types: [DType; 2], n: usize, args: [Arg; 4], sizes: [usize; 4]) -> Option<Job> {
    let mut all = args.to_vec();
    for v in sizes {
        all.push(word(v)?);
    }
    let [l, g] = types.map(|d| c_type(d).to_owned());
    let source = source(FILE, &[("L", l), ("G", g)]);
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
    let mut all = spec.outputs.iter().flatten().chain([l]);
    if all.any(|o| o.dtype != DType::F32) {
        return None;
    }
    let job = rows(
        [DType::F32; 2],
        n,
        args,
        [v, l.layout.row_stride()?, dl_row, 0],
    )?;
    Some(Offer::new("logits_cross_entropy_f32", vec![job]))
}

/// Where rows, logits and their gradient lie, and as what they are multiplied.
struct Form {
    dtype: DType,
    /// The rows `[n, c]`.
    x: (Arg, usize),
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
    let half = t.weights == DType::BF16 && w.frozen && w.dtype.is_float();
    let dtype = if half { DType::BF16 } else { DType::F32 };
    let fit = (CHUNK_BYTES / (pitch * dtype.bytes())).max(1);
    let chunk = if fit > 128 { fit / 128 * 128 } else { fit }.min(n.max(1));
    let (mut jobs, mut scratch) = (
        vec![],
        (chunk * pitch * dtype.bytes()).next_multiple_of(256),
    );
    let dx_type = spec.outputs[1].as_ref().map_or(dtype, |o| o.dtype);
    let (form, prepare) = if half {
        let x_type = one_type([x])?;
        let mut rows = (Arg::Read(0), x_row);
        if x_type != DType::BF16 || x_row % 8 != 0 {
            rows = (Arg::Scratch(scratch), c);
            jobs.push(linear_half::narrow(
                t,
                x_type,
                [Arg::Read(0), rows.0],
                [n, c, x_row, c],
            )?);
            scratch += (n * c * 2).next_multiple_of(256);
        }
        let form = Form {
            dtype,
            x: rows,
            w: [c, 1],
        };
        (form, linear_half::plain(spec, 1).into_iter().collect())
    } else {
        if x.dtype != DType::F32 || dx_type != DType::F32 {
            return None;
        }
        let one = linear::one_weight(t, spec, 1)?;
        let form = Form {
            dtype,
            x: (Arg::Read(0), x_row),
            w: one.stride,
        };
        (form, one.prepare)
    };
    one_type(&spec.outputs[1]).or(spec.outputs[1].is_none().then_some(dtype))?;
    let nll = match spec.outputs[0] {
        Some(_) => Arg::Write(0),
        None => Arg::U64(0),
    };
    for first in (0..n).step_by(chunk) {
        let m = chunk.min(n - first);
        let logits = matrix(Arg::Scratch(0), form.dtype, [m, v], [pitch, 1], 0)?;
        let x = matrix(form.x.0, form.dtype, [m, c], [form.x.1, 1], 0)?;
        let x = Matrix {
            offset: first * form.x.1,
            ..x
        };
        let [wr, wc] = form.w;
        let turned = matrix(Arg::Read(1), form.dtype, [c, v], [wc, wr], 0)?;
        jobs.push(product([m, v, c], [x, turned, logits]));
        let dl_at = if spec.outputs[1].is_some() {
            Arg::Scratch(0)
        } else {
            Arg::U64(0)
        };
        let args = [Arg::Scratch(0), Arg::Read(2), nll, dl_at];
        jobs.push(rows([form.dtype; 2], m, args, [v, pitch, pitch, first])?);
        if let Some(dx) = &spec.outputs[1] {
            let row = dx.layout.row_stride()?.max(c);
            let out = matrix(Arg::Write(1), dx_type, [m, c], [row, 1], 0)?;
            let out = Matrix {
                offset: first * row,
                ..out
            };
            let dl = matrix(Arg::Scratch(0), form.dtype, [m, v], [pitch, 1], 0)?;
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
