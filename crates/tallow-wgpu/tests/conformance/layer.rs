//! Decoder layers for one token of each row, as a graph.
//! Invariant: the last of several projections has no adapter, so that both kinds stand side by side.
//! Absent on purpose: an embedding and a head.
use tallow_conformance::Case;
use tallow_core::{
    Result,
    graph::{Builder, NodeId, Update},
    op::{Attention, Block, KvWrite, Linear, Mask, RmsNorm, Role, Rope, SwiGlu},
    oracle::sample,
    types::TensorType,
};

/// Extents of a layer.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) rows: usize,
    pub(crate) c: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) d: usize,
    pub(crate) slots: usize,
    pub(crate) mlp: usize,
    /// 0: no adapters.
    pub(crate) rank: usize,
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

/// What all layers read.
#[derive(Clone, Copy)]
struct Shared {
    pos: NodeId,
    freq: NodeId,
    caches: [NodeId; 2],
}

/// One layer after `x`: its result, and both caches.
fn layer(g: &mut Made, s: Sizes, x: NodeId, all: Shared) -> Result<(NodeId, [NodeId; 2])> {
    let (heads, kv, pos) = (s.queries + 2 * s.keys, s.keys * s.d, all.pos);
    let normed = g.norm(x, s.c)?;
    let ns = [s.queries * s.d, kv, kv];
    let qkv = g.linear(normed, s.c, (&ns, s.rank), None)?;
    let qkv = g.b.reshape(qkv, [s.rows, 1, heads, s.d])?;
    let turned = g.b.slice(qkv, 2, 0, s.queries + s.keys)?;
    let values = g.b.slice(qkv, 2, s.queries + s.keys, s.keys)?;
    let rope = Rope { inverse: false };
    let turned = g.b.composite(rope, &[turned, pos, all.freq])?[0];
    let queries = g.b.slice(turned, 2, 0, s.queries)?;
    let keys = g.b.slice(turned, 2, s.queries, s.keys)?;
    let keys = g.b.composite(KvWrite, &[all.caches[0], keys, pos])?[0];
    let values = g.b.composite(KvWrite, &[all.caches[1], values, pos])?[0];
    let attention = Attention {
        scale: 0.4.into(),
        mask: Mask::Causal { window: None },
        cap: None,
    };
    let seen = g.b.composite(attention, &[queries, keys, values, pos])?[0];
    let seen = g.b.reshape(seen, [s.rows, 1, s.queries * s.d])?;
    let x = g.linear(seen, s.queries * s.d, (&[s.c], s.rank), Some(x))?;
    let normed = g.norm(x, s.c)?;
    let both = g.linear(normed, s.c, (&[s.mlp, s.mlp], s.rank), None)?;
    let [gate, up] = [0, s.mlp].map(|at| g.b.slice(both, 2, at, s.mlp));
    let gated = g.b.composite(SwiGlu, &[gate?, up?])?[0];
    let y = g.linear(gated, s.mlp, (&[s.c], s.rank), Some(x))?;
    Ok((y, [keys, values]))
}

/// `count` layers one after another, each with weights and caches of its own.
pub(crate) fn layers(s: Sizes, count: usize) -> Result<Case> {
    let mut g = Made::default();
    let mut x = g.input(Role::Data, TensorType::f32([s.rows, 1, s.c]));
    let pos = g.input(Role::Data, TensorType::u32([s.rows, 1]));
    let freq = g.frozen(&[s.d / 2]);
    let cache = TensorType::f32([s.rows, s.slots, s.keys, s.d]);
    let mut updates = vec![];
    for _ in 0..count {
        let slot = g.types.len() as u32;
        let caches = [0, 1].map(|_| g.input(Role::State, cache.clone()));
        let (y, made) = layer(&mut g, s, x, Shared { pos, freq, caches })?;
        let one = |(i, value)| Update {
            slot: slot + i,
            value,
        };
        updates.extend((0u32..).zip(made).map(one));
        x = y;
    }
    let limit = s.slots as u32 + 1;
    let random = |(i, t): (usize, &TensorType)| sample::random(t, limit, 31, i as u32);
    Ok(Case {
        name: format!(
            "{count} layers, {} rows, hidden {}, rank {}",
            s.rows, s.c, s.rank
        ),
        inputs: g.types.iter().enumerate().map(random).collect(),
        graph: g.b.finish(vec![x], updates),
    })
}
