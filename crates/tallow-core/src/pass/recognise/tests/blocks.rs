//! Norms, gates and softmax.
use super::*;

/// A product of `x` in the given order.
fn product(b: &mut Builder, x: &[NodeId]) -> Result<NodeId> {
    let mut y = x[0];
    for f in &x[1..] {
        y = b.map(Mul, &[y, *f])?;
    }
    Ok(y)
}

fn mean_square(b: &mut Builder, x: NodeId) -> Result<NodeId> {
    let sq = b.map(Mul, &[x, x])?;
    let s = b.sum_last(sq)?;
    b.map_const(Mul, s, 0.25)
}

const NORM: [&[usize]; 3] = [&[2, 3, 4], &[4], &[2, 3, 4]];

#[test]
fn norms_in_any_order_and_writing() {
    for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
        for writing in 0..4 {
            let g = f32s(&NORM[..2], |b, x| {
                let v = mean_square(b, x[0])?;
                let v = b.map_const(Add, v, 1e-5)?;
                let r = match writing {
                    0 => b.map(Rsqrt, &[v])?,
                    _ => b.map(Sqrt, &[v])?,
                };
                let r = match writing {
                    1 => b.map(Recip, &[r])?,
                    2 => {
                        let one = b.scalar(1.0);
                        b.map(Div, &[one, r])?
                    }
                    _ => r,
                };
                if writing == 3 {
                    let y = b.map(Div, &[x[0], r])?;
                    return Ok(vec![b.map(Mul, &[y, x[1]])?]);
                }
                let f = [x[0], r, x[1]];
                Ok(vec![product(b, &order.map(|k| f[k]))?])
            });
            let r = becomes(&g, &["rms_norm"]);
            assert_eq!(r.nodes.len(), 3);
        }
    }
}

#[test]
fn a_norm_keeps_other_factors_and_means_by_division() {
    let g = f32s(&NORM, |b, x| {
        let sq = b.map(Mul, &[x[0], x[0]])?;
        let s = b.sum_last(sq)?;
        let v = b.map_const(Div, s, 4.0)?;
        let eps = b.scalar(1e-6);
        let v = b.map(Add, &[eps, v])?;
        let r = b.map(Rsqrt, &[v])?;
        let y = product(b, &[x[2], x[0], r, x[1]])?;
        Ok(vec![y])
    });
    becomes(&g, &["rms_norm"]);
}

#[test]
fn what_is_nearly_a_norm() {
    let norm = |factor: f32, other: bool, watched: bool| {
        f32s(&NORM, |b, x| {
            let sq = b.map(Mul, &[x[0], if other { x[2] } else { x[0] }])?;
            let s = b.sum_last(sq)?;
            let v = b.map_const(Mul, s, factor)?;
            let v = b.map_const(Add, v, 1e-5)?;
            let v = b.map(Abs, &[v])?;
            let r = b.map(Rsqrt, &[v])?;
            let mut out = vec![product(b, &[x[0], r, x[1]])?];
            out.extend(watched.then_some(r));
            Ok(out)
        })
    };
    // Another length, another value, an op in between, a reader of the root.
    stays(&norm(0.5, false, false));
    stays(&norm(0.25, true, false));
    stays(&norm(0.25, false, false));
    let watched = f32s(&NORM[..2], |b, x| {
        let v = mean_square(b, x[0])?;
        let v = b.map_const(Add, v, 1e-5)?;
        let r = b.map(Rsqrt, &[v])?;
        Ok(vec![product(b, &[x[0], r, x[1]])?, r])
    });
    stays(&watched);
    // Another axis.
    stays(&f32s(&[&[4, 4], &[4]], |b, x| {
        let sq = b.map(Mul, &[x[0], x[0]])?;
        let s = b.reduce(ReduceOp::Sum, 0, sq)?;
        let v = b.map_const(Mul, s, 0.25)?;
        let v = b.map_const(Add, v, 1e-5)?;
        let r = b.map(Rsqrt, &[v])?;
        Ok(vec![product(b, &[x[0], r, x[1]])?])
    }));
}

#[test]
fn a_sum_before_a_norm() {
    let norm = |b: &mut Builder, x: NodeId, w: NodeId| {
        let v = mean_square(b, x)?;
        let v = b.map_const(Add, v, 1e-5)?;
        let r = b.map(Rsqrt, &[v])?;
        product(b, &[x, r, w])
    };
    let g = f32s(&NORM, |b, x| {
        let s = b.map(Add, &[x[0], x[2]])?;
        let y = norm(b, s, x[1])?;
        Ok(vec![y, s])
    });
    becomes(&g, &["add_rms_norm"]);
    // A repeated row is no residual.
    let g = f32s(&NORM[..2], |b, x| {
        let s = b.map(Add, &[x[0], x[1]])?;
        Ok(vec![norm(b, s, x[1])?])
    });
    becomes(&g, &["rms_norm"]);
    // A linear layer takes the sum first.
    let ins = [
        (Role::Data, TensorType::f32([3, 4])),
        (Role::Frozen, TensorType::f32([4, 4])),
        (Role::Frozen, TensorType::f32([4])),
    ];
    let g = build(&ins, |b, x| {
        let y = b.matmul(x[0], false, x[1], true)?;
        let s = b.map(Add, &[x[0], y])?;
        Ok(vec![norm(b, s, x[2])?, s])
    });
    becomes(&g, &["linear", "rms_norm"]);
    // The weight comes from the sum: both cannot be made at once.
    let g = f32s(&[&[4, 4], &[4, 4]], |b, x| {
        let s = b.map(Add, &[x[0], x[1]])?;
        let w = b.slice(s, 0, 0, 1)?;
        let w = b.reshape(w, [4])?;
        Ok(vec![norm(b, s, w)?])
    });
    becomes(&g, &["rms_norm"]);
}

