//! A norm and the projection behind it: bare, with an adapter, and with the adapter's products as steps of their own.
//! Invariant: the rows of a task differ in the adapter and in nothing else; that the steps stay apart is tested, not believed.
//! Absent on purpose: what the steps would cost through a framework; peers have the product in the suite `seed`.

use tallow::{DType, LoraWeights, Session, Tensor, TensorType};

use super::products::{LoraShape, SCALE, sample};
use super::rows::EPS;
use super::{Context, Suite, Task};
use crate::Result;
use crate::measure::Contender;
use crate::ours::{Fill, Join, Operands, Ours, Reference, Subject};
use crate::probe::Cost;

/// Rank of the adapter.
const RANK: usize = 8;

/// What stands behind the norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behind {
    /// The projection.
    Bare,
    /// The projection with its adapter.
    Adapter,
    /// Three products, none of which meets another or the norm in a kernel.
    Steps,
}

/// 1 and 128 rows of 512 to 4096, by the type of the weights.
pub(super) fn tasks(cx: &Context) -> impl Iterator<Item = Task> {
    let sizes: &[usize] = match cx.quick {
        true => &[512, 2048],
        false => &[512, 1024, 2048, 4096],
    };
    let shapes = [1, 128]
        .into_iter()
        .flat_map(move |m| sizes.iter().map(move |k| (m, *k)));
    shapes.map(|(m, k)| Task {
        suite: Suite::Tax,
        name: format!("norm, then linear {m}x{k} @ {k}x{k}"),
        tokens: None,
        peers: vec![],
        make: Box::new(move |cx| {
            let sides = [
                ("bare".to_owned(), Behind::Bare),
                (format!("adapter, rank {RANK}"), Behind::Adapter),
                ("its products as steps".to_owned(), Behind::Steps),
            ];
            let one = |(name, behind)| side(cx, m, k, (name, behind));
            sides.into_iter().map(one).collect()
        }),
    })
}

fn side(cx: &Context, m: usize, k: usize, (name, behind): (String, Behind)) -> Result<Contender> {
    let shape = shape(m, k, behind);
    let work = work(&cx.session, shape, cx.dtype, behind)?;
    let product = shape.cost(cx.dtype);
    let cost = Cost {
        bytes: product.bytes + 4 * k,
        ..product
    };
    Ok(cx.ours(&name, work, &cost))
}

fn shape(m: usize, k: usize, behind: Behind) -> LoraShape {
    let rank = match behind {
        Behind::Bare => 0,
        Behind::Adapter | Behind::Steps => RANK,
    };
    LoraShape { m, k, n: k, rank }
}

fn work(session: &Session, shape: LoraShape, dtype: DType, behind: Behind) -> Result<Ours> {
    let LoraShape { m, k, n, rank } = shape;
    let mut o = Operands::new(session, 13);
    let [sw, sa, sb] = shape.scales();
    let x = o.data(TensorType::f32([m, k]), Fill::Signed(1.0))?;
    let norm = o.filled(&[k], DType::F32, Fill::Near(1.0))?;
    let w = o.weights(&[n, k], dtype, sw)?;
    let mut rng = fastrand::Rng::with_seed(14);
    let up: Vec<f64> = (0..n * rank)
        .map(|_| f64::from(sb * (2.0 * rng.f32() - 1.0)))
        .collect();
    let adapter = match behind {
        Behind::Bare => None,
        Behind::Adapter | Behind::Steps => Some((
            o.weights(&[rank, k], DType::F32, sa)?,
            o.filled(&[n, rank], DType::F32, Fill::Fixed(up.clone()))?,
        )),
    };
    // Steps have the scale in `B`, exactly: one step less.
    let scaled: Vec<f64> = up.iter().map(|v| v * f64::from(SCALE)).collect();
    let scaled = match behind {
        Behind::Steps => Some(o.filled(&[n, rank], DType::F32, Fill::Fixed(scaled))?),
        Behind::Bare | Behind::Adapter => None,
    };
    let again = move |x: &[Tensor]| {
        let x = x[0].rms_norm(&norm, EPS)?;
        let y = match (&adapter, &scaled) {
            (Some((a, _)), Some(b)) => in_steps(&x, &w, a, b)?,
            _ => {
                let all = adapter.clone().map(|(a, b)| (a, b, SCALE));
                let one = LoraWeights {
                    w: w.clone(),
                    bias: None,
                    adapters: vec![all],
                };
                x.linears(&[one], None)?
            }
        };
        Ok(vec![y])
    };
    let subject = Subject {
        carried: vec![x],
        again: Box::new(again),
        updates: vec![],
        join: Join::Feed,
        reference: Reference::Sampled(Box::new(move |v, seed| {
            let others: Vec<&[f64]> = std::iter::once(v[0])
                .chain(v[2..].iter().copied())
                .collect();
            sample(shape, dtype, Some((v[1], EPS)), &others, seed)
        })),
    };
    let ours = Ours::new(o, subject)?;
    Ok(match dtype {
        // What the norm gives may be rounded for the product, and a rounding that falls to the other side is no error.
        DType::BF16 => ours.in_half(),
        _ => ours,
    })
}

