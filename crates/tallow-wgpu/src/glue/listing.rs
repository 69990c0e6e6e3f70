//! Every kernel's text, for a machine without a GPU to translate.
//! Invariant: the texts come from the same offers that a GPU gets.
//! Absent on purpose: which specs; whoever asks brings them.
use super::{candidates, prepare};
use crate::{launch::Kernel, shader::Target};
use std::{collections::BTreeMap, sync::Arc};
use tallow_core::{
    kernel::{KernelSpec, Offers},
    types::DType,
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

/// The kernels for `specs`, each text once, on a GPU with the limits that every adapter of WebGPU has: 8 buffers, 128
/// bytes of numbers, 16 KiB of shared memory. `subgroups`: their smallest size; `None`: kernels use none.
pub fn sources(specs: &[KernelSpec], subgroups: Option<u32>, weights: DType) -> Vec<Source> {
    let target = Target {
        subgroups,
        buffers: 8,
        immediates: 128,
        shared: 16 << 10,
        threads: 256,
        binding: 128 << 20,
        weights,
        mps: false,
    };
    let (mut table, mut found) = (Offers::default(), BTreeMap::new());
    for spec in specs {
        for c in candidates(&mut table, &target, spec) {
            let mut jobs = table.get(c.kernel).jobs.clone();
            for (i, format) in c.prepare {
                jobs.extend(prepare(&target, format, &spec.inputs[i]).unwrap_or_default());
            }
            for k in jobs {
                let source = Source {
                    entry: k.entry,
                    buffers: buffers(&k),
                    numbers: k.args.len() * 4,
                    uniform: k.uniform,
                    text: k.source.clone(),
                };
                found.insert(k.source, source);
            }
        }
    }
    found.into_values().collect()
}

fn buffers(k: &Kernel) -> usize {
    k.args.iter().filter(|a| a.is_buffer()).count()
}
