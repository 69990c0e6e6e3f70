//! How far an f32 kernel may be from the oracle: a first-order running error bound.
//! Invariant: a result's bound counts one rounding for every term that went into it, in units of the
//! f32 epsilon: `Σ|x||w|` for a product of exact operands, and what later ops make of it.
//! Absent on purpose: a tolerance of each kernel's own. The one constant in front is [`SLACK`].
use super::{Value, check_inputs, gather, matmul, node, reduce};
use crate::{
    Result,
    graph::{Graph, NodeId},
    op::{Op, ReduceOp},
    pass::expand::expand_all,
    scalar::ScalarOp,
    types::DType,
};

/// How many times the first-order rounding bound a kernel may be off: fused multiply-adds, other
/// orders of summation and approximations of a few ulp in `exp`, `sin`, `cos`.
pub const SLACK: f64 = 4.0;

/// A result with its error bound.
#[derive(Clone, Debug, PartialEq)]
pub struct Bounded {
    /// The result.
    pub value: Value,
    /// For each element, how far an evaluation in f32 may be off, in units of the f32 epsilon.
    pub bound: Vec<f64>,
}

impl Bounded {
    /// For each element, how far a kernel's result may be off: [`SLACK`] bounds, and one rounding to the type it is stored as.
    pub fn tolerances(&self) -> impl Iterator<Item = f64> + '_ {
        let ulp = match self.value.ty.dtype {
            DType::F32 => f64::from(f32::EPSILON),
            DType::BF16 => 2f64.powi(-8),
            DType::F16 => 2f64.powi(-11),
            DType::I32 | DType::U32 | DType::U8 => 0.0,
        };
        let all = self.value.data.iter().zip(&self.bound);
        all.map(move |(v, bound)| SLACK * f64::from(f32::EPSILON) * bound + ulp * v.abs() + 1e-30)
    }
}

/// [`eval`](super::eval) with error bounds. Inputs count as exact.
///
/// # Errors
/// Inputs that do not fit the graph's.
pub fn eval_bounded(g: &Graph, inputs: &[Value]) -> Result<Vec<Bounded>> {
    check_inputs(g, inputs)?;
    let g = expand_all(g)?;
    let mut vals: Vec<Vec<f64>> = Vec::with_capacity(g.nodes.len());
    let mut errs: Vec<Vec<f64>> = Vec::with_capacity(g.nodes.len());
    for (id, n) in g.iter() {
        let inputs_of = n.inputs.iter().map(|i| i.index());
        let xs: Vec<&[f64]> = inputs_of.clone().map(|i| &*vals[i]).collect();
        let es: Vec<&[f64]> = inputs_of.map(|i| &*errs[i]).collect();
        let v = match n.op {
            Op::Input(slot, _) => inputs[slot as usize].data.clone(),
            _ => node(&g, id, &xs)?,
        };
        let e = error(&g, id, &v, &xs, &es)?;
        errs.push(e);
        vals.push(v);
    }
    let root = |r: NodeId| Bounded {
        value: Value {
            ty: g.ty(r).clone(),
            data: vals[r.index()].clone(),
        },
        bound: errs[r.index()].clone(),
    };
    Ok(g.roots().map(root).collect())
}

/// Roundings to `d` in units of the f32 epsilon.
fn rounding(d: DType) -> f64 {
    match d {
        DType::BF16 => f64::from(1 << 16),
        DType::F16 => f64::from(1 << 13),
        DType::F32 => 1.0,
        DType::I32 | DType::U32 | DType::U8 => 0.0,
    }
}

