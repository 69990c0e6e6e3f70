//! tallow as a work under the clock: a graph with random operands, its plan, the same in a chain, and the oracle.
//! Invariant: operands are uploaded and results poisoned through the device's own calls, so the clock times what a
//! user would run; the oracle gets the operands as the device holds them, rounded to their dtype.
//! Absent on purpose: which graphs; `suite` knows.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use half::bf16;
use tallow::core::oracle::Value;
use tallow::core::oracle::bound::{Bounded, eval_bounded};
use tallow::core::tensor::lower;
use tallow::{DType, Plan, Program, Role, Session, Tensor, TensorType};

use crate::Result;
use crate::work::{Chained, Check, Clock, Judge, Looped, Work, link};

mod chain;
pub mod judge;

/// What an operand is filled with.
#[derive(Clone, Debug, PartialEq)]
pub enum Fill {
    /// Uniform in `±`.
    Signed(f32),
    /// The same, exact in bf16.
    Half(f32),
    /// Uniform from a tenth of it up to it.
    Positive(f32),
    /// Uniform within a tenth around it.
    Near(f32),
    /// Whole numbers below it.
    Below(u32),
    /// The index along the last axis.
    Positions,
    /// These.
    Fixed(Vec<f64>),
}

impl Fill {
    fn draw(&self, ty: &TensorType, rng: &mut fastrand::Rng) -> Vec<f64> {
        let n = ty.shape.numel();
        let stored = |v: f32| match ty.dtype {
            DType::BF16 => bf16::from_f32(v).to_f64(),
            _ => f64::from(v),
        };
        match self {
            Fill::Signed(s) => (0..n)
                .map(|_| stored(s * (2.0 * rng.f32() - 1.0)))
                .collect(),
            Fill::Half(s) => (0..n)
                .map(|_| bf16::from_f32(s * (2.0 * rng.f32() - 1.0)).to_f64())
                .collect(),
            Fill::Positive(s) => (0..n)
                .map(|_| stored(s * (0.1 + 0.9 * rng.f32())))
                .collect(),
            Fill::Near(s) => (0..n)
                .map(|_| stored(s * (0.9 + 0.2 * rng.f32())))
                .collect(),
            Fill::Below(limit) => (0..n).map(|_| f64::from(rng.u32(..*limit))).collect(),
            Fill::Positions => (0..n).map(|i| (i % ty.shape.last()) as f64).collect(),
            Fill::Fixed(v) => v.clone(),
        }
    }
}

/// One operand: on the device, and its elements as the device holds them.
struct Operand {
    leaf: Tensor,
    fill: Fill,
    host: Vec<f64>,
    /// Drawn anew every round.
    varies: bool,
}

/// Operands being made.
pub struct Operands<'a> {
    session: &'a Session,
    rng: fastrand::Rng,
    made: Vec<Operand>,
}

impl<'a> Operands<'a> {
    /// None yet.
    #[must_use]
    pub fn new(session: &'a Session, seed: u64) -> Self {
        Operands {
            session,
            rng: fastrand::Rng::with_seed(seed),
            made: vec![],
        }
    }

    /// An operand that is new in every round.
    ///
    /// # Errors
    /// No memory.
    pub fn data(&mut self, ty: TensorType, fill: Fill) -> Result<Tensor> {
        let leaf = self.session.zeros(ty, Role::Data)?;
        self.push(leaf, fill, true)
    }

    /// Random weights: drawn once, laid out once as the kernels want them. `±scale`, f32 or bf16.
    ///
    /// # Errors
    /// No memory.
    pub fn weights(&mut self, shape: &[usize], dtype: DType, scale: f32) -> Result<Tensor> {
        self.filled(shape, dtype, Fill::Signed(scale))
    }

    /// The same, filled otherwise.
    ///
    /// # Errors
    /// No memory.
    pub fn filled(&mut self, shape: &[usize], dtype: DType, fill: Fill) -> Result<Tensor> {
        let ty = TensorType::new(shape, dtype);
        let host = fill.draw(&ty, &mut self.rng);
        let bytes = dtype.encode(&host);
        let all = 0..bytes.len();
        let leaf = self.session.adopt(Arc::new(bytes), all, ty)?;
        self.made.push(Operand {
            leaf: leaf.clone(),
            fill,
            host,
            varies: false,
        });
        Ok(leaf)
    }

