//! The part of a verification that trains: loss, gradients, AdamW steps and the weights after them.
//! Invariant: one recorded step serves all of it, as a training loop would run it.
//! Absent on purpose: dropout (the reference's adapter is at rest in it), schedules, clipping.

use tallow_core::op::Role;
use tallow_core::session::Program;
use tallow_core::tensor::Tensor;
use tallow_core::tensor::value_and_grad;
use tallow_core::types::{Shape, TensorType};

use super::reference::{FILE, Reference};
use super::{Check, GRADIENTS, Ids, LOSSES, TRAINED, relative, worst_part};
use crate::adapter::Adapter;
use crate::error::Result;
use crate::model::Model;

/// Positions of a row that are not labels.
const UNCOUNTED: usize = 6;
/// A target that is not counted.
const NO_TARGET: u32 = u32::MAX;
const BETA1: f32 = 0.9;
const BETA2: f32 = 0.999;
const EPS: f32 = 1e-8;

/// A recorded training step with AdamW.
struct Step {
    program: Program,
    hyper: Tensor,
}

/// Loss, gradients, training losses and trained weights.
pub(super) fn checks(
    model: &Model,
    adapter: &Adapter,
    r: &Reference,
    ids: &Ids,
) -> Result<Vec<Check>> {
    let steps = r.steps()?;
    let absent = |quantity: &str, tolerance: f64, tensor: &str| {
        let what = format!("tensor `{tensor}` in {FILE}");
        Check::absent(quantity, tolerance, &what)
    };
    let mut step = Step::record(model, adapter, ids, r)?;
    let (lr, weight_decay) = steps
        .as_ref()
        .map_or((0.0, 0.0), |s| (s.lr, s.weight_decay));
    let first = step.run(model, 1, lr, weight_decay)?;
    let gradient = model.session.read(&step.program.outputs[1])?;

    let mut checks = vec![match r.values("loss", &[1])? {
        Some(want) => {
            let note = format!("{first:.6}, reference {:.6}; relative", want[0]);
            Check::measured("loss", relative(&[first], &want), LOSSES, note)
        }
        None => absent("loss", LOSSES, "loss"),
    }];
    let parts = |prefix: &str, values: &[f32]| compare(adapter, r, prefix, values);
    checks.push(match parts("grad.", &gradient)? {
        Some((p, missing)) => worst_part("gradients", GRADIENTS, &p, &missing),
        None => absent("gradients", GRADIENTS, "grad.<module>.lora_A.weight"),
    });
    let Some(steps) = steps else {
        let name = "losses_adamw_lr<lr>_wd<wd>";
        checks.push(absent("training losses", LOSSES, name));
        checks.push(absent("trained weights", TRAINED, name));
        return Ok(checks);
    };
    let mut losses = vec![first];
    for n in 2..=steps.losses.len() {
        losses.push(step.run(model, n as i32, lr, weight_decay)?);
    }
    checks.push(training_losses(&losses, &steps.losses));
    let trained = model.session.read(&adapter.params)?;
    let prefix = format!("after{}.", losses.len());
    checks.push(match parts(&prefix, &trained)? {
        Some((p, missing)) => worst_part("trained weights", TRAINED, &p, &missing),
        None => {
            let name = format!("{prefix}<module>.lora_A.weight");
            absent("trained weights", TRAINED, &name)
        }
    });
    Ok(checks)
}

fn training_losses(got: &[f32], want: &[f32]) -> Check {
    let each = got.iter().zip(want);
    let parts: Vec<(String, f64)> = each
        .enumerate()
        .map(|(i, (g, w))| (format!("step {}", i + 1), relative(&[*g], &[*w])))
        .collect();
    worst_part("training losses", LOSSES, &parts, &[])
}

