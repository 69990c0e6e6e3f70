//! Linear layers and adapters.
use super::*;
use crate::op::Linear;

const X: usize = 0;
const W: usize = 1;
const A: usize = 2;
const B: usize = 3;
const BIAS: usize = 4;

/// `x [3, 4]`, `W [5, 4]` frozen, `A [2, 4]`, `B [5, 2]`, bias `[5]`; stored `[in, out]` unless `tb`.
fn layer(tb: bool, f: impl FnOnce(&mut Builder, &[NodeId]) -> Result<Vec<NodeId>>) -> Graph {
    let m = |n: usize, k: usize| TensorType::f32(if tb { [n, k] } else { [k, n] });
    let ins = [
        (Role::Data, TensorType::f32([3, 4])),
        (Role::Frozen, m(5, 4)),
        (Role::State, m(2, 4)),
        (Role::State, m(5, 2)),
        (Role::Frozen, TensorType::f32([5])),
    ];
    build(&ins, f)
}

#[track_caller]
fn linear(g: &Graph) -> Linear {
    match only(g) {
        Composite::Linear(l) => l,
        other => panic!("{other:?}"),
    }
}

#[test]
fn adapters_with_the_scale_anywhere() {
    for tb in [false, true] {
        for place in 0..6 {
            let g = layer(tb, |b, x| {
                let s = |b: &mut Builder, on: usize, v: NodeId| match on == place {
                    true => b.map_const(Mul, v, 2.0),
                    false => Ok(v),
                };
                let base = b.matmul(x[X], false, x[W], tb)?;
                let xs = s(b, 0, x[X])?;
                let down = s(b, 1, x[A])?;
                let up = s(b, 2, x[B])?;
                let h = b.matmul(xs, false, down, tb)?;
                let h = s(b, 3, h)?;
                let y = b.matmul(h, false, up, tb)?;
                let y = s(b, 4, y)?;
                Ok(vec![b.map(Add, &[base, y])?])
            });
            // With the scale on its operand, the branch reads another value than the base.
            let r = becomes(&g, &["lora_linear"]);
            let scale = if place == 5 { 1.0 } else { 2.0 };
            assert_eq!(linear(&r).blocks[0].adapters, [Some((2, scale.into()))]);
        }
    }
}

#[test]
fn scale_on_the_left_and_transposed_views() {
    let g = layer(true, |b, x| {
        let t = |b: &mut Builder, i: usize| b.permute(x[i], &[1, 0]);
        let (w, down, up) = (t(b, W)?, t(b, A)?, t(b, B)?);
        let h = b.matmul(x[X], false, down, false)?;
        let y = b.matmul(h, false, up, false)?;
        let s = b.scalar(0.5);
        let y = b.map(Mul, &[s, y])?;
        let base = b.matmul(x[X], false, w, false)?;
        Ok(vec![b.map(Add, &[y, base])?])
    });
    let r = becomes(&g, &["lora_linear"]);
    // The weights are read as they are stored.
    assert!(!r.nodes.iter().any(|n| matches!(n.op, Op::Permute(_))));
}

#[test]
fn biases_and_other_terms() {
    let orders = [[0, 1, 2], [1, 0, 2], [1, 2, 0], [2, 1, 0]];
    for order in orders {
        let g = layer(true, |b, x| {
            let h = b.matmul(x[X], false, x[A], true)?;
            let y = b.matmul(h, false, x[B], true)?;
            let base = b.matmul(x[X], false, x[W], true)?;
            let bias = b.broadcast(x[BIAS], &[3, 5].into())?;
            let terms = [base, y, bias];
            let sum = b.map(Add, &[terms[order[0]], terms[order[1]]])?;
            Ok(vec![b.map(Add, &[sum, terms[order[2]]])?])
        });
        let r = becomes(&g, &["lora_linear"]);
        assert!(linear(&r).blocks[0].bias);
        assert_eq!(r.nodes.len(), 5 + 2);
    }
    // What else is in the sum is the residual.
    let g = layer(true, |b, x| {
        let base = b.matmul(x[X], false, x[W], true)?;
        let y = b.map(Add, &[base, x[BIAS]])?;
        let r = b.map(Exp, &[base])?;
        let _ = r;
        let wide = b.concat(1, &[x[X], x[X]])?;
        let other = b.slice(wide, 1, 1, 5)?;
        Ok(vec![b.map(Add, &[other, y])?])
    });
    let l = linear(&becomes(&g, &["linear"]));
    assert!(l.residual && l.blocks[0].bias);
}

