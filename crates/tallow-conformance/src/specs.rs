//! What a backend may be asked for, without running it: every op in every example, as kernel specs.
//! Invariant: a new composite or scalar op is in the list without a line here.
//! Absent on purpose: values. Whoever runs kernels takes the cases.
use tallow_core::{
    kernel::{Body, KernelSpec, Operand},
    op::{Bits, Composite, ReduceOp},
    scalar::{Inst, ScalarOp, ScalarProgram},
    types::{DType, Layout, TensorType},
};

/// A spec of every op in every example: composites with operands that never change and that do, all results wanted;
/// structural ops on small shapes in every type.
pub fn specs() -> Vec<KernelSpec> {
    let mut all = structural();
    for (c, tys) in Composite::examples() {
        let refs: Vec<&TensorType> = tys.iter().collect();
        let Ok(outs) = c.infer(&refs) else { continue };
        for frozen in [true, false] {
            let (frozen, live) = (vec![frozen; refs.len()], vec![true; outs.len()]);
            all.extend(KernelSpec::composite(&c, &refs, &frozen, &live));
        }
    }
    all
}

fn dense(shape: &[usize], dtype: DType) -> Operand {
    Operand::dense(&TensorType::new(shape, dtype))
}

fn one(body: Body, inputs: Vec<Operand>, out: Operand) -> KernelSpec {
    KernelSpec {
        body,
        inputs,
        outputs: vec![Some(out)],
    }
}

fn structural() -> Vec<KernelSpec> {
    let f32s = |shape: &[usize]| dense(shape, DType::F32);
    let mut all = vec![];
    for op in ScalarOp::ALL {
        let n = op.arity() as u16;
        let program = ScalarProgram {
            n_inputs: n,
            insts: vec![Inst::Apply(*op, (0..n).collect())],
            outputs: vec![n],
        };
        let ins = vec![f32s(&[5, 7]); op.arity()];
        all.push(one(Body::Map(program), ins, f32s(&[5, 7])));
    }
    for from in DType::ALL {
        for to in DType::ALL {
            let mut turned = dense(&[6, 4, 3], from);
            turned.layout = Layout::contiguous(&[3, 4, 6].into()).permute(&[2, 1, 0]);
            all.push(one(Body::Copy, vec![turned], dense(&[6, 4, 3], to)));
        }
        let ins = vec![dense(&[5, 7], from), dense(&[9], DType::U32)];
        all.push(one(Body::Gather, ins, dense(&[9, 7], from)));
    }
    for op in [ReduceOp::Sum, ReduceOp::Max] {
        for (axis, to) in [(0, [1, 40]), (1, [30, 1])] {
            let body = Body::Reduce(op, axis);
            all.push(one(body, vec![f32s(&[30, 40])], f32s(&to)));
        }
    }
    for (m, dtype) in [(20, DType::F32), (512, DType::F32), (20, DType::BF16)] {
        let (ta, tb, alpha) = (true, false, Bits::from(1.0));
        let ins = vec![dense(&[m, 8], dtype), dense(&[m, 96], dtype)];
        let body = Body::MatMul { ta, tb, alpha };
        all.push(one(body, ins, dense(&[8, 96], dtype)));
    }
    all.push(one(Body::Fill(Bits::from(1.0)), vec![], f32s(&[3])));
    all.push(one(Body::Iota(1), vec![], f32s(&[3, 4])));
    let seed = vec![dense(&[2], DType::U32)];
    all.push(one(Body::Random(3), seed, f32s(&[9])));
    let rows = vec![dense(&[9], DType::U32), f32s(&[9, 7])];
    all.push(one(Body::ScatterAdd, rows, f32s(&[6, 7])));
    all
}
