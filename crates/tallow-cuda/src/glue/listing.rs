//! Every kernel's text, for a machine without a card to compile.
//! Invariant: the texts come from the same offers that a card gets, for the examples that every op brings.
//! Absent on purpose: the product library, which is compiled already.
use super::{Table, Target, prepare};
use crate::launch::Job;
use std::{collections::BTreeMap, sync::Arc};
use tallow_core::{
    backend::Half::{May, Wanted},
    kernel::{Body, KernelSpec, Operand},
    op::{Bits, Composite, ReduceOp},
    scalar::{Inst, ScalarOp, ScalarProgram},
    types::{DType, Layout, TensorType},
};

/// Entry point and text of the kernels for every example of every op, each text once.
pub fn sources(weights: DType) -> Vec<(&'static str, Arc<str>)> {
    let target = Target {
        processors: 132,
        shared: 227 << 10,
        weights,
        bulk: true,
    };
    let mut table = Table::default();
    let mut found = BTreeMap::new();
    let specs = specs().into_iter().flat_map(|s| [rounded(&target, &s), s]);
    for spec in specs {
        for c in table.candidates(&target, &spec) {
            let mut jobs = table.offer(c.kernel).jobs;
            for (i, format) in c.prepare {
                jobs.extend(prepare(&target, format, &spec.inputs[i]).unwrap_or_default());
            }
            for job in jobs {
                if let Job::Kernel(k) = job {
                    found.insert(k.source, k.entry);
                }
            }
        }
    }
    let alone = super::pairs::examples().into_iter();
    for job in alone.chain(super::chain::examples(&target)) {
        if let Job::Kernel(k) = job {
            found.insert(k.source, k.entry);
        }
    }
    found.into_iter().map(|(s, e)| (e, s)).collect()
}

/// `spec` with everything in bf16 that may be.
fn rounded(target: &Target, spec: &KernelSpec) -> KernelSpec {
    let mut half = spec.clone();
    let votes = super::halves(target, spec);
    let outs = half.outputs.iter_mut().map(Option::as_mut);
    for (o, vote) in half.inputs.iter_mut().map(Some).chain(outs).zip(votes) {
        if let (Some(o), May | Wanted) = (o, vote)
            && o.dtype == DType::F32
        {
            o.dtype = DType::BF16;
        }
    }
    half
}

fn specs() -> Vec<KernelSpec> {
    let mut all = structural();
    for (c, tys) in Composite::examples() {
        let refs: Vec<&TensorType> = tys.iter().collect();
        let Ok(outs) = c.infer(&refs) else { continue };
        for frozen in [true, false] {
            let spec = KernelSpec::composite(
                &c,
                &refs,
                &vec![frozen; refs.len()],
                &vec![true; outs.len()],
            );
            all.extend(spec);
        }
    }
    all
}

fn structural() -> Vec<KernelSpec> {
    let dense = |shape: &[usize], dtype| Operand::dense(&TensorType::new(shape, dtype));
    let f32s = |shape: &[usize]| dense(shape, DType::F32);
    let one = |body, inputs, out| KernelSpec {
        body,
        inputs,
        outputs: vec![Some(out)],
    };
    let mut all = vec![];
    for op in ScalarOp::ALL {
        let n = op.arity() as u16;
        let program = ScalarProgram {
            n_inputs: n,
            insts: vec![Inst::Apply(*op, (0..n).collect())],
            outputs: vec![n],
        };
        all.push(one(
            Body::Map(program),
            vec![f32s(&[5, 7]); op.arity()],
            f32s(&[5, 7]),
        ));
    }
    for from in DType::ALL {
        for to in DType::ALL {
            let mut turned = dense(&[6, 4, 3], from);
            turned.layout = Layout::contiguous(&[3, 4, 6].into()).permute(&[2, 1, 0]);
            all.push(one(Body::Copy, vec![turned], dense(&[6, 4, 3], to)));
        }
        all.push(one(
            Body::Gather,
            vec![dense(&[5, 7], from), dense(&[9], DType::U32)],
            dense(&[9, 7], from),
        ));
    }
    for op in [ReduceOp::Sum, ReduceOp::Max] {
        for (axis, to) in [(0, [1, 40]), (1, [30, 1])] {
            all.push(one(
                Body::Reduce(op, axis),
                vec![f32s(&[30, 40])],
                f32s(&to),
            ));
        }
    }
    for (m, dtype) in [(20, DType::F32), (512, DType::F32), (20, DType::BF16)] {
        let (ta, tb, alpha) = (true, false, Bits::from(1.0));
        let inputs = vec![dense(&[m, 8], dtype), dense(&[m, 96], dtype)];
        all.push(one(
            Body::MatMul { ta, tb, alpha },
            inputs,
            dense(&[8, 96], dtype),
        ));
    }
    all.push(one(Body::Fill(Bits::from(1.0)), vec![], f32s(&[3])));
    all.push(one(Body::Iota(1), vec![], f32s(&[3, 4])));
    all.push(one(
        Body::Random(3),
        vec![dense(&[2], DType::U32)],
        f32s(&[9]),
    ));
    all.push(one(
        Body::ScatterAdd,
        vec![dense(&[9], DType::U32), f32s(&[9, 7])],
        f32s(&[6, 7]),
    ));
    all
}
