//! From kernel specs to kernels: which of this crate's kernels can run a spec, and with what arguments.
//! Invariant: a candidate is offered only for layouts its kernel reads and writes as they are; a
//! kernel function touches only the spans that the plan gives it.
//! Absent on purpose: arithmetic, which lives in the kernel modules; a kernel that only this glue calls
//! may lie in one file with its binding (`layer_norm`).
use crate::{device::Cpu, exec::Exec};
use std::sync::Arc;
use tallow_core::{
    Error, Result,
    kernel::{Body, Candidate, Format, KernelSpec, Operand},
    op::Composite,
};

mod attention;
mod dropout;
mod layer_norm;
mod linear;
mod matmul;
mod rows;
mod structural;

/// What a kernel function gets: threads, operands and results in the order of the spec, scratch.
pub(crate) struct Io<'a> {
    pub(crate) exec: Exec<'a>,
    pub(crate) reads: &'a [*const u8],
    /// Null where nobody wants the result.
    pub(crate) writes: &'a [*mut u8],
    pub(crate) workspace: (*mut u8, usize),
}

impl Io<'_> {
    pub(crate) fn read<T>(&self, i: usize) -> *const T {
        self.reads[i].cast()
    }
    pub(crate) fn write<T>(&self, i: usize) -> *mut T {
        self.writes[i].cast()
    }
    /// The scratch memory as floats.
    #[expect(
        clippy::mut_from_ref,
        reason = "the memory belongs to the step, not to this struct"
    )]
    pub(crate) fn scratch(&self) -> &mut [f32] {
        let (p, bytes) = self.workspace;
        if bytes == 0 {
            return &mut [];
        }
        // SAFETY: the plan gives this step `bytes` bytes of the arena, aligned to 64, that nothing
        // else uses while it runs; a kernel function asks for them once.
        unsafe { std::slice::from_raw_parts_mut(p.cast(), bytes / 4) }
    }
}

/// A kernel with everything but its pointers bound.
pub(crate) type KernelFn = dyn Fn(&Io) + Send + Sync;

/// A candidate before it has a number.
pub(crate) struct Offer {
    pub(crate) name: &'static str,
    /// Scratch in floats.
    pub(crate) scratch: usize,
    pub(crate) prepare: Vec<(usize, Format)>,
    /// How many times as long as others it is thought to take.
    pub(crate) dearer: f64,
    pub(crate) run: Arc<KernelFn>,
}

impl Offer {
    pub(crate) fn new(name: &'static str, run: impl Fn(&Io) + Send + Sync + 'static) -> Self {
        Offer {
            name,
            scratch: 0,
            prepare: vec![],
            dearer: 1.0,
            run: Arc::new(run),
        }
    }
    pub(crate) fn scratch(self, floats: usize) -> Self {
        Offer {
            scratch: floats,
            ..self
        }
    }
    pub(crate) fn dearer(self, times: f64) -> Self {
        Offer {
            dearer: times,
            ..self
        }
    }
}

/// All ways this CPU can run `spec`.
pub(crate) fn candidates(cpu: &Cpu, spec: &KernelSpec) -> Vec<Candidate> {
    let mut table = cpu.table.lock().unwrap_or_else(|e| e.into_inner());
    let candidate = |kernel, offer: &Offer| Candidate {
        kernel,
        name: offer.name,
        workspace: offer.scratch * 4,
        cost: estimate(cpu, spec) * offer.dearer,
        prepare: offer.prepare.clone(),
    };
    table.candidates(spec, || offers(cpu, spec), candidate)
}

/// Seconds of one run by a roofline: arithmetic at a modest rate or bytes at a modest bandwidth.
fn estimate(cpu: &Cpu, spec: &KernelSpec) -> f64 {
    const FLOPS_PER_S: f64 = 80e9;
    const BYTES_PER_S: f64 = 20e9;
    const START_S: f64 = 2e-7;
    let threads = cpu.threads() as f64;
    let work = (spec.flops() / FLOPS_PER_S).max(spec.bytes() as f64 / BYTES_PER_S);
    START_S + work / threads
}

fn offers(cpu: &Cpu, spec: &KernelSpec) -> Vec<Offer> {
    let one = |o: Option<Offer>| o.into_iter().collect();
    match &spec.body {
        Body::Composite(c) => match c {
            Composite::Linear(l) => {
                let thin = linear::thin(l, spec);
                thin.into_iter()
                    .chain(linear::forward(cpu, l, spec))
                    .collect()
            }
            Composite::LinearGrad(l) => one(linear::backward(cpu, l, spec)),
            Composite::CrossEntropy(_) => one(linear::cross_entropy(cpu, spec)),
            Composite::Dropout(d) => one(dropout::offer(d, spec)),
            Composite::Attention(a) => one(attention::forward(cpu, a, spec)),
            Composite::AttentionGrad(a) => one(attention::backward(cpu, &a.0, spec)),
            Composite::KvWrite(_) => one(attention::kv_write(spec)),
            Composite::RmsNorm(n) => one(rows::rms_norm(n.eps.get(), spec)),
            Composite::RmsNormGrad(n) => one(rows::rms_norm_grad(cpu, n, spec)),
            Composite::AddRmsNorm(n) => one(rows::add_rms_norm(n.eps.get(), spec)),
            Composite::LayerNorm(n) => one(layer_norm::offer(n, spec)),
            Composite::Softmax(_) => one(rows::softmax(spec)),
            Composite::SoftmaxGrad(_) => one(rows::softmax_grad(spec)),
            Composite::Rope(r) => one(rows::rope(cpu, r.inverse, spec)),
            Composite::SwiGlu(_) => one(rows::swiglu(spec)),
            Composite::SwiGluGrad(_) => one(rows::swiglu_grad(spec)),
            Composite::AdamW(_) => one(rows::adamw(spec)),
            // No kernel: it runs as its decomposition.
            _ => vec![],
        },
        Body::MatMul { ta, tb, alpha } => matmul::matmul(cpu, *ta, *tb, alpha.get(), spec),
        Body::Map(_)
        | Body::Copy
        | Body::Fill(_)
        | Body::Reduce(..)
        | Body::Gather
        | Body::ScatterAdd
        | Body::Iota(_)
        | Body::Random(_) => one(structural::offer(cpu, spec)),
    }
}

/// Writes a frozen operand in one of this backend's formats.
///
/// # Safety
/// `from` holds the operand with its strides; `to` has `format.bytes` writable bytes.
pub(crate) unsafe fn prepare(
    cpu: &Cpu,
    format: Format,
    from: *const u8,
    op: &Operand,
    to: *mut u8,
) -> Result<()> {
    // SAFETY: the caller's promise.
    if unsafe { linear::prepare(cpu, format, from, op, to) } {
        return Ok(());
    }
    Err(Error::Device {
        device: "cpu".into(),
        what: format!("unknown weight format {} (bug in tallow)", format.name),
    })
}

/// Row stride of an operand read as dense rows `[rows, last]`.
pub(crate) fn row_stride(o: &Operand) -> Option<usize> {
    o.layout.row_stride()
}
