//! What an adapter adds to a projection, beyond the two matrices that ride in its product: magnitudes and dropout.
//! Invariant: without magnitude and dropout there is nothing here to do and nothing is done; `W + s·B·A` is never formed.
//! Absent on purpose: the gradient of the norm, which DoRA treats as a constant in backward (its section 4.3).

use tallow_core::op::Role;
use tallow_core::session::Session;
use tallow_core::tensor::{LoraWeights, Tensor};
use tallow_core::types::DType;

use crate::error::Result;
use crate::model::Model;

/// Keeps what is only read for its value apart from what is differentiated.
const DETACHED: u32 = u32::MAX;
/// Below every norm that means anything: a row of zeros has a magnitude of zero, and not 0/0.
const LEAST: f32 = 1e-30;

/// What one adapter adds to one projection while a forward pass is written down.
#[derive(Clone)]
pub(crate) struct Branch {
    /// `A [r, k]` and `B [n, r]`.
    pub(crate) a: Tensor,
    pub(crate) b: Tensor,
    pub(crate) scale: f32,
    pub(crate) magnitude: Option<Magnitude>,
    /// With the number of the module, whose mask is its own.
    pub(crate) dropout: Option<(Dropout, u32)>,
}

impl Branch {
    /// What rides in the product.
    fn pair(&self) -> (Tensor, Tensor, f32) {
        (self.a.clone(), self.b.clone(), self.scale)
    }
}

/// Dropout on the inputs of all branches.
#[derive(Clone, Debug)]
pub(crate) struct Dropout {
    /// `[2]` u32, data.
    pub(crate) seed: Tensor,
    /// Probability that an input stays.
    pub(crate) keep: f32,
}

/// DoRA's magnitude of one projection (Liu et al. 2024, arXiv:2402.09353): the result is scaled row by row with
/// `m / ‖W + s·B·A‖`.
#[derive(Clone, Debug)]
pub(crate) struct Magnitude {
    /// `[n]`, a view of the parameters.
    pub(crate) m: Tensor,
    /// `A` and `B` again, as values that no gradient goes through.
    a: Tensor,
    b: Tensor,
    /// `‖W‖²` of each row, `[n]`, frozen.
    squares: Tensor,
    /// The factors, where the parameters never change.
    fixed: Option<Tensor>,
}

impl Magnitude {
    /// Views of `params` where `A`, `B` and `m` begin; `squares`: `‖W‖²` by row.
    pub(crate) fn new(
        params: &Tensor,
        [a_at, b_at, m_at]: [usize; 3],
        [r, k, n]: [usize; 3],
        squares: &[f32],
        session: &Session,
    ) -> Result<Self> {
        // A value behind a barrier is another one than the view that gradients are asked for.
        let values = params.barrier(DETACHED)?;
        Ok(Self {
            m: params.slice(0, m_at, n)?,
            a: values.slice(0, a_at, r * k)?.reshape([r, k])?,
            b: values.slice(0, b_at, n * r)?.reshape([n, r])?,
            squares: session.tensor(squares, [n], Role::Frozen)?,
            fixed: None,
        })
    }

    /// The same with the factors computed now, for parameters that never change.
    pub(crate) fn fixed(self, model: &Model, module: &str, scale: f32) -> Result<Self> {
        let factors = self.factors(model.base_weight(module)?, scale)?;
        let values = model.session.read(&factors)?;
        let fixed = model
            .session
            .tensor(&values, [values.len()], Role::Frozen)?;
        Ok(Self {
            fixed: Some(fixed),
            ..self
        })
    }

    /// `m / ‖W + s·B·A‖ [n]`, by rows. With `u = (W + s/2·B·A)·Aᵀ`, one thin product,
    /// `‖W + s·B·A‖² = ‖W‖² + 2s·Σ_r u∘B`.
    pub(crate) fn factors(&self, w: &Tensor, scale: f32) -> Result<Tensor> {
        if let Some(fixed) = &self.fixed {
            return Ok(fixed.clone());
        }
        let n = self.m.shape().numel();
        let u = self.a.lora_linear(w, &self.a, &self.b, scale / 2.0)?;
        let cross = u.mul(&self.b.t()?)?.sum(0)?.reshape([n])?;
        let squares = cross.mul_scalar(2.0 * scale)?.add(&self.squares)?;
        let norm = squares.maximum(&Tensor::scalar(LEAST))?.sqrt()?;
        Ok(self.m.div(&norm)?)
    }
}

/// `‖W‖²` of each row of `w [n, k]`.
pub(crate) fn row_squares(session: &Session, w: &Tensor) -> Result<Vec<f32>> {
    let w = w.cast(DType::F32)?;
    Ok(session.read(&w.mul(&w)?.sum(1)?)?)
}

/// One of the projections that read the same tensor.
pub(crate) struct Part {
    pub(crate) w: Tensor,
    pub(crate) bias: Option<Tensor>,
    /// Of each share of the rows; all parts have equally many.
    pub(crate) branches: Vec<Option<Branch>>,
}

impl Part {
    fn n(&self) -> usize {
        self.w.dims()[0]
    }
    /// Its adapter, where there is one share.
    fn branch(&self) -> Option<&Branch> {
        self.branches[0].as_ref()
    }
    fn magnitude(&self) -> Option<&Magnitude> {
        self.branch()?.magnitude.as_ref()
    }
    fn dropout(&self) -> Option<&(Dropout, u32)> {
        self.branch()?.dropout.as_ref()
    }
    /// Does any share need more than the product?
    fn is_plain(&self) -> bool {
        let more = |b: &Branch| b.magnitude.is_some() || b.dropout.is_some();
        !self.branches.iter().flatten().any(more)
    }
    /// As the rows of one share see it.
    fn of(&self, share: usize) -> Self {
        Part {
            w: self.w.clone(),
            bias: self.bias.clone(),
            branches: vec![self.branches[share].clone()],
        }
    }
}

