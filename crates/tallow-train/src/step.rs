//! One optimizer step as one recording: forward, loss, backward, clipping, AdamW.
//! Invariant: after the first batch of a length nothing is planned or allocated on the device; parameters
//! and moments are state that the recordings of all lengths share.
//! Absent on purpose: gradient accumulation, and gradients of anything but the adapter.
use crate::{Error, Result, TrainConfig, batch::Batch};
use std::collections::BTreeMap;
use tallow_core::{
    op::Role,
    session::{Program, Session},
    tensor::{Tensor, value_and_grad},
    types::TensorType,
};
use tallow_llm::{adapter::Adapter, model::Model};

/// Added to the norm before dividing by it, as in PyTorch's `clip_grad_norm_`.
const CLIP_EPS: f32 = 1e-6;

/// The state of AdamW for one adapter of `P` parameters.
#[derive(Clone)]
pub struct Optimizer {
    /// First moment `[P]`.
    pub m: Tensor,
    /// Second moment `[P]`.
    pub v: Tensor,
    /// What AdamW reads anew in every step, `[8]`; see [`tallow_core::op::AdamW`].
    pub hyper: Tensor,
}

impl Optimizer {
    /// Moments of 0.
    ///
    /// # Errors
    /// No memory.
    pub fn new(session: &Session, adapter: &Adapter) -> Result<Self> {
        let ty = adapter.params.ty();
        Ok(Optimizer {
            m: session.zeros(ty.clone(), Role::State)?,
            v: session.zeros(ty.clone(), Role::State)?,
            hyper: session.zeros(TensorType::f32([8]), Role::Data)?,
        })
    }

    /// Uploads what step number `step` (from 1) needs at learning rate `lr`. Bias corrections are
    /// computed in f64 from the decays as the device knows them, in f32.
    fn upload(&self, session: &Session, c: &TrainConfig, lr: f64, step: u64) -> Result<()> {
        let left = |beta: f64| 1.0 - f64::from(beta as f32).powf(step as f64);
        let hyper = [
            lr,
            c.beta1,
            c.beta2,
            c.eps,
            c.weight_decay,
            left(c.beta1),
            left(c.beta2).sqrt(),
            1.0,
        ];
        Ok(session.write(&self.hyper, &hyper.map(|x| x as f32))?)
    }
}

/// The tensors of a step over `[b, t]` inputs, not yet planned.
pub struct StepGraph {
    /// Token ids `[b, t]`.
    pub ids: Tensor,
    /// Positions `[b, t]`.
    pub pos: Tensor,
    /// Targets `[b, t]`.
    pub targets: Tensor,
    /// 1 / counted targets, `[]`.
    pub inv_count: Tensor,
    /// Mean loss of the counted targets, `[]`, in nats.
    pub loss: Tensor,
    /// Norm of the gradient before clipping, `[]`.
    pub norm: Tensor,
    /// Parameters and moments with their next values.
    pub updates: Vec<(Tensor, Tensor)>,
}

impl StepGraph {
    /// The step for `b` rows of `t` inputs; the gradient is clipped to the norm `clip`, where given.
    ///
    /// # Errors
    /// An adapter that is not trainable, or a graph that does not fit together.
    pub fn build(
        model: &Model,
        adapter: &Adapter,
        optimizer: &Optimizer,
        [b, t]: [usize; 2],
        clip: Option<f64>,
    ) -> Result<Self> {
        let s = &model.session;
        let ints = || s.zeros(TensorType::u32([b, t]), Role::Data);
        let (ids, pos, targets) = (ints()?, ints()?, ints()?);
        let inv_count = s.zeros(TensorType::f32([]), Role::Data)?;
        let x = model.hidden(&ids, &pos, Some(adapter), None)?.x;
        let loss = model
            .nll_with(&x, &targets, Some(adapter))?
            .sum_all()?
            .mul(&inv_count)?;
        let parts = adapter.parts()?;
        let wrt: Vec<&Tensor> = parts.iter().map(|(_, view)| view).collect();
        let made = value_and_grad(&loss, &wrt)?;
        let flat = |g: &Tensor| g.reshape([g.shape().numel()]);
        let flat = made.grads.iter().map(flat).collect::<Result<Vec<_>, _>>()?;
        let grad = Tensor::concat(0, &flat.iter().collect::<Vec<_>>())?;
        let norm = grad.mul(&grad)?.sum_all()?.sqrt()?;
        let grad = match clip {
            None => grad,
            Some(most) => {
                let scale = norm.add_scalar(CLIP_EPS)?.recip()?;
                let scale = scale
                    .mul_scalar(most as f32)?
                    .minimum(&Tensor::scalar(1.0))?;
                grad.mul(&scale)?
            }
        };
        let Optimizer { m, v, hyper } = optimizer;
        let [p1, m1, v1] = adapter.params.adamw(&grad, m, v, hyper)?;
        let p1 = adapter.pace(&p1)?;
        let updates = vec![
            (adapter.params.clone(), p1),
            (m.clone(), m1),
            (v.clone(), v1),
        ];
        Ok(StepGraph {
            ids,
            pos,
            targets,
            inv_count,
            loss: made.loss,
            norm,
            updates,
        })
    }
}

