//! Each rule: the same result from fewer nodes.
use super::{
    super::testing::{composites, f32s, only, same},
    *,
};
use crate::{
    grad::grad,
    op::{Block, Composite, Linear, RmsNorm, SwiGlu},
    scalar::ScalarOp::{self, Add, Exp, Sub},
};

/// Asserts that `f` of inputs of these shapes shrinks to `left` nodes besides inputs.
#[track_caller]
fn shrinks(
    shapes: &[&[usize]],
    left: usize,
    f: impl FnOnce(&mut Builder, &[NodeId]) -> Result<NodeId>,
) -> Graph {
    let g = f32s(shapes, |b, x| Ok(vec![f(b, x)?]));
    let s = simplify(&g).unwrap();
    same(&g, &s);
    assert!(s.nodes.len() < g.nodes.len(), "{g:#?}");
    assert_eq!(s.nodes.len() - shapes.len(), left, "{s:#?}");
    assert_eq!(s, simplify(&s).unwrap(), "not simple yet");
    s
}

#[test]
fn neutral_operands_vanish() {
    let with = |s, v| move |b: &mut Builder, x: &[NodeId]| b.map_const(s, x[0], v);
    shrinks(&[&[3]], 0, with(Add, 0.0));
    shrinks(&[&[3]], 0, with(Sub, 0.0));
    shrinks(&[&[3]], 0, with(Mul, 1.0));
    shrinks(&[&[3]], 0, with(Div, 1.0));
    shrinks(&[&[3]], 0, |b, x| {
        let n = b.map(Neg, x)?;
        b.map(Neg, &[n])
    });
    let once = |s, v| {
        let g = f32s(&[&[3]], |b, x| Ok(vec![b.map_const(s, x[0], v)?]));
        assert_eq!(simplify(&g).unwrap().nodes.len(), g.nodes.len());
    };
    once(Mul, 0.0);
    once(Add, 1.0);
    once(Div, 2.0);
}

#[test]
fn constants_fold() {
    shrinks(&[&[3]], 3, |b, x| {
        let c = b.scalar(2.0);
        let c = b.map_const(Add, c, 3.0)?;
        let c = b.map(Exp, &[c])?;
        let c = b.reshape(c, [1])?;
        b.map(ScalarOp::Max, &[x[0], c])
    });
    // A product of factors is one factor; a sum of equal ones is their number.
    shrinks(&[&[3]], 3, |b, x| {
        let two = b.map_const(Mul, x[0], 2.0)?;
        let one = b.scalar(1.0);
        let ones = b.broadcast(one, &[3].into())?;
        let three = b.reduce(ReduceOp::Sum, 0, ones)?;
        b.map(Mul, &[two, three])
    });
    shrinks(&[&[3], &[3]], 0, |b, x| {
        let c = b.scalar(0.0);
        b.map(ScalarOp::Select, &[c, x[0], x[1]])
    });
}

#[test]
fn views_of_views_are_one() {
    shrinks(&[&[2, 3, 4]], 0, |b, x| {
        let p = b.permute(x[0], &[2, 0, 1])?;
        b.permute(p, &[1, 2, 0])
    });
    shrinks(&[&[2, 3, 4]], 1, |b, x| {
        let p = b.permute(x[0], &[2, 0, 1])?;
        b.permute(p, &[2, 1, 0])
    });
    shrinks(&[&[9, 2]], 1, |b, x| {
        let s = b.slice(x[0], 0, 2, 6)?;
        b.slice(s, 0, 1, 3)
    });
    shrinks(&[&[3]], 1, |b, x| {
        let s = b.reshape(x[0], [1, 3])?;
        let s = b.broadcast(s, &[2, 3].into())?;
        b.broadcast(s, &[4, 2, 3].into())
    });
    shrinks(&[&[2, 3]], 0, |b, x| {
        let pad = Op::Pad {
            axis: 0,
            before: 1,
            after: 2,
        };
        let p = b.push(pad, x)?;
        b.slice(p, 0, 1, 2)
    });
}

#[test]
fn casts_that_lose_nothing_vanish() {
    let bf16 = TensorType::new([3], DType::BF16);
    let g = super::super::testing::build(&[(crate::op::Role::Data, bf16)], |b, x| {
        let wide = b.cast(x[0], DType::F32)?;
        let back = b.cast(wide, DType::BF16)?;
        let half = b.cast(wide, DType::F16)?;
        // Not this one: f16 cannot hold every bf16.
        Ok(vec![back, b.cast(half, DType::F32)?])
    });
    let s = simplify(&g).unwrap();
    same(&g, &s);
    assert_eq!(s.outputs[0], NodeId(0));
    assert_eq!(s.nodes.len(), 3);
}

