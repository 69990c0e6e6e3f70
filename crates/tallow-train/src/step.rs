//! One optimizer step as one recording (forward, loss, backward, clipping, update), or as two kinds of them where
//! gradients of several batches are added up first: one adds, one applies.
//! Invariant: after the first batch of a length nothing is planned or allocated on the device; parameters and
//! moments are state that all recordings share, and a loss or gradient that is not finite changes none of them.
//! Absent on purpose: gradients of anything but the adapter.
use crate::{
    Result, TrainConfig,
    batch::{Batch, BatchShape},
    optim::Optimizer,
};
use std::collections::BTreeMap;
use tallow_core::{
    op::Role,
    plan::Memory,
    session::{Compiled, Program, Session},
    tensor::{Tensor, value_and_grad},
    types::TensorType,
};
use tallow_llm::{adapter::Adapter, model::Model};

mod trainer;
pub use trainer::{Snapshot, Trainer};

/// Added to the norm before dividing by it, as in PyTorch's `clip_grad_norm_`.
const CLIP_EPS: f32 = 1e-6;

/// Where batches of one shape are uploaded to.
pub struct Inputs {
    /// Token ids `[b, t]`.
    pub ids: Tensor,
    /// Positions `[b, t]`.
    pub pos: Tensor,
    /// Where documents begin in packed rows, `[b, t]`.
    pub starts: Option<Tensor>,
    /// Targets `[b, t]`.
    pub targets: Tensor,
}

impl Inputs {
    fn new(s: &Session, shape: BatchShape) -> Result<Self> {
        let [b, t] = shape.dims;
        let ints = || s.zeros(TensorType::u32([b, t]), Role::Data);
        Ok(Inputs {
            ids: ints()?,
            pos: ints()?,
            starts: shape.packed.then(ints).transpose()?,
            targets: ints()?,
        })
    }

    /// Uploads a batch of this shape.
    fn upload(&self, session: &Session, batch: &Batch) -> Result<()> {
        session.write_u32(&self.ids, &batch.ids)?;
        session.write_u32(&self.pos, &batch.pos)?;
        if let Some(starts) = &self.starts {
            session.write_u32(starts, &batch.starts)?;
        }
        Ok(session.write_u32(&self.targets, &batch.targets)?)
    }

    /// The summed loss times `scale`, where given, and its gradient `[P]`.
    fn backward(
        &self,
        model: &Model,
        adapter: &Adapter,
        scale: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        let x = match &self.starts {
            None => model.hidden(&self.ids, &self.pos, Some(adapter), None)?.x,
            Some(starts) => {
                let (ids, pos) = (&self.ids, &self.pos);
                model.hidden_packed(ids, pos, starts, Some(adapter))?.x
            }
        };
        let mut loss = model
            .nll_with(&x, &self.targets, Some(adapter))?
            .sum_all()?;
        if let Some(scale) = scale {
            loss = loss.mul(scale)?;
        }
        let parts = adapter.parts()?;
        let wrt: Vec<&Tensor> = parts.iter().map(|(_, view)| view).collect();
        let made = value_and_grad(&loss, &wrt)?;
        let flat = |g: &Tensor| g.reshape([g.shape().numel()]);
        let flat = made.grads.iter().map(flat).collect::<Result<Vec<_>, _>>()?;
        let grad = Tensor::concat(0, &flat.iter().collect::<Vec<_>>())?;
        Ok((made.loss, grad))
    }
}

/// What a mean gradient does to parameters and moments.
struct Update {
    norm: Tensor,
    updates: Vec<(Tensor, Tensor)>,
}

impl Update {
    /// Clips `grad [P]` to the norm `clip`, where given, and hands it to the optimizer, unless it or `loss []`
    /// is not finite.
    fn new(
        adapter: &Adapter,
        optimizer: &Optimizer,
        loss: &Tensor,
        grad: &Tensor,
        clip: Option<f64>,
    ) -> Result<Self> {
        let norm = grad.mul(grad)?.sum_all()?.sqrt()?;
        // False for NaN too.
        let finite = |x: &Tensor| x.abs()?.less(&Tensor::scalar(f32::MAX));
        let gate = finite(loss)?.mul(&finite(&norm)?)?;
        let grad = match clip {
            None => grad.clone(),
            Some(most) => {
                let scale = norm.add_scalar(CLIP_EPS)?.recip()?;
                let scale = scale
                    .mul_scalar(most as f32)?
                    .minimum(&Tensor::scalar(1.0))?;
                grad.mul(&scale)?
            }
        };
        let grad = gate.select(&grad, &Tensor::scalar(0.0))?;
        let updates = optimizer.updates(adapter, &grad, &gate)?;
        Ok(Update { norm, updates })
    }
}