/// What a step tells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepResult {
    /// Mean loss of the counted targets before the update, in nats a token.
    pub loss: f32,
    /// Norm of the gradient before clipping.
    pub grad_norm: f32,
}

/// A recorded step for batches of one shape.
pub struct TrainStep {
    /// The recording with its plan.
    pub program: Program,
    graph: StepGraph,
}

impl TrainStep {
    /// Plans and records; see [`StepGraph::build`].
    ///
    /// # Errors
    /// As [`StepGraph::build`]; no memory.
    pub fn new(
        model: &Model,
        adapter: &Adapter,
        optimizer: &Optimizer,
        shape: [usize; 2],
        clip: Option<f64>,
    ) -> Result<Self> {
        let graph = StepGraph::build(model, adapter, optimizer, shape, clip)?;
        let outs = [&graph.loss, &graph.norm];
        let program = model.session.record(&outs, &graph.updates)?;
        Ok(TrainStep { program, graph })
    }

    /// Uploads a batch of this shape. A batch without a counted target has a loss of 0.
    ///
    /// # Errors
    /// A batch of another shape.
    pub fn upload(&self, session: &Session, batch: &Batch) -> Result<()> {
        let g = &self.graph;
        session.write_u32(&g.ids, &batch.ids)?;
        session.write_u32(&g.pos, &batch.pos)?;
        session.write_u32(&g.targets, &batch.targets)?;
        let inv = 1.0 / batch.counted.max(1) as f64;
        Ok(session.write(&g.inv_count, &[inv as f32])?)
    }

    /// Runs the step and waits for its two numbers.
    ///
    /// # Errors
    /// A device that fails.
    pub fn run(&mut self, session: &Session) -> Result<StepResult> {
        self.program.replay()?;
        let mut got = [[0.0]; 2];
        for (out, value) in self.program.outputs.iter().zip(&mut got) {
            session.read_into(out, value)?;
        }
        Ok(StepResult {
            loss: got[0][0],
            grad_norm: got[1][0],
        })
    }
}

/// Trains one adapter, step by step, keeping one recording a batch length.
pub struct Trainer {
    model: Model,
    adapter: Adapter,
    config: TrainConfig,
    optimizer: Optimizer,
    steps: BTreeMap<[usize; 2], TrainStep>,
    done: u64,
}

impl Trainer {
    /// Starts with moments of 0. The adapter's parameters must be state.
    ///
    /// # Errors
    /// Settings that make no sense; no memory.
    pub fn new(model: &Model, adapter: &Adapter, config: &TrainConfig) -> Result<Self> {
        config.validate()?;
        Ok(Trainer {
            model: model.clone(),
            adapter: adapter.for_training(&model.session)?,
            config: config.clone(),
            optimizer: Optimizer::new(&model.session, adapter)?,
            steps: BTreeMap::new(),
            done: 0,
        })
    }

    /// The recording for a batch shape `[b, t]`, made on its first use.
    ///
    /// # Errors
    /// As [`TrainStep::new`].
    pub fn recording(&mut self, shape: [usize; 2]) -> Result<&mut TrainStep> {
        use std::collections::btree_map::Entry;
        match self.steps.entry(shape) {
            Entry::Occupied(found) => Ok(found.into_mut()),
            Entry::Vacant(place) => {
                let clip = self.config.clip;
                let made =
                    TrainStep::new(&self.model, &self.adapter, &self.optimizer, shape, clip)?;
                Ok(place.insert(made))
            }
        }
    }

    /// One step at learning rate `lr`.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the loss or the gradient is not finite; the adapter is spoilt then.
    pub fn step(&mut self, batch: &Batch, lr: f64) -> Result<StepResult> {
        let session = self.model.session.clone();
        let number = self.done + 1;
        self.optimizer.upload(&session, &self.config, lr, number)?;
        self.adapter.draw(&session, self.config.seed, number)?;
        let step = self.recording([batch.b, batch.t])?;
        step.upload(&session, batch)?;
        let got = step.run(&session)?;
        self.done = number;
        for (what, value) in [("loss", got.loss), ("gradient norm", got.grad_norm)] {
            if !value.is_finite() {
                return Err(Error::NotFinite {
                    step: number,
                    what,
                    value,
                });
            }
        }
        Ok(got)
    }

    /// Steps done.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Recordings made, one a batch shape.
    pub fn recordings(&self) -> usize {
        self.steps.len()
    }

    /// Predicted memory of the largest recording, in bytes; all share weights, parameters and moments.
    pub fn memory_bytes(&self) -> usize {
        let of = |s: &TrainStep| s.program.compiled.plan.memory().total();
        self.steps.values().map(of).max().unwrap_or(0)
    }
}