#[test]
fn flattened_rows_are_not_flattened_any_more() {
    let ins = [
        (Role::Data, TensorType::f32([2, 3, 4])),
        (Role::Frozen, TensorType::f32([5, 4])),
        (Role::State, TensorType::f32([2, 4])),
        (Role::State, TensorType::f32([5, 2])),
    ];
    let g = build(&ins, |b, x| {
        let rows = b.reshape(x[0], [6, 4])?;
        let base = b.matmul(rows, false, x[1], true)?;
        let h = b.matmul(rows, false, x[2], true)?;
        let up = b.matmul(h, false, x[3], true)?;
        let (base, up) = (b.reshape(base, [2, 3, 5])?, b.reshape(up, [2, 3, 5])?);
        Ok(vec![b.map(Add, &[base, up])?])
    });
    let r = becomes(&g, &["lora_linear"]);
    assert!(!r.nodes.iter().any(|n| matches!(n.op, Op::Reshape(_))));
}

#[test]
fn repeated_and_narrow_weights() {
    let ins = [
        (Role::Data, TensorType::f32([2, 3, 4])),
        (Role::Frozen, TensorType::new([4, 5], DType::BF16)),
    ];
    let g = build(&ins, |b, x| {
        let w = b.cast(x[1], DType::F32)?;
        let w = b.broadcast(w, &[2, 4, 5].into())?;
        Ok(vec![b.matmul(x[0], false, w, false)?])
    });
    let r = becomes(&g, &["linear"]);
    // The weight keeps its dtype.
    assert!(!r.nodes.iter().any(|n| matches!(n.op, Op::Cast(_))));
    // A weight that is itself one repeated row is not a weight [n, k].
    let ins = [
        (Role::Data, TensorType::f32([3, 4])),
        (Role::Frozen, TensorType::f32([1, 5])),
    ];
    stays(&build(&ins, |b, x| {
        let w = b.broadcast(x[1], &[4, 5].into())?;
        Ok(vec![b.matmul(x[0], false, w, false)?])
    }));
}

#[test]
fn near_misses() {
    // Somebody else reads the branch: the base is a layer, the branch stays.
    let g = layer(true, |b, x| {
        let base = b.matmul(x[X], false, x[W], true)?;
        let h = b.matmul(x[X], false, x[A], true)?;
        let y = b.matmul(h, false, x[B], true)?;
        Ok(vec![b.map(Add, &[base, y])?, h])
    });
    assert!(linear(&becomes(&g, &["linear"])).residual);
    // The branch reads another value.
    let g = layer(true, |b, x| {
        let base = b.matmul(x[X], false, x[W], true)?;
        let e = b.map(Exp, &[x[X]])?;
        let h = b.matmul(e, false, x[A], true)?;
        let y = b.matmul(h, false, x[B], true)?;
        Ok(vec![b.map(Add, &[base, y])?])
    });
    assert!(!linear(&becomes(&g, &["linear"])).is_adapted());
    // Something happens inside the branch.
    let g = layer(true, |b, x| {
        let base = b.matmul(x[X], false, x[W], true)?;
        let h = b.matmul(x[X], false, x[A], true)?;
        let h = b.map(Exp, &[h])?;
        let y = b.matmul(h, false, x[B], true)?;
        Ok(vec![b.map(Add, &[base, y])?])
    });
    assert!(!linear(&becomes(&g, &["linear"])).is_adapted());
    // A weight that is trained, a scaled product, a transposed left operand.
    stays(&f32s(&[&[3, 4], &[5, 4]], |b, x| {
        Ok(vec![b.matmul(x[0], false, x[1], true)?])
    }));
    stays(&layer(true, |b, x| {
        let y = b.matmul(x[X], false, x[W], true)?;
        Ok(vec![b.map_const(Mul, y, 3.0)?])
    }));
    let ins = [
        (Role::Data, TensorType::f32([4, 3])),
        (Role::Frozen, TensorType::f32([5, 4])),
    ];
    stays(&build(&ins, |b, x| {
        Ok(vec![b.matmul(x[0], true, x[1], true)?])
    }));
}
