//! Compares what this crate computes with reference outputs of another program.
//! Invariant: every quantity of the reference is compared, or reported as absent; NaN never passes.
//! Absent on purpose: tolerances to choose from. They are those of f32, however the weights are stored.
//!
//! A folder holds a model, its adapter in `adapter/`, and `reference.safetensors`: `input_ids [b, t]`;
//! `logits [b, t, vocab]`; `greedy [1, n]`, 8 ids of the first row and what follows them; with the adapter
//! `adapter_logits`, `loss [1]` (the ids as labels, the first 6 of a row not counted), its gradients
//! `grad.<module>.lora_{A,B}.weight`; and the losses before each of some AdamW steps,
//! `losses_adamw_lr<lr>_wd<wd> [n]`, with the weights after them, `after<n>.<module>.lora_{A,B}.weight`. With DoRA
//! gradients and weights have `….lora_magnitude_vector.weight` too.

mod reference;
mod train;

use std::path::Path;

use tallow_core::op::Role;
use tallow_core::session::Session;

use crate::adapter::Adapter;
use crate::error::{Result, list};
use crate::generate::Decoder;
use crate::model::{LoadOptions, Model};
use crate::peft;
use crate::sample::{Sampler, Sampling};
use reference::Reference;

/// Largest difference of a logit.
const LOGITS: f64 = 5e-5;
/// Relative difference of a gradient, by norm.
const GRADIENTS: f64 = 1e-4;
/// Relative difference of a loss.
const LOSSES: f64 = 1e-5;
/// Relative difference of a trained weight, by norm.
const TRAINED: f64 = 1e-4;
/// Ids of the first row that the greedy continuation starts from.
const PROMPT: usize = 8;
/// Where the reference's adapter lies.
const ADAPTER: &str = "adapter";

/// One quantity compared.
#[derive(Clone, Debug, PartialEq)]
pub struct Check {
    /// "logits", "gradients", ...
    pub quantity: String,
    /// The difference found; `None` where the reference does not have the quantity.
    pub measured: Option<f64>,
    /// The most it may be.
    pub tolerance: f64,
    /// Within the tolerance, or nothing to compare with.
    pub pass: bool,
    /// What the difference is, where it is largest, what is absent.
    pub note: String,
}

impl Check {
    fn measured(quantity: &str, measured: f64, tolerance: f64, note: String) -> Self {
        Self {
            quantity: quantity.to_owned(),
            measured: Some(measured),
            tolerance,
            // False for NaN.
            pass: measured <= tolerance,
            note,
        }
    }

    fn absent(quantity: &str, tolerance: f64, what: &str) -> Self {
        Self {
            quantity: quantity.to_owned(),
            measured: None,
            tolerance,
            pass: true,
            note: format!("not compared: no {what}"),
        }
    }
}

/// Compares the model in `dir`, in f32, with the reference outputs beside it: one [`Check`] a quantity.
///
/// # Errors
/// A folder that is not laid out like this (see the module), a model or adapter that cannot be loaded, a
/// reference without any of the quantities.
pub fn verify(session: &Session, dir: &Path) -> Result<Vec<Check>> {
    let model = Model::load(session, dir, &LoadOptions::default())?;
    let reference = Reference::open(dir)?;
    let ids = reference.input_ids(&model)?;
    let mut checks = vec![
        logits(&model, &reference, &ids, None)?,
        greedy(&model, &reference)?,
    ];
    let folder = dir.join(ADAPTER);
    if folder.join(peft::CONFIG_FILE).exists() || folder.join(peft::WEIGHTS_FILE).exists() {
        let (adapter, _) = Adapter::load(&model, &folder, Role::State)?;
        checks.push(logits(&model, &reference, &ids, Some(&adapter))?);
        checks.extend(train::checks(&model, &adapter, &reference, &ids)?);
    } else {
        for (quantity, tolerance) in [
            ("adapter logits", LOGITS),
            ("loss", LOSSES),
            ("gradients", GRADIENTS),
            ("training losses", LOSSES),
            ("trained weights", TRAINED),
        ] {
            let what = &format!("folder `{ADAPTER}` with an adapter");
            checks.push(Check::absent(quantity, tolerance, what));
        }
    }
    match checks.iter().any(|c| c.measured.is_some()) {
        true => Ok(checks),
        false => Err(reference.bad("holds nothing to compare with")),
    }
}

