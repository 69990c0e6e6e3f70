//! The conformance suite on the card, and what a card has that the CPU has not: work that goes on after a call.
//! Invariant: a machine without a usable card prints why and passes; `TALLOW_REQUIRE_CUDA=1` makes that a failure.
use std::sync::{Arc, OnceLock};
use tallow_conformance::{
    Case, check_all, composites, distance, dtypes, inside, layouts, structural, training,
};
use tallow_core::{
    backend::Chooser,
    graph::Builder,
    kernel::{Candidate, KernelSpec},
    op::{
        Attention, AttentionGrad, Bits, Block, Composite, Linear, LinearGrad, Mask, Op, RmsNorm,
        RmsNormGrad, Role, SwiGlu,
    },
    oracle::sample,
    session::Session,
    types::{DType, TensorType},
};
use tallow_cuda::{Cuda, CudaOptions};

/// The card, opened once for all tests; `None`, with the reason printed, where there is none.
fn card() -> Option<Arc<Cuda>> {
    static CARD: OnceLock<Option<Arc<Cuda>>> = OnceLock::new();
    let open = || {
        let options = CudaOptions {
            ordinal: 0,
            weights: DType::F32,
        };
        match Cuda::open(&options) {
            Ok(c) => Some(Arc::new(c)),
            Err(e) => {
                assert!(
                    std::env::var_os("TALLOW_REQUIRE_CUDA").is_none(),
                    "TALLOW_REQUIRE_CUDA is set, but {e}"
                );
                eprintln!("SKIP: {e}");
                None
            }
        }
    };
    CARD.get_or_init(open).clone()
}

/// The dearest candidate: what is offered but seldom chosen is tested too.
struct Dearest;
impl Chooser for Dearest {
    fn choose(&self, _: &KernelSpec, c: &[Candidate]) -> tallow_core::Result<(usize, String)> {
        let dearest = (0..c.len()).max_by(|a, b| c[*a].cost.total_cmp(&c[*b].cost));
        Ok((dearest.unwrap_or(0), "dearest".into()))
    }
}

fn sessions() -> Vec<Session> {
    let Some(card) = card() else { return vec![] };
    vec![
        Session::new(card.clone()),
        Session::with_chooser(card, Box::new(Dearest)),
    ]
}

macro_rules! parts {
    ($($name:ident: $cases:ident;)*) => { $(
        #[test]
        fn $name() {
            for s in sessions() {
                check_all(&s, $cases());
            }
        }
    )* };
}
parts! {
    composites_match_their_decomposition: composites;
    structural_ops_match_the_oracle: structural;
    dtypes_convert_and_compute: dtypes;
    strided_operands_and_results: layouts;
    gradients_and_updates_of_a_small_model: training;
}

/// Replay n+1's data must not reach what replay n reads, however far the host is ahead.
#[test]
fn uploads_wait_for_the_replays_before_them() {
    let Some(card) = card() else { return };
    let s = Session::new(card);
    let n = 1 << 20;
    let x = s.zeros(TensorType::f32([n]), Role::Data).unwrap();
    let sum = s.zeros(TensorType::f32([n]), Role::State).unwrap();
    // A product long enough that the host gets many replays ahead of the card.
    let w = s
        .tensor(&vec![0.0; 2048 * 2048], [2048, 2048], Role::Data)
        .unwrap();
    let slow = w.matmul(&w).unwrap().matmul(&w).unwrap();
    let next = sum.add(&x).unwrap();
    let mut p = s.record(&[&slow], &[(sum.clone(), next)]).unwrap();
    let replays = 40;
    let start = std::time::Instant::now();
    for i in 0..replays {
        s.write(&x, &vec![i as f32; n]).unwrap();
        p.replay().unwrap();
    }
    let asked = start.elapsed();
    let got = s.read(&sum).unwrap();
    let all = start.elapsed();
    let want = (replays * (replays - 1) / 2) as f32;
    assert!(
        got.iter().all(|v| *v == want),
        "want {want} everywhere, got {:?}",
        &got[..4]
    );
    println!("asked for in {asked:?}, done after {all:?}");
}

