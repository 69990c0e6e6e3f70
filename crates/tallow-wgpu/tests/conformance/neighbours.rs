//! A decoder layer for one token of each row: steps that fewer dispatches do than the plan has.
//! Invariant: the results are the oracle's, the caches' too, and the dispatches are counted: a layer that no longer
//! joins fails here.
//! Absent on purpose: whole models.
use super::{
    Way, gpu,
    layer::{Sizes, layers as of_layers},
};
use tallow_conformance::{Case, check_all};
use tallow_core::{Result, backend::Backend, session::Session};

/// One row and several, vectors of four and not.
fn layers(rank: usize) -> Vec<Case> {
    let small = Sizes {
        rows: 1,
        c: 40,
        queries: 4,
        keys: 2,
        d: 8,
        slots: 70,
        mlp: 56,
        rank,
    };
    let odd = Sizes {
        rows: 3,
        c: 37,
        queries: 3,
        keys: 1,
        d: 6,
        slots: 5,
        mlp: 29,
        rank,
    };
    let made = [small, odd].map(|s| of_layers(s, 1)).into_iter();
    made.collect::<Result<_>>().expect("a layer")
}

#[test]
fn a_layer_of_few_dispatches() {
    for way in [Way::Usual, Way::Plain] {
        let Some(gpu) = gpu(way) else { return };
        let session = Session::new(gpu);
        check_all(&session, layers(0).into_iter().chain(layers(5)).collect());
    }
}

#[test]
fn dispatches_of_a_layer_are_counted() {
    let Some(gpu) = gpu(Way::Usual) else { return };
    let session = Session::new(gpu.clone());
    // With adapters each product has a dispatch in front, unless its blocks are of whole workgroups.
    for (rank, wants) in [(0, [7, 7]), (5, [7, 11])] {
        for (case, want) in layers(rank).into_iter().zip(wants) {
            let made = session.compile(&case.graph).expect("compiles");
            let each = gpu.launched(&made.plan);
            let steps: Vec<_> = made.plan.steps.iter().map(|s| s.kernel_name).collect();
            assert_eq!(
                each.iter().map(|l| l.launches.len()).sum::<usize>(),
                want,
                "{}: {steps:?} {each:?}",
                case.name
            );
        }
    }
}
