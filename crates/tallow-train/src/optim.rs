//! Optimizers over the one flat buffer of an adapter: AdamW, Lion, and SGD with momentum.
//! Invariant: where the gate is 0, parameters and moments keep their values whatever the gradient holds;
//! what changes from step to step is uploaded, so a recording serves them all.
//! Absent on purpose: schedules and clipping.
use crate::{Result, TrainConfig};
use std::{fmt, str::FromStr};
use tallow_core::{op::Role, session::Session, tensor::Tensor, types::TensorType};
use tallow_llm::adapter::Adapter;

/// Numbers a step uploads; see [`tallow_core::op::AdamW`] for their order.
const NUMBERS: usize = 8;
/// With these, AdamW with a gradient of 0 leaves everything as it is.
const IDLE: [f32; NUMBERS] = [0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0];

/// Which optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OptimizerKind {
    /// Adam with decoupled weight decay (arXiv:1711.05101), as PyTorch computes it.
    AdamW,
    /// The sign of a blend of gradient and momentum, with decoupled weight decay (arXiv:2302.06675). Wants a
    /// learning rate 3 to 10 times smaller than AdamW's.
    Lion,
    /// Gradient descent with `beta1` as its momentum; weight decay is added to the gradient, as in PyTorch.
    Sgd,
}

impl OptimizerKind {
    /// Every optimizer.
    pub const ALL: [OptimizerKind; 3] = [Self::AdamW, Self::Lion, Self::Sgd];

    /// Lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            Self::AdamW => "adamw",
            Self::Lion => "lion",
            Self::Sgd => "sgd",
        }
    }
}

impl fmt::Display for OptimizerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for OptimizerKind {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let known = Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|k| k.name() == s);
        found.ok_or_else(|| format!("want one of {known}"))
    }
}

/// The state of an optimizer for one adapter of `P` parameters.
#[derive(Clone)]
pub struct Optimizer {
    /// Which one.
    pub kind: OptimizerKind,
    /// First moment, or momentum, `[P]`.
    pub m: Tensor,
    /// Second moment `[P]`; AdamW only.
    pub v: Option<Tensor>,
    /// What is read anew in every step, `[2, 8]`: the step's numbers, and those that change nothing.
    pub hyper: Tensor,
}

impl Optimizer {
    /// Moments of 0.
    ///
    /// # Errors
    /// No memory.
    pub fn new(session: &Session, adapter: &Adapter, kind: OptimizerKind) -> Result<Self> {
        let zeros = || session.zeros(adapter.params.ty().clone(), Role::State);
        Ok(Optimizer {
            kind,
            m: zeros()?,
            v: match kind {
                OptimizerKind::AdamW => Some(zeros()?),
                OptimizerKind::Lion | OptimizerKind::Sgd => None,
            },
            hyper: session.zeros(TensorType::f32([2, NUMBERS]), Role::Data)?,
        })
    }

    /// Uploads what update number `number` (from 1) needs at learning rate `lr`. Bias corrections are
    /// computed in f64 from the decays as the device knows them, in f32.
    pub(crate) fn upload(&self, s: &Session, c: &TrainConfig, lr: f64, number: u64) -> Result<()> {
        let left = |beta: f64| 1.0 - f64::from(beta as f32).powf(number as f64);
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
        let mut both = [0.0; 2 * NUMBERS];
        both[..NUMBERS].copy_from_slice(&hyper.map(|x| x as f32));
        both[NUMBERS..].copy_from_slice(&IDLE);
        Ok(s.write(&self.hyper, &both)?)
    }

    /// Uploads numbers with which the next step changes nothing, given a gradient of 0.
    pub(crate) fn idle(&self, s: &Session) -> Result<()> {
        Ok(s.write(&self.hyper, &[IDLE, IDLE].concat())?)
    }

    /// The adapter's parameters and the moments with their next values, given the gradient `[P]`, which is 0 where `gate []`
    /// is 0; nothing changes then.
    pub(crate) fn updates(
        &self,
        adapter: &Adapter,
        grad: &Tensor,
        gate: &Tensor,
    ) -> Result<Vec<(Tensor, Tensor)>> {
        let params = &adapter.params;
        let row = |i: usize| self.hyper.slice(0, i, 1)?.reshape([NUMBERS]);
        let hyper = gate.select(&row(0)?, &row(1)?)?;
        let (m, state) = (&self.m, |x: &Tensor| x.clone());
        if let Some(v) = &self.v {
            let [p1, m1, v1] = params.adamw(grad, m, v, &hyper)?;
            let p1 = adapter.pace(&p1)?;
            return Ok(vec![(state(params), p1), (state(m), m1), (state(v), v1)]);
        }
        let number = |i: usize| hyper.slice(0, i, 1)?.reshape([]);
        let (lr, decay) = (number(0)?, number(4)?);
        let (p1, m1) = match self.kind {
            OptimizerKind::Sgd => {
                let full = grad.add(&params.mul(&decay)?)?;
                let m1 = m.mul(&number(1)?)?.add(&full)?;
                (params.sub(&m1.mul(&lr)?)?, m1)
            }
            _ => {
                let blend = |beta: &Tensor| {
                    let rest = Tensor::scalar(1.0).sub(beta)?;
                    m.mul(beta)?.add(&grad.mul(&rest)?)
                };
                let kept = params.mul(&Tensor::scalar(1.0).sub(&lr.mul(&decay)?)?)?;
                let p1 = kept.sub(&sign(&blend(&number(1)?)?)?.mul(&lr)?)?;
                (p1, blend(&number(2)?)?)
            }
        };
        let p1 = adapter.pace(&p1)?;
        Ok(vec![(state(params), p1), (state(m), m1)])
    }
}

/// -1, 0 or 1.
fn sign(x: &Tensor) -> tallow_core::Result<Tensor> {
    let zero = Tensor::scalar(0.0);
    zero.less(x)?.sub(&x.less(&zero)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for k in OptimizerKind::ALL {
            assert_eq!(k.name().parse(), Ok(k));
        }
        let bad = "adam".parse::<OptimizerKind>();
        assert_eq!(bad, Err("want one of adamw, lion, sgd".to_owned()));
    }
}
