//! A whole model in generic code, its gradients included, in canonical form.
use super::{
    super::testing::{composites, inputs, same},
    *,
};
use crate::{
    grad::grad,
    graph::{Builder, NodeId},
    op::{Op, ReduceOp, Role},
    oracle::eval,
    scalar::ScalarOp::*,
    types::{DType, TensorType},
};

/// Rows, heads, width of a head.
const T: usize = 5;
const H: usize = 2;
const D: usize = 3;
const C: usize = H * D;

/// A model as somebody would write it who has never heard of composites.
struct Model {
    b: Builder,
    trained: Vec<NodeId>,
}

impl Model {
    fn param(&mut self, role: Role, shape: &[usize]) -> NodeId {
        let p = self.b.input(role, TensorType::f32(shape));
        if role == Role::State {
            self.trained.push(p);
        }
        p
    }
    fn lora(&mut self, x: NodeId, n: usize) -> Result<NodeId> {
        let k = self.b.shape(x).last();
        let w = self.param(Role::Frozen, &[n, k]);
        let down = self.param(Role::State, &[2, k]);
        let up = self.param(Role::State, &[n, 2]);
        let b = &mut self.b;
        let base = b.matmul(x, false, w, true)?;
        let h = b.matmul(x, false, down, true)?;
        let y = b.matmul(h, false, up, true)?;
        let y = b.map_const(Mul, y, 2.0)?;
        b.map(Add, &[base, y])
    }
    fn norm(&mut self, x: NodeId) -> Result<NodeId> {
        let w = self.param(Role::Frozen, &[C]);
        let b = &mut self.b;
        let sq = b.map(Mul, &[x, x])?;
        let s = b.sum_last(sq)?;
        let v = b.map_const(Mul, s, 1.0 / C as f32)?;
        let v = b.map_const(Add, v, 1e-5)?;
        let r = b.map(Rsqrt, &[v])?;
        let y = b.map(Mul, &[x, r])?;
        b.map(Mul, &[y, w])
    }
    fn softmax(&mut self, x: NodeId) -> Result<NodeId> {
        let b = &mut self.b;
        let axis = b.shape(x).rank() - 1;
        let m = b.reduce(ReduceOp::Max, axis, x)?;
        let d = b.map(Sub, &[x, m])?;
        let e = b.map(Exp, &[d])?;
        let s = b.sum_last(e)?;
        b.map(Div, &[e, s])
    }
    fn attention(&mut self, x: NodeId) -> Result<NodeId> {
        let mut heads = vec![];
        for _ in 0..3 {
            let y = self.lora(x, C)?;
            let y = self.b.reshape(y, [T, H, D])?;
            heads.push(self.b.permute(y, &[1, 0, 2])?);
        }
        let b = &mut self.b;
        let raw = b.matmul(heads[0], false, heads[1], true)?;
        let raw = b.map_const(Mul, raw, 0.5)?;
        let row = b.push(Op::Iota([T, T].into(), 0), &[])?;
        let key = b.push(Op::Iota([T, T].into(), 1), &[])?;
        let hidden = b.map(Less, &[row, key])?;
        let low = b.scalar(-1e9);
        let raw = b.map(Select, &[hidden, low, raw])?;
        let p = self.softmax(raw)?;
        let b = &mut self.b;
        let o = b.matmul(p, false, heads[2], false)?;
        let o = b.permute(o, &[1, 0, 2])?;
        let o = b.reshape(o, [T, C])?;
        self.lora(o, C)
    }
    fn mlp(&mut self, x: NodeId) -> Result<NodeId> {
        let (g, u) = (self.lora(x, 8)?, self.lora(x, 8)?);
        let s = self.b.map(Sigmoid, &[g])?;
        let silu = self.b.map(Mul, &[g, s])?;
        let m = self.b.map(Mul, &[silu, u])?;
        self.lora(m, C)
    }
    fn loss(&mut self, x: NodeId) -> Result<NodeId> {
        let w = self.param(Role::Frozen, &[11, C]);
        let target = self.b.input(Role::Data, TensorType::u32([T]));
        let b = &mut self.b;
        let l = b.matmul(x, false, w, true)?;
        let m = b.reduce(ReduceOp::Max, 1, l)?;
        let d = b.map(Sub, &[l, m])?;
        let e = b.map(Exp, &[d])?;
        let s = b.sum_last(e)?;
        let s = b.map(Log, &[s])?;
        let logp = b.map(Sub, &[d, s])?;
        let t = b.cast(target, DType::F32)?;
        let t = b.reshape(t, [T, 1])?;
        let index = b.push(Op::Iota([1, 11].into(), 1), &[])?;
        let hot = b.map(Equal, &[index, t])?;
        let p = b.map(Mul, &[hot, logp])?;
        let p = b.sum_last(p)?;
        let p = b.reduce(ReduceOp::Sum, 0, p)?;
        let p = b.map(Neg, &[p])?;
        let p = b.map_const(Mul, p, 1.0 / T as f32)?;
        b.reshape(p, [])
    }
}

