//! Dependent repetitions of a work inside one plan.
//! Invariant: the plan gives back what went into the last repetition and what came out of it, so that the oracle can
//! judge that one exactly. Whether the others were computed shows in the time: `measure` wants it to grow.

use std::collections::BTreeSet;
use std::rc::Rc;

use tallow::{Plan, Program, Tensor};

use super::{Graphed, Join, download};
use crate::Result;
use crate::work::{Chain, Chained, Check, Judge};

/// Factor on what [`Join::Add`] adds: operands stay of their size over many repetitions.
const ADDED: f32 = 0.125;
/// Timed replays behind a share.
const TIMED: usize = 3;

struct Repeated {
    graph: Rc<Graphed>,
    program: Program,
    /// Which steps are the work, by what they compute.
    ours: BTreeSet<String>,
    share: Option<f64>,
}

fn names(plan: &Plan) -> impl Iterator<Item = String> {
    plan.steps.iter().map(|s| s.spec.name())
}

/// A chain of `n` repetitions; `one` is the recording of a single one.
pub(super) fn make(graph: &Rc<Graphed>, one: &Program, n: usize) -> Result<Chained> {
    let subject = &graph.subject;
    let mut carried = subject.carried.clone();
    for _ in 1..n {
        let outs = (subject.again)(&carried)?;
        carried = match subject.join {
            Join::None(why) => return Ok(Chained::No(why)),
            Join::Feed => outs[..carried.len()].to_vec(),
            Join::Add => vec![joined(&carried[0], &outs[0])?],
        };
    }
    let outs = (subject.again)(&carried)?;
    let wanted: Vec<&Tensor> = carried.iter().chain(&outs).collect();
    let program = graph.session.record(&wanted, &[])?;
    Ok(Chained::Plan(Box::new(Repeated {
        graph: graph.clone(),
        ours: names(&one.compiled.plan).collect(),
        program,
        share: None,
    })))
}

/// `x` plus the last column of `y`, row by row.
fn joined(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let (rows, wide) = (x.shape().rows(), x.shape().last());
    let y = y.reshape([rows, y.shape().numel() / rows])?;
    let column = y.slice(1, y.shape().last() - 1, 1)?.mul_scalar(ADDED)?;
    let x2 = x.reshape([rows, wide])?;
    Ok(x2.add(&column)?.reshape(x.shape().clone())?)
}

impl Chain for Repeated {
    fn renew(&mut self, seed: u64) -> Result<()> {
        self.graph.draw(seed)?;
        self.graph.poison(&self.program)
    }

    fn start(&mut self) -> Result<()> {
        Ok(self.program.replay()?)
    }

    fn wait(&mut self) -> Result<()> {
        // Reading waits.
        let out = &self.program.outputs[self.program.outputs.len() - 1];
        let mut bytes = [0; 4];
        if let Some(b) = out.buffer() {
            self.graph.session.backend().download(b, 0, &mut bytes)?;
        }
        Ok(())
    }

    fn share(&mut self) -> Result<f64> {
        if let Some(share) = self.share {
            return Ok(share);
        }
        let plan = self.program.compiled.plan.clone();
        let is_ours: Vec<bool> = names(&plan).map(|n| self.ours.contains(&n)).collect();
        let mut share = 1.0f64;
        if is_ours.contains(&false) {
            let mut shares = vec![];
            for _ in 0..TIMED {
                let times = self.program.replay_timed()?;
                let ours = times.iter().zip(&is_ours).filter(|(_, ours)| **ours);
                let ours: f64 = ours.map(|(t, _)| t).sum();
                shares.push(ours / times.iter().sum::<f64>());
            }
            share = crate::stats::median(&shares);
        }
        self.share = Some(share);
        Ok(share)
    }

    fn check(&mut self) -> Result<Check> {
        let carried = self.graph.subject.carried.len();
        let all = self.program.outputs.iter();
        let all = all.map(|t| download(&self.graph.session, t));
        let all = all.collect::<Result<Vec<_>>>()?;
        let (fed, got) = all.split_at(carried);
        if fed.iter().flatten().any(|v| !v.is_finite()) {
            let of = got.iter().map(Vec::len).sum();
            return Ok(Check {
                worst: f64::MAX,
                compared: of,
                of,
                by: Judge::Oracle,
                at: None,
            });
        }
        self.graph.compare(got, Some(fed))
    }
}
