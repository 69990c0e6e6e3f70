//! From kernel specs to dispatches: which kernels can run a spec, and with what arguments.
//! Invariant: a candidate is offered only for layouts its kernels read and write as they are; which kernels a
//! spec gets depends on the spec and the [`Target`] alone, so all of this runs without a GPU.
//! Absent on purpose: where operands lie.
use crate::{
    launch::{Arg, Kernel, Offer},
    shader::Target,
};
use tallow_core::{
    kernel::{Body, Candidate, Format, KernelSpec, Offers, Operand},
    op::Composite,
    types::DType,
};

mod attention;
mod coop;
mod elementwise;
mod heads;
mod linear;
mod linear_few;
mod listing;
mod loss;
mod matmul;
mod mps;
mod outer;
mod pointwise;
mod reduce;
mod rows;
mod skinny;
mod table;
mod top;
pub(crate) use heads::{Heads, heads};
pub(crate) use linear::{Around, Gate, Norm, with_neighbours};
pub use listing::{Source, Wanted, sources};
pub(crate) use mps::Gemm;

/// All ways to run `spec`.
pub(crate) fn candidates(
    table: &mut Offers<Offer>,
    target: &Target,
    spec: &KernelSpec,
) -> Vec<Candidate> {
    let candidate = |kernel, offer: &Offer| Candidate {
        kernel,
        name: offer.name,
        workspace: offer.scratch,
        cost: estimate(spec, offer),
        prepare: offer.prepare.clone(),
    };
    table.candidates(spec, || offers(target, spec), candidate)
}

/// What a laptop's GPU does in its stride.
const FLOPS_PER_S: f64 = 1e12;

/// Seconds of one run: a start for each dispatch, then arithmetic or bytes at modest rates of a laptop's GPU.
fn estimate(spec: &KernelSpec, offer: &Offer) -> f64 {
    const BYTES_PER_S: f64 = 1e11;
    const START_S: f64 = 3e-6;
    let work = (spec.flops() / FLOPS_PER_S).max(spec.bytes() as f64 / BYTES_PER_S);
    START_S * offer.jobs.len() as f64 + work + offer.extra
}

fn offers(t: &Target, spec: &KernelSpec) -> Vec<Offer> {
    let one = |o: Option<Offer>| o.into_iter().collect();
    match &spec.body {
        Body::Composite(c) => match c {
            Composite::Linear(l) => {
                let ours = linear::forward(t, l, spec).into_iter();
                ours.chain(mps::offer(t, spec)).collect()
            }
            Composite::LinearGrad(l) => linear::backward(t, l, spec),
            Composite::CrossEntropy(_) => one(loss::cross_entropy(t, spec)),
            Composite::LogitsCrossEntropy(_) => one(loss::of_logits(t, spec)),
            Composite::Dropout(d) => one(pointwise::dropout(t, d, spec)),
            Composite::Attention(a) => one(attention::forward(t, a, spec)),
            Composite::AttentionGrad(a) => one(attention::backward(t, &a.0, spec)),
            Composite::KvWrite(_) => one(table::kv_write(t, spec)),
            Composite::Top(_) => one(top::top(t, spec)),
            Composite::Rope(r) => one(pointwise::rope(t, r.inverse, spec)),
            Composite::SwiGlu(_) => one(pointwise::swiglu(t, spec)),
            Composite::SwiGluGrad(_) => one(pointwise::swiglu_grad(t, spec)),
            Composite::AdamW(_) => one(pointwise::adamw(t, spec)),
            Composite::RmsNorm(n) => one(rows::rms_norm(t, n.eps, spec)),
            Composite::RmsNormGrad(n) => one(rows::rms_norm_grad(t, n, spec)),
            Composite::AddRmsNorm(n) => one(rows::add_rms_norm(t, n.eps, spec)),
            Composite::LayerNorm(n) => one(rows::layer_norm(t, n.eps, spec)),
            Composite::Softmax(_) => one(rows::softmax(t, spec)),
            Composite::SoftmaxGrad(_) => one(rows::softmax_grad(t, spec)),
            // No kernel: it runs as its decomposition.
            _ => vec![],
        },
        Body::MatMul { ta, tb, alpha } => {
            let ours = matmul::offers(t, *ta, *tb, alpha.get(), spec).into_iter();
            ours.chain(mps::offer(t, spec)).collect()
        }
        Body::Reduce(r, axis) => one(reduce::offer(t, *r, *axis, spec)),
        Body::Gather => one(table::gather(t, spec)),
        Body::ScatterAdd => one(table::scatter_add(t, spec)),
        Body::Map(_) | Body::Copy | Body::Fill(_) | Body::Iota(_) | Body::Random(_) => {
            one(elementwise::generated(t, spec))
        }
    }
}

/// The dispatches that write a frozen operand in one of this backend's formats.
pub(crate) fn prepare(t: &Target, format: Format, op: &Operand) -> Option<Vec<Kernel>> {
    linear::prepare(t, format, op)
}

/// Threads of a workgroup over elements.
pub(crate) const THREADS: u32 = 256;

/// A number of elements or a stride as an argument, if it is small enough for the kernels.
pub(crate) fn word(name: &'static str, n: usize) -> Option<Arg> {
    Some(Arg::U32(name.into(), u32::try_from(n).ok()?))
}

/// The one type of these operands, if it is a float.
pub(crate) fn one_float<'a>(all: impl IntoIterator<Item = &'a Operand>) -> Option<DType> {
    let mut types = all.into_iter().map(|o| o.dtype);
    let first = types.next().filter(|d| d.is_float())?;
    types.all(|d| d == first).then_some(first)
}