/// Differences of the reference's tensors `<prefix><part>` and of the parts in `values`, laid out like the
/// adapter's parameters; and the names only one side has. `None` where the reference has none of them.
#[expect(clippy::type_complexity, reason = "two lists of names, used once")]
fn compare(
    adapter: &Adapter,
    r: &Reference,
    prefix: &str,
    values: &[f32],
) -> Result<Option<(Vec<(String, f64)>, Vec<String>)>> {
    let mut names = r.names(prefix);
    if names.is_empty() {
        return Ok(None);
    }
    let (mut parts, mut missing) = (vec![], vec![]);
    let mut at = 0;
    for (name, view) in adapter.parts()? {
        let got = &values[at..at + view.shape().numel()];
        at += got.len();
        match r.values(&format!("{prefix}{name}"), view.dims())? {
            Some(want) => parts.push((name.clone(), relative(got, &want))),
            None => missing.push(name.clone()),
        }
        names.retain(|n| *n != name);
    }
    missing.append(&mut names);
    Ok(Some((parts, missing)))
}

impl Step {
    fn record(model: &Model, adapter: &Adapter, ids: &Ids, r: &Reference) -> Result<Self> {
        let s = &model.session;
        let shape = [ids.b, ids.t];
        let targets = targets(ids);
        let counted = targets.iter().filter(|t| **t != NO_TARGET).count();
        if counted == 0 {
            let problem = format!("input_ids: want rows of more than {UNCOUNTED} ids");
            return Err(r.bad(problem));
        }
        let id = s.tensor_u32(&ids.ids, shape, Role::Data)?;
        let pos = s.tensor_u32(&ids.positions(), shape, Role::Data)?;
        let target = s.tensor_u32(&targets, shape, Role::Data)?;
        let hidden = model.hidden(&id, &pos, Some(adapter), None)?;
        let nll = model.nll_with(&hidden.x, &target, Some(adapter))?;
        let loss = nll.sum_all()?.mul_scalar(1.0 / counted as f32)?;

        let parts = adapter.parts()?;
        let wrt: Vec<&Tensor> = parts.iter().map(|p| &p.1).collect();
        let g = value_and_grad(&loss, &wrt)?;
        let flat = g.grads.iter().map(|d| Ok(d.reshape([d.shape().numel()])?));
        let flat = flat.collect::<Result<Vec<_>>>()?;
        let flat = Tensor::concat(0, &flat.iter().collect::<Vec<_>>())?;

        let moment = || s.zeros(TensorType::f32([adapter.elems()]), Role::State);
        let (m, v) = (moment()?, moment()?);
        let hyper = s.tensor(&[0.0; 8], [8], Role::Data)?;
        let [p1, m1, v1] = adapter.params.adamw(&flat, &m, &v, &hyper)?;
        let updates = [(adapter.params.clone(), p1), (m, m1), (v, v1)];
        let loss = g.loss.reshape(Shape::from([1]))?;
        Ok(Self {
            program: s.record(&[&loss, &flat], &updates)?,
            hyper,
        })
    }

    /// Takes step number `t` (from 1 on) and returns the loss before it.
    fn run(&mut self, model: &Model, t: i32, lr: f32, weight_decay: f32) -> Result<f32> {
        // From the betas as f32 holds them: 0.999 is off by 1.3e-8, which 1 - 0.999 turns into 1.3e-5, and a
        // correction that does not know it would leave that in every step.
        let correction = |beta: f32| 1.0 - f64::from(beta).powi(t);
        let hyper = [
            lr,
            BETA1,
            BETA2,
            EPS,
            weight_decay,
            correction(BETA1) as f32,
            correction(BETA2).sqrt() as f32,
            1.0,
        ];
        model.session.write(&self.hyper, &hyper)?;
        self.program.replay()?;
        Ok(model.session.read(&self.program.outputs[0])?[0])
    }
}

/// The next id of each position, where it is a label.
fn targets(ids: &Ids) -> Vec<u32> {
    let mut targets = vec![NO_TARGET; ids.ids.len()];
    for (row, out) in ids.ids.chunks(ids.t).zip(targets.chunks_mut(ids.t)) {
        // Position `i` is to say label `i + 1`.
        let labels = row.iter().skip(UNCOUNTED);
        let says = out.iter_mut().skip(UNCOUNTED - 1);
        says.zip(labels).for_each(|(to, label)| *to = *label);
    }
    targets
}
