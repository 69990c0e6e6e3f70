//! What a decoded token of a narrow model of 24 layers costs the host: dispatches, and the time to ask for them.
//! Invariant: each token is waited for before the next is asked, so nothing that is timed waits for the GPU; weights are
//! zeros, which changes no dispatch.
//! Absent on purpose: the GPU's time.
#[path = "../tests/conformance/layer.rs"]
mod layer;

use layer::{Sizes, layers};
use std::{sync::Arc, time::Instant};
use tallow_core::{
    backend::Backend,
    op::Role,
    session::Session,
    tensor::{Tensor, lift},
};
use tallow_wgpu::{Choice, Wgpu, WgpuOptions};

const TOKENS: usize = 200;

fn main() {
    let options = WgpuOptions {
        adapter: Choice::Number(0),
        weights: tallow_core::types::DType::F32,
        plain: false,
        binding_bytes: None,
    };
    let gpu = match Wgpu::open(&options) {
        Ok(gpu) => Arc::new(gpu),
        Err(e) => return eprintln!("SKIP: {e}"),
    };
    for rank in [0, 8] {
        let sizes = Sizes {
            rows: 1,
            c: 64,
            queries: 4,
            keys: 2,
            d: 16,
            slots: 64,
            mlp: 128,
            rank,
        };
        let (dispatches, us) = token(&gpu, sizes, 24);
        println!(
            "rank {rank}: {dispatches} dispatches a token of 24 layers, {us:.0} µs to ask for it (median of {TOKENS})"
        );
    }
}

/// Dispatches of a token, and the median of the microseconds that a replay keeps the host.
fn token(gpu: &Arc<Wgpu>, sizes: Sizes, count: usize) -> (usize, f64) {
    let session = Session::new(gpu.clone());
    let graph = layers(sizes, count).expect("layers").graph;
    let plan = session.compile(&graph).expect("compiles");
    let launched = gpu.launched(&plan.plan);
    let dispatches = launched.iter().map(|l| l.launches.len()).sum();
    let zeros = |(_, role, ty): (_, Role, tallow_core::types::TensorType)| {
        session.zeros(ty, role).expect("memory")
    };
    let leaves: Vec<Tensor> = graph.inputs().into_iter().map(zeros).collect();
    let outs = lift(&graph, &leaves);
    let mut values = graph.clone();
    values.outputs = graph.updates.iter().map(|u| u.value).collect();
    let states = graph
        .updates
        .iter()
        .map(|u| leaves[u.slot as usize].clone());
    let updates: Vec<(Tensor, Tensor)> = states.zip(lift(&values, &leaves)).collect();
    let outs: Vec<&Tensor> = outs.iter().collect();
    let mut made = session.record(&outs, &updates).expect("records");
    let mut times: Vec<f64> = (0..TOKENS)
        .map(|_| {
            session.wait().expect("waits");
            let start = Instant::now();
            made.replay().expect("runs");
            start.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (dispatches, times[TOKENS / 2])
}
