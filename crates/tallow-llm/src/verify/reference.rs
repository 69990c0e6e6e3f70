//! `reference.safetensors` of a folder with reference outputs.
//! Invariant: what is given out has the shape and the range that was asked for.
//! Absent on purpose: comparing.

use std::path::Path;

use super::{Ids, PROMPT};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::weights::Weights;

/// Its name in the folder.
pub(super) const FILE: &str = "reference.safetensors";
/// What the losses of training steps are called, up to their learning rate.
const LOSSES: &str = "losses_adamw_lr";

pub(super) struct Reference {
    file: Weights,
}

/// The AdamW steps a reference took.
pub(super) struct Steps {
    pub(super) lr: f32,
    pub(super) weight_decay: f32,
    /// The loss before each.
    pub(super) losses: Vec<f32>,
}

impl Reference {
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let hint = "give a folder with reference outputs: config.json, model.safetensors, adapter/ and reference.safetensors";
        let file = Weights::open_file_hinted(&dir.join(FILE), hint)?;
        Ok(Self { file })
    }

    pub(super) fn bad(&self, problem: impl Into<String>) -> Error {
        Error::Reference {
            path: self.file.path().to_path_buf(),
            problem: problem.into(),
        }
    }

    /// `input_ids [b, t]`.
    pub(super) fn input_ids(&self, model: &Model) -> Result<Ids> {
        let Some(tensor) = self.file.find("input_ids") else {
            return Err(self.bad("there is no tensor `input_ids`"));
        };
        let [b, t] = tensor.shape[..] else {
            let shape = &tensor.shape;
            return Err(self.bad(format!("input_ids: want shape [b, t], got {shape:?}")));
        };
        let most = model.config.max_positions;
        if b == 0 || t == 0 || t > most {
            let problem = format!("input_ids: want rows of 1 to {most} ids, got [{b}, {t}]");
            return Err(self.bad(problem));
        }
        let ids = self.ids("input_ids", tensor.to_i64()?, model)?;
        Ok(Ids { b, t, ids })
    }

    /// `greedy [1, n]` with more than the prompt in it, where it is there.
    pub(super) fn greedy(&self, model: &Model) -> Result<Option<Vec<u32>>> {
        let Some(tensor) = self.file.find("greedy") else {
            return Ok(None);
        };
        let most = model.config.max_positions;
        match tensor.shape[..] {
            [1, n] if n > PROMPT && n <= most => {
                self.ids("greedy", tensor.to_i64()?, model).map(Some)
            }
            _ => {
                let shape = &tensor.shape;
                let want = format!("greedy: want [1, n] with n from {} to {most}", PROMPT + 1);
                Err(self.bad(format!("{want}, got {shape:?}")))
            }
        }
    }

    fn ids(&self, name: &str, ids: Vec<i64>, model: &Model) -> Result<Vec<u32>> {
        let vocab = model.config.vocab;
        let one = |id: i64| match usize::try_from(id) {
            Ok(i) if i < vocab => Ok(i as u32),
            _ => Err(self.bad(format!("{name}: id {id} is not in a vocabulary of {vocab}"))),
        };
        ids.into_iter().map(one).collect()
    }

    /// A tensor of floats in f32, where it is there.
    pub(super) fn values(&self, name: &str, shape: &[usize]) -> Result<Option<Vec<f32>>> {
        let Some(tensor) = self.file.find(name) else {
            return Ok(None);
        };
        match tensor.shape == shape {
            true => tensor.to_f32().map(Some),
            false => Err(tensor.wrong_shape(shape.to_vec())),
        }
    }

    /// What follows `prefix` in the names of tensors.
    pub(super) fn names(&self, prefix: &str) -> Vec<String> {
        let all = self.file.iter();
        all.filter_map(|t| t.name.strip_prefix(prefix).map(str::to_owned))
            .collect()
    }

    /// The AdamW steps, with the settings their name tells: `losses_adamw_lr1e-2_wd0.01`.
    pub(super) fn steps(&self) -> Result<Option<Steps>> {
        let Some(rest) = self.names(LOSSES).into_iter().next() else {
            return Ok(None);
        };
        let name = format!("{LOSSES}{rest}");
        let settings = rest.split_once("_wd");
        let number = |s: &str| s.parse::<f32>().ok().filter(|v| v.is_finite());
        let parsed = settings.and_then(|(lr, wd)| Some((number(lr)?, number(wd)?)));
        let (Some((lr, weight_decay)), Some(tensor)) = (parsed, self.file.find(&name)) else {
            return Err(self.bad(format!("{name}: want {LOSSES}<number>_wd<number>")));
        };
        let losses = self.values(&name, &[tensor.elems()])?.unwrap_or_default();
        match losses.is_empty() {
            true => Err(self.bad(format!("{name}: want at least one loss, got none"))),
            false => Ok(Some(Steps {
                lr,
                weight_decay,
                losses,
            })),
        }
    }
}
