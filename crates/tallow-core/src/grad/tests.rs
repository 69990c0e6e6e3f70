//! Every rule against differences; every gradient of a composite against that of its meaning.
use super::{check::check_grad, *};
use crate::{
    op::{Bits, Composite, Linear, ReduceOp, Role},
    oracle::{Value, eval, sample},
    pass::expand::expand_all,
    types::{DType, TensorType},
};

/// `Σ w y` over `outs` with random `w`, given as further inputs whose values are returned.
fn functional(b: &mut Builder, outs: &[NodeId]) -> (NodeId, Vec<Value>) {
    let mut total = b.scalar(0.0);
    let mut values = vec![];
    for o in outs {
        let ty = TensorType::f32(b.shape(*o).clone());
        let y = b.cast(*o, DType::F32).unwrap();
        values.push(sample::random(&ty, 0, 99, values.len() as u32));
        let w = b.input(Role::Data, ty);
        let p = b.map(ScalarOp::Mul, &[y, w]).unwrap();
        let n = b.shape(p).numel();
        let p = b.reshape(p, [n]).unwrap();
        let p = b.reduce(ReduceOp::Sum, 0, p).unwrap();
        let p = b.reshape(p, []).unwrap();
        total = b.map(ScalarOp::Add, &[total, p]).unwrap();
    }
    (total, values)
}

/// Checks the gradient of `f` in all its float operands.
fn check(
    name: &str,
    mut inputs: Vec<Value>,
    f: impl FnOnce(&mut Builder, &[NodeId]) -> Result<Vec<NodeId>>,
) {
    let mut b = Builder::default();
    let ins: Vec<_> = inputs
        .iter()
        .map(|v| b.input(Role::State, v.ty.clone()))
        .collect();
    let outs = f(&mut b, &ins).unwrap();
    let (loss, weights) = functional(&mut b, &outs);
    let wrt: Vec<NodeId> = ins
        .into_iter()
        .filter(|i| b.ty(*i).dtype.is_float())
        .collect();
    inputs.extend(weights);
    let g = b.finish(vec![loss], vec![]);
    let worst = check_grad(&g, &inputs, &wrt).unwrap();
    assert!(worst.error < 2e-6, "{name}: {worst:?}");
}

fn f32s<const N: usize>(shape: [usize; N], id: u32) -> Value {
    sample::random(&TensorType::f32(shape), 0, 5, id)
}

#[test]
fn every_scalar_op() {
    for s in ScalarOp::ALL {
        let mut xs: Vec<Value> = (0..s.arity() as u32).map(|i| f32s([2, 5], i)).collect();
        if s.wants_positive() {
            let all = xs.iter_mut().flat_map(|x| &mut x.data);
            all.for_each(|v| *v = v.abs());
        }
        if *s == ScalarOp::Select {
            check(s.name(), xs, |b, x| {
                let i = b.push(Op::Iota([2, 5].into(), 1), &[])?;
                let c = b.map_const(ScalarOp::Less, i, 2.0)?;
                Ok(vec![b.map(*s, &[c, x[1], x[2]])?])
            });
            continue;
        }
        check(s.name(), xs, |b, x| Ok(vec![b.map(*s, x)?]));
    }
}

#[test]
fn ties_go_to_the_first_operand_of_max_and_are_shared_by_a_reduction() {
    let two = |v| Value::full(TensorType::f32([2]), v);
    let mut b = Builder::default();
    let x = b.input(Role::State, TensorType::f32([2]));
    let y = b.input(Role::State, TensorType::f32([2]));
    let m = b.map(ScalarOp::Max, &[x, y]).unwrap();
    let m = b.reduce(ReduceOp::Max, 0, m).unwrap();
    let g = b.finish(vec![m], vec![]);
    let d = eval(&grad(&g, &[x, y]).unwrap(), &[two(3.0), two(3.0)]).unwrap();
    assert_eq!(d[1].data, [0.5, 0.5]);
    assert_eq!(d[2].data, [0.0, 0.0]);
}

#[test]
fn every_structural_op() {
    let x = || vec![f32s([2, 3, 4], 1)];
    check("sum", x(), |b, x| {
        Ok(vec![b.reduce(ReduceOp::Sum, 1, x[0])?])
    });
    check("max", x(), |b, x| {
        Ok(vec![b.reduce(ReduceOp::Max, 2, x[0])?])
    });
    check("broadcast", vec![f32s([3, 1], 1)], |b, x| {
        Ok(vec![b.broadcast(x[0], &[2, 3, 4].into())?])
    });
    check("reshape", x(), |b, x| Ok(vec![b.reshape(x[0], [4, 6])?]));
    check("permute", x(), |b, x| {
        Ok(vec![b.permute(x[0], &[2, 0, 1])?])
    });
    check("slice", x(), |b, x| Ok(vec![b.slice(x[0], 1, 1, 2)?]));
    check("concat", vec![f32s([2, 3], 1), f32s([2, 1], 2)], |b, x| {
        Ok(vec![b.concat(1, &[x[0], x[1], x[0]])?])
    });
    let (axis, before, after) = (1, 2, 1);
    let pad = Op::Pad {
        axis,
        before,
        after,
    };
    check("pad", x(), |b, x| Ok(vec![b.push(pad, x)?]));
    check("barrier", x(), |b, x| Ok(vec![b.push(Op::Barrier(1), x)?]));
    let ids = Value::new(TensorType::u32([2, 2]), vec![1.0, 3.0, 1.0, 9.0]);
    check("gather", vec![f32s([4, 3], 1), ids.clone()], |b, x| {
        Ok(vec![b.push(Op::Gather(DType::F32), x)?])
    });
    let ids = Value::new(TensorType::u32([4]), ids.data);
    check("scatter_add", vec![ids, f32s([4, 3], 1)], |b, x| {
        Ok(vec![b.push(Op::ScatterAdd(4), x)?])
    });
}