fn error(g: &Graph, id: NodeId, v: &[f64], xs: &[&[f64]], es: &[&[f64]]) -> Result<Vec<f64>> {
    let n = g.node(id);
    let sh = |k: usize| &g.ty(n.inputs[k]).shape;
    let abs = |x: &[f64]| -> Vec<f64> { x.iter().map(|v| v.abs()).collect() };
    let plus = |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a + b).collect() };
    let rounded = |e: &[f64], d: DType| -> Vec<f64> {
        let one = |(e, v): (&f64, &f64)| e + v.abs() * rounding(d);
        e.iter().zip(v).map(one).collect()
    };
    Ok(match &n.op {
        Op::Input(..) | Op::Const(_) | Op::Iota(..) | Op::Random { .. } => vec![0.0; v.len()],
        Op::Map(s) => (0..v.len()).map(|i| scalar(*s, v[i], xs, es, i)).collect(),
        Op::Cast(d) => rounded(es[0], *d),
        Op::Reduce(ReduceOp::Max, axis) => reduce(ReduceOp::Max, *axis, sh(0), es[0]),
        Op::Reduce(ReduceOp::Sum, axis) => {
            let terms = plus(&abs(xs[0]), es[0]);
            reduce(ReduceOp::Sum, *axis, sh(0), &terms)
        }
        Op::MatMul { ta, tb, alpha } => {
            let (t, s) = ([*ta, *tb], [sh(0), sh(1)]);
            let (a, b) = (abs(xs[0]), abs(xs[1]));
            let mut all = matmul(t, s, [&plus(&a, es[0]), &b]);
            // Weights are exact.
            if es[1].iter().any(|e| *e != 0.0) {
                all = plus(&all, &matmul(t, s, [&a, es[1]]));
            }
            let alpha = f64::from(alpha.get()).abs();
            all.iter().map(|e| e * alpha).collect()
        }
        Op::Gather(d) => rounded(&gather(DType::F32, sh(0), es[0], xs[1]), *d),
        Op::ScatterAdd(_) => node(g, id, &[xs[0], &plus(&abs(xs[1]), es[1])])?,
        Op::Broadcast(_)
        | Op::Reshape(_)
        | Op::Permute(_)
        | Op::Slice { .. }
        | Op::Concat(_)
        | Op::Pad { .. }
        | Op::Barrier(_)
        | Op::Part(_)
        | Op::Composite(_) => node(g, id, es)?,
    })
}

/// One rounding of the result, and each operand's error times the slope, which is measured.
fn scalar(s: ScalarOp, v: f64, xs: &[&[f64]], es: &[&[f64]], i: usize) -> f64 {
    match s {
        ScalarOp::Less | ScalarOp::Equal => return 0.0,
        ScalarOp::Select => return if xs[0][i] != 0.0 { es[1][i] } else { es[2][i] },
        _ => {}
    }
    let mut e = v.abs();
    for k in 0..xs.len() {
        if es[k][i] == 0.0 {
            continue;
        }
        let at = |h: f64| {
            let mut x = [0.0; 3];
            for (slot, from) in x.iter_mut().zip(xs) {
                *slot = from[i];
            }
            x[k] += h;
            s.eval(&x[..xs.len()])
        };
        let h = xs[k][i].abs() * 1e-5 + 1e-9;
        let slope = (at(h) - at(-h)) / (2.0 * h);
        if slope.is_finite() {
            e += slope.abs() * es[k][i];
        }
    }
    e
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{graph::Builder, op::Role, types::TensorType};

    #[test]
    fn a_product_counts_its_terms_and_later_ops_carry_them_on() {
        let mut b = Builder::default();
        let x = b.input(Role::Data, TensorType::f32([1, 3]));
        let w = b.input(Role::Data, TensorType::f32([3, 1]));
        let y = b.matmul(x, false, w, false).unwrap();
        let e = b.map(ScalarOp::Exp, &[y]).unwrap();
        let z = b.matmul(e, false, y, false).unwrap();
        let g = b.finish(vec![y, e, z], vec![]);
        let x = Value::new(TensorType::f32([1, 3]), vec![1.0, -2.0, 3.0]);
        let w = Value::new(TensorType::f32([3, 1]), vec![2.0, 3.0, 1.0]);
        let out = eval_bounded(&g, &[x, w]).unwrap();
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-6 * b.abs(), "{a} {b}");
        assert_eq!(out[0].value.data, [-1.0]);
        assert_eq!(out[0].bound, [11.0]);
        let e = (-1.0f64).exp();
        near(out[1].bound[0], e + e * 11.0);
        near(out[2].bound[0], (e + 12.0 * e) + e * 11.0);
    }
}
