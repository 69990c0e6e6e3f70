//! What a recording of a plan would launch, told without memory and without a card.
//! Invariant: the launches are those that a recording makes: the same offers, fused in the same way. Addresses are made up, one
//! region for every binding.
//! Absent on purpose: what launches cost.
use super::fuse;
use crate::{
    glue::Target,
    launch::{Job, Offer, Places},
};
use tallow_core::{
    backend::Launched,
    plan::{Place, Plan, Span, Step},
};

/// Bytes between two made-up bindings.
const REGION: u64 = 1 << 42;

/// Where a span might lie.
fn address(s: &Span) -> u64 {
    let region = match s.place {
        Place::Arena => 1,
        Place::Input(i) => 2 + 3 * u64::from(i),
        Place::Prepared(i) => 3 + 3 * u64::from(i),
        Place::Output(i) => 4 + 3 * u64::from(i),
    };
    region * REGION + s.offset as u64
}

fn name(job: &Job) -> String {
    match job {
        Job::Kernel(k) => {
            let grid = k.grid.iter().filter(|n| **n > 1);
            let grid: Vec<String> = grid.map(u32::to_string).collect();
            let grid = if grid.is_empty() {
                "1".to_owned()
            } else {
                grid.join(" x ")
            };
            format!("{} ({grid} blocks of {})", k.entry, k.block)
        }
        Job::Gemm(p) => format!("cublasLt ({} x {} x {})", p.m, p.n, p.k),
    }
}

fn needed(step: &Step, jobs: &[Job]) -> Vec<String> {
    let reads: Vec<u64> = step.reads.iter().map(address).collect();
    let write = |w: &Option<Span>| w.as_ref().map_or(0, address);
    let writes: Vec<u64> = step.writes.iter().map(write).collect();
    let places = Places {
        reads: &reads,
        writes: &writes,
        scratch: step.workspace.as_ref().map_or(0, address),
        own: 0,
    };
    jobs.iter().filter(|j| places.need(j)).map(name).collect()
}

/// All steps of `plan`, whose kernels are `offers`.
pub(crate) fn launched(target: &Target, plan: &Plan, offers: &[Offer]) -> Vec<Launched> {
    let fused = fuse(target, plan, offers, &|s| Some(address(s)));
    let (mut out, mut first) = (vec![], None);
    for (i, (step, offer)) in plan.steps.iter().zip(offers).enumerate() {
        let jobs = match fused.jobs.get(&i) {
            // The launch that does it is that of a later step.
            Some(jobs) if jobs.is_empty() => {
                first = first.or(Some(i));
                continue;
            }
            Some(jobs) => jobs,
            None => &offer.jobs,
        };
        out.push(Launched {
            steps: first.take().unwrap_or(i)..=i,
            launches: needed(step, jobs),
        });
    }
    out
}
