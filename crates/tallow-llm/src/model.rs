//! A model in memory: its weights as frozen leaves, and the graph of its forward pass.
//! Invariant: every tensor `weights::expected` names is a leaf here, and nothing else is; matrices keep the
//! type they are stored in unless [`LoadOptions`] rounds them, norms and biases are f32.
//! Absent on purpose: devices, gradients, a training mode. A step is built from the tensors given back here.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use half::bf16;
use tallow_core::op::Role;
use tallow_core::session::Session;
use tallow_core::tensor::Tensor;
use tallow_core::types::{DType, TensorType};

use crate::adapter::Adapters;
use crate::adapter::branch::{self, Part};
use crate::cache::Cache;
use crate::config::{Family, HEAD, ModelConfig};
use crate::error::{Error, Result};
use crate::layers::Forward;
use crate::weights::{self, StoredDtype, TensorView, Weights};
use crate::{llama, mistral, qwen2};

/// The type in which weight matrices are kept. Sums, norms, biases and adapters are f32 in both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ComputeDType {
    /// Weights as they are stored: nothing is rounded.
    #[default]
    F32,
    /// Weights stored in f32 or f16 are rounded to bf16: half the memory to read.
    BF16,
}

impl ComputeDType {
    /// Lower-case name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::BF16 => "bf16",
        }
    }
}

impl FromStr for ComputeDType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::BF16),
            other => Err(Error::Setting {
                name: "dtype",
                want: "f32 or bf16",
                got: crate::error::quote(other),
            }),
        }
    }
}

/// How a model is loaded.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions {
    /// The type in which weight matrices are kept.
    pub dtype: ComputeDType,
}

/// A language model on a device. Cheap to clone; clones share the weights.
#[derive(Clone)]
pub struct Model {
    /// What it computes.
    pub config: ModelConfig,
    /// Where it computes.
    pub session: Session,
    /// Are layers computed again in a backward pass, instead of keeping what they computed? Gradient
    /// checkpointing: less memory, about a third more time.
    pub recompute: bool,
    /// Leaves by their names in the checkpoint.
    pub(crate) weights: Arc<HashMap<String, Tensor>>,
    /// Radians a token, `[head_dim / 2]`.
    pub(crate) inv_freq: Tensor,
}

/// The result of a forward pass.
pub struct Hidden {
    /// After the final norm, `[b, t, c]` f32.
    pub x: Tensor,
    /// With a cache: its leaves and what they hold after this pass, for `Session::record`.
    pub updates: Vec<(Tensor, Tensor)>,
}

impl Model {
    /// Loads a Hugging Face folder: `config.json` and the weights in one or several safetensors files.
    /// The files are mapped, not copied, where the device reads host memory.
    ///
    /// # Errors
    /// Files that are missing or damaged, an architecture this version does not compute, no memory.
    pub fn load(session: &Session, dir: &Path, opts: &LoadOptions) -> Result<Self> {
        let config = ModelConfig::read(dir)?;
        let files = Weights::open(dir, &config)?;
        let mut leaves = HashMap::new();
        for (name, shape) in weights::expected(&config) {
            let leaf = leaf(session, files.get(&name)?, &shape, opts.dtype)?;
            leaves.insert(name, leaf);
        }
        let freq = &config.rope.inv_freq;
        Ok(Self {
            inv_freq: session.tensor(freq, [freq.len()], Role::Frozen)?,
            session: session.clone(),
            recompute: false,
            weights: Arc::new(leaves),
            config,
        })
    }

    /// The projections of the layers, which "all-linear" selects: "model.layers.0.self_attn.q_proj" to `(n, k)`, its values out and in.
    pub fn module_shapes(&self) -> BTreeMap<String, (usize, usize)> {
        let all = self.config.projections().into_iter();
        all.map(|(name, p)| (name, (p.n, p.k))).collect()
    }

    /// Every weight by its name in the checkpoint, sorted.
    pub fn tensors(&self) -> BTreeMap<&str, &Tensor> {
        let all = self.weights.iter();
        all.map(|(name, leaf)| (name.as_str(), leaf)).collect()
    }

