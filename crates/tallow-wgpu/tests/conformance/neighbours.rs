//! A decoder layer for one token of each row: steps that fewer dispatches do than the plan has.
//! Invariant: the results are the oracle's, the caches' too, and the dispatches are counted: a layer that no longer
//! joins fails here.
//! Absent on purpose: whole models.
use super::{Way, gpu};
use tallow_conformance::{Case, check_all};
use tallow_core::{
    Result,
    graph::{Builder, NodeId, Update},
    op::{Attention, Block, KvWrite, Linear, Mask, RmsNorm, Role, Rope, SwiGlu},
    oracle::sample,
    session::Session,
    types::TensorType,
};

/// Extents of a layer.
#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    c: usize,
    queries: usize,
    keys: usize,
    d: usize,
    slots: usize,
    mlp: usize,
    /// 0: no adapters.
    rank: usize,
}

/// A graph under construction and the types of its inputs.
#[derive(Default)]
struct Made {
    b: Builder,
    types: Vec<TensorType>,
}

impl Made {
    fn input(&mut self, role: Role, ty: TensorType) -> NodeId {
        self.types.push(ty.clone());
        self.b.input(role, ty)
    }
    fn frozen(&mut self, shape: &[usize]) -> NodeId {
        self.input(Role::Frozen, TensorType::f32(shape))
    }
    fn norm(&mut self, x: NodeId, c: usize) -> Result<NodeId> {
        let w = self.frozen(&[c]);
        let norm = RmsNorm { eps: 1e-5.into() };
        Ok(self.b.composite(norm, &[x, w])?[0])
    }
    /// Projections of one row; the last has no adapter if there are several.
    fn linear(
        &mut self,
        x: NodeId,
        k: usize,
        (ns, rank): (&[usize], usize),
        past: Option<NodeId>,
    ) -> Result<NodeId> {
        let (mut blocks, mut ins) = (vec![], vec![x]);
        for (i, n) in ns.iter().enumerate() {
            let rank = if i > 1 { 0 } else { rank };
            ins.push(self.frozen(&[*n, k]));
            if rank > 0 {
                ins.extend([self.frozen(&[rank, k]), self.frozen(&[*n, rank])]);
            }
            blocks.push(Block {
                n: *n,
                bias: false,
                adapters: vec![(rank > 0).then(|| (rank, 0.5.into()))],
            });
        }
        let residual = past.is_some();
        ins.extend(past);
        Ok(self.b.composite(Linear { blocks, residual }, &ins)?[0])
    }
}

fn layer(s: Sizes) -> Result<Case> {
    let mut g = Made::default();
    let (heads, kv) = (s.queries + 2 * s.keys, s.keys * s.d);
    let x = g.input(Role::Data, TensorType::f32([s.rows, 1, s.c]));
    let pos = g.input(Role::Data, TensorType::u32([s.rows, 1]));
    let freq = g.frozen(&[s.d / 2]);
    let cache = TensorType::f32([s.rows, s.slots, s.keys, s.d]);
    let caches = [0, 1].map(|_| g.input(Role::State, cache.clone()));
    let normed = g.norm(x, s.c)?;
    let ns = [s.queries * s.d, kv, kv];
    let qkv = g.linear(normed, s.c, (&ns, s.rank), None)?;
    let qkv = g.b.reshape(qkv, [s.rows, 1, heads, s.d])?;
    let turned = g.b.slice(qkv, 2, 0, s.queries + s.keys)?;
    let values = g.b.slice(qkv, 2, s.queries + s.keys, s.keys)?;
    let turned =
        g.b.composite(Rope { inverse: false }, &[turned, pos, freq])?[0];
    let queries = g.b.slice(turned, 2, 0, s.queries)?;
    let keys = g.b.slice(turned, 2, s.queries, s.keys)?;
    let keys = g.b.composite(KvWrite, &[caches[0], keys, pos])?[0];
    let values = g.b.composite(KvWrite, &[caches[1], values, pos])?[0];
    let attention = Attention {
        scale: 0.4.into(),
        mask: Mask::Causal { window: None },
    };
    let seen = g.b.composite(attention, &[queries, keys, values, pos])?[0];
    let seen = g.b.reshape(seen, [s.rows, 1, s.queries * s.d])?;
    let x = g.linear(seen, s.queries * s.d, (&[s.c], s.rank), Some(x))?;
    let normed = g.norm(x, s.c)?;
    let both = g.linear(normed, s.c, (&[s.mlp, s.mlp], s.rank), None)?;
    let [gate, up] = [0, s.mlp].map(|at| g.b.slice(both, 2, at, s.mlp));
    let gated = g.b.composite(SwiGlu, &[gate?, up?])?[0];
    let y = g.linear(gated, s.mlp, (&[s.c], s.rank), Some(x))?;
    let updates = [(3, keys), (4, values)].map(|(slot, value)| Update { slot, value });
    let limit = s.slots as u32 + 1;
    let random = |(i, t): (usize, &TensorType)| sample::random(t, limit, 31, i as u32);
    Ok(Case {
        name: format!("layer of {} rows, hidden {}, rank {}", s.rows, s.c, s.rank),
        inputs: g.types.iter().enumerate().map(random).collect(),
        graph: g.b.finish(vec![y], updates.to_vec()),
    })
}

/// One row and several, vectors of four and not.
fn layers(rank: usize) -> Vec<Case> {
    let small = Sizes {
        rows: 1,
        c: 40,
        queries: 4,
        keys: 2,
        d: 8,
        slots: 70,
        mlp: 52,
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
    let made = [small, odd].map(layer).into_iter();
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
    // With adapters each product has a dispatch in front.
    for (rank, want) in [(0, 7), (5, 11)] {
        for case in layers(rank) {
            let made = session.compile(&case.graph).expect("compiles");
            let each = gpu.dispatches(&made.plan);
            let steps: Vec<_> = made.plan.steps.iter().map(|s| s.kernel_name).collect();
            assert_eq!(
                each.iter().sum::<usize>(),
                want,
                "{}: {steps:?} {each:?}",
                case.name
            );
        }
    }
}