#[test]
fn windows_of_things_side_by_side_are_those_things() {
    let shapes: [&[usize]; 3] = [&[2, 3], &[2, 4], &[2, 5]];
    shrinks(&shapes, 0, |b, x| {
        let c = b.concat(1, x)?;
        b.slice(c, 1, 3, 4)
    });
    shrinks(&shapes, 1, |b, x| {
        let c = b.concat(1, x)?;
        b.slice(c, 1, 8, 2)
    });
    shrinks(&shapes, 1, |b, x| {
        let c = b.concat(1, x)?;
        b.slice(c, 1, 3, 9)
    });
    shrinks(&shapes, 1, |b, x| {
        let c = b.concat(1, x)?;
        let flat = b.reshape(c, [2, 1, 12])?;
        b.slice(flat, 2, 7, 5)
    });
    shrinks(&[&[2, 9]], 1, |b, x| {
        let l = b.slice(x[0], 1, 1, 3)?;
        let r = b.slice(x[0], 1, 4, 2)?;
        b.concat(1, &[l, r])
    });
}

#[test]
fn the_gradient_of_slices_is_their_gradients_side_by_side() {
    for order in [[0, 1, 2], [2, 1, 0], [0, 2, 1]] {
        let s = shrinks(&[&[2, 3], &[2, 4], &[2, 5]], 1, |b, x| {
            let at = [0, 3, 7];
            let mut sum: Option<NodeId> = None;
            for k in order {
                let (before, n) = (at[k], b.shape(x[k]).last());
                let after = 12 - before - n;
                let axis = 1;
                let pad = Op::Pad {
                    axis,
                    before,
                    after,
                };
                let p = b.push(pad, &[x[k]])?;
                sum = Some(match sum {
                    Some(s) => b.map(Add, &[s, p])?,
                    None => p,
                });
            }
            Ok(sum.unwrap_or(x[0]))
        });
        assert_eq!(s.node(s.outputs[0]).op, Op::Concat(1));
    }
}

#[test]
fn scales_and_transposes_go_into_the_product() {
    let s = shrinks(&[&[2, 3], &[4, 3]], 1, |b, x| {
        let w = b.permute(x[1], &[1, 0])?;
        let a = b.map_const(Mul, x[0], 2.0)?;
        let y = b.matmul(a, false, w, false)?;
        let y = b.map_const(Div, y, 4.0)?;
        let c = b.scalar(3.0);
        b.map(Mul, &[c, y])
    });
    let alpha = Bits::from(1.5);
    let (ta, tb) = (false, true);
    assert_eq!(s.node(s.outputs[0]).op, Op::MatMul { ta, tb, alpha });
    // A product that somebody else reads keeps its scale apart.
    let g = f32s(&[&[2, 3], &[3, 4]], |b, x| {
        let y = b.matmul(x[0], false, x[1], false)?;
        Ok(vec![y, b.map_const(Mul, y, 3.0)?])
    });
    assert_eq!(simplify(&g).unwrap(), g);
}

#[test]
fn reshapes_move_behind_elementwise_ops() {
    let s = shrinks(&[&[6, 4], &[6, 4], &[4]], 4, |b, x| {
        let p = b.reshape(x[0], [2, 3, 4])?;
        let q = b.reshape(x[1], [2, 3, 4])?;
        let sum = b.map(Add, &[p, q])?;
        b.map(Add, &[sum, x[2]])
    });
    assert!(matches!(s.node(s.outputs[0]).op, Op::Reshape(_)));
}

fn block(n: usize, rank: usize) -> Block {
    Block {
        n,
        bias: false,
        adapters: vec![(rank > 0).then(|| (rank, 2.0.into()))],
    }
}

fn lora(b: &mut Builder, x: &[NodeId], n: usize) -> Result<Vec<NodeId>> {
    let residual = false;
    let blocks = vec![block(n, 2)];
    b.composite(Linear { blocks, residual }, x)
}

