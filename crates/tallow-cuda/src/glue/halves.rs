//! What may lie between two kernels as bf16 on a card that was asked to multiply in bf16.
//! Invariant: what is marked here is read and written by the kernels offered for it; a planner that finds none anyway
//! goes back to f32. Losses, statistics, gradients of adapters and everything the host sees stay f32.
//! Absent on purpose: a card that was asked for exact arithmetic; it stores nothing in bf16.
use super::{Target, attention, linear_few::FEW_ROWS, linear_half::alike, outer};
use tallow_core::{
    backend::Half::{self, May, Never, Wanted},
    kernel::{Body, KernelSpec},
    op::{Block, Composite},
    types::DType,
};

/// For each operand, then each result of `spec`.
pub(super) fn halves(t: &Target, spec: &KernelSpec) -> Vec<Half> {
    if t.weights != DType::BF16 {
        return vec![];
    }
    let (ins, outs) = (spec.inputs.len(), spec.outputs.len());
    let mut votes = vec![Never; ins + outs];
    let mut mark = |all: &[usize], v: Half| all.iter().for_each(|i| votes[*i] = v);
    match &spec.body {
        Body::Map(_) | Body::Copy if spec.inputs.iter().all(|o| o.dtype == DType::F32) => {
            mark(&(0..ins + outs).collect::<Vec<_>>(), May);
        }
        // Rows of a table that is not frozen may be activations.
        Body::Gather => mark(&[0, ins], May),
        Body::MatMul { ta, tb, .. } if outer::offer(*ta, *tb, 1.0, spec).is_some() => {
            mark(&[0, 1], May);
        }
        Body::Composite(c) => match c {
            Composite::Linear(l) if many(&l.blocks, spec) => {
                // What is added must have the type of the result, so it is wanted too.
                mark(&[0, ins], Wanted);
                mark(&if l.residual { vec![ins - 1] } else { vec![] }, Wanted);
            }
            Composite::LinearGrad(l) if many(&l.blocks, spec) => {
                // What is added must have the type of the result, so it is wanted too.
                mark(&[0, ins], Wanted);
                mark(&if l.residual { vec![ins - 1] } else { vec![] }, Wanted);
            }
            Composite::CrossEntropy(_) if spec.inputs[1].frozen => mark(&[0, ins + 1], Wanted),
            Composite::Attention(_) if attention::takes_halves(spec) => {
                mark(&[0, 1, 2, ins], Wanted);
            }
            Composite::AttentionGrad(_) if attention::takes_halves(spec) => {
                mark(&[0, 1, 2, 4, 6, ins, ins + 1, ins + 2], Wanted);
            }
            Composite::RmsNorm(_) => mark(&[0, ins], Wanted),
            Composite::RmsNormGrad(n) => {
                mark(&[0, 2, ins], May);
                mark(&if n.residual { vec![3] } else { vec![] }, May);
            }
            Composite::Rope(_) | Composite::Dropout(_) => mark(&[0, ins], May),
            Composite::SwiGlu(_) => mark(&[0, 1, ins], Wanted),
            Composite::SwiGluGrad(_) => mark(&[0, 1, 2, ins, ins + 1], Wanted),
            Composite::KvWrite(_) => mark(&[1], May),
            _ => {}
        },
        _ => {}
    }
    votes
}

/// Is this a linear for the tensor cores: frozen weights, many rows, one adapter at most or several that are alike?
fn many(blocks: &[Block], spec: &KernelSpec) -> bool {
    let one = blocks.iter().all(|b| b.adapters.len() == 1);
    (one || alike(blocks)) && spec.inputs[1].frozen && spec.inputs[0].layout.shape.rows() > FEW_ROWS
}