    /// A leaf that is there already, new in every round.
    ///
    /// # Errors
    /// A leaf without memory.
    pub fn leaf(&mut self, leaf: &Tensor, fill: Fill) -> Result<()> {
        self.push(leaf.clone(), fill, true).map(drop)
    }

    fn push(&mut self, leaf: Tensor, fill: Fill, varies: bool) -> Result<Tensor> {
        let host = vec![0.0; leaf.shape().numel()];
        self.made.push(Operand {
            leaf: leaf.clone(),
            fill,
            host,
            varies,
        });
        Ok(leaf)
    }
}

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
/// PyTorch shows over [`LAYERS`]; without its adapter a result is further off by far.
pub const HALF: f64 = 3e-2;

/// Over more layers than this roundings add up: one is as likely up as down, so as the root of their number.
const LAYERS: f64 = 6.0;

/// The same of kernels that round the operands of products with bf16 weights, and nothing else.
const PAIRS: f64 = 1.5e-2;

/// So many elements have a mean to be measured from.
const MANY: usize = 8;

/// See [`Reference::Sampled`].
pub type SampleFn = Box<dyn Fn(&[&[f64]], u64) -> Result<Sample>>;

/// A repetition as a function of what it carries on.
pub type Again = Box<dyn Fn(&[Tensor]) -> Result<Vec<Tensor>>>;

/// How one repetition in a plan depends on the one before.
pub enum Join {
    /// There is no chain; why.
    None(&'static str),
    /// Results are the next operands.
    Feed,
    /// The next operand is the old one plus the last column of the result.
    Add,
}

/// What to measure.
pub struct Subject {
    /// Operands carried from repetition to repetition of a chain; the last element of the first is what is fed.
    pub carried: Vec<Tensor>,
    /// The work.
    pub again: Again,
    /// State it changes: leaves and their next values, as in `Session::record`.
    pub updates: Vec<(Tensor, Tensor)>,
    /// How repetitions are joined.
    pub join: Join,
    /// What is right.
    pub reference: Reference,
}

/// A graph with its operands: what a single run and a chain of runs share.
struct Graphed {
    session: Session,
    operands: RefCell<Vec<Operand>>,
    subject: Subject,
    outs: Vec<Tensor>,
    /// Index of the operand that is fed.
    fed: usize,
    /// What the operands were drawn from, and what was fed last.
    seed: Cell<u64>,
    link: Cell<f32>,
    /// How far what is rounded to bf16 on the way may be apart, relative to the largest element.
    half: Cell<Option<f64>>,
    /// Times that, for a deep model.
    depth: Cell<f64>,
    /// Which results and states somebody else has, where not all.
    some: RefCell<Option<Vec<usize>>>,
}

/// A graph under the clock.
pub struct Ours {
    graph: Rc<Graphed>,
    program: Program,
}

fn raw(t: &Tensor) -> Option<u64> {
    t.buffer().map(|b| b.raw)
}

impl Ours {
    /// Records the work.
    ///
    /// # Errors
    /// A graph that cannot be planned; no memory.
    pub fn new(operands: Operands<'_>, subject: Subject) -> Result<Self> {
        let session = operands.session.clone();
        let outs = (subject.again)(&subject.carried)?;
        let program = session.record(&outs.iter().collect::<Vec<_>>(), &subject.updates)?;
        let first = subject.carried.first().and_then(raw);
        let fed = operands.made.iter().position(|o| raw(&o.leaf) == first);
        let graph = Graphed {
            session,
            fed: fed.unwrap_or(0),
            operands: RefCell::new(operands.made),
            subject,
            outs,
            seed: Cell::new(0),
            link: Cell::new(0.0),
            half: Cell::new(None),
            depth: Cell::new(1.0),
            some: RefCell::new(None),
        };
        Ok(Ours {
            graph: Rc::new(graph),
            program,
        })
    }

    /// The same work of kernels that round operands to bf16 on the way, layer after layer.
    #[must_use]
    pub fn in_half(self) -> Self {
        self.graph.half.set(Some(PAIRS));
        self
    }

    /// The same work, of so many layers that round one behind the other.
    #[must_use]
    pub fn over(self, layers: usize) -> Self {
        let depth = (layers as f64 / LAYERS).sqrt().max(1.0);
        self.graph.depth.set(depth);
        self
    }