#[test]
fn a_residual_goes_into_the_linear_layer() {
    let shapes: [&[usize]; 5] = [&[3, 4], &[5, 4], &[2, 4], &[5, 2], &[3, 5]];
    for swap in [false, true] {
        let g = f32s(&shapes, |b, x| {
            let y = lora(b, &x[..4], 5)?;
            // Something between the layer and the sum reads its second result.
            let h = b.map(Exp, &[y[1]])?;
            let r = b.map(Exp, &[x[4]])?;
            let s = if swap { [r, y[0]] } else { [y[0], r] };
            Ok(vec![b.map(Add, &s)?, h])
        });
        let s = simplify(&g).unwrap();
        same(&g, &s);
        assert!(s.nodes.len() < g.nodes.len());
        assert!(matches!(only(&s), Composite::Linear(l) if l.residual));
    }
}

#[test]
fn a_residual_that_needs_the_result_or_has_readers_stays() {
    let shapes: [&[usize]; 5] = [&[3, 5], &[5, 5], &[2, 5], &[5, 2], &[5]];
    let keeps = |g: Graph| {
        let s = simplify(&g).unwrap();
        assert!(matches!(only(&s), Composite::Linear(l) if !l.residual));
    };
    // The other term depends on the layer's second result.
    keeps(f32s(&shapes, |b, x| {
        let y = lora(b, &x[..4], 5)?;
        let r = b.matmul(y[1], false, x[3], true)?;
        Ok(vec![b.map(Add, &[y[0], r])?])
    }));
    // Somebody else reads the result.
    keeps(f32s(&shapes, |b, x| {
        let y = lora(b, &x[..4], 5)?;
        Ok(vec![b.map(Add, &[y[0], x[0]])?, y[0]])
    }));
    // A repeated row is a bias.
    keeps(f32s(&shapes, |b, x| {
        let y = lora(b, &x[..4], 5)?;
        Ok(vec![b.map(Add, &[y[0], x[4]])?])
    }));
}

#[test]
fn two_layers_that_could_take_each_other_make_no_cycle() {
    let shapes: [&[usize]; 4] = [&[3, 5], &[5, 5], &[2, 5], &[5, 2]];
    let g = f32s(&shapes, |b, x| {
        let p = lora(b, x, 5)?;
        let x2 = b.map(Exp, &[x[0]])?;
        let q = lora(b, &[x2, x[1], x[2], x[3]], 5)?;
        // Each sum wants the other layer's second result: only one may have it.
        let (hp, hq) = (b.concat(1, &[p[1], p[1]])?, b.concat(1, &[q[1], q[1]])?);
        let hp = b.concat(1, &[hp, x[0]])?;
        let hq = b.concat(1, &[hq, x[0]])?;
        let (rp, rq) = (b.slice(hq, 1, 0, 5)?, b.slice(hp, 1, 0, 5)?);
        Ok(vec![b.map(Add, &[p[0], rp])?, b.map(Add, &[q[0], rq])?])
    });
    let s = simplify(&g).unwrap();
    same(&g, &s);
    let with = |n: &&Node| matches!(&n.op, Op::Composite(Composite::Linear(l)) if l.residual);
    assert_eq!(s.nodes.iter().filter(with).count(), 1);
}

/// A transformer block's gradient: the residual stream's cotangents are summed in the norms.
#[test]
fn the_gradient_of_a_block_adds_residuals_in_the_norm() {
    let shapes: [&[usize]; 6] = [&[3, 4], &[4], &[4, 4], &[2, 4], &[4, 2], &[4, 4]];
    let g = f32s(&shapes, |b, x| {
        let eps = 1e-5.into();
        let mut s = b.map(Exp, &[x[0]])?;
        for _ in 0..2 {
            let y = b.composite(RmsNorm { eps }, &[s, x[1]])?[0];
            let up = lora(b, &[y, x[2], x[3], x[4]], 4)?[0];
            let gate = lora(b, &[y, x[5], x[3], x[4]], 4)?[0];
            let m = b.composite(SwiGlu, &[gate, up])?[0];
            s = b.map(Add, &[s, m])?;
        }
        let e = b.map(Exp, &[s])?;
        let flat = b.reshape(e, [12])?;
        Ok(vec![b.reduce(ReduceOp::Sum, 0, flat)?])
    });
    let d = grad(&g, &[NodeId(0), NodeId(3)]).unwrap();
    let s = simplify(&d).unwrap();
    same(&d, &s);
    let folded = |n: &&Node| match &n.op {
        Op::Composite(Composite::RmsNormGrad(c)) => c.residual,
        Op::Composite(Composite::LinearGrad(c)) => c.residual,
        _ => false,
    };
    assert_eq!(
        s.nodes.iter().filter(folded).count(),
        4,
        "{:?}",
        composites(&s)
    );
}