/// Loss, then the trained parameters.
fn model(layers: usize) -> Graph {
    let mut m = Model {
        b: Builder::default(),
        trained: vec![],
    };
    let mut x = m.param(Role::Data, &[T, C]);
    for _ in 0..layers {
        let y = m.norm(x).unwrap();
        let y = m.attention(y).unwrap();
        x = m.b.map(Add, &[x, y]).unwrap();
        let y = m.norm(x).unwrap();
        let y = m.mlp(y).unwrap();
        x = m.b.map(Add, &[x, y]).unwrap();
    }
    let y = m.norm(x).unwrap();
    let loss = m.loss(y).unwrap();
    m.b.finish([&[loss][..], &m.trained].concat(), vec![])
}

const LAYER: [&str; 7] = [
    "rms_norm",
    "lora_linear",
    "attention",
    "lora_linear",
    "rms_norm",
    "lora_linear",
    "swiglu",
];

#[test]
fn generic_code_becomes_the_composites_of_a_model() {
    let g = model(2);
    let (c, notes) = canonical(&g).unwrap();
    let mut want = [LAYER.as_slice(), &["lora_linear"]].concat().repeat(2);
    want.extend(["rms_norm", "cross_entropy"]);
    assert_eq!(composites(&c), want);
    same(&g, &c);
    // Two groups, an attention, a gate, seven layers and two norms in each layer.
    assert_eq!(
        notes
            .iter()
            .filter(|n| n.contains("in one product"))
            .count(),
        4
    );
    assert_eq!(canonical(&c).unwrap(), (c, vec![]));
}

#[test]
fn gradients_of_a_canonical_model_are_those_of_the_generic_one() {
    let g = model(2);
    let raw = grad(&g, &g.outputs[1..]).unwrap();
    let c = canonical(&g).unwrap().0;
    let d = canonical(&grad(&c, &c.outputs[1..]).unwrap()).unwrap().0;
    let x = inputs(&g, 3);
    let (want, got) = (eval(&raw, &x).unwrap(), eval(&d, &x).unwrap());
    assert_eq!(want.len(), got.len());
    for (w, g) in want.iter().zip(&got) {
        let size = w.data.iter().fold(1e-3, |s: f64, v| s.max(v.abs()));
        for (a, b) in w.data.iter().zip(&g.data) {
            assert!((a - b).abs() < 1e-5 * size, "{a} {b}");
        }
    }
    assert!(got[1..].iter().all(|d| d.data.iter().any(|v| *v != 0.0)));
    // No gradient forms scores, logits or the gradient of a frozen weight; the forward pass is shared.
    let shapes = [vec![H, T, T], vec![1, H, T, T], vec![T, 11], vec![8, C]];
    let forms = |n: &&crate::graph::Node| {
        shapes.contains(&n.ty.shape.0) && !matches!(n.op, Op::Input(..) | Op::Iota(..))
    };
    assert_eq!(d.nodes.iter().find(forms), None);
    let count = |g: &Graph, name: &str| composites(g).iter().filter(|n| **n == name).count();
    for name in ["attention", "lora_linear", "cross_entropy", "rms_norm"] {
        assert_eq!(count(&c, name), count(&d, name), "{name}");
    }
    assert_eq!(count(&d, "lora_linear_grad"), 8);
    let pads = d.nodes.iter().filter(|n| matches!(n.op, Op::Pad { .. }));
    assert_eq!(pads.count(), 0);
    // Each norm but the last adds the residual stream's gradient itself.
    let added = d.nodes.iter().filter(
        |n| matches!(&n.op, Op::Composite(crate::op::Composite::RmsNormGrad(c)) if c.residual),
    );
    assert_eq!(added.count(), 3);
    assert_eq!(canonical(&d).unwrap().0, d);
}
