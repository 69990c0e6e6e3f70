//! A work of tallow's as the judge of somebody else's result: it draws the operands and knows what is right.
//! Invariant: the oracle judges; tallow's own kernels have no say.

use tallow::Tensor;

use super::{Fill, Graphed, Ours};
use crate::Result;
use crate::work::{Check, Work as _};

/// Operands and their right result, without an engine.
pub struct Judged {
    ours: Ours,
    link: f32,
}

/// Operands and results of `ours`, which is never run.
#[must_use]
pub fn judged(ours: Ours) -> Judged {
    Judged { ours, link: 0.0 }
}

/// The same, for an engine that rounds everything to bf16.
#[must_use]
pub fn judged_half(ours: Ours) -> Judged {
    ours.graph.half.set(Some(super::HALF));
    judged(ours)
}

impl Judged {
    fn graph(&self) -> &Graphed {
        &self.ours.graph
    }

    /// New operands; those that are fed, row-major.
    ///
    /// # Errors
    /// A device that refuses them.
    pub fn draw(&mut self, seed: u64) -> Result<Vec<f64>> {
        self.graph().draw(seed)?;
        Ok(self.graph().operands.borrow()[self.graph().fed]
            .host
            .clone())
    }

    /// New operands, all that vary, row-major, in the order they were made; the one that is fed among them.
    ///
    /// # Errors
    /// As [`Judged::draw`].
    pub fn draw_all(&mut self, seed: u64) -> Result<Vec<Vec<f64>>> {
        self.graph().draw(seed)?;
        let operands = self.graph().operands.borrow();
        let all = operands.iter().filter(|o| o.varies);
        Ok(all.map(|o| o.host.clone()).collect())
    }

    /// The last element fed becomes a number made of `link`, which is given back.
    ///
    /// # Errors
    /// As [`Judged::draw`].
    pub fn feed(&mut self, link: f32) -> Result<f64> {
        self.link = link;
        self.ours.feed(link)?;
        let graph = self.graph();
        let fed = graph.operands.borrow()[graph.fed].host.last().copied();
        Ok(fed.unwrap_or(f64::NAN))
    }

    /// What was fed last.
    #[must_use]
    pub fn link(&self) -> f32 {
        self.link
    }

    /// Factor on what is fed.
    #[must_use]
    pub fn scale(&self) -> f32 {
        match self.graph().operands.borrow()[self.graph().fed].fill {
            Fill::Signed(s) | Fill::Half(s) | Fill::Positive(s) | Fill::Near(s) => s,
            Fill::Below(_) | Fill::Positions | Fill::Fixed(_) => 1.0,
        }
    }

    /// Extents of what is fed.
    #[must_use]
    pub fn shape(&self) -> Vec<usize> {
        self.graph().subject.carried[0].dims().to_vec()
    }

    /// Weights in the order they were made, with their extents.
    #[must_use]
    pub fn weights(&self) -> Vec<(Vec<f64>, Vec<usize>)> {
        let operands = self.graph().operands.borrow();
        let fixed = operands.iter().filter(|o| !o.varies);
        fixed
            .map(|o| (o.host.clone(), o.leaf.dims().to_vec()))
            .collect()
    }

    /// From here on only these of all results and states are compared, in this order.
    #[must_use]
    pub fn only(self, which: &[usize]) -> Self {
        self.graph().some.replace(Some(which.to_vec()));
        self
    }

    /// Compares the results, each row-major, with the oracle. `returned` must be the last element of the first.
    ///
    /// # Errors
    /// As [`Judged::check`].
    pub fn check_all(&self, got: &[Vec<f64>], returned: f32) -> Result<Check> {
        let graph = self.graph();
        let states = graph.subject.updates.iter().map(|(state, _)| state);
        let all: Vec<_> = graph.outs.iter().chain(states).collect();
        let some = match graph.some.borrow().is_some() {
            true => graph.some_of(&all),
            false => all.iter().take(graph.outs.len()).collect(),
        };
        let fit = |(o, g): (&&&Tensor, &Vec<f64>)| o.shape().numel() == g.len();
        let fits = some.len() == got.len() && some.iter().zip(got).all(fit);
        let mut check = graph.check(got, returned)?;
        if !fits || got.is_empty() {
            check.worst = f64::MAX;
        }
        Ok(check)
    }

    /// Compares a result, row-major, with the oracle. `returned` must be its last element.
    ///
    /// # Errors
    /// An oracle that refuses the graph.
    pub fn check(&self, got: Vec<f64>, returned: f32) -> Result<Check> {
        let of = self.graph().outs[0].shape().numel();
        if got.len() != of {
            return Ok(Check {
                worst: f64::MAX,
                compared: got.len(),
                of,
                by: crate::work::Judge::Oracle,
                at: None,
            });
        }
        self.graph().check(&[got], returned)
    }
}