/// A replay is asked for, not waited for.
#[test]
fn replay_returns_at_once() {
    let Some(card) = card() else { return };
    let s = Session::new(card);
    let w = s
        .tensor(&vec![0.0; 4096 * 4096], [4096, 4096], Role::Data)
        .unwrap();
    let slow = (0..8).fold(w.clone(), |x, _| x.matmul(&w).unwrap());
    let mut p = s.record(&[&slow], &[]).unwrap();
    p.replay().unwrap();
    s.read(&p.outputs[0]).unwrap();
    let start = std::time::Instant::now();
    p.replay().unwrap();
    let asked = start.elapsed();
    let mut one = [0u8; 4];
    let buffer = p.outputs[0].buffer().unwrap();
    s.backend().download(buffer, 0, &mut one).unwrap();
    let done = start.elapsed();
    assert!(asked * 4 < done, "asked in {asked:?}, done in {done:?}");
}

/// Equal runs give equal bits.
#[test]
fn two_runs_agree_to_the_bit() {
    let Some(card) = card() else { return };
    let s = Session::new(card);
    let values = |n: usize, k: f32| (0..n).map(|i| ((i as f32) * k).sin()).collect::<Vec<_>>();
    let x = s
        .tensor(&values(600 * 96, 0.37), [600, 96], Role::Data)
        .unwrap();
    let d = s
        .tensor(&values(600 * 8, 0.11), [600, 8], Role::Data)
        .unwrap();
    let y = x.exp().unwrap().matmul_t(true, &d, false).unwrap();
    let run = || {
        s.read(&s.eval(std::slice::from_ref(&y)).unwrap()[0])
            .unwrap()
    };
    let first: Vec<u32> = run().iter().map(|v| v.to_bits()).collect();
    for _ in 0..5 {
        let again: Vec<u32> = run().iter().map(|v| v.to_bits()).collect();
        assert_eq!(first, again);
    }
}

#[test]
fn what_does_not_fit_is_said_in_one_sentence() {
    let Some(card) = card() else { return };
    let s = Session::new(card);
    let Err(e) = s.zeros(TensorType::f32([1 << 43]), Role::Data) else {
        panic!("32 TiB were given");
    };
    let text = e.to_string();
    assert!(
        text.starts_with("cuda:0: no memory on the card for 35184372088832 bytes ("),
        "{text}"
    );
}

#[test]
fn an_unknown_card_is_said_in_one_sentence() {
    if card().is_none() {
        return;
    }
    let options = CudaOptions {
        ordinal: 4096,
        weights: DType::F32,
    };
    let Err(e) = Cuda::open(&options) else {
        panic!("opened")
    };
    assert!(
        e.to_string()
            .starts_with("cuda:4096: no CUDA device 4096: the driver sees "),
        "{e}"
    );
}

fn rounding() -> Session {
    let options = CudaOptions {
        ordinal: 0,
        weights: DType::BF16,
    };
    Session::new(Arc::new(Cuda::open(&options).unwrap()))
}

/// Runs `cases` in bf16: within two percent of the oracle in norm, and at least a quarter of the results rounded,
/// which shows that bf16 ran. The gradient of softmax is a difference of which little may be left where a query sees few
/// keys, as in the examples: five percent were seen there.
fn near(s: &Session, cases: Vec<Case>) {
    let (mut bad, mut rounded, mut count) = (vec![], 0, 0);
    for case in &cases {
        let few_keys = case.name.starts_with("attention_grad example");
        let most = if few_keys { 1e-1 } else { 2e-2 };
        for d in distance(s, case).unwrap() {
            count += 1;
            rounded += usize::from(d > 1e-5);
            if d.is_nan() || d > most {
                bad.push(format!("{}: {d:.2e}", case.name));
            }
        }
    }
    assert!(
        bad.is_empty(),
        "{} of {count} too far:\n{}",
        bad.len(),
        bad.join("\n")
    );
    assert!(
        rounded * 4 > count,
        "only {rounded} of {count} results were rounded: bf16 did not run"
    );
}

/// Examples of these composites whose weights never change: only those are rounded.
fn frozen(ops: &[&str]) -> Vec<Case> {
    let all = composites().into_iter();
    let wanted = |c: &Case| ops.contains(&c.name.split(' ').next().unwrap_or_default());
    all.filter(|c| wanted(c) && c.name.contains("Frozen"))
        .collect()
}

