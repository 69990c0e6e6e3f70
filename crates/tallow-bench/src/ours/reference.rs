//! What a result of tallow's, or of a peer, is held against: the oracle, a part of it, or other kernels.
//! Invariant: the tolerance is the rounding's own, element by element, where the oracle says what is right; only whole models
//! and what rounds to bf16 on the way are held to a part of the largest element.
//! Absent on purpose: which reference a work has; `suite` knows.

use tallow::Tensor;
use tallow::core::oracle::Value;
use tallow::core::oracle::bound::{Bounded, eval_bounded};
use tallow::core::tensor::lower;

use super::{Graphed, Operand, Ours, download, raw};
use crate::Result;
use crate::work::{Check, Furthest, Judge, Work as _};

/// Some elements of the first result, from operands given in the order they were made.
pub struct Sample {
    /// Which elements.
    pub at: Vec<usize>,
    /// What they should be: the same elements by each way of rounding that is right.
    pub want: Vec<Bounded>,
}

/// What a result is compared with.
pub enum Reference {
    /// The whole graph in the oracle.
    Whole,
    /// The whole graph, and within [`TWIN`] of the largest element: over many layers the rounding bound alone grows wide.
    Deep,
    /// A part of it, where the whole takes too long: for a seed and the operands, some elements of the first result.
    Sampled(SampleFn),
    /// The same work by other kernels, where even a part takes too long: within [`TWIN`] of the largest element.
    Twin(Judge, TwinFn),
}

/// Makes the other one.
pub type TwinFn = Box<dyn Fn() -> Result<Ours>>;

/// How far two sets of kernels may be apart, relative to the largest element of a result.
pub const TWIN: f64 = 2e-3;

/// How far the results of somebody who rounds everything to bf16 may be apart, relative to the largest element. Twice what
/// PyTorch shows over six layers; without its adapter a result is further off by far.
pub const HALF: f64 = 3e-2;

/// Over more layers than this roundings add up: one is as likely up as down, so as the root of their number.
pub(super) const LAYERS: f64 = 6.0;

/// The same of kernels that round the operands of products with bf16 weights, and nothing else.
pub(super) const PAIRS: f64 = 1.5e-2;

/// So many elements have a mean to be measured from.
const MANY: usize = 8;

/// See [`Reference::Sampled`].
pub type SampleFn = Box<dyn Fn(&[&[f64]], u64) -> Result<Sample>>;

impl Graphed {
    /// As [`Work::check`], of `got`.
    pub(super) fn check(&self, got: &[Vec<f64>], returned: f32) -> Result<Check> {
        let mut check = self.compare(got, None)?;
        let there = got.first().and_then(|g| g.last().copied());
        if there.map(|v| (v as f32).to_bits()) != Some(returned.to_bits()) {
            check.worst = f64::MAX;
        }
        Ok(check)
    }

    /// Elements of every operand of the graph, in its own order of leaves; `carried` in place of what is carried.
    fn values(&self, leaves: &[Tensor], carried: Option<&[Vec<f64>]>) -> Result<Vec<Value>> {
        let operands = self.operands.borrow();
        let one = |leaf: &Tensor| {
            let is = |t: &Tensor| raw(t) == raw(leaf);
            let at = self.subject.carried.iter().position(is);
            let data = match (at.zip(carried), operands.iter().find(|o| is(&o.leaf))) {
                (Some((i, values)), _) => values[i].clone(),
                (None, Some(o)) => o.host.clone(),
                (None, None) => download(&self.session, leaf)?,
            };
            Ok(Value::new(leaf.ty().clone(), data))
        };
        leaves.iter().map(one).collect()
    }

