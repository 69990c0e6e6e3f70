//! What single kernels must do beyond the examples that every op brings: large angles, values that are no numbers, sums
//! over many workgroups.
//! Invariant: expectations come from the oracle or from f64 arithmetic written here, never from a kernel.
use super::{Way, gpu};
use std::sync::Arc;
use tallow_conformance::{Case, check_all};
use tallow_core::{
    graph::Builder,
    op::{
        Attention, AttentionGrad, Bits, Composite, CrossEntropy, Mask, Op, ReduceOp, Role, Rope,
        Top,
    },
    oracle::{Value, sample},
    session::Session,
    tensor::{Tensor, lift},
    types::{DType, TensorType},
};

fn session() -> Option<Session> {
    Some(Session::new(gpu(Way::Usual)? as Arc<_>))
}

/// `c` on operands of these types, drawn at random: a case for the oracle.
fn case(c: impl Into<Composite>, tys: &[TensorType]) -> Case {
    let (c, seed) = (c.into(), 77);
    let mut b = Builder::default();
    let ins: Vec<_> = tys.iter().map(|t| b.input(Role::Data, t.clone())).collect();
    let outs = b.composite(c.clone(), &ins).unwrap();
    Case {
        name: format!("{} {tys:?}", c.name()),
        graph: b.finish(outs, vec![]),
        inputs: sample::operands(&c, tys, seed),
    }
}

/// The results of `c` on these operands.
fn results(s: &Session, c: impl Into<Composite>, leaves: &[Tensor]) -> Vec<Vec<f32>> {
    let mut b = Builder::default();
    let ty = |t: &Tensor| TensorType::new(t.shape().clone(), t.dtype());
    let ins: Vec<_> = leaves.iter().map(|t| b.input(Role::Data, ty(t))).collect();
    let outs = b.composite(c, &ins).unwrap();
    let outs = lift(&b.finish(outs, vec![]), leaves);
    let made = s.eval(&outs).unwrap();
    made.iter().map(|t| s.read(t).unwrap()).collect()
}

/// Angles of many turns are as exact as small ones: a long context must not blur.
#[test]
fn rotations_are_exact_at_far_positions() {
    let Some(s) = session() else { return };
    let (d, pos) = (64usize, [0u32, 1, 7, 1000, 65_537, 131_071, 16_000_001]);
    let f: Vec<f32> = (0..d / 2)
        .map(|i| 10_000f32.powf(-2.0 * i as f32 / d as f32))
        .collect();
    let x: Vec<f32> = (0..pos.len() * d).map(|i| (i as f32 * 0.7).sin()).collect();
    let leaves = [
        s.tensor(&x, [1, pos.len(), 1, d], Role::Data).unwrap(),
        s.tensor_u32(&pos, [1, pos.len()], Role::Data).unwrap(),
        s.tensor(&f, [d / 2], Role::Data).unwrap(),
    ];
    let got = &results(&s, Rope { inverse: false }, &leaves)[0];
    for (t, p) in pos.iter().enumerate() {
        for i in 0..d / 2 {
            // The angle is an f32 product; what follows has no rounding of its own to speak of.
            let angle = f64::from(*p as f32 * f[i]);
            let (low, high) = (f64::from(x[t * d + i]), f64::from(x[t * d + i + d / 2]));
            let want = low * angle.cos() - high * angle.sin();
            let off = (f64::from(got[t * d + i]) - want).abs();
            assert!(off < 5e-7, "position {p}, pair {i}: off by {off:.1e}");
        }
    }
}

/// Infinities, ties, both zeros and a NaN, in one part of a row and in the second.
#[test]
fn the_top_of_values_that_are_no_numbers() {
    let Some(s) = session() else { return };
    for v in [33usize, 5000] {
        let last = v - 1;
        let mut rows = vec![vec![-1.0f32; v]; 6];
        rows[0][last] = f32::INFINITY;
        rows[1].fill(f32::NEG_INFINITY);
        rows[2][last] = f32::NAN;
        (rows[3][3], rows[3][last]) = (2.5, 2.5);
        (rows[4][5], rows[4][last]) = (-0.0, 0.0);
        rows[5][last] = 1e-40;
        let want = [last, 0, v, 3, 5, last];
        let flat = s.tensor(&rows.concat(), [6, v], Role::Data).unwrap();
        let got = &results(&s, Top, &[flat])[0];
        for (r, want) in want.into_iter().enumerate() {
            assert_eq!(got[2 * r], want as f32, "row {r} of {v}");
        }
        assert_eq!([got[1], got[3]], [f32::INFINITY, f32::NEG_INFINITY]);
        assert_eq!([got[7], got[9], got[11]], [2.5, 0.0, 1e-40]);
    }
}

