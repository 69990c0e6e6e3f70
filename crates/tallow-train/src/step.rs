//! One optimizer step as one recording (forward, loss, backward, clipping, update), or as two kinds of them where
//! gradients of several batches are added up first: one adds, one applies. Several adapters trained side by side
//! share a recording, each with rows, loss, clipping and update of its own.
//! Invariant: after the first batch of a length nothing is planned or allocated on the device; parameters and
//! moments are state that all recordings share, and a loss or gradient that is not finite changes none of its adapter's.
//! Absent on purpose: gradients of anything but adapters.
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
    tensor::{Tensor, values_and_grads},
    types::TensorType,
};
use tallow_llm::{adapter::Adapter, model::Model};

mod trainer;
pub use trainer::{Snapshot, Trainer, Turn};

/// Added to the norm before dividing by it, as in PyTorch's `clip_grad_norm_`.
const CLIP_EPS: f32 = 1e-6;

/// Where batches of one shape are uploaded to. `b` rows of `t` tokens, of all adapters together.
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

/// Losses of the adapters, `[g]`, and the gradient `[P]` of each.
struct Backward {
    losses: Tensor,
    grads: Vec<Tensor>,
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

    /// Each adapter's summed loss over its share of the rows times its `scale [g]`, where given, and its gradient.
    fn backward(
        &self,
        model: &Model,
        adapters: &[Adapter],
        scale: Option<&Tensor>,
    ) -> Result<Backward> {
        let x = match &self.starts {
            None => model.hidden(&self.ids, &self.pos, adapters, None)?.x,
            Some(starts) => {
                let (ids, pos) = (&self.ids, &self.pos);
                model.hidden_packed(ids, pos, starts, adapters)?.x
            }
        };
        let nll = model.nll_with(&x, &self.targets, adapters)?;
        let rows = nll.shape().numel() / adapters.len();
        let mut losses = nll.reshape([adapters.len(), rows])?.sum(1)?;
        losses = losses.reshape([adapters.len()])?;
        if let Some(scale) = scale {
            losses = losses.mul(scale)?;
        }
        let mut views = vec![];
        let mut counts = vec![];
        for adapter in adapters {
            let parts = adapter.parts()?;
            counts.push(parts.len());
            views.extend(parts.into_iter().map(|(_, view)| view));
        }
        let made = values_and_grads(&losses, &views.iter().collect::<Vec<_>>())?;
        let mut left = &made.grads[..];
        let mut grads = vec![];
        for count in counts {
            let (own, rest) = left.split_at(count);
            let flat = own.iter().map(|g| g.reshape([g.shape().numel()]));
            let flat = flat.collect::<Result<Vec<_>, _>>()?;
            grads.push(Tensor::concat(0, &flat.iter().collect::<Vec<_>>())?);
            left = rest;
        }
        Ok(Backward {
            losses: made.loss,
            grads,
        })
    }
}

/// An adapter that is trained, and what makes steps of its gradient.
pub struct Trained<'a> {
    /// Its parameters must be state.
    pub adapter: &'a Adapter,
    /// Its optimizer.
    pub optimizer: &'a Optimizer,
    /// The norm its gradient is clipped to.
    pub clip: Option<f64>,
}

/// What mean gradients do to parameters and moments.
struct Update {
    /// Before clipping, `[g]`.
    norms: Tensor,
    updates: Vec<(Tensor, Tensor)>,
}