/// The tensors of a step over `[b, t]` inputs, not yet planned.
pub struct StepGraph {
    /// Where a batch goes.
    pub inputs: Inputs,
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
        shape: impl Into<BatchShape>,
        clip: Option<f64>,
    ) -> Result<Self> {
        let inputs = Inputs::new(&model.session, shape.into())?;
        let inv_count = model.session.zeros(TensorType::f32([]), Role::Data)?;
        let (loss, grad) = inputs.backward(model, adapter, Some(&inv_count))?;
        let Update { norm, updates } = Update::new(adapter, optimizer, &loss, &grad, clip)?;
        Ok(StepGraph {
            inputs,
            inv_count,
            loss,
            norm,
            updates,
        })
    }

    /// Its plan; nothing of it is allocated.
    ///
    /// # Errors
    /// A graph that cannot be planned.
    pub fn plan(&self, session: &Session) -> Result<Compiled> {
        Ok(session.explain(&[&self.loss, &self.norm], &self.updates)?)
    }
}

/// Sums over the batches of a step, on the device.
#[derive(Clone)]
pub struct Sums {
    /// Gradient of the summed loss, `[P]`.
    grad: Tensor,
    /// Summed loss, `[]`, in nats.
    loss: Tensor,
}

impl Sums {
    fn new(session: &Session, adapter: &Adapter) -> Result<Self> {
        Ok(Sums {
            grad: session.zeros(adapter.params.ty().clone(), Role::State)?,
            loss: session.zeros(TensorType::f32([]), Role::State)?,
        })
    }
}

/// The tensors that add one batch of `[b, t]` inputs to [`Sums`].
pub struct MicroGraph {
    inputs: Inputs,
    loss: Tensor,
    updates: Vec<(Tensor, Tensor)>,
}

impl MicroGraph {
    fn build(model: &Model, adapter: &Adapter, sums: &Sums, shape: BatchShape) -> Result<Self> {
        let inputs = Inputs::new(&model.session, shape)?;
        let (loss, grad) = inputs.backward(model, adapter, None)?;
        let updates = vec![
            (sums.grad.clone(), sums.grad.add(&grad)?),
            (sums.loss.clone(), sums.loss.add(&loss)?),
        ];
        Ok(MicroGraph {
            inputs,
            loss,
            updates,
        })
    }

    fn plan(&self, session: &Session) -> Result<Compiled> {
        Ok(session.explain(&[&self.loss], &self.updates)?)
    }
}

/// The tensors that turn [`Sums`] into one update and empty them.
struct ApplyGraph {
    inv_count: Tensor,
    loss: Tensor,
    norm: Tensor,
    updates: Vec<(Tensor, Tensor)>,
}

impl ApplyGraph {
    fn build(
        session: &Session,
        adapter: &Adapter,
        optimizer: &Optimizer,
        sums: &Sums,
        clip: Option<f64>,
    ) -> Result<Self> {
        let inv_count = session.zeros(TensorType::f32([]), Role::Data)?;
        let (loss, grad) = (sums.loss.mul(&inv_count)?, sums.grad.mul(&inv_count)?);
        let Update { norm, mut updates } = Update::new(adapter, optimizer, &loss, &grad, clip)?;
        for sum in [&sums.grad, &sums.loss] {
            let zeros = Tensor::scalar(0.0).broadcast(sum.shape().clone())?;
            updates.push((sum.clone(), zeros));
        }
        Ok(ApplyGraph {
            inv_count,
            loss,
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
    /// The first batch of the step whose own loss was not finite, if there is one.
    pub bad_batch: Option<usize>,
}

impl StepResult {
    /// Were parameters and moments updated? They are unless loss or gradient is not finite.
    pub fn updated(&self) -> bool {
        let finite = |x: f32| x.abs() < f32::MAX;
        finite(self.loss) && finite(self.grad_norm)
    }
}
