//! Every kernel's text, for a machine without a card to compile.
//! Invariant: the texts come from the same offers that a card gets.
//! Absent on purpose: which specs; whoever asks brings them. The product library, which is compiled already.
use super::{Target, candidates, prepare};
use crate::launch::Job;
use std::{collections::BTreeMap, sync::Arc};
use tallow_core::{
    backend::Half::{May, Wanted},
    kernel::{Body, KernelSpec, Offers},
    op::Composite,
    types::DType,
};

/// Entry point and text of the kernels for `specs`, as they are and with everything in bf16 that may be, and of those that
/// only a recording asks for; each text once.
pub fn sources(specs: &[KernelSpec], weights: DType) -> Vec<(&'static str, Arc<str>)> {
    let target = Target::hopper(weights);
    let mut table = Offers::default();
    let mut found = BTreeMap::new();
    let specs = specs.iter().flat_map(|s| [rounded(&target, s), s.clone()]);
    for spec in specs {
        for c in candidates(&mut table, &target, &spec) {
            let mut jobs = table.get(c.kernel).jobs.clone();
            for (i, format) in c.prepare {
                jobs.extend(prepare(&target, format, &spec.inputs[i]).unwrap_or_default());
            }
            if let (true, Body::Composite(Composite::Linear(l))) =
                (c.name == super::TAIL, &spec.body)
            {
                jobs.extend(super::framed::examples(&target, l, &spec));
            }
            for job in jobs {
                if let Job::Kernel(k) = job {
                    found.insert(k.source, k.entry);
                }
            }
        }
    }
    let alone = super::pairs::examples(&target).into_iter();
    let alone = alone.chain(super::chain::examples(&target));
    for job in alone.chain(super::outer::examples()) {
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