#[test]
fn every_product() {
    for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
        let a = if ta { [3, 4, 2] } else { [3, 2, 4] };
        let w = if tb { [3, 5, 4] } else { [3, 4, 5] };
        check("matmul", vec![f32s(a, 1), f32s(w, 2)], |b, x| {
            let alpha = Bits::from(-1.5);
            Ok(vec![b.push(Op::MatMul { ta, tb, alpha }, x)?])
        });
    }
}

#[test]
fn casts_pass_gradients_between_floats_only() {
    let mut b = Builder::default();
    let x = b.input(Role::State, TensorType::new([2], DType::BF16));
    let y = b.cast(x, DType::F32).unwrap();
    let i = b.cast(y, DType::I32).unwrap();
    let i = b.cast(i, DType::F32).unwrap();
    let y = b.map(ScalarOp::Mul, &[y, i]).unwrap();
    let y = b.reduce(ReduceOp::Sum, 0, y).unwrap();
    let g = b.finish(vec![y], vec![]);
    let v = Value::new(TensorType::new([2], DType::BF16), vec![2.5, -3.25]);
    let d = eval(&grad(&g, &[x]).unwrap(), &[v]).unwrap();
    assert_eq!(d[1].ty.dtype, DType::BF16);
    assert_eq!(d[1].data, [2.0, -3.0]);
}

#[test]
fn every_composite() {
    for (i, (c, tys)) in Composite::examples().into_iter().enumerate() {
        let values = sample::operands(&c, &tys, i as u32);
        let name = format!("{c:?} {i}");
        check(&name, values.clone(), |b, x| b.composite(c.clone(), x));
        check(&name, values, |b, x| {
            Ok(b.composite(c.clone(), x)?[..1].to_vec())
        });
    }
}

/// The gradient as composites write it equals the gradient of their decompositions.
#[test]
fn composites_differentiate_as_their_meaning() {
    for (i, (c, tys)) in Composite::examples().into_iter().enumerate() {
        let mut values = sample::operands(&c, &tys, i as u32);
        let mut b = Builder::default();
        let ins: Vec<_> = tys
            .iter()
            .map(|t| b.input(Role::State, t.clone()))
            .collect();
        let outs = b.composite(c.clone(), &ins).unwrap();
        let (loss, weights) = functional(&mut b, &outs[..1]);
        values.extend(weights);
        let wrt: Vec<NodeId> = ins
            .into_iter()
            .filter(|x| b.ty(*x).dtype.is_float())
            .collect();
        let g = b.finish(vec![loss], vec![]);
        let own = eval(&grad(&g, &wrt).unwrap(), &values).unwrap();
        let e = expand_all(&g).unwrap();
        let meaning = eval(&grad(&e, &wrt).unwrap(), &values).unwrap();
        for (a, m) in own.iter().zip(&meaning) {
            let size = m.data.iter().fold(1e-3, |s: f64, v| s.max(v.abs()));
            for (x, y) in a.data.iter().zip(&m.data) {
                assert!((x - y).abs() <= 1e-9 * size, "{c:?}: {x} {y}");
            }
        }
    }
}

fn lora(b: &mut Builder, x: NodeId, n: usize) -> (NodeId, Vec<NodeId>) {
    let k = b.shape(x).last();
    let w = b.input(Role::Frozen, TensorType::f32([n, k]));
    let down = b.input(Role::State, TensorType::f32([2, k]));
    let up = b.input(Role::State, TensorType::f32([n, 2]));
    let op = Linear {
        blocks: vec![crate::op::Block {
            n,
            bias: false,
            adapters: vec![Some((2, 2.0.into()))],
        }],
        residual: false,
    };
    let y = b.composite(op, &[x, w, down, up]).unwrap()[0];
    (y, vec![down, up])
}

fn total(b: &mut Builder, y: NodeId) -> NodeId {
    let n = b.shape(y).numel();
    let y = b.reshape(y, [n]).unwrap();
    let y = b.map(ScalarOp::Mul, &[y, y]).unwrap();
    b.reduce(ReduceOp::Sum, 0, y).unwrap()
}

