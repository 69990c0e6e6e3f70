//! Hand-computed results of every structural op, and properties that composites must have.
use super::*;
use crate::{
    graph::{Builder, Update},
    op::{Attention, Bits, CrossEntropy, KvWrite, Mask, Role},
    scalar::ScalarOp,
};

fn val<const N: usize>(shape: [usize; N], data: &[f64]) -> Value {
    Value::new(TensorType::f32(shape), data.to_vec())
}
fn ids<const N: usize>(shape: [usize; N], data: &[u32]) -> Value {
    let data = data.iter().map(|v| f64::from(*v)).collect();
    Value::new(TensorType::u32(shape), data)
}
fn run(inputs: &[Value], f: impl FnOnce(&mut Builder, &[NodeId]) -> Result<NodeId>) -> Vec<f64> {
    let mut b = Builder::default();
    let ins: Vec<_> = inputs
        .iter()
        .map(|v| b.input(Role::Data, v.ty.clone()))
        .collect();
    let out = f(&mut b, &ins).unwrap();
    let g = b.finish(vec![out], vec![]);
    eval(&g, inputs).unwrap().remove(0).data
}

#[test]
fn moves_elements_as_documented() {
    let x = val([2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let xs = std::slice::from_ref(&x);
    assert_eq!(
        run(xs, |b, x| b.permute(x[0], &[1, 0])),
        [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]
    );
    assert_eq!(run(xs, |b, x| b.slice(x[0], 1, 1, 2)), [2.0, 3.0, 5.0, 6.0]);
    let pad = Op::Pad {
        axis: 1,
        before: 1,
        after: 0,
    };
    assert_eq!(
        run(xs, |b, x| b.push(pad, x)),
        [0.0, 1.0, 2.0, 3.0, 0.0, 4.0, 5.0, 6.0]
    );
    assert_eq!(run(xs, |b, x| b.sum_last(x[0])), [6.0, 15.0]);
    assert_eq!(
        run(xs, |b, x| b.reduce(ReduceOp::Max, 0, x[0])),
        [4.0, 5.0, 6.0]
    );
    let both = run(xs, |b, x| {
        let s = b.slice(x[0], 1, 0, 1)?;
        b.concat(1, &[x[0], s])
    });
    assert_eq!(both, [1.0, 2.0, 3.0, 1.0, 4.0, 5.0, 6.0, 4.0]);
    let wide = run(&[val([2, 1], &[1.0, 2.0])], |b, x| {
        b.broadcast(x[0], &[2, 2, 3].into())
    });
    assert_eq!(wide, [1.0, 1.0, 1.0, 2.0, 2.0, 2.0].repeat(2),);
    let iota = run(&[], |b, _| b.push(Op::Iota([2, 3].into(), 1), &[]));
    assert_eq!(iota, [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]);
}

#[test]
fn products_agree_for_every_transposition() {
    let a = val([2, 2, 3], &(0..12).map(f64::from).collect::<Vec<_>>());
    let w = val([2, 3, 2], &(3..15).map(f64::from).collect::<Vec<_>>());
    let plain = run(&[a.clone(), w.clone()], |b, x| {
        b.matmul(x[0], false, x[1], false)
    });
    assert_eq!(plain[..4], [19.0, 22.0, 64.0, 76.0]);
    for (ta, tb) in [(true, false), (false, true), (true, true)] {
        let got = run(&[a.clone(), w.clone()], |b, x| {
            let a = if ta {
                b.permute(x[0], &[0, 2, 1])?
            } else {
                x[0]
            };
            let w = if tb {
                b.permute(x[1], &[0, 2, 1])?
            } else {
                x[1]
            };
            let alpha = Bits::from(2.0);
            b.push(Op::MatMul { ta, tb, alpha }, &[a, w])
        });
        let twice: Vec<f64> = plain.iter().map(|v| v * 2.0).collect();
        assert_eq!(got, twice);
    }
}

#[test]
fn tables_ignore_ids_past_their_end() {
    let table = val([2, 2], &[1.0, 2.0, 3.0, 4.0]);
    let at = ids([3], &[1, 9, u32::MAX]);
    let got = run(&[table, at.clone()], |b, x| {
        b.push(Op::Gather(DType::F32), x)
    });
    assert_eq!(got, [3.0, 4.0, 0.0, 0.0, 0.0, 0.0]);
    let rows = val([3, 1], &[5.0, 6.0, 7.0]);
    let got = run(&[ids([3], &[1, 1, u32::MAX]), rows], |b, x| {
        b.push(Op::ScatterAdd(2), x)
    });
    assert_eq!(got, [0.0, 11.0]);
}

#[test]
fn casts_round_to_halves_and_truncate_to_integers() {
    let x = val([3], &[1.0 + 2f64.powi(-9), -1.5, 3e9]);
    let cast = |d: DType| {
        run(std::slice::from_ref(&x), |b, x| {
            let c = b.cast(x[0], d)?;
            b.cast(c, DType::F32)
        })
    };
    assert_eq!(cast(DType::BF16)[..2], [1.0, -1.5]);
    assert_eq!(cast(DType::F16)[0], 1.0 + 2f64.powi(-9));
    assert_eq!(cast(DType::I32), [1.0, -1.0, 2147483647.0]);
    assert_eq!(cast(DType::U32), [1.0, 0.0, 3e9]);
}

#[test]
fn attention_pads_and_masks() {
    let (q, pos) = (
        val([1, 2, 1, 2], &[1.0, 0.0, 0.0, 1.0]),
        ids([1, 2], &[1, u32::MAX]),
    );
    let k = val([1, 3, 1, 2], &[0.0, 0.0, 0.0, 0.0, 9.0, 9.0]);
    let v = val([1, 3, 1, 2], &[2.0, 0.0, 4.0, 6.0, 100.0, 100.0]);
    let op = Attention {
        scale: 1.0.into(),
        mask: Mask::Causal { window: None },
        cap: None,
    };
    let got = run(&[q, k, v, pos], |b, x| Ok(b.composite(op, x)?[0]));
    assert_eq!(got, [3.0, 3.0, 0.0, 0.0]);
}

#[test]
fn cross_entropy_of_equal_logits_is_log_of_their_number() {
    let (x, w) = (val([2, 1], &[1.0, 1.0]), val([4, 1], &[3.0; 4]));
    let got = run(&[x, w, ids([2], &[2, u32::MAX])], |b, x| {
        Ok(b.composite(CrossEntropy, x)?[0])
    });
    assert!((got[0] - 4f64.ln()).abs() < 1e-12);
    assert_eq!(got[1], 0.0);
}

#[test]
fn cache_keeps_the_last_of_equal_positions() {
    let (cache, new) = (
        val([1, 3, 1, 1], &[1.0, 2.0, 3.0]),
        val([1, 3, 1, 1], &[7.0, 8.0, 9.0]),
    );
    let pos = ids([1, 3], &[1, 1, u32::MAX]);
    let got = run(&[cache, new, pos], |b, x| Ok(b.composite(KvWrite, x)?[0]));
    assert_eq!(got, [1.0, 8.0, 3.0]);
}

#[test]
fn updates_follow_outputs_and_equal_draws_are_one() {
    let mut b = Builder::default();
    let seed = b.input(Role::Data, TensorType::u32([2]));
    let state = b.input(Role::State, TensorType::f32([6]));
    let draw = |b: &mut Builder, id| {
        let shape = Shape::from([6]);
        b.push(Op::Random { id, shape }, &[seed])
    };
    let (r, again, other) = (
        draw(&mut b, 3).unwrap(),
        draw(&mut b, 3).unwrap(),
        draw(&mut b, 4).unwrap(),
    );
    assert_eq!(r, again);
    let next = b.map(ScalarOp::Add, &[state, r]).unwrap();
    let g = b.finish(
        vec![r, other],
        vec![Update {
            slot: 1,
            value: next,
        }],
    );
    let out = eval(&g, &[ids([2], &[5, 6]), val([6], &[1.0; 6])]).unwrap();
    assert_eq!(out.len(), 3);
    assert_ne!(out[0].data, out[1].data);
    let want: Vec<f64> = (0..6)
        .map(|i| 1.0 + f64::from(philox::uniform([5, 6], 3, i)))
        .collect();
    assert_eq!(out[2].data, want);
    assert!(eval(&g, &[ids([2], &[5, 6])]).is_err());
}