/// Tables of some pieces at a binding of 4 KiB.
pub(crate) fn tables() -> Vec<Case> {
    let weight = |d: DType| TensorType::new([130, 40], d);
    let cross = |d: DType| {
        let tys = [TensorType::f32([33, 40]), weight(d), TensorType::u32([33])];
        case(CrossEntropy, &tys)
    };
    // Each operand below its bound.
    let of_rows = |name: String, op: Op, tys: [TensorType; 2], bounds: [u32; 2]| {
        let mut b = Builder::default();
        let ins = tys.clone().map(|t| b.input(Role::Data, t));
        let out = b.push(op, &ins).unwrap();
        let inputs = (0..2).map(|i| sample::random(&tys[i], bounds[i], 3, i as u32));
        Case {
            name,
            graph: b.finish(vec![out], vec![]),
            inputs: inputs.collect(),
        }
    };
    let gather = |d: DType| {
        let tys = [weight(d), TensorType::u32([77])];
        let name = format!("gather of pieces of {d}");
        of_rows(name, Op::Gather(DType::F32), tys, [5, 131])
    };
    let tys = [TensorType::u32([77]), TensorType::f32([77, 41])];
    let scatter = of_rows(
        "scatter to pieces".into(),
        Op::ScatterAdd(130),
        tys,
        [131, 5],
    );
    let reduce = |axis: usize| {
        let ty = TensorType::f32([50, 33, 7]);
        let mut b = Builder::default();
        let x = b.input(Role::Data, ty.clone());
        let out = b.push(Op::Reduce(ReduceOp::Sum, axis), &[x]).unwrap();
        Case {
            name: format!("reduce of pieces along {axis}"),
            graph: b.finish(vec![out], vec![]),
            inputs: vec![sample::random(&ty, 5, 3, 0)],
        }
    };
    let both = [DType::F32, DType::BF16];
    let reduced = [1, 2].map(reduce).into_iter();
    let gathered = both.map(gather).into_iter().chain(reduced);
    let all = both.map(cross).into_iter().chain(gathered);
    all.chain([scatter]).collect()
}

/// More logits than are held at a time.
#[test]
fn cross_entropy_in_several_chunks() {
    let Some(s) = session() else { return };
    let (n, v) = (66, 260_000);
    let tys = [
        TensorType::f32([n, 1]),
        TensorType::f32([v, 1]),
        TensorType::u32([n]),
    ];
    check_all(&s, vec![case(CrossEntropy, &tys)]);
}

/// Weights in bf16 are read as they lie.
#[test]
fn cross_entropy_over_weights_in_bf16() {
    let Some(s) = session() else { return };
    let tys = [
        TensorType::f32([33, 40]),
        TensorType::new([67, 40], DType::BF16),
        TensorType::u32([33]),
    ];
    check_all(&s, vec![case(CrossEntropy, &tys)]);
}

fn attention([b, t, h, hk, d, s]: [usize; 6]) -> (Attention, Vec<TensorType>) {
    let (q, kv) = (
        TensorType::f32([b, t, h, d]),
        TensorType::f32([b, s, hk, d]),
    );
    let a = Attention {
        scale: (1.0 / (d as f32).sqrt()).into(),
        mask: Mask::Causal { window: None },
        cap: None,
    };
    (a, vec![q, kv.clone(), kv, TensorType::u32([b, t])])
}

/// One query over more parts than a workgroup has threads; and the longest heads.
#[test]
fn attention_over_many_keys_and_long_heads() {
    let Some(s) = session() else { return };
    let mut all = vec![];
    for sizes in [[3, 1, 4, 2, 64, 4500], [1, 33, 2, 1, 200, 34]] {
        let (a, tys) = attention(sizes);
        all.push(case(a, &tys));
    }
    for cap in [None, Some(0.5)] {
        let (mut a, tys) = attention([1, 33, 2, 1, 256, 34]);
        a.cap = cap.map(Bits::from);
        let (q, lse) = (tys[0].clone(), TensorType::f32([1, 2, 33]));
        let grad = [&tys[..], &[q.clone(), lse, q]].concat();
        all.push(case(AttentionGrad(a.clone()), &grad));
        all.extend(cap.map(|_| case(a, &tys)));
    }
    check_all(&s, all);
}

/// Sums over many workgroups are made in one order.
#[test]
fn gradients_of_attention_repeat_to_the_bit() {
    let Some(s) = session() else { return };
    let (a, tys) = attention([2, 70, 4, 2, 16, 70]);
    let q = tys[0].clone();
    let tys = [&tys[..], &[q.clone(), TensorType::f32([2, 4, 70]), q]].concat();
    let c = Composite::from(AttentionGrad(a));
    let leaf = |v: &Value| {
        let f32s: Vec<f32> = v.data.iter().map(|x| *x as f32).collect();
        let u32s: Vec<u32> = v.data.iter().map(|x| *x as u32).collect();
        match v.ty.dtype {
            DType::U32 => s.tensor_u32(&u32s, v.ty.shape.clone(), Role::Data),
            _ => s.tensor(&f32s, v.ty.shape.clone(), Role::Data),
        }
    };
    let leaves: Vec<Tensor> = sample::operands(&c, &tys, 3)
        .iter()
        .map(|v| leaf(v).unwrap())
        .collect();
    let run = || {
        let made = results(&s, c.clone(), &leaves).concat();
        made.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
    };
    let first = run();
    assert!(first.iter().any(|b| *b != 0));
    for _ in 0..2 {
        assert!(first == run(), "two runs differ");
    }
}