/// Token ids `[b, t]`.
struct Ids {
    b: usize,
    t: usize,
    ids: Vec<u32>,
}

impl Ids {
    /// Position in the row, for each token.
    fn positions(&self) -> Vec<u32> {
        (0..self.b).flat_map(|_| 0..self.t as u32).collect()
    }
}

fn logits(model: &Model, r: &Reference, ids: &Ids, adapter: Option<&Adapter>) -> Result<Check> {
    let (quantity, name) = match adapter {
        None => ("logits", "logits"),
        Some(_) => ("adapter logits", "adapter_logits"),
    };
    let shape = [ids.b, ids.t, model.config.vocab];
    let Some(want) = r.values(name, &shape)? else {
        let what = format!("tensor `{name}` in {}", reference::FILE);
        return Ok(Check::absent(quantity, LOGITS, &what));
    };
    let s = &model.session;
    let id = s.tensor_u32(&ids.ids, [ids.b, ids.t], Role::Data)?;
    let pos = s.tensor_u32(&ids.positions(), [ids.b, ids.t], Role::Data)?;
    let hidden = model.hidden(&id, &pos, adapter, None)?;
    let got = s.read(&model.logits_with(&hidden.x, adapter)?)?;
    let mut worst = (0.0, 0);
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        let d = (f64::from(*g) - f64::from(*w)).abs();
        if d > worst.0 || d.is_nan() {
            worst = (d, i);
        }
        if d.is_nan() {
            break;
        }
    }
    let (row, token) = (worst.1 / model.config.vocab, worst.1 % model.config.vocab);
    let (b, t) = (row / ids.t, row % ids.t);
    let note = format!("largest difference, at row {b}, position {t}, token {token}");
    Ok(Check::measured(quantity, worst.0, LOGITS, note))
}

fn greedy(model: &Model, r: &Reference) -> Result<Check> {
    let quantity = "greedy";
    let Some(want) = r.greedy(model)? else {
        let what = format!("tensor `greedy` in {}", reference::FILE);
        return Ok(Check::absent(quantity, 0.0, &what));
    };
    let mut decoder = Decoder::new(model, None, want.len())?;
    let mut sampler = Sampler::new(Sampling::greedy())?;
    let mut got = want[..PROMPT].to_vec();
    let mut fed = 0;
    let mut first = None;
    while got.len() < want.len() {
        let logits = decoder.feed(&got[fed..])?;
        fed = got.len();
        let id = sampler.next(logits, &got)?;
        let expected = want[got.len()];
        if id != expected && first.is_none() {
            let gap = logits[id as usize] - logits[expected as usize];
            let at = got.len();
            first = Some(format!(
                "first at position {at}: {id} for {expected}, {gap:.1e} likelier"
            ));
        }
        got.push(id);
    }
    let differ = got.iter().zip(&want).filter(|(a, b)| a != b).count();
    let of = want.len() - PROMPT;
    let note = match first {
        None => format!("{of} tokens are the same"),
        Some(first) => format!("{differ} of {of} tokens differ, {first}"),
    };
    Ok(Check::measured(quantity, differ as f64, 0.0, note))
}

/// `|a - b| / |b|` by norm in f64; where `b` is zero, `|a|`.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let each = a.iter().zip(b);
    let difference = norm(&mut each.map(|(a, b)| f64::from(*a) - f64::from(*b)));
    match norm(&mut b.iter().map(|b| f64::from(*b))) {
        0.0 => difference,
        size => difference / size,
    }
}

/// The worst of named parts, those `missing` from one side being a failure.
fn worst_part(
    quantity: &str,
    tolerance: f64,
    parts: &[(String, f64)],
    missing: &[String],
) -> Check {
    let mut worst: Option<&(String, f64)> = None;
    for part in parts {
        if worst.is_none_or(|w| part.1.is_nan() || part.1 > w.1) {
            worst = Some(part);
        }
        if part.1.is_nan() {
            break;
        }
    }
    let note = match worst {
        Some((name, _)) => format!("largest of {} by relative norm: {name}", parts.len()),
        None => "nothing in common".to_owned(),
    };
    let measured = worst.map_or(f64::NAN, |w| w.1);
    let mut check = Check::measured(quantity, measured, tolerance, note);
    if !missing.is_empty() {
        check.pass = false;
        check.note = format!("{}; only on one side: {}", check.note, list(missing));
    }
    check
}

#[cfg(test)]
mod tests;