const PRODUCTS: [&str; 7] = [
    "attention",
    "attention_grad",
    "linear",
    "lora_linear",
    "lora_linear_grad",
    "linear_grad",
    "cross_entropy",
];

#[test]
fn products_in_bf16_are_near_the_oracle() {
    if card().is_some() {
        near(&rounding(), frozen(&PRODUCTS));
    }
}

/// Between two kernels values are stored in bf16 too.
#[test]
fn intermediates_in_bf16_are_near_the_oracle() {
    if card().is_none() {
        return;
    }
    let others = [
        "rms_norm",
        "rms_norm_grad",
        "swiglu",
        "swiglu_grad",
        "rope",
        "dropout",
    ];
    let ops = [&PRODUCTS[..], &others].concat();
    let cases: Vec<Case> = frozen(&ops).iter().map(|c| inside(c).unwrap()).collect();
    let s = rounding();
    near(&s, cases);
}

/// Heads as models have them, several tiles of queries and keys; and `dy` so much wider than `dx` that it is not copied.
#[test]
fn shapes_of_training_are_near_the_oracle() {
    let case = |(c, tys): (Composite, Vec<TensorType>)| {
        let mut b = Builder::default();
        let ins: Vec<_> = (tys.iter().map(|t| b.input(Role::Frozen, t.clone()))).collect();
        let outs = b.composite(c.clone(), &ins).unwrap();
        let case = Case {
            name: format!("{} {tys:?}", c.name()),
            graph: b.finish(outs, vec![]),
            inputs: sample::operands(&c, &tys, 31),
        };
        inside(&case).unwrap()
    };
    let all = attention_of_models().into_iter().chain(many_rows());
    let cases = all.chain([wide_grad()]).chain(shared());
    let cases: Vec<Case> = cases.map(case).collect();
    if card().is_some() {
        near(&rounding(), cases);
    }
}

/// Both directions of attention over heads of 64 to 128, with one document in a row and with several.
fn attention_of_models() -> Vec<(Composite, Vec<TensorType>)> {
    let (b, t, s) = (2, 150, 200);
    let mut all = vec![];
    for (h, hk, d, window, packed, cap) in [
        (7, 1, 64, None, false, None),
        (4, 2, 64, Some(90), false, None),
        (2, 2, 64, None, true, None),
        (4, 2, 64, Some(90), true, Some(0.5)),
        (2, 1, 64, None, false, Some(50.0)),
        (4, 1, 128, None, false, None),
        (2, 1, 128, Some(90), true, Some(0.5)),
        (2, 1, 72, None, true, None),
    ] {
        let mask = Mask::Causal { window };
        let a = Attention {
            scale: 0.125.into(),
            mask,
            cap: cap.map(Bits::from),
        };
        let (q, kv) = ([b, t, h, d], [b, s, hk, d]);
        let mut ins = vec![TensorType::f32(q), TensorType::f32(kv), TensorType::f32(kv)];
        ins.push(TensorType::u32([b, t]));
        let starts = packed.then(|| TensorType::u32([b, t]));
        let lse = TensorType::f32([b, h, t]);
        let mut grad = ins.clone();
        grad.extend([TensorType::f32(q), lse, TensorType::f32(q)]);
        ins.extend(starts.clone());
        grad.extend(starts);
        all.push((AttentionGrad(a.clone()).into(), grad));
        all.push((a.into(), ins));
    }
    all
}

/// Norms of more rows than get a block each.
fn many_rows() -> Vec<(Composite, Vec<TensorType>)> {
    let mut all: Vec<(Composite, Vec<TensorType>)> = vec![];
    for (rows, c) in [(517, 200), (600, 77)] {
        let (x, w) = (TensorType::f32([rows, c]), TensorType::f32([c]));
        let (eps, residual) = (1e-5.into(), c == 200);
        all.push((RmsNorm { eps }.into(), vec![x.clone(), w.clone()]));
        let mut ins = vec![x.clone(), w, x.clone()];
        ins.extend(residual.then_some(x));
        all.push((RmsNormGrad { eps, residual }.into(), ins));
    }
    all
}

