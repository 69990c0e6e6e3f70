//! Products with and without an adapter: 128x512 @ 512x8, where this project began, and LoRA forwards.
//! Invariant: the oracle judges rows and columns drawn anew each time, the first and the last among them.

use tallow::core::element::to_bf16;
use tallow::core::graph::Builder;
use tallow::core::op::{Block, Linear, RmsNorm};
use tallow::core::oracle::Value;
use tallow::core::oracle::bound::{Bounded, eval_bounded};
use tallow::{DType, LoraWeights, Role, Session, TensorType};

use super::{Context, Suite, Task};
use crate::Result;
use crate::ours::{Fill, Join, Operands, Ours, Reference, Sample, Subject};
use crate::peer::Job;
use crate::probe::Cost;

/// Factor on the adapter's branch.
pub const SCALE: f32 = 2.0;
/// Rows and columns that the oracle computes.
const SAMPLED: [usize; 2] = [6, 48];

/// `y = x·Wᵀ + scale·(x·Aᵀ)·Bᵀ`: `x [m, k]`, `W [n, k]`, `A [rank, k]`, `B [n, rank]`; rank 0 is the bare product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoraShape {
    /// Rows of x.
    pub m: usize,
    /// Values in.
    pub k: usize,
    /// Values out.
    pub n: usize,
    /// Of the adapter; 0: none.
    pub rank: usize,
}

impl LoraShape {
    /// Least bytes and arithmetic, with weights of `dtype` and all else in f32.
    #[must_use]
    pub fn cost(&self, dtype: DType) -> Cost {
        let Self { m, k, n, rank } = *self;
        let adapter = rank * (n + k);
        Cost {
            bytes: dtype.bytes() * n * k + 4 * (m * k + m * n + adapter),
            flops: 2.0 * (m * n * k + m * adapter) as f64,
            dtype,
        }
    }

    /// Sizes of random operands that keep results near 1, however often they are fed back: `W`, `A`, `B`.
    #[must_use]
    pub fn scales(&self) -> [f32; 3] {
        let (k, r) = (self.k as f32, self.rank.max(1) as f32);
        [
            0.9 * (3.0 / k).sqrt(),
            (3.0 / k).sqrt(),
            0.15 * (3.0 / r).sqrt(),
        ]
    }
}

impl std::fmt::Display for LoraShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { m, k, n, rank } = self;
        match rank {
            0 => write!(f, "{m}x{k} @ {k}x{n}"),
            _ => write!(f, "LoRA forward {m}x{k} @ {k}x{n}, rank {rank}"),
        }
    }
}

/// The work in tallow.
///
/// # Errors
/// No memory.
pub fn lora(session: &Session, shape: LoraShape, dtype: DType) -> Result<Ours> {
    filled(session, shape, dtype, Fill::Signed)
}

/// The same with operands that are exact in bf16.
///
/// # Errors
/// No memory.
pub fn lora_half(session: &Session, shape: LoraShape) -> Result<Ours> {
    filled(session, shape, DType::BF16, Fill::Half)
}

fn filled(
    session: &Session,
    shape: LoraShape,
    dtype: DType,
    fill: fn(f32) -> Fill,
) -> Result<Ours> {
    let LoraShape { m, k, n, rank } = shape;
    let mut o = Operands::new(session, 11);
    let [sw, sa, sb] = shape.scales();
    let x = o.data(TensorType::f32([m, k]), fill(1.0))?;
    let w = o.weights(&[n, k], dtype, sw)?;
    let adapter = match rank {
        0 => None,
        r => {
            let a = o.filled(&[r, k], DType::F32, fill(sa))?;
            let b = o.filled(&[n, r], DType::F32, fill(sb))?;
            Some((a, b, SCALE))
        }
    };
    let weights = LoraWeights {
        w,
        bias: None,
        adapters: vec![adapter],
    };
    let subject = Subject {
        carried: vec![x],
        again: Box::new(move |x| Ok(vec![x[0].linears(std::slice::from_ref(&weights), None)?])),
        updates: vec![],
        join: if k == n { Join::Feed } else { Join::Add },
        reference: Reference::Sampled(Box::new(move |v, seed| sample(shape, dtype, None, v, seed))),
    };
    Ours::new(o, subject)
}