/// `x·Aᵀ`, that times `Bᵀ`, and `x·Wᵀ` with it added; a barrier stands wherever a step could join another.
fn in_steps(x: &Tensor, w: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let h = x.barrier(1)?.linear(a)?;
    let up = h.barrier(2)?.linear(b)?;
    let y = x.barrier(3)?.linear(w)?;
    Ok(y.add(&up.barrier(4)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::Work as _;

    fn session(dtype: DType) -> Session {
        tallow::open_with(&tallow::OpenOptions {
            device: "cpu".into(),
            threads: Some(2),
            weights: dtype,
            choose: tallow::Choose::Estimate,
        })
        .unwrap()
    }

    /// The steps, by what they compute.
    fn steps(behind: Behind) -> &'static [&'static str] {
        match behind {
            Behind::Bare => &["rms_norm", "linear"],
            Behind::Adapter => &["rms_norm", "lora_linear"],
            Behind::Steps => &["rms_norm", "linear", "linear", "linear"],
        }
    }

    #[test]
    fn all_sides_are_right_and_only_the_steps_are_steps() {
        for dtype in [DType::F32, DType::BF16] {
            let session = session(dtype);
            for behind in [Behind::Bare, Behind::Adapter, Behind::Steps] {
                for m in [1, 7] {
                    let mut work = work(&session, shape(m, 72, behind), dtype, behind).unwrap();
                    let names = work.plan().steps.iter().map(|s| s.spec.name());
                    assert_eq!(names.collect::<Vec<_>>(), steps(behind));
                    work.renew(3).unwrap();
                    work.feed(0.4).unwrap();
                    work.start().unwrap();
                    let y = work.finish().unwrap();
                    let check = work.check(y).unwrap();
                    assert!(check.pass(), "{dtype} {behind:?} {m}: {check:?}");
                }
            }
        }
    }

    #[test]
    fn a_dropped_adapter_or_norm_is_noticed() {
        for dtype in [DType::F32, DType::BF16] {
            let session = session(dtype);
            let made = |behind| {
                let mut work = work(&session, shape(7, 72, behind), dtype, behind).unwrap();
                work.renew(3).unwrap();
                work.feed(0.4).unwrap();
                work.start().unwrap();
                work
            };
            let mut with = made(Behind::Adapter);
            let y = with.take_results_of(&made(Behind::Bare));
            assert!(!with.check(y).unwrap().pass(), "{dtype}");
            let raw = LoraShape {
                m: 7,
                k: 72,
                n: 72,
                rank: RANK,
            };
            let mut raw = super::super::products::lora(&session, raw, dtype).unwrap();
            raw.renew(3).unwrap();
            raw.feed(0.4).unwrap();
            raw.start().unwrap();
            let y = with.take_results_of(&raw);
            assert!(!with.check(y).unwrap().pass(), "{dtype}");
        }
    }
}