    /// Of all results and states those that are compared.
    pub(super) fn some_of<'a, T>(&self, all: &'a [T]) -> Vec<&'a T> {
        match &*self.some.borrow() {
            None => all.iter().collect(),
            Some(which) => which.iter().filter_map(|i| all.get(*i)).collect(),
        }
    }

    /// Compares `got`, the results, with the reference; `carried` replaces what is carried.
    pub(super) fn compare(&self, got: &[Vec<f64>], carried: Option<&[Vec<f64>]>) -> Result<Check> {
        let of = got.iter().map(Vec::len).sum();
        let mut errors = Errors::default();
        let mut by = Judge::Oracle;
        let half = self.half.get().map(|part| part * self.depth.get());
        match &self.subject.reference {
            Reference::Whole | Reference::Deep => {
                let low = lower(&self.outs, &self.subject.updates)?;
                let values = self.values(&low.leaves, carried)?;
                let want = eval_bounded(&low.graph, &values)?;
                for (i, (got, want)) in got.iter().zip(self.some_of(&want)).enumerate() {
                    errors.result = i;
                    if let Some(part) = half {
                        errors.rounded(got, want, part);
                        continue;
                    }
                    errors.add(got, want);
                    if matches!(self.subject.reference, Reference::Deep) {
                        errors.near(got, &want.value.data, TWIN);
                    }
                }
            }
            Reference::Sampled(sample) => {
                let operands = self.operands.borrow();
                let value = |o: &Operand| -> Vec<f64> {
                    let is = |t: &Tensor| raw(t) == raw(&o.leaf);
                    let at = self.subject.carried.iter().position(is);
                    match at.zip(carried) {
                        Some((i, values)) => values[i].clone(),
                        None => o.host.clone(),
                    }
                };
                let values: Vec<Vec<f64>> = operands.iter().map(value).collect();
                let values: Vec<&[f64]> = values.iter().map(Vec::as_slice).collect();
                let s = sample(&values, self.seed.get())?;
                let got: Vec<f64> = s.at.iter().map(|i| got[0][*i]).collect();
                let judged = s.want.iter().map(|want| {
                    let mut by_this = Errors::default();
                    match half {
                        Some(part) => by_this.rounded(&got, want, part),
                        None => by_this.add(&got, want),
                    }
                    by_this
                });
                if let Some(best) = judged.min_by(|a, b| a.worst.total_cmp(&b.worst)) {
                    errors = best;
                    if let Some(at) = &mut errors.at {
                        at.element = s.at[at.element];
                    }
                }
            }
            Reference::Twin(judge, make) => {
                by = *judge;
                let mut twin = make()?;
                twin.renew(self.seed.get())?;
                twin.feed(self.link.get())?;
                twin.start()?;
                for (i, (got, want)) in got.iter().zip(self.some_of(&twin.results()?)).enumerate() {
                    errors.result = i;
                    errors.near(got, want, half.unwrap_or(TWIN));
                    errors.compared += got.len();
                }
            }
        }
        // Elements that are not compared are at least there.
        if got.iter().flatten().any(|v| v.is_nan()) {
            errors.worst = f64::MAX;
        }
        Ok(Check {
            worst: errors.worst,
            compared: errors.compared,
            of,
            by,
            at: errors.at,
        })
    }
}

/// The largest error so far.
#[derive(Default)]
struct Errors {
    worst: f64,
    compared: usize,
    /// Which result is compared now, and where the largest error is.
    result: usize,
    at: Option<Furthest>,
}

impl Errors {
    fn add(&mut self, got: &[f64], want: &Bounded) {
        let wanted = want.value.data.iter().zip(want.tolerances());
        for (i, (got, (want, tolerance))) in got.iter().zip(wanted).enumerate() {
            self.off(i, *got, *want, tolerance);
        }
        self.compared += got.len();
    }

    fn rounded(&mut self, got: &[f64], want: &Bounded, part: f64) {
        self.near(got, &want.value.data, part);
        self.compared += got.len();
    }

    /// By another rule: within `part` of the largest element, or, of many in the first result, of what is furthest from their
    /// mean: losses are all near the logarithm of the vocabulary, and a part of that hides much. The norms of eight gradients
    /// are near each other as well, but there is no number that they would be near without having been computed: eight are
    /// held to what one is held to.
    fn near(&mut self, got: &[f64], want: &[f64], part: f64) {
        let mean = match self.result == 0 && want.len() >= MANY {
            true => want.iter().sum::<f64>() / want.len() as f64,
            false => 0.0,
        };
        let largest = want.iter().fold(0.0f64, |m, v| m.max((v - mean).abs()));
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            self.off(i, *got, *want, part * largest + 1e-30);
        }
    }

    fn off(&mut self, element: usize, got: f64, want: f64, tolerance: f64) {
        let off = (got - want).abs() / tolerance;
        let off = if off.is_finite() { off } else { f64::MAX };
        if off >= self.worst {
            self.worst = off;
            self.at = Some(Furthest {
                result: self.result,
                element,
                got,
                want,
            });
        }
    }
}
