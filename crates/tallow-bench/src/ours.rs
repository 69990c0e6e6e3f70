//! tallow as a work under the clock: a graph with random operands, its plan, the same in a chain, and the oracle.
//! Invariant: operands are uploaded and results poisoned through the device's own calls, so the clock times what a
//! user would run; the oracle gets the operands as the device holds them, rounded to their dtype.
//! Absent on purpose: what a result is held against, which is `reference`; which graphs there are, which `suite` knows.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use half::bf16;
use tallow::{DType, Plan, Program, Role, Session, Tensor, TensorType};

use crate::work::{Chained, Check, Clock, Looped, Work, link};
use crate::{Error, Result};

mod chain;
pub mod judge;
mod reference;

pub use reference::{HALF, Reference, Sample, SampleFn, TWIN, TwinFn};
use reference::{LAYERS, PAIRS};

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

    fn poison(&self, program: &Program) -> Result<()> {
        for out in &program.outputs {
            upload(&self.session, out, &vec![f64::NAN; out.shape().numel()])?;
        }
        Ok(())
    }
}

/// Index of the last element.
fn last(t: &Tensor) -> usize {
    t.shape().numel().saturating_sub(1)
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
        // It would keep what it holds, and peers would be given something else.
        None => Err(Error::Setting {
            name: "an operand",
            want: "a tensor with memory",
            got: format!("{t:?}"),
        }),
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
