//! Attention with every mask and layout.
use super::*;
use crate::op::{Attention, Mask, Softmax};

const QKV: [&[usize]; 3] = [&[2, 4, 5, 6], &[2, 4, 7, 6], &[2, 4, 7, 6]];

/// How a causal mask is written.
#[derive(Clone, Copy, Debug)]
enum Style {
    None,
    /// `select(key <= query, scores, -inf)`.
    Keep,
    /// `select(query < key, -1e9, scores)`.
    Drop,
    /// `scores + (query < key) * -1e9`.
    Add,
}

/// The scores with keys hidden that lie more than `ahead` behind the query, or `window` before it.
fn masked(
    b: &mut Builder,
    raw: NodeId,
    style: Style,
    ahead: f32,
    window: Option<f32>,
) -> Result<NodeId> {
    let s = b.shape(raw).0.clone();
    let (t, n) = (s[s.len() - 2], s[s.len() - 1]);
    let row = b.push(Op::Iota([t, n].into(), 0), &[])?;
    let row = b.map_const(ScalarOp::Add, row, ahead)?;
    let key = b.push(Op::Iota([1, n].into(), 1), &[])?;
    let mut hidden = b.map(Less, &[row, key])?;
    if let Some(w) = window {
        let last = b.map_const(ScalarOp::Add, key, w - 1.0)?;
        let old = b.map(Less, &[last, row])?;
        hidden = b.map(Max, &[hidden, old])?;
    }
    match style {
        Style::None => Ok(raw),
        Style::Keep => {
            let (one, low) = (b.scalar(1.0), b.scalar(f32::NEG_INFINITY));
            let seen = b.map(Less, &[hidden, one])?;
            b.map(Select, &[seen, raw, low])
        }
        Style::Drop => {
            let low = b.scalar(-1e9);
            b.map(Select, &[hidden, low, raw])
        }
        Style::Add => {
            let low = b.map_const(Mul, hidden, -1e9)?;
            b.map(ScalarOp::Add, &[raw, low])
        }
    }
}

fn softmax(b: &mut Builder, x: NodeId) -> Result<NodeId> {
    let axis = b.shape(x).rank() - 1;
    let m = b.reduce(ReduceOp::Max, axis, x)?;
    let d = b.map(Sub, &[x, m])?;
    let e = b.map(Exp, &[d])?;
    let s = b.sum_last(e)?;
    b.map(Div, &[e, s])
}

fn attend(style: Style, ahead: f32, window: Option<f32>, shapes: &[&[usize]]) -> Graph {
    f32s(shapes, |b, x| {
        let raw = b.matmul(x[0], false, x[1], true)?;
        let raw = b.map_const(Mul, raw, 0.5)?;
        let raw = masked(b, raw, style, ahead, window)?;
        let p = softmax(b, raw)?;
        Ok(vec![b.matmul(p, false, x[2], false)?])
    })
}

#[track_caller]
fn attention(g: &Graph) -> Attention {
    match only(&becomes(g, &["attention"])) {
        Composite::Attention(a) => a,
        other => panic!("{other:?}"),
    }
}

#[test]
fn full_and_causal_masks_in_every_style() {
    let a = attention(&attend(Style::None, 0.0, None, &QKV));
    assert_eq!((a.mask, a.scale.get()), (Mask::Full, 0.5));
    for style in [Style::Keep, Style::Drop, Style::Add] {
        let a = attention(&attend(style, 2.0, None, &QKV));
        assert_eq!(a.mask, Mask::Causal { window: None }, "{style:?}");
        let a = attention(&attend(style, 0.0, None, &QKV));
        assert_eq!(a.mask, Mask::Causal { window: None }, "{style:?}");
        let a = attention(&attend(style, 2.0, Some(3.0), &QKV));
        assert_eq!(a.mask, Mask::Causal { window: Some(3) }, "{style:?}");
    }
    // Three axes: heads without a batch.
    let a = attention(&attend(Style::Keep, 0.0, None, &[&[3, 4, 2][..]; 3]));
    assert_eq!(a.mask, Mask::Causal { window: None });
}