const GATE: [&[usize]; 3] = [&[3, 4], &[3, 4], &[3, 4]];

/// The factors of silu besides its operand, above and below the line.
fn sigmoid(b: &mut Builder, g: NodeId, writing: usize) -> Result<(Option<NodeId>, Option<NodeId>)> {
    if writing == 0 {
        return Ok((Some(b.map(Sigmoid, &[g])?), None));
    }
    let n = b.map(Neg, &[g])?;
    let e = b.map(Exp, &[n])?;
    let d = b.map_const(Add, e, 1.0)?;
    match writing {
        1 => Ok((None, Some(d))),
        2 => Ok((Some(b.map(Recip, &[d])?), None)),
        _ => {
            let one = b.scalar(1.0);
            Ok((Some(b.map(Div, &[one, d])?), None))
        }
    }
}

#[test]
fn gates_in_any_order_and_writing() {
    for writing in 0..4 {
        for swap in [false, true] {
            let g = f32s(&GATE[..2], |b, x| {
                let (up, down) = sigmoid(b, x[0], writing)?;
                let mut silu = x[0];
                if let Some(up) = up {
                    silu = b.map(Mul, &if swap { [up, silu] } else { [silu, up] })?;
                }
                if let Some(down) = down {
                    silu = b.map(Div, &[silu, down])?;
                }
                Ok(vec![b.map(
                    Mul,
                    &if swap { [x[1], silu] } else { [silu, x[1]] },
                )?])
            });
            let r = becomes(&g, &["swiglu"]);
            assert_eq!(r.nodes.len(), 3);
        }
    }
    // More factors go with the other operand.
    let g = f32s(&GATE, |b, x| {
        let s = b.map(Sigmoid, &[x[0]])?;
        let u = b.map(Div, &[x[1], x[2]])?;
        Ok(vec![product(b, &[s, u, x[0]])?])
    });
    becomes(&g, &["swiglu"]);
}

#[test]
fn what_is_nearly_a_gate() {
    // silu alone, with a constant, or with a repeated row.
    for k in 0..3 {
        stays(&f32s(&[&[3, 4], &[4]], |b, x| {
            let s = b.map(Sigmoid, &[x[0]])?;
            let y = b.map(Mul, &[x[0], s])?;
            Ok(vec![match k {
                0 => y,
                1 => b.map_const(Mul, y, 2.0)?,
                _ => b.map(Mul, &[y, x[1]])?,
            }])
        }));
    }
    // The sigmoid of something else; 2 + exp; a reader of the sigmoid.
    stays(&f32s(&GATE, |b, x| {
        let s = b.map(Sigmoid, &[x[2]])?;
        Ok(vec![product(b, &[x[0], s, x[1]])?])
    }));
    stays(&f32s(&GATE, |b, x| {
        let n = b.map(Neg, &[x[0]])?;
        let e = b.map(Exp, &[n])?;
        let d = b.map_const(Add, e, 2.0)?;
        let s = b.map(Div, &[x[0], d])?;
        Ok(vec![b.map(Mul, &[s, x[1]])?])
    }));
    stays(&f32s(&GATE, |b, x| {
        let s = b.map(Sigmoid, &[x[0]])?;
        Ok(vec![product(b, &[x[0], s, x[1]])?, s])
    }));
}

/// `exp(x - max x)` and its sum over `axis`.
fn exps(b: &mut Builder, x: NodeId, axis: usize) -> Result<(NodeId, NodeId)> {
    let m = b.reduce(ReduceOp::Max, axis, x)?;
    let d = b.map(Sub, &[x, m])?;
    let e = b.map(Exp, &[d])?;
    Ok((e, b.reduce(ReduceOp::Sum, axis, e)?))
}

#[test]
fn softmax_by_division_and_by_the_inverse() {
    for inverse in [false, true] {
        let g = f32s(&[&[2, 3, 4]], |b, x| {
            let (e, s) = exps(b, x[0], 2)?;
            Ok(vec![if inverse {
                let r = b.map(Recip, &[s])?;
                b.map(Mul, &[r, e])?
            } else {
                b.map(Div, &[e, s])?
            }])
        });
        let r = becomes(&g, &["softmax"]);
        assert_eq!(r.nodes.len(), 2);
    }
}

#[test]
fn what_is_nearly_softmax() {
    let square: [&[usize]; 2] = [&[4, 4], &[4, 4]];
    stays(&f32s(&square, |b, x| {
        let (e, s) = exps(b, x[0], 0)?;
        Ok(vec![b.map(Div, &[e, s])?])
    }));
    // Another row's exponentials, no maximum, a reader of the sum.
    stays(&f32s(&square, |b, x| {
        let (e, _) = exps(b, x[0], 1)?;
        let (_, s) = exps(b, x[1], 1)?;
        Ok(vec![b.map(Div, &[e, s])?])
    }));
    stays(&f32s(&square, |b, x| {
        let e = b.map(Exp, &[x[0]])?;
        let s = b.sum_last(e)?;
        Ok(vec![b.map(Div, &[e, s])?])
    }));
    stays(&f32s(&square, |b, x| {
        let (e, s) = exps(b, x[0], 1)?;
        Ok(vec![b.map(Div, &[e, s])?, s])
    }));
}