#[test]
fn the_first_layer_needs_no_gradient_of_its_input() {
    let mut b = Builder::default();
    let x = b.input(Role::Data, TensorType::f32([3, 4]));
    let (y, mut wrt) = lora(&mut b, x, 5);
    let (z, second) = lora(&mut b, y, 6);
    wrt.extend(second);
    let loss = total(&mut b, z);
    // Freezing drops unread nodes, so what is asked for must be read by name afterwards.
    let g = b.finish([&[loss][..], &wrt].concat(), vec![]);
    let g = grad(&g, &g.outputs[1..]).unwrap();
    let parts_of_grads: Vec<Vec<usize>> = g
        .iter()
        .filter(|(_, n)| matches!(n.op, Op::Composite(Composite::LinearGrad(_))))
        .map(|(id, _)| {
            let reads = |n: &crate::graph::Node| match n.op {
                Op::Part(k) if n.inputs[0] == id => Some(k),
                _ => None,
            };
            g.nodes.iter().filter_map(reads).collect()
        })
        .collect();
    // The second layer gives dx and dh, the first only dh.
    assert_eq!(parts_of_grads, vec![vec![0, 1], vec![1]]);
    let frozen = g.inputs().iter().filter(|i| i.1 == Role::Frozen).count();
    assert_eq!(frozen, 2);
    let forms_dw = |n: &crate::graph::Node| n.ty.shape == [6, 5].into() && !n.inputs.is_empty();
    assert!(!g.nodes.iter().any(forms_dw));
}

#[test]
fn stops_at_views_of_one_flat_input() {
    let mut b = Builder::default();
    let flat = b.input(Role::State, TensorType::f32([10]));
    let make = |b: &mut Builder, at| {
        let s = b.slice(flat, 0, at, 4).unwrap();
        b.reshape(s, [2, 2]).unwrap()
    };
    let (u, v, unused) = (make(&mut b, 0), make(&mut b, 4), make(&mut b, 6));
    let y = b.matmul(u, false, v, true).unwrap();
    let loss = total(&mut b, y);
    let g = b.finish(vec![loss, unused], vec![]);
    let d = grad(&g, &[u, v, unused]).unwrap();
    assert!(!d.nodes.iter().any(|n| matches!(n.op, Op::Pad { .. })));
    assert_eq!(d.ty(d.outputs[1]).shape, [2, 2].into());
    let x = f32s([10], 3);
    let out = eval(&d, std::slice::from_ref(&x)).unwrap();
    assert_eq!(out[3], Value::full(TensorType::f32([2, 2]), 0.0));
    let worst = check_grad(&g, &[x], &[u, v, flat]).unwrap();
    assert!(worst.error < 1e-6, "{worst:?}");
}

#[test]
fn refuses_what_has_no_gradient() {
    let mut b = Builder::default();
    let x = b.input(Role::State, TensorType::f32([2]));
    let i = b.input(Role::Data, TensorType::u32([2]));
    let g = b.finish(vec![x, i], vec![]);
    let ints = Builder::resume(&g).finish(vec![i], vec![]);
    let e = grad(&ints, &[x]).unwrap_err().to_string();
    assert!(e.contains("the loss must be a float"), "{e}");
    let mut b = Builder::resume(&g);
    let loss = total(&mut b, x);
    let g = b.finish(vec![loss], vec![]);
    let e = grad(&g, &[i]).unwrap_err().to_string();
    assert!(e.contains("is not one float"), "{e}");
}

#[test]
fn of_several_losses_it_is_the_gradient_of_their_sum() {
    let x = f32s([3, 4], 5);
    let made = |sum: bool| {
        let mut b = Builder::default();
        let x = b.input(Role::State, TensorType::f32([3, 4]));
        let squares = b.map(ScalarOp::Mul, &[x, x]).unwrap();
        let losses = b.reduce(ReduceOp::Sum, 1, squares).unwrap();
        let out = match sum {
            true => b.reduce(ReduceOp::Sum, 0, losses).unwrap(),
            false => losses,
        };
        grad(&b.finish(vec![out], vec![]), &[x]).unwrap()
    };
    let of = |g: &Graph| eval(g, std::slice::from_ref(&x)).unwrap();
    let (each, sum) = (of(&made(false)), of(&made(true)));
    assert_eq!(each[1], sum[1]);
    assert_eq!([each[0].ty.shape.numel(), sum[0].ty.shape.numel()], [3, 1]);
}

/// At a tie the differences see half the slope of either side.
#[test]
fn the_checker_sees_a_wrong_gradient() {
    let mut b = Builder::default();
    let x = b.input(Role::State, TensorType::f32([1]));
    let zero = b.map_const(ScalarOp::Mul, x, 0.0).unwrap();
    let y = b.map(ScalarOp::Max, &[x, zero]).unwrap();
    let g = b.finish(vec![y], vec![]);
    let at = |v| Value::full(TensorType::f32([1]), v);
    assert!(check_grad(&g, &[at(1.0)], &[x]).unwrap().error < 1e-9);
    assert!(check_grad(&g, &[at(0.0)], &[x]).unwrap().error > 0.4);
}