impl Update {
    /// Clips each gradient and hands it to its optimizer, unless it or its loss is not finite.
    fn new(all: &[Trained<'_>], losses: &Tensor, grads: &[Tensor]) -> Result<Self> {
        let (mut norms, mut updates) = (vec![], vec![]);
        for (i, (trained, grad)) in all.iter().zip(grads).enumerate() {
            let loss = losses.slice(0, i, 1)?.reshape([])?;
            let (norm, more) = one_update(trained, &loss, grad)?;
            norms.push(norm.reshape([1])?);
            updates.extend(more);
        }
        Ok(Update {
            norms: Tensor::concat(0, &norms.iter().collect::<Vec<_>>())?,
            updates,
        })
    }
}

/// The norm of `grad [P]` before clipping, and what it does unless it or `loss []` is not finite.
fn one_update(
    trained: &Trained<'_>,
    loss: &Tensor,
    grad: &Tensor,
) -> Result<(Tensor, Vec<(Tensor, Tensor)>)> {
    let norm = grad.mul(grad)?.sum_all()?.sqrt()?;
    // False for NaN too.
    let finite = |x: &Tensor| x.abs()?.less(&Tensor::scalar(f32::MAX));
    let gate = finite(loss)?.mul(&finite(&norm)?)?;
    let grad = match trained.clip {
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
    let updates = trained.optimizer.updates(trained.adapter, &grad, &gate)?;
    Ok((norm, updates))
}

/// The shape of the batches of `count` adapters, one after another.
fn whole(one: BatchShape, count: usize) -> BatchShape {
    let [b, t] = one.dims;
    BatchShape {
        dims: [b * count, t],
        ..one
    }
}

/// The adapters alone.
fn adapters(all: &[Trained<'_>]) -> Vec<Adapter> {
    all.iter().map(|t| t.adapter.clone()).collect()
}

/// The tensors of a step of `g` adapters over `[b, t]` inputs each, not yet planned.
pub struct StepGraph {
    /// Where the batches go, one after another.
    pub inputs: Inputs,
    /// 1 / counted targets of each, `[g]`.
    pub inv_counts: Tensor,
    /// Mean loss of the counted targets of each, `[g]`, in nats.
    pub losses: Tensor,
    /// Norm of each gradient before clipping, `[g]`.
    pub norms: Tensor,
    /// Parameters and moments with their next values.
    pub updates: Vec<(Tensor, Tensor)>,
}

impl StepGraph {
    /// The step for `b` rows of `t` inputs of each adapter.
    ///
    /// # Errors
    /// An adapter that is not trainable, or a graph that does not fit together.
    pub fn build(model: &Model, all: &[Trained<'_>], shape: impl Into<BatchShape>) -> Result<Self> {
        let inputs = Inputs::new(&model.session, whole(shape.into(), all.len()))?;
        let inv_counts = counts(&model.session, all.len())?;
        let Backward { losses, grads } =
            inputs.backward(model, &adapters(all), Some(&inv_counts))?;
        let Update { norms, updates } = Update::new(all, &losses, &grads)?;
        Ok(StepGraph {
            inputs,
            inv_counts,
            losses,
            norms,
            updates,
        })
    }

    /// Its plan; nothing of it is allocated.
    ///
    /// # Errors
    /// A graph that cannot be planned.
    pub fn plan(&self, session: &Session) -> Result<Compiled> {
        Ok(session.explain(&[&self.losses, &self.norms], &self.updates)?)
    }
}

/// One number for each adapter, uploaded in every step.
fn counts(session: &Session, adapters: usize) -> Result<Tensor> {
    Ok(session.zeros(TensorType::f32([adapters]), Role::Data)?)
}

/// Sums over the batches of a step, on the device.
#[derive(Clone)]
pub struct Sums {
    /// Gradient of each adapter's summed loss, `[P]`.
    grads: Vec<Tensor>,
    /// Summed losses, `[g]`, in nats.
    losses: Tensor,
}

impl Sums {
    fn new(session: &Session, all: &[Trained<'_>]) -> Result<Self> {
        let zeros = |ty: TensorType| session.zeros(ty, Role::State);
        let grads = all.iter().map(|t| zeros(t.adapter.params.ty().clone()));
        Ok(Sums {
            grads: grads.collect::<Result<_, _>>()?,
            losses: zeros(TensorType::f32([all.len()]))?,
        })
    }
}

/// The tensors that add one batch of `[b, t]` inputs of each adapter to [`Sums`].
pub struct MicroGraph {
    inputs: Inputs,
    losses: Tensor,
    updates: Vec<(Tensor, Tensor)>,
}

impl MicroGraph {
    fn build(model: &Model, all: &[Trained<'_>], sums: &Sums, shape: BatchShape) -> Result<Self> {
        let inputs = Inputs::new(&model.session, whole(shape, all.len()))?;
        let Backward { losses, grads } = inputs.backward(model, &adapters(all), None)?;
        let mut updates = vec![(sums.losses.clone(), sums.losses.add(&losses)?)];
        for (sum, grad) in sums.grads.iter().zip(&grads) {
            updates.push((sum.clone(), sum.add(grad)?));
        }
        Ok(MicroGraph {
            inputs,
            losses,
            updates,
        })
    }

    fn plan(&self, session: &Session) -> Result<Compiled> {
        Ok(session.explain(&[&self.losses], &self.updates)?)
    }
}

/// The tensors that turn [`Sums`] into one update and empty them.
struct ApplyGraph {
    inv_counts: Tensor,
    losses: Tensor,
    norms: Tensor,
    updates: Vec<(Tensor, Tensor)>,
}

impl ApplyGraph {
    fn build(session: &Session, all: &[Trained<'_>], sums: &Sums) -> Result<Self> {
        let inv_counts = counts(session, all.len())?;
        let losses = sums.losses.mul(&inv_counts)?;
        let mean = |(i, sum): (usize, &Tensor)| {
            let inv = inv_counts.slice(0, i, 1)?.reshape([])?;
            sum.mul(&inv)
        };
        let grads = sums.grads.iter().enumerate().map(mean);
        let grads = grads.collect::<Result<Vec<_>, _>>()?;
        let Update { norms, mut updates } = Update::new(all, &losses, &grads)?;
        for sum in sums.grads.iter().chain([&sums.losses]) {
            let zeros = Tensor::scalar(0.0).broadcast(sum.shape().clone())?;
            updates.push((sum.clone(), zeros));
        }
        Ok(ApplyGraph {
            inv_counts,
            losses,
            norms,
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