fn wide_grad() -> (Composite, Vec<TensorType>) {
    let (m, k) = (70, 24);
    let blocks: Vec<Block> = [(96, 8), (72, 5)]
        .map(|(n, r)| Block {
            n,
            bias: false,
            adapters: vec![Some((r, 1.5.into()))],
        })
        .into();
    let mut ins = vec![TensorType::f32([m, 96 + 72])];
    for (n, r) in [(96, 8), (72, 5)] {
        ins.extend([[n, k], [r, k], [n, r]].map(TensorType::f32));
    }
    ins.push(TensorType::f32([m, k]));
    let op = LinearGrad {
        blocks,
        residual: true,
    };
    (op.into(), ins)
}

/// Both directions of projections whose rows are divided into shares with adapters of their own: of one row, of no whole
/// block, of many; extents on 16 bytes and not; `dy` copied and not.
fn shared() -> Vec<(Composite, Vec<TensorType>)> {
    let sizes: [(usize, usize, usize, [usize; 3]); 7] = [
        (2, 37, 72, [40, 24, 32]),
        (4, 19, 72, [40, 24, 32]),
        (4, 301, 136, [64, 40, 8]),
        (2, 35, 24, [96, 72, 8]),
        (4, 21, 33, [17, 5, 9]),
        (8, 67, 512, [64, 64, 64]),
        (9, 1, 64, [24, 8, 16]),
    ];
    let both = |(shares, m, k, ns): (usize, usize, usize, [usize; 3])| {
        let kinds = ns.into_iter().zip([(8, true), (0, false), (5, false)]);
        let kinds = kinds.map(|(n, (r, bias))| (n, r, bias));
        let block = |(n, r, bias): (usize, usize, bool)| Block {
            n,
            bias,
            adapters: (0..shares)
                .map(|g| (r > 0).then_some((r, (0.5 + g as f32).into())))
                .collect(),
        };
        let blocks: Vec<Block> = kinds.clone().map(block).collect();
        let (rows, outputs) = (shares * m, ns.iter().sum());
        let (x, y) = ([rows, k], [rows, outputs]);
        let ins = |first: [usize; 2], last: Option<[usize; 2]>, biases: bool| {
            let mut ins = vec![first];
            for (n, r, _) in kinds.clone() {
                ins.push([n, k]);
                let all = (0..shares * usize::from(r > 0)).flat_map(|_| [[r, k], [n, r]]);
                ins.extend(all);
            }
            ins.extend(last);
            let mut tys: Vec<_> = ins.into_iter().map(TensorType::f32).collect();
            if biases {
                tys.insert(2, TensorType::f32([ns[0]]));
            }
            tys
        };
        [false, true].map(|residual| {
            let blocks = blocks.clone();
            let forward = Linear {
                blocks: blocks.clone(),
                residual,
            };
            let backward = LinearGrad { blocks, residual };
            [
                (forward.into(), ins(x, residual.then_some(y), true)),
                (backward.into(), ins(y, residual.then_some(x), false)),
            ]
        })
    };
    sizes.into_iter().flat_map(both).flatten().collect()
}

/// `dA = dhᵀ x` and `dB = dyᵀ h` where the wide side is an intermediate in bf16.
#[test]
fn outer_products_of_intermediates_are_near_the_oracle() {
    if card().is_none() {
        return;
    }
    let case = |(rows, few, many, turned): (usize, usize, usize, bool)| {
        let mut b = Builder::default();
        let wide = || TensorType::f32([rows, many]);
        let tys = [wide(), wide(), TensorType::f32([rows, few])];
        let ins = tys.each_ref().map(|t| b.input(Role::Data, t.clone()));
        let y = b.push(Op::Composite(SwiGlu.into()), &ins[..2]).unwrap();
        let sides = if turned { [y, ins[2]] } else { [ins[2], y] };
        let out = b.matmul(sides[0], true, sides[1], false).unwrap();
        let inputs = (0u32..).zip(&tys).map(|(i, t)| sample::random(t, 5, 77, i));
        Case {
            name: format!("outer {rows} {few} {many} {turned}"),
            inputs: inputs.collect(),
            graph: b.finish(vec![out], vec![]),
        }
    };
    let sizes = [
        (300, 8, 96),
        (513, 5, 97),
        (600, 16, 64),
        (4096, 24, 130),
        (256, 33, 40),
    ];
    let both = sizes
        .into_iter()
        .flat_map(|(r, f, m)| [(r, f, m, false), (r, f, m, true)]);
    near(&rounding(), both.map(case).collect());
}
