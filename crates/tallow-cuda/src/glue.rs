//! From kernel specs to launches: which kernels can run a spec, and with what arguments.
//! Invariant: a candidate is offered only for layouts its kernels read and write as they are; which kernels a
//! spec gets depends on the spec and the [`Target`] alone, so all of this runs without a card.
//! Absent on purpose: addresses.
use crate::launch::{Arg, Job, Kernel, Offer, Start};
use std::sync::Arc;
use tallow_core::{
    kernel::{Body, Candidate, Format, KernelSpec, Offers, Operand},
    op::Composite,
    types::DType,
};

mod attention;
pub(crate) mod chain;
mod elementwise;
pub(crate) mod framed;
mod halves;
mod linear;
mod linear_few;
mod linear_half;
mod linear_thin;
mod listing;
mod loss;
pub(crate) mod matmul;
pub(crate) mod outer;
pub(crate) mod pairs;
mod reduce;
mod rows;
mod table;
pub use listing::sources;

/// What of a card decides which kernels it gets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    /// Multiprocessors.
    pub(crate) processors: u32,
    /// Most shared memory of a block, in bytes.
    pub(crate) shared: usize,
    /// What frozen weights are multiplied as.
    pub(crate) weights: DType,
    /// Does it copy memory in bulk, past the registers?
    pub(crate) bulk: bool,
}

impl Target {
    /// An H100 or H200.
    pub(crate) fn hopper(weights: DType) -> Self {
        Target {
            processors: 132,
            shared: 227 << 10,
            weights,
            bulk: true,
        }
    }
}

/// Is `c` computed again by gradients rather than kept? One pass over what is kept anyway, beside products.
pub(crate) fn cheap(c: &Composite) -> bool {
    matches!(c, Composite::RmsNorm(_) | Composite::SwiGlu(_))
}

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

/// Seconds of one run: a start for each launch, then arithmetic or bytes at modest rates of a large card.
fn estimate(spec: &KernelSpec, offer: &Offer) -> f64 {
    const FLOPS_PER_S: f64 = 3e13;
    const BYTES_PER_S: f64 = 2.5e12;
    const START_S: f64 = 2e-6;
    let work = (spec.flops() / FLOPS_PER_S).max(spec.bytes() as f64 / BYTES_PER_S);
    START_S * offer.jobs.len() as f64 + work + offer.extra
}

/// The decoding attention of one row, leaving parts of the next linear's `h` behind; and how many.
pub(crate) fn attention_then(
    a: &tallow_core::op::Attention,
    spec: &KernelSpec,
    next: &pairs::Next,
) -> Option<(Vec<Job>, usize)> {
    attention::decode_then(a, spec, next)
}

/// Are all weights of a linear dense rows of bf16, where its kernel for few rows reads them?
pub(crate) fn row_weights(t: &Target, spec: &KernelSpec, l: &tallow_core::op::Linear) -> bool {
    linear::row_weights(t, spec, l)
}

/// Name of the offer of a linear whose rows the step in front may make.
pub(crate) const TAIL: &str = linear_half::TAIL;

/// The launches of such a linear with what makes its rows taken in.
pub(crate) fn behind(
    t: &Target,
    l: &tallow_core::op::Linear,
    spec: &KernelSpec,
    front: framed::Front,
) -> Option<Vec<Job>> {
    linear::behind(t, l, spec, front)
}

/// What of `spec` may lie in bf16 between two kernels.
pub(crate) fn halves(t: &Target, spec: &KernelSpec) -> Vec<tallow_core::backend::Half> {
    halves::halves(t, spec)
}

