//! `x Wᵀ`, with its bias and its adapter, in the usual writings.
//! Invariant: scales have been moved into products before (see `simplify`), so only shapes of sums vary.
//! Absent on purpose: trainable weights without an adapter, which gain nothing.
use super::{Edit, Found, Match};
use crate::{
    Result,
    graph::{Builder, NodeId},
    op::{Bits, Block, Linear, Op, Role},
    scalar::ScalarOp::Add,
    types::DType,
};

/// A product `x Mᵀ`: `m` is stored `[n, k]` where `tb`, else `[k, n]`.
#[derive(Clone, Copy)]
struct Product {
    x: NodeId,
    m: NodeId,
    tb: bool,
    alpha: f32,
}

/// `scale (x Aᵀ) Bᵀ`.
struct Adapter {
    down: Product,
    up: Product,
}

struct Layer {
    base: Product,
    adapter: Option<Adapter>,
    bias: Option<NodeId>,
    /// Terms of the sum that are no part of the layer.
    rest: Vec<NodeId>,
    inner: Vec<NodeId>,
}

pub(super) fn find(e: &mut Edit<'_>, uses: &[u32], id: NodeId) -> Result<Option<Found>> {
    let m = Match { b: &e.b, uses };
    let layer = match m.node(id).op {
        Op::Map(Add) => sum(m, id),
        Op::MatMul { .. } => alone(m, id),
        _ => None,
    };
    let Some(l) = layer else { return Ok(None) };
    let note = note(m, &l);
    let mut new = emit(&mut e.b, &l, id)?;
    for r in &l.rest {
        new = e.b.map(Add, &[new, *r])?;
    }
    let inner = l.inner;
    Ok(Some(Found { new, inner, note }))
}

/// A matrix product of rows with one matrix.
fn product(m: Match<'_>, id: NodeId) -> Option<Product> {
    let n = m.node(id);
    let Op::MatMul {
        ta: false,
        tb,
        alpha,
    } = n.op
    else {
        return None;
    };
    let (x, mut w) = (n.inputs[0], n.inputs[1]);
    if m.repeated(w) {
        let (wide, one) = (m.shape(w), m.node(w).inputs[0]);
        if wide.0.ends_with(&m.shape(one).0) {
            w = one;
        }
    }
    let fits = m.shape(w).rank() == 2 && m.f32_rows(x);
    fits.then_some(Product {
        x,
        m: w,
        tb,
        alpha: alpha.get(),
    })
}

/// A frozen input, or a view of one.
fn frozen(m: Match<'_>, mut id: NodeId) -> bool {
    loop {
        let n = m.node(id);
        id = match n.op {
            Op::Input(_, role) => return role == Role::Frozen,
            Op::Reshape(_) | Op::Permute(_) | Op::Slice { .. } | Op::Cast(_) => n.inputs[0],
            _ => return false,
        };
    }
}

fn alone(m: Match<'_>, id: NodeId) -> Option<Layer> {
    let base = product(m, id).filter(|p| p.alpha == 1.0 && frozen(m, p.m))?;
    Some(Layer {
        base,
        adapter: None,
        bias: None,
        rest: vec![],
        inner: vec![],
    })
}

fn sum(m: Match<'_>, root: NodeId) -> Option<Layer> {
    let (mut terms, mut inner) = m.terms(root)?;
    let once = |id: NodeId| m.uses[id.index()] == 1;
    let base_at = |t: &NodeId| product(m, *t).filter(|p| p.alpha == 1.0 && once(*t));
    let adapter_at = |t: NodeId, x: NodeId| {
        let up = product(m, t).filter(|_| once(t))?;
        let down = product(m, up.x).filter(|d| d.x == x && once(up.x))?;
        Some((t, Adapter { down, up }))
    };
    let adapted = |t: &NodeId| {
        let base = base_at(t)?;
        let of = |o: &NodeId| adapter_at(*o, base.x).filter(|_| o != t);
        Some((*t, base, Some(terms.iter().find_map(of)?)))
    };
    let bare = |t: &NodeId| Some((*t, base_at(t).filter(|p| frozen(m, p.m))?, None));
    let found = terms.iter().find_map(adapted);
    let (at, base, adapter) = found.or_else(|| terms.iter().find_map(bare))?;
    let mut swallow = |t: NodeId| {
        super::matcher::take(&mut terms, t);
        inner.push(t);
    };
    swallow(at);
    let adapter = adapter.map(|(t, a)| {
        swallow(t);
        swallow(a.up.x);
        a
    });
    let n = m.shape(root).last();
    let row = |t: &NodeId| {
        let from = m.node(*t).inputs.first()?;
        let fits = m.repeated(*t) && *m.shape(*from) == [n].into();
        fits.then_some((*t, *from))
    };
    let bias = terms.iter().find_map(row).map(|(t, from)| {
        super::matcher::take(&mut terms, t);
        from
    });
    // A sum that only adds other things to a bare product is seen at the product itself.
    if adapter.is_none() && bias.is_none() {
        return None;
    }
    Some(Layer {
        base,
        adapter,
        bias,
        rest: terms,
        inner,
    })
}

/// The matrix as `[n, k]`.
fn rows(b: &mut Builder, p: Product) -> Result<NodeId> {
    if p.tb {
        Ok(p.m)
    } else {
        b.permute(p.m, &[1, 0])
    }
}

/// The weight as `[n, k]`, in the dtype it is stored in.
fn weight(b: &mut Builder, mut p: Product) -> Result<NodeId> {
    if b.node(p.m).op == Op::Cast(DType::F32) {
        let from = b.node(p.m).inputs[0];
        if b.ty(from).dtype.is_float() {
            p.m = from;
        }
    }
    rows(b, p)
}

/// The value of the layer, with the type of the node `like`.
fn emit(b: &mut Builder, l: &Layer, like: NodeId) -> Result<NodeId> {
    // Rows that were flattened for the product need not be.
    let mut x = l.base.x;
    if let Op::Reshape(_) = b.node(x).op {
        let wide = b.node(x).inputs[0];
        if b.shape(x).rank() == 2
            && b.shape(wide).rank() > 2
            && b.shape(wide).last() == b.shape(x).last()
        {
            x = wide;
        }
    }
    let mut ins = vec![x, weight(b, l.base)?];
    ins.extend(l.bias);
    let mut adapter = None;
    if let Some(a) = &l.adapter {
        let (down, up) = (rows(b, a.down)?, rows(b, a.up)?);
        ins.extend([down, up]);
        let scale = Bits::from(a.down.alpha * a.up.alpha);
        adapter = Some((b.shape(down).0[0], scale));
    }
    let block = Block {
        n: b.shape(ins[1]).0[0],
        bias: l.bias.is_some(),
        adapters: vec![adapter],
    };
    let op = Linear {
        blocks: vec![block],
        residual: false,
    };
    let y = b.composite(op, &ins)?[0];
    b.reshape(y, b.shape(like).clone())
}

fn note(m: Match<'_>, l: &Layer) -> String {
    let w = &m.node(l.base.m).ty;
    let bias = if l.bias.is_some() { " + bias" } else { "" };
    match &l.adapter {
        Some(a) => {
            let rank = m.shape(a.up.x).last();
            format!("lora_linear with {w}, rank {rank}: from x W{bias} + s (x A) B")
        }
        None => format!("linear with {w}: from x W{bias}"),
    }
}