    /// Results, then states, as they are now.
    pub(crate) fn results(&self) -> Result<Vec<Vec<f64>>> {
        let states = self.graph.subject.updates.iter().map(|(state, _)| state);
        let results = self.program.outputs.iter().chain(states);
        let got = results.map(|t| download(&self.graph.session, t));
        got.collect()
    }

    /// Overwrites the results with those of another work; what `finish` says then.
    #[cfg(test)]
    pub(crate) fn take_results_of(&mut self, other: &Ours) -> f32 {
        for (to, from) in self.program.outputs.iter().zip(&other.program.outputs) {
            let values = download(&self.graph.session, from).unwrap_or_default();
            upload(&self.graph.session, to, &values).unwrap_or_default();
        }
        self.finish().unwrap_or(f32::NAN)
    }

    /// The same work of a device that keeps what is between its kernels in bf16 as well.
    #[must_use]
    pub fn all_in_half(self) -> Self {
        self.graph.half.set(Some(HALF));
        self
    }

    #[cfg(test)]
    pub(crate) fn judge_by(&mut self, reference: Reference) {
        if let Some(graph) = Rc::get_mut(&mut self.graph) {
            graph.subject.reference = reference;
        }
    }

    /// The plan of one run.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.program.compiled.plan
    }
}

impl Graphed {
    /// New operands, the same for the same seed.
    fn draw(&self, seed: u64) -> Result<()> {
        self.seed.set(seed);
        let mut rng = fastrand::Rng::with_seed(seed);
        for o in self.operands.borrow_mut().iter_mut().filter(|o| o.varies) {
            o.host = o.fill.draw(o.leaf.ty(), &mut rng);
            upload(&self.session, &o.leaf, &o.host)?;
        }
        Ok(())
    }

    /// As [`Work::check`], of `got`.
    fn check(&self, got: &[Vec<f64>], returned: f32) -> Result<Check> {
        let mut check = self.compare(got, None)?;
        let there = got.first().and_then(|g| g.last().copied());
        if there.map(|v| (v as f32).to_bits()) != Some(returned.to_bits()) {
            check.worst = f64::MAX;
        }
        Ok(check)
    }

    fn poison(&self, program: &Program) -> Result<()> {
        for out in &program.outputs {
            upload(&self.session, out, &vec![f64::NAN; out.shape().numel()])?;
        }
        Ok(())
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
    fn some_of<'a, T>(&self, all: &'a [T]) -> Vec<&'a T> {
        match &*self.some.borrow() {
            None => all.iter().collect(),
            Some(which) => which.iter().filter_map(|i| all.get(*i)).collect(),
        }
    }

    /// Compares `got`, the results, with the reference; `carried` replaces what is carried.
    fn compare(&self, got: &[Vec<f64>], carried: Option<&[Vec<f64>]>) -> Result<Check> {
        let of = got.iter().map(Vec::len).sum();
        let mut errors = Errors::default();
        let mut by = Judge::Oracle;
        let half = self.half.get().map(|part| part * self.depth.get());
        match &self.subject.reference {
            Reference::Whole | Reference::Deep => {
                let low = lower(&self.outs, &self.subject.updates)?;
                let values = self.values(&low.leaves, carried)?;
                let want = eval_bounded(&low.graph, &values)?;
                for (got, want) in got.iter().zip(self.some_of(&want)) {
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
                }
            }
            Reference::Twin(judge, make) => {
                by = *judge;
                let mut twin = make()?;
                twin.renew(self.seed.get())?;
                twin.feed(self.link.get())?;
                twin.start()?;
                for (got, want) in got.iter().zip(self.some_of(&twin.results()?)) {
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
        })
    }
}

/// Index of the last element.
fn last(t: &Tensor) -> usize {
    t.shape().numel().saturating_sub(1)
}

/// The largest error so far.
#[derive(Default)]
struct Errors {
    worst: f64,
    compared: usize,
}

impl Errors {
    fn add(&mut self, got: &[f64], want: &Bounded) {
        let wanted = want.value.data.iter().zip(want.tolerances());
        for (got, (w, tolerance)) in got.iter().zip(wanted) {
            let off = (got - w).abs() / tolerance;
            self.worst = if off.is_finite() {
                self.worst.max(off)
            } else {
                f64::MAX
            };
        }
        self.compared += got.len();
    }

    fn rounded(&mut self, got: &[f64], want: &Bounded, part: f64) {
        self.near(got, &want.value.data, part);
        self.compared += got.len();
    }

