//! Every kernel's text, for a machine without a GPU to translate.
//! Invariant: the texts come from the same offers that a GPU gets.
//! Absent on purpose: which specs; whoever asks brings them.
use super::{Around, Gate, Heads, Norm, candidates, heads, prepare, with_neighbours};
use crate::{
    launch::Kernel,
    shader::{Coop, Target, Units},
};
use std::{collections::BTreeMap, sync::Arc};
use tallow_core::{
    kernel::{Body, KernelSpec, Offers, Operand},
    op::{Block, Composite, KvWrite, Linear, RmsNorm, Rope, SwiGlu},
    types::{DType, TensorType},
};

/// A kernel as a GPU would get it.
#[derive(Clone, Debug)]
pub struct Source {
    /// Entry point.
    pub entry: &'static str,
    /// WGSL.
    pub text: Arc<str>,
    /// Storage buffers bound, in group 0 from binding 0 on.
    pub buffers: usize,
    /// Bytes of numbers passed beside them.
    pub numbers: usize,
    /// Do the numbers come in a uniform buffer, bound behind the others?
    pub uniform: bool,
}

/// What kernels are listed for, beside the limits that every adapter of WebGPU has: 8 buffers, 128 bytes of numbers.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Smallest size of a subgroup; `None`: kernels use none.
    pub subgroups: Option<u32>,
    /// What frozen weights are multiplied as.
    pub weights: DType,
    /// Sides of the units that multiply f32, and of those that multiply f16; both add f32.
    pub units: [Option<u32>; 2],
    /// Memory that a workgroup shares; 16 KiB are everywhere.
    pub shared_bytes: usize,
}

/// The kernels for `specs`, each text once.
pub fn sources(specs: &[KernelSpec], wanted: &Wanted) -> Vec<Source> {
    let [f32s, f16s] = wanted.units;
    let any = wanted.units.iter().any(Option::is_some);
    let target = Target {
        subgroups: wanted.subgroups,
        buffers: 8,
        immediates: 128,
        shared: wanted.shared_bytes,
        threads: 256,
        binding: 128 << 20,
        weights: wanted.weights,
        mps: false,
        coop: wanted.subgroups.filter(|_| any).map(|lanes| Coop {
            f32s,
            f16s,
            lanes,
            by: Units::Adapter,
        }),
    };
    let (mut table, mut found) = (Offers::default(), BTreeMap::new());
    let mut keep = |k: Kernel| {
        let source = Source {
            entry: k.entry,
            buffers: buffers(&k),
            numbers: k.args.len() * 4,
            uniform: k.uniform,
            text: k.source.clone(),
        };
        found.insert(k.source, source);
    };
    joined(&target).into_iter().for_each(&mut keep);
    for spec in specs {
        for c in candidates(&mut table, &target, spec) {
            let mut jobs = table.get(c.kernel).jobs.clone();
            for (i, format) in c.prepare {
                jobs.extend(prepare(&target, format, &spec.inputs[i]).unwrap_or_default());
            }
            jobs.into_iter().for_each(&mut keep);
        }
    }
    found.into_values().collect()
}

/// Kernels that do several steps of a plan: a linear with the norm in front of it and the gate behind, and what a token's
/// heads go through.
fn joined(t: &Target) -> Vec<Kernel> {
    let dense = |tys: &[TensorType]| tys.iter().map(Operand::dense).collect::<Vec<_>>();
    let f32s = |s: &[usize]| TensorType::f32(s);
    let composite = |c: Composite, ins: &[TensorType], out: &[usize]| KernelSpec {
        body: Body::Composite(c),
        inputs: dense(ins),
        outputs: vec![Some(Operand::dense(&f32s(out)))],
    };
    let all = |specs: &[&KernelSpec]| KernelSpec {
        body: specs[0].body.clone(),
        inputs: specs.iter().flat_map(|s| s.inputs.clone()).collect(),
        outputs: specs.iter().flat_map(|s| s.outputs.clone()).collect(),
    };
    let block = Block {
        n: 24,
        bias: false,
        adapters: vec![Some((4, 0.5.into()))],
    };
    let l = Linear {
        blocks: vec![block.clone(), block],
        residual: false,
    };
    let part = [f32s(&[24, 40]), f32s(&[4, 40]), f32s(&[24, 4])];
    let ins = [&[f32s(&[2, 40])], &part[..], &part[..]].concat();
    let linear = composite(l.clone().into(), &ins, &[2, 48]);
    let norm = RmsNorm { eps: 1e-5.into() };
    let norm = composite(norm.into(), &[f32s(&[2, 40]), f32s(&[40])], &[2, 40]);
    let halves = [f32s(&[2, 24]), f32s(&[2, 24])];
    let gate = composite(SwiGlu.into(), &halves, &[2, 24]);
    let (x, row) = (linear.inputs.len(), 40);
    let around = Around {
        norm: Some(Norm {
            x,
            w: x + 1,
            row,
            eps: 1e-5,
        }),
        gate: Some(Gate { y: 2, row: 24 }),
    };
    let numbered = all(&[&linear, &norm, &gate]);
    let made = with_neighbours(t, &l, (&linear, &numbered), around);
    let pos = TensorType::u32([2, 1]);
    let turned = f32s(&[2, 1, 6, 8]);
    let rope = Rope { inverse: false };
    let rope = composite(
        rope.into(),
        &[turned, pos.clone(), f32s(&[4])],
        &[2, 1, 6, 8],
    );
    let (cache, new) = (f32s(&[2, 9, 2, 8]), f32s(&[2, 1, 2, 8]));
    let put = composite(KvWrite.into(), &[cache, new, pos], &[2, 9, 2, 8]);
    let steps = Heads {
        rope: &rope,
        writes: [&put, &put],
    };
    let heads = heads(t, &steps, &all(&[&rope, &put, &put]));
    made.into_iter().flat_map(|m| m.0).chain(heads).collect()
}

fn buffers(k: &Kernel) -> usize {
    k.args.iter().filter(|a| a.is_buffer()).count()
}