fn offers(t: &Target, spec: &KernelSpec) -> Vec<Offer> {
    let one = |o: Option<Offer>| o.into_iter().collect();
    match &spec.body {
        Body::Composite(c) => match c {
            Composite::Linear(l) => linear::forward(t, l, spec),
            Composite::LinearGrad(l) => one(linear::backward(t, l, spec)),
            Composite::CrossEntropy(_) => one(loss::cross_entropy(t, spec)),
            Composite::LogitsCrossEntropy(_) => one(loss::of_logits(spec)),
            Composite::Dropout(d) => one(elementwise::dropout(t, d, spec)),
            Composite::Attention(a) => one(attention::forward(t, a, spec)),
            Composite::AttentionGrad(a) => one(attention::backward(t, &a.0, spec)),
            Composite::KvWrite(_) => one(table::kv_write(t, spec)),
            Composite::RmsNorm(n) => one(rows::rms_norm(n.eps, spec)),
            Composite::RmsNormGrad(n) => one(rows::rms_norm_grad(n, spec)),
            Composite::AddRmsNorm(n) => one(rows::add_rms_norm(n.eps, spec)),
            Composite::LayerNorm(n) => one(rows::layer_norm(n.eps, spec)),
            Composite::Softmax(_) => one(rows::softmax(spec)),
            Composite::Top(_) => one(rows::top(spec)),
            Composite::SoftmaxGrad(_) => one(rows::softmax_grad(spec)),
            Composite::Rope(r) => one(elementwise::rope(t, r.inverse, spec)),
            Composite::SwiGlu(_) => one(elementwise::swiglu(t, spec)),
            Composite::SwiGluGrad(_) => one(elementwise::swiglu_grad(t, spec)),
            Composite::AdamW(_) => one(elementwise::adamw(t, spec)),
            // No kernel: it runs as its decomposition.
            _ => vec![],
        },
        Body::MatMul { ta, tb, alpha } => matmul::offers(*ta, *tb, alpha.get(), spec),
        Body::Reduce(r, axis) => one(reduce::offer(*r, *axis, spec)),
        Body::Gather => one(table::gather(t, spec)),
        Body::ScatterAdd => one(table::scatter_add(t, spec)),
        Body::Map(_) | Body::Copy | Body::Fill(_) | Body::Iota(_) | Body::Random(_) => {
            one(elementwise::generated(t, spec))
        }
    }
}

/// The launches that write a frozen operand in one of this backend's formats.
pub(crate) fn prepare(t: &Target, format: Format, op: &Operand) -> Option<Vec<Job>> {
    linear::prepare(t, format, op)
}

/// A kernel's whole text: the prelude, its constants, its file.
pub(crate) fn source(file: &str, defines: &[(&str, String)]) -> Arc<str> {
    let mut text = String::from(crate::compile::PRELUDE);
    for (name, value) in defines {
        text += &format!("#define {name} {value}\n");
    }
    (text + file).into()
}

/// The type of an element in a kernel.
pub(crate) fn c_type(d: DType) -> &'static str {
    match d {
        DType::F32 => "float",
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        DType::I32 => "int",
        DType::U32 => "u32",
        DType::U8 => "u8",
    }
}

/// Threads of a block over elements.
pub(crate) const THREADS: u32 = 256;

/// Blocks of [`THREADS`] for `n` elements whose kernel walks on by the size of the grid.
pub(crate) fn blocks(t: &Target, n: usize) -> u32 {
    let most = t.processors.max(1) * 16;
    n.div_ceil(THREADS as usize).clamp(1, most as usize) as u32
}

/// A kernel over a grid of one dimension.
pub(crate) fn kernel(
    entry: &'static str,
    source: Arc<str>,
    grid: u32,
    block: u32,
    args: Vec<Arg>,
) -> Job {
    Job::Kernel(Kernel {
        entry,
        source,
        grid: [grid, 1, 1],
        block,
        shared: 0,
        args,
        unless_same: None,
        start: Start::After,
    })
}

/// The same launch, begun early: its kernel waits itself.
pub(crate) fn early(job: Job) -> Job {
    match job {
        Job::Kernel(k) => Job::Kernel(Kernel {
            start: Start::Early,
            ..k
        }),
        other => other,
    }
}

/// A number of elements or a stride as an argument, if it is small enough for the kernels.
pub(crate) fn word(n: usize) -> Option<Arg> {
    u32::try_from(n).ok().map(Arg::U32)
}