/// Projections of one `x [.., k]`, side by side `[.., Σn]`, plus `residual` if given.
pub(crate) fn project(x: &Tensor, parts: &[Part], residual: Option<&Tensor>) -> Result<Tensor> {
    let shares = parts.first().map_or(1, |p| p.branches.len());
    if shares == 1 {
        return project_one(x, parts, residual);
    }
    if parts.iter().all(Part::is_plain) {
        let weights = |p: &Part| LoraWeights {
            w: p.w.clone(),
            bias: p.bias.clone(),
            adapters: p
                .branches
                .iter()
                .map(|b| Some(b.as_ref()?.pair()))
                .collect(),
        };
        let weights: Vec<LoraWeights> = parts.iter().map(weights).collect();
        return Ok(x.linears(&weights, residual)?);
    }
    // What comes after the product differs from share to share.
    each_share(x, shares, |g, rows| {
        let own: Vec<Part> = parts.iter().map(|p| p.of(g)).collect();
        let residual = residual.map(|r| share(r, shares, g)).transpose()?;
        project_one(rows, &own, residual.as_ref())
    })
}

/// The rows of share `g`.
pub(crate) fn share(x: &Tensor, shares: usize, g: usize) -> Result<Tensor> {
    let rows = x.dims()[0] / shares;
    Ok(x.slice(0, g * rows, rows)?)
}

/// `f` of the rows of each share, one after another.
pub(crate) fn each_share(
    x: &Tensor,
    shares: usize,
    f: impl Fn(usize, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let one = |g: usize| f(g, &share(x, shares, g)?);
    let all = (0..shares).map(one).collect::<Result<Vec<_>>>()?;
    joined(&all, 0)
}

/// The projections of rows that have one adapter.
fn project_one(x: &Tensor, parts: &[Part], residual: Option<&Tensor>) -> Result<Tensor> {
    let scaled = parts.iter().any(|p| p.magnitude().is_some());
    let weights = |p: &Part| LoraWeights {
        w: p.w.clone(),
        // A magnitude scales the product only, so what is added comes after it.
        bias: p.bias.clone().filter(|_| !scaled),
        adapters: vec![match (p.branch(), p.dropout()) {
            (Some(b), None) => Some(b.pair()),
            _ => None,
        }],
    };
    let weights: Vec<LoraWeights> = parts.iter().map(weights).collect();
    let mut y = x.linears(&weights, residual.filter(|_| !scaled))?;
    if parts.iter().any(|p| p.dropout().is_some()) {
        y = y.add(&dropped(x, parts)?)?;
    }
    if scaled {
        y = y.mul(&factors(parts)?)?;
        if let Some(bias) = biases(parts)? {
            y = y.add(&bias)?;
        }
        if let Some(residual) = residual {
            y = y.add(residual)?;
        }
    }
    Ok(y)
}

/// The branches of `x` with dropout, side by side; zeros where a projection has none.
fn dropped(x: &Tensor, parts: &[Part]) -> Result<Tensor> {
    let lead = x.shape().clone();
    let one = |p: &Part| -> Result<Tensor> {
        let (Some(b), Some((d, id))) = (p.branch(), p.dropout()) else {
            return Ok(Tensor::scalar(0.0).broadcast(lead.with_last(p.n()))?);
        };
        let h = x.dropout_linear(&b.a, &d.seed, *id, d.keep)?;
        let h = h.reshape([h.shape().rows(), h.shape().last()])?;
        let up = h.matmul_t(false, &b.b, true)?.mul_scalar(b.scale)?;
        Ok(up.reshape(lead.with_last(p.n()))?)
    };
    let all = parts.iter().map(one).collect::<Result<Vec<_>>>()?;
    joined(&all, lead.rank() - 1)
}

/// What each output is multiplied with, `[Σn]`; 1 where there is no magnitude.
fn factors(parts: &[Part]) -> Result<Tensor> {
    let one = |p: &Part| match (p.branch(), p.magnitude()) {
        (Some(b), Some(m)) => m.factors(&p.w, b.scale),
        _ => Ok(Tensor::scalar(1.0).broadcast([p.n()])?),
    };
    let all = parts.iter().map(one).collect::<Result<Vec<_>>>()?;
    joined(&all, 0)
}

/// The biases `[Σn]`, if any projection has one; 0 for the others.
fn biases(parts: &[Part]) -> Result<Option<Tensor>> {
    if parts.iter().all(|p| p.bias.is_none()) {
        return Ok(None);
    }
    let one = |p: &Part| match &p.bias {
        Some(bias) => Ok(bias.clone()),
        None => Ok(Tensor::scalar(0.0).broadcast([p.n()])?),
    };
    let all = parts.iter().map(one).collect::<Result<Vec<_>>>()?;
    joined(&all, 0).map(Some)
}

fn joined(all: &[Tensor], axis: usize) -> Result<Tensor> {
    match all {
        [one] => Ok(one.clone()),
        _ => Ok(Tensor::concat(axis, &all.iter().collect::<Vec<_>>())?),
    }
}