    /// Everything up to and with the final norm. `ids`, `pos: [b, t]` u32, a position of `u32::MAX` is padding:
    /// it changes no other row, and what comes out in it means nothing.
    /// Without a cache a token's position must be its index in the row (padding behind the text).
    /// With one (`b` = 1) the rows may be any further positions; the cache must be updated with the result's `updates`.
    /// Several `adapters` have equal shares of the `b` rows.
    ///
    /// # Errors
    /// An adapter or a cache of another model; shapes that do not fit.
    pub fn hidden<'a>(
        &self,
        ids: &Tensor,
        pos: &Tensor,
        adapters: impl Into<Adapters<'a>>,
        cache: Option<&Cache>,
    ) -> Result<Hidden> {
        self.forward(ids, pos, None, adapters.into(), cache)
    }

    /// As [`Model::hidden`] without a cache, over rows that hold several documents one after another: `pos` counts
    /// from 0 in each, `starts [b, t]` is the index in its row of a document's first token. No token sees another
    /// document. Padding has a position of `u32::MAX` and a start of 0.
    ///
    /// # Errors
    /// As [`Model::hidden`].
    pub fn hidden_packed<'a>(
        &self,
        ids: &Tensor,
        pos: &Tensor,
        starts: &Tensor,
        adapters: impl Into<Adapters<'a>>,
    ) -> Result<Hidden> {
        // Integers saturate, so padding stays padding.
        let index = pos.add(starts)?;
        self.forward(ids, pos, Some([&index, starts]), adapters.into(), None)
    }

    fn forward(
        &self,
        ids: &Tensor,
        pos: &Tensor,
        packed: Option<[&Tensor; 2]>,
        adapters: Adapters<'_>,
        cache: Option<&Cache>,
    ) -> Result<Hidden> {
        adapters.check_fits(&self.config)?;
        let layer = match self.config.family {
            Family::Llama => llama::layer,
            Family::Qwen2 => qwen2::layer,
            Family::Mistral => mistral::layer,
        };
        let mut forward = Forward::new(self, pos, packed, adapters, cache);
        let mut x = forward.embed(ids)?;
        for index in 0..self.config.layers {
            if self.recompute {
                x = x.barrier(index as u32)?;
            }
            x = layer(&mut forward, index, &x)?;
        }
        Ok(Hidden {
            x: forward.rms_norm(&x, "model.norm")?,
            updates: forward.updates,
        })
    }

    /// Scores of every token: `x [.., c]` (after the final norm) to `[.., vocab]`, without an adapter on the output
    /// projection.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        self.logits_with(x, Adapters::default())
    }

    /// Scores of every token, as [`logits`](Self::logits), with what the adapter adds to the output projection. A tied
    /// embedding is not touched by it.
    pub fn logits_with<'a>(&self, x: &Tensor, adapters: impl Into<Adapters<'a>>) -> Result<Tensor> {
        let part = Part {
            w: self.head()?.clone(),
            bias: None,
            branches: adapters.into().of(HEAD)?,
        };
        branch::project(x, &[part], None)
    }

    /// Cross entropy in nats, without ever holding all logits: `x [b, t, c]` (after the final norm) against
    /// `targets [b, t]` u32 gives `[b * t]`. A target of `u32::MAX` is not counted: 0, and no gradient.
    pub fn nll(&self, x: &Tensor, targets: &Tensor) -> Result<Tensor> {
        self.nll_with(x, targets, Adapters::default())
    }

    /// As [`nll`](Self::nll), with what the adapter adds to the output projection, where it is on that: then all
    /// logits are held, and the memory for them is in the plan.
    pub fn nll_with<'a>(
        &self,
        x: &Tensor,
        targets: &Tensor,
        adapters: impl Into<Adapters<'a>>,
    ) -> Result<Tensor> {
        let adapters = adapters.into();
        let rows = x.reshape([x.shape().rows(), x.shape().last()])?;
        let targets = targets.reshape([targets.shape().numel()])?;
        match adapters.of(HEAD)?.iter().all(Option::is_none) {
            true => Ok(rows.cross_entropy(self.head()?, &targets)?),
            false => Ok(self
                .logits_with(&rows, adapters)?
                .logits_cross_entropy(&targets)?),
        }
    }

    /// The weight `[n, k]` of a module that an adapter can be on, but for the embedding.
    pub(crate) fn base_weight(&self, module: &str) -> Result<&Tensor> {
        match module {
            HEAD => self.head(),
            _ => self.weight(&format!("{module}.weight")),
        }
    }

    /// The output projection `[vocab, c]`: its own, or the embedding where they are tied.
    fn head(&self) -> Result<&Tensor> {
        self.weight(match self.config.tied {
            true => "model.embed_tokens.weight",
            false => "lm_head.weight",
        })
    }

    /// A leaf by its name in the checkpoint.
    pub(crate) fn weight(&self, name: &str) -> Result<&Tensor> {
        self.weights.get(name).ok_or_else(|| Error::Tensors {
            path: self.config.path.clone(),
            count: 1,
            problem: "tensors the family reads but `weights::expected` does not name",
            names: name.to_owned(),
            hint: "this is a bug in tallow",
        })
    }
}

/// One tensor of a checkpoint on the device.
fn leaf(s: &Session, t: &TensorView, shape: &[usize], want: ComputeDType) -> Result<Tensor> {
    if shape.len() < 2 {
        return Ok(s.tensor(&t.to_f32()?, shape, Role::Frozen)?);
    }
    let dtype = match (t.dtype, want) {
        (StoredDtype::BF16, _) => DType::BF16,
        (_, ComputeDType::BF16) => {
            let round = |v: &f32| bf16::from_f32(*v).to_le_bytes();
            let bytes: Vec<u8> = t.to_f32()?.iter().flat_map(round).collect();
            let all = 0..bytes.len();
            let ty = TensorType::new(shape, DType::BF16);
            return Ok(s.adopt(Arc::new(bytes), all, ty)?);
        }
        (StoredDtype::F32, _) => DType::F32,
        (StoredDtype::F16, _) => DType::F16,
        _ => return Err(t.wrong_type("F32, BF16 or F16")),
    };
    let host = Arc::new(Mapped(t.clone()));
    Ok(s.adopt(host, 0..t.bytes.len(), TensorType::new(shape, dtype))?)
}

/// A tensor's bytes in its mapped file, which it keeps open.
struct Mapped(TensorView);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}