/// Some rows and columns of the result: the same op, in the oracle, over the rows of `x` and `W` that they need; behind a
/// norm with weights and an epsilon, where there is one.
/// With weights in bf16 a kernel may round `x` for the product with `W`, exactly, or take it as it is: both are right.
pub(super) fn sample(
    shape: LoraShape,
    dtype: DType,
    norm: Option<(&[f64], f32)>,
    v: &[&[f64]],
    seed: u64,
) -> Result<Sample> {
    let LoraShape { m, k, n, rank } = shape;
    let mut rng = fastrand::Rng::with_seed(seed ^ 0x5eed);
    let rows = some(m, SAMPLED[0], &mut rng);
    let cols = some(n, SAMPLED[1], &mut rng);
    let take = |of: &[f64], which: &[usize], wide: usize| -> Vec<f64> {
        let row = |i: &usize| of[i * wide..(i + 1) * wide].to_vec();
        which.iter().flat_map(row).collect()
    };
    let f32s = |shape: [usize; 2], data: Vec<f64>| Value::new(TensorType::f32(shape), data);
    let x = f32s([rows.len(), k], take(v[0], &rows, k));
    let wide = TensorType::new([cols.len(), k], dtype);
    let w = Value::new(wide, take(v[1], &cols, k));
    let adapter = (rank > 0).then(|| {
        let up = take(v[3], &cols, rank);
        [f32s([rank, k], v[2].to_vec()), f32s([cols.len(), rank], up)]
    });
    let norm = norm.map(|(w, eps)| (Value::new(TensorType::f32([k]), w.to_vec()), eps));
    let exact = product(&x, norm.as_ref(), &w, adapter.as_ref())?;
    let mut want = vec![exact];
    if dtype == DType::BF16 && norm.is_none() {
        let rounded = x.data.iter().map(|v| to_bf16(*v).to_f64());
        let rounded = product(&f32s([rows.len(), k], rounded.collect()), None, &w, None)?;
        let bare = product(&x, None, &w, None)?;
        let mut with = want[0].clone();
        let differences = rounded.value.data.iter().zip(&bare.value.data);
        for (to, (r, b)) in with.value.data.iter_mut().zip(differences) {
            *to += r - b;
        }
        want.push(with);
    }
    let at = rows
        .iter()
        .flat_map(|i| cols.iter().map(move |j| i * n + j));
    Ok(Sample {
        at: at.collect(),
        want,
    })
}

/// The op in the oracle.
fn product(
    x: &Value,
    norm: Option<&(Value, f32)>,
    w: &Value,
    adapter: Option<&[Value; 2]>,
) -> Result<Bounded> {
    let mut b = Builder::default();
    let operands: Vec<&Value> = [x, w]
        .into_iter()
        .chain(adapter.into_iter().flatten())
        .collect();
    let mut ins: Vec<_> = operands
        .iter()
        .map(|v| b.input(Role::Data, v.ty.clone()))
        .collect();
    let mut values: Vec<Value> = operands.into_iter().cloned().collect();
    if let Some((weights, eps)) = norm {
        let weight = b.input(Role::Data, weights.ty.clone());
        let eps = (*eps).into();
        ins[0] = b.composite(RmsNorm { eps }, &[ins[0], weight])?[0];
        values.push(weights.clone());
    }
    let block = Block {
        n: w.ty.shape.0[0],
        bias: false,
        adapters: vec![adapter.map(|[a, _]| (a.ty.shape.0[0], SCALE.into()))],
    };
    let op = Linear {
        blocks: vec![block],
        residual: false,
    };
    let y = b.composite(op, &ins)?;
    Ok(eval_bounded(&b.finish(y, vec![]), &values)?.remove(0))
}

/// Up to `count` different numbers below `n`, the first and the last among them.
fn some(n: usize, count: usize, rng: &mut fastrand::Rng) -> Vec<usize> {
    let mut all = vec![0, n - 1];
    all.extend((0..count.saturating_sub(2)).map(|_| rng.usize(..n)));
    all.sort_unstable();
    all.dedup();
    all
}

/// The product that this project began with.
pub const FIRST: LoraShape = LoraShape {
    m: 128,
    k: 512,
    n: 8,
    rank: 0,
};

/// A task of one shape.
#[must_use]
pub fn task(shape: LoraShape) -> Task {
    Task {
        suite: Suite::Seed,
        name: shape.to_string(),
        tokens: None,
        peers: vec![(String::new(), Job::Lora(shape))],
        make: Box::new(move |cx: &Context| {
            let work = lora(&cx.session, shape, cx.dtype)?;
            Ok(vec![cx.ours("tallow", work, &shape.cost(cx.dtype))])
        }),
    }
}

/// The product, others as thin, and the LoRA forwards of the suite.
#[must_use]
pub fn tasks(cx: &Context) -> Vec<Task> {
    let (sizes, ranks): (&[usize], &[usize]) = match cx.quick {
        true => (&[512, 1024, 2048], &[8]),
        false => (&[512, 1024, 2048, 4096], &[0, 4, 8, 16, 32, 64]),
    };
    let mut all = vec![task(FIRST)];
    if !cx.quick {
        let thin = |m: usize, n: usize| task(LoraShape { m, n, ..FIRST });
        let rows = [1, 8, 128, 512].into_iter();
        let all_thin = rows.flat_map(|m| [4, 8, 16, 32, 64].map(|n| (m, n)));
        all.extend(
            all_thin
                .filter(|t| *t != (FIRST.m, FIRST.n))
                .map(|(m, n)| thin(m, n)),
        );
    }
    for m in [1, 128] {
        for k in sizes {
            let shape = |rank: &usize| LoraShape {
                m,
                k: *k,
                n: *k,
                rank: *rank,
            };
            all.extend(ranks.iter().map(|r| task(shape(r))));
        }
    }
    all
}