#[test]
fn heads_moved_out_by_the_caller_are_read_where_they_were() {
    // q, k, v [b, t, h, d]; k transposed by a view; two key heads for four of the query.
    let shapes: [&[usize]; 3] = [&[2, 5, 4, 6], &[2, 7, 2, 6], &[2, 7, 2, 6]];
    let g = f32s(&shapes, |b, x| {
        let q = b.permute(x[0], &[0, 2, 1, 3])?;
        let q = b.map_const(Mul, q, 0.25)?;
        let mut repeat = |x: NodeId| {
            let x = b.permute(x, &[0, 2, 1, 3])?;
            let x = b.reshape(x, [2, 2, 1, 7, 6])?;
            let x = b.broadcast(x, &[2, 2, 2, 7, 6].into())?;
            b.reshape(x, [2, 4, 7, 6])
        };
        let (k, v) = (repeat(x[1])?, repeat(x[2])?);
        let k = b.permute(k, &[0, 1, 3, 2])?;
        let raw = b.matmul(q, false, k, false)?;
        let p = softmax(b, raw)?;
        let o = b.matmul(p, false, v, false)?;
        Ok(vec![b.permute(o, &[0, 2, 1, 3])?])
    });
    let r = becomes(&g, &["attention"]);
    let at = r
        .nodes
        .iter()
        .find(|n| n.ty.shape == [2, 5, 4, 6].into() && n.inputs.len() == 4);
    assert_eq!(at.unwrap().inputs[..3], [NodeId(0), NodeId(1), NodeId(2)]);
    assert!(!r.nodes.iter().any(|n| matches!(n.op, Op::Permute(_))));
}

#[test]
fn what_is_nearly_attention() {
    let only_softmax = |g: &Graph| {
        becomes(g, &["softmax"]);
    };
    // Masks that are not causal, or do not hide.
    let with = |f: &dyn Fn(&mut Builder, NodeId) -> Result<NodeId>| {
        f32s(&QKV, |b, x| {
            let raw = b.matmul(x[0], false, x[1], true)?;
            let raw = f(b, raw)?;
            let p = b.composite(Softmax, &[raw])?[0];
            Ok(vec![b.matmul(p, false, x[2], false)?])
        })
    };
    let same_but = |g: Graph| assert_eq!(composites(&recognise(&g).unwrap().0), ["softmax"]);
    same_but(with(&|b, raw| {
        let row = b.push(Op::Iota([5, 7].into(), 0), &[])?;
        let key = b.push(Op::Iota([5, 7].into(), 1), &[])?;
        let (c, low) = (b.map(Less, &[row, key])?, b.scalar(-1e9));
        b.map(Select, &[c, raw, low])
    }));
    same_but(with(&|b, raw| {
        let row = b.push(Op::Iota([5, 7].into(), 0), &[])?;
        let key = b.push(Op::Iota([5, 7].into(), 1), &[])?;
        let (c, low) = (b.map(Less, &[row, key])?, b.scalar(-3.0));
        b.map(Select, &[c, low, raw])
    }));
    same_but(with(&|b, raw| b.map(Exp, &[raw])));
    // Capped scores.
    same_but(with(&|b, raw| {
        let part = b.map_const(Mul, raw, 1.0 / 50.0)?;
        let bent = b.map(ScalarOp::Tanh, &[part])?;
        b.map_const(Mul, bent, 50.0)
    }));
    // A mask made of data.
    only_softmax(&f32s(&[QKV[0], QKV[1], QKV[2], &[5, 7]], |b, x| {
        let raw = b.matmul(x[0], false, x[1], true)?;
        let raw = b.map(ScalarOp::Add, &[raw, x[3]])?;
        let p = softmax(b, raw)?;
        Ok(vec![b.matmul(p, false, x[2], false)?])
    }));
    // A reader of the probabilities; another width of the values.
    only_softmax(&f32s(&QKV, |b, x| {
        let raw = b.matmul(x[0], false, x[1], true)?;
        let p = softmax(b, raw)?;
        Ok(vec![b.matmul(p, false, x[2], false)?, p])
    }));
    only_softmax(&attend(
        Style::None,
        0.0,
        None,
        &[QKV[0], QKV[1], &[2, 4, 7, 3]],
    ));
}