    /// By another rule: within `part` of the largest element, or of what is furthest from the mean of many: losses are all near
    /// the logarithm of the vocabulary, and a part of that hides much.
    fn near(&mut self, got: &[f64], want: &[f64], part: f64) {
        let mean = match want.len() >= MANY {
            true => want.iter().sum::<f64>() / want.len() as f64,
            false => 0.0,
        };
        let largest = want.iter().fold(0.0f64, |m, v| m.max((v - mean).abs()));
        for (got, want) in got.iter().zip(want) {
            let off = (got - want).abs() / (part * largest + 1e-30);
            self.worst = if off.is_finite() {
                self.worst.max(off)
            } else {
                f64::MAX
            };
        }
    }
}

impl Work for Ours {
    fn renew(&mut self, seed: u64) -> Result<()> {
        self.graph.draw(seed)?;
        self.graph.poison(&self.program)
    }

    fn feed(&mut self, link: f32) -> Result<()> {
        self.graph.link.set(link);
        let operands = &mut self.graph.operands.borrow_mut();
        let o = &mut operands[self.graph.fed];
        let at = last(&o.leaf);
        let (bytes, value) = match o.fill {
            Fill::Below(limit) => {
                let id = (link * limit as f32) as u32 % limit;
                (id.to_le_bytes(), f64::from(id))
            }
            Fill::Signed(s) | Fill::Positive(s) | Fill::Near(s) => {
                ((s * link).to_le_bytes(), f64::from(s * link))
            }
            Fill::Half(s) => {
                let v = bf16::from_f32(s * link).to_f32();
                (v.to_le_bytes(), f64::from(v))
            }
            Fill::Positions | Fill::Fixed(_) => (link.to_le_bytes(), f64::from(link)),
        };
        o.host[at] = value;
        if let Some(b) = o.leaf.buffer() {
            self.graph.session.backend().upload(b, 4 * at, &bytes)?;
        }
        Ok(())
    }

    fn start(&mut self) -> Result<()> {
        Ok(self.program.replay()?)
    }

    fn finish(&mut self) -> Result<f32> {
        let out = &self.program.outputs[0];
        let mut bytes = [0; 4];
        if let Some(b) = out.buffer() {
            let at = 4 * last(out);
            self.graph.session.backend().download(b, at, &mut bytes)?;
        }
        Ok(f32::from_le_bytes(bytes))
    }

    fn waited(&mut self, clock: &dyn Clock, n: usize, first: f32) -> Result<Looped> {
        // Behind a bus what feeds the next repetition takes as long as a small work, and is nobody else's time. On this
        // side of it that is a store, and a second look at the clock would take longer.
        let apart = self.graph.session.backend().far();
        let (mut links, mut next, mut seconds) = (Vec::with_capacity(n), first, 0.0);
        let begin = clock.now();
        for i in 0..n {
            self.feed(next)?;
            let start = match apart {
                true => {
                    self.graph.session.backend().wait()?;
                    clock.now()
                }
                false => begin,
            };
            self.start()?;
            let y = self.finish()?;
            if apart {
                seconds += clock.now() - start;
            }
            links.push((next, y));
            next = link(y, i);
        }
        if !apart {
            seconds = clock.now() - begin;
        }
        Ok(Looped { seconds, links })
    }

    fn fetch(&mut self, clock: &dyn Clock) -> Result<f64> {
        let start = clock.now();
        self.results()?;
        Ok(clock.now() - start)
    }

    fn check(&mut self, returned: f32) -> Result<Check> {
        self.graph.check(&self.results()?, returned)
    }

    fn remembers(&self) -> bool {
        !self.graph.subject.updates.is_empty()
    }

    fn chain(&mut self, n: usize) -> Result<Chained> {
        chain::make(&self.graph, &self.program, n)
    }
}

fn upload(session: &Session, t: &Tensor, values: &[f64]) -> Result<()> {
    match t.buffer() {
        Some(b) => Ok(session.backend().upload(b, 0, &t.dtype().encode(values))?),
        None => Ok(()),
    }
}

/// Elements of a leaf.
pub(crate) fn download(session: &Session, t: &Tensor) -> Result<Vec<f64>> {
    let mut bytes = vec![0; t.ty().bytes()];
    if let Some(b) = t.buffer() {
        session.backend().download(b, 0, &mut bytes)?;
    }
    Ok(t.dtype().decode(&bytes))
}

#[cfg(test)]
mod tests;
