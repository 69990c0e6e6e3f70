//! A LoRA adapter on a device: one flat buffer, of which every `A`, `B` and magnitude is a view.
//! Invariant: the views cover the buffer exactly once, in order of offset; modules are sorted by name, `A`
//! before `B` before the magnitude. So the gradient of the buffer is the gradients of the views, one after another.
//! Absent on purpose: files (see `peft.rs`), optimizers, merging into the weights.

pub(crate) mod branch;
mod start;

use std::path::Path;

use tallow_core::op::Role;
use tallow_core::session::Session;
use tallow_core::tensor::Tensor;
use tallow_core::types::TensorType;

use crate::config::{EMBEDDING, ModelConfig, Projection};
use crate::error::{Error, Result, list, quote};
use crate::model::Model;
use crate::peft::{self, AdapterConfig, Init, LoraModule, turned};
use branch::{Branch, Dropout, Magnitude};

/// An adapter of a model: `y = x·Wᵀ + scale·(x·Aᵀ)·Bᵀ` for each adapted projection. Cheap to clone; clones
/// share the parameters.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// What it is on, and how strong.
    pub config: AdapterConfig,
    /// Every parameter, `[P]` f32: state where it is trained, frozen where it only runs.
    pub params: Tensor,
    modules: Vec<Module>,
    /// While training, if the configuration asks for it.
    dropout: Option<Dropout>,
    /// A learning rate's factor for each parameter, `[P]`, where they differ.
    rates: Option<Tensor>,
}

/// The adapters of a forward pass: none, one for all rows of a batch, or several that have an equal share of its
/// rows each, one after another.
#[derive(Clone, Copy, Debug, Default)]
pub struct Adapters<'a>(&'a [Adapter]);

impl<'a> From<&'a [Adapter]> for Adapters<'a> {
    fn from(all: &'a [Adapter]) -> Self {
        Adapters(all)
    }
}

impl<'a> From<&'a Adapter> for Adapters<'a> {
    fn from(one: &'a Adapter) -> Self {
        Adapters(std::slice::from_ref(one))
    }
}

impl<'a> From<Option<&'a Adapter>> for Adapters<'a> {
    fn from(one: Option<&'a Adapter>) -> Self {
        one.map_or(Adapters(&[]), Adapters::from)
    }
}

impl Adapters<'_> {
    /// What each share adds to a module. None at all: a single `None`.
    pub(crate) fn of(self, module: &str) -> Result<Vec<Option<Branch>>> {
        match self.0 {
            [] => Ok(vec![None]),
            all => all.iter().map(|a| a.of(module)).collect(),
        }
    }

    /// Every module of every adapter is a projection of this model, so that none is left out silently.
    pub(crate) fn check_fits(self, config: &ModelConfig) -> Result<()> {
        self.0.iter().try_for_each(|a| a.check_fits(config))
    }
}

/// One adapted projection.
#[derive(Clone, Debug)]
struct Module {
    name: String,
    size: Projection,
    rank: usize,
    scale: f32,
    /// `A [r, k]` and `B [n, r]`, views of the parameters; on the embedding `A` lies turned, `[k, r]`, so that a
    /// token's numbers are a row.
    a: Tensor,
    b: Tensor,
    magnitude: Option<Magnitude>,
    /// PiSSA: `A` and `B` as they started, frozen.
    start: Option<[Tensor; 2]>,
    /// Where `A` begins in the parameters; `B` follows it, then the magnitude.
    offset: usize,
}

impl Module {
    fn parts(&self) -> Vec<(String, &Tensor, usize)> {
        let (name, b_at) = (&self.name, self.offset + self.rank * self.size.k);
        let (a, b) = match &**name {
            EMBEDDING => ("lora_embedding_A", "lora_embedding_B"),
            _ => ("lora_A.weight", "lora_B.weight"),
        };
        let mut all = vec![
            (format!("{name}.{a}"), &self.a, self.offset),
            (format!("{name}.{b}"), &self.b, b_at),
        ];
        if let Some(m) = &self.magnitude {
            let at = b_at + self.rank * self.size.n;
            all.push((format!("{name}.lora_magnitude_vector.weight"), &m.m, at));
        }
        all
    }
}

impl Adapter {
    /// A fresh adapter to train. With [`Init::Uniform`] as PEFT starts one: every `A` uniform in ±1/sqrt(k), every
    /// `B` zero, magnitudes those of the base, so that it changes nothing yet. With [`Init::Pissa`] it changes
    /// nothing yet either, up to rounding. Equal seeds give equal adapters.
    ///
    /// # Errors
    /// A configuration that selects nothing of the model, or more than its projections; PiSSA with DoRA.
    pub fn new(model: &Model, config: &AdapterConfig, seed: u64) -> Result<Self> {
        let mut made = peft::Adapter::init(config.clone(), &model.config.adaptable(), seed)?;
        if config.init == Init::Pissa {
            if config.use_dora {
                return Err(Error::Setting {
                    name: "init",
                    want: "another start than pissa where DoRA is on",
                    got: "pissa".to_owned(),
                });
            }
            start::pissa(model, &mut made.modules, seed)?;
        }
        Self::place(model, made.config, made.modules, Role::State)
    }

    /// Reads a PEFT folder; also returns what deserves a word to the user though the adapter works.
    /// `role`: [`Role::State`] to train it, [`Role::Frozen`] to run it only (the device may then lay it out once).
    ///
    /// # Errors
    /// Files that are missing or damaged, an adapter that does not fit the model whole.
    pub fn load(model: &Model, dir: &Path, role: Role) -> Result<(Self, Vec<String>)> {
        let read = peft::Adapter::read(dir, &model.config.adaptable())?;
        let adapter = Self::place(model, read.config, read.modules, role)?;
        Ok((adapter, read.warnings))
    }

    /// Writes a PEFT folder, in f32; each file is whole or not there. `base_name`: what the base model is
    /// called in it. Waits for the device.
    ///
    /// # Errors
    /// A folder that cannot be written; parameters that are not finite.
    pub fn save(&self, model: &Model, dir: &Path, base_name: &str) -> Result<()> {
        let all = model.session.read(&self.params)?;
        let module = |m: &Module| {
            let (a, b) = (m.rank * m.size.k, m.rank * m.size.n);
            let from = &all[m.offset..];
            LoraModule {
                module: m.name.clone(),
                projection: m.size,
                rank: m.rank,
                scale: m.scale,
                a: match &*m.name {
                    EMBEDDING => turned(&from[..a], m.rank),
                    _ => from[..a].to_vec(),
                },
                b: from[a..a + b].to_vec(),
                magnitude: m
                    .magnitude
                    .as_ref()
                    .map(|_| from[a + b..a + b + m.size.n].to_vec()),
            }
        };
        let mut file = peft::Adapter {
            config: AdapterConfig {
                base_model: Some(base_name.to_owned()),
                ..self.config.clone()
            },
            modules: self.modules.iter().map(module).collect(),
            warnings: Vec::new(),
        };
        for (m, to) in self.modules.iter().zip(&mut file.modules) {
            if let Some([a, b]) = &m.start {
                start::double(to, &model.session.read(a)?, &model.session.read(b)?);
            }
        }
        if self.config.init == Init::Pissa {
            file.config = file.config.doubled();
        }
        file.write(dir)
    }

    /// Every `A`, `B` and magnitude by PEFT's name ("model.layers.0.self_attn.q_proj.lora_A.weight",
    /// "….lora_magnitude_vector.weight") as a view `[r, k]`, `[n, r]` or `[n]` of the parameters. In order of offset
    /// and covering all of them once: their gradients, flattened and joined, are the gradient of
    /// [`params`](Self::params). On the embedding they are "….lora_embedding_A" as `[k, r]` and "….lora_embedding_B".
    pub fn parts(&self) -> Result<Vec<(String, Tensor)>> {
        let parts = self.modules.iter().flat_map(Module::parts);
        Ok(parts.map(|(name, view, _)| (name, view.clone())).collect())
    }

    /// The adapted projections, sorted, each with its rank and scale.
    pub fn modules(&self) -> impl Iterator<Item = (&str, usize, f32)> {
        let all = self.modules.iter();
        all.map(|m| (m.name.as_str(), m.rank, m.scale))
    }

    /// Number of parameters.
    pub fn elems(&self) -> usize {
        self.params.shape().numel()
    }

    /// This adapter as a training step runs it: with the dropout its configuration asks for. Everything but a
    /// training step uses the adapter as it is. The numbers drawn are those of the last [`draw`](Self::draw).
    ///
    /// # Errors
    /// No memory.
    pub fn for_training(&self, session: &Session) -> Result<Self> {
        if self.config.dropout == 0.0 {
            return Ok(self.clone());
        }
        let dropout = Dropout {
            seed: session.zeros(TensorType::u32([2]), Role::Data)?,
            keep: (1.0 - self.config.dropout) as f32,
        };
        Ok(Self {
            dropout: Some(dropout),
            ..self.clone()
        })
    }

    /// Chooses the dropout masks of the next replay: equal seeds and steps give equal masks. Nothing without dropout.
    ///
    /// # Errors
    /// A device that fails.
    pub fn draw(&self, session: &Session, seed: u64, step: u64) -> Result<()> {
        let Some(d) = &self.dropout else {
            return Ok(());
        };
        // A key a step: seeds that differ in either half differ in the first word or are told apart by the second.
        let key = [
            (seed ^ (seed >> 32)) as u32,
            (step ^ (seed >> 32).rotate_left(16)) as u32,
        ];
        Ok(session.write_u32(&d.seed, &key)?)
    }

    /// LoRA+ (Hayou et al. 2024, arXiv:2402.12354): every `B` learns `ratio` times as fast. See [`pace`](Self::pace).
    ///
    /// # Errors
    /// A ratio that is not a positive number; no memory.
    pub fn with_b_rate(&self, session: &Session, ratio: f64) -> Result<Self> {
        if !(ratio.is_finite() && ratio > 0.0) {
            return Err(Error::Setting {
                name: "learning rate ratio of LoRA+",
                want: "a number above 0",
                got: ratio.to_string(),
            });
        }
        let mut rates = vec![1.0_f32; self.elems()];
        for m in &self.modules {
            let b_at = m.offset + m.rank * m.size.k;
            rates[b_at..b_at + m.rank * m.size.n].fill(ratio as f32);
        }
        Ok(Self {
            rates: Some(session.tensor(&rates, [rates.len()], Role::Frozen)?),
            ..self.clone()
        })
    }

    /// What the parameters become where the optimizer, at the plain learning rate, would make them `next [P]`: each
    /// goes its own multiple of the way. Every rule whose step is proportional to the learning rate (AdamW with its
    /// decoupled decay, SGD, Lion) then steps at the multiplied rate. Without rates of its own, `next`.
    ///
    /// # Errors
    /// Another number of parameters.
    pub fn pace(&self, next: &Tensor) -> Result<Tensor> {
        let Some(rates) = &self.rates else {
            return Ok(next.clone());
        };
        let way = next.sub(&self.params)?.mul(rates)?;
        Ok(self.params.add(&way)?)
    }

    /// Overwrites one part, named as in [`parts`](Self::parts); row-major. For tests and imports: it moves all
    /// parameters to the host and back.
    ///
    /// # Errors
    /// An unknown name; another number of values.
    pub fn set(&self, session: &Session, name: &str, values: &[f32]) -> Result<()> {
        let (from, elems) = self.find(name)?;
        if values.len() != elems {
            return Err(Error::Setting {
                name: "values of an adapter's part",
                want: "as many as the part has",
                got: format!("{} for the {elems} of {}", values.len(), quote(name)),
            });
        }
        let mut all = session.read(&self.params)?;
        all[from..from + elems].copy_from_slice(values);
        Ok(session.write(&self.params, &all)?)
    }

    /// The values of one part, row-major. Waits for the device.
    ///
    /// # Errors
    /// An unknown name.
    pub fn get(&self, session: &Session, name: &str) -> Result<Vec<f32>> {
        let (from, elems) = self.find(name)?;
        Ok(session.read(&self.params)?[from..from + elems].to_vec())
    }

    /// Where a part begins, and how many values it has.
    fn find(&self, name: &str) -> Result<(usize, usize)> {
        let parts = self.modules.iter().flat_map(Module::parts);
        let mut found = parts.filter(|p| p.0 == name);
        let one = found.next().map(|(_, t, from)| (from, t.shape().numel()));
        one.ok_or_else(|| Error::Setting {
            name: "part of an adapter",
            want: "<module>.lora_A.weight or <module>.lora_B.weight of an adapted module",
            got: quote(name),
        })
    }

    /// What is added to a projection, where it is adapted.
    fn of(&self, module: &str) -> Result<Option<Branch>> {
        let at = self
            .modules
            .binary_search_by(|m| m.name.as_str().cmp(module));
        let Ok(at) = at else { return Ok(None) };
        let m = &self.modules[at];
        let (mut a, mut b) = (m.a.clone(), m.b.clone());
        if let Some([a0, minus_b0]) = &m.start {
            a = Tensor::concat(0, &[&a, a0])?;
            b = Tensor::concat(1, &[&b, minus_b0])?;
        }
        Ok(Some(Branch {
            a,
            b,
            scale: m.scale,
            magnitude: m.magnitude.clone(),
            dropout: self.dropout.clone().map(|d| (d, at as u32)),
        }))
    }

    /// Every module is a projection of this model, so that none is left out silently.
    pub(crate) fn check_fits(&self, config: &ModelConfig) -> Result<()> {
        let base = config.adaptable();
        let misfit = |m: &&Module| base.get(&m.name) != Some(&m.size);
        let rest: Vec<&str> = self
            .modules
            .iter()
            .filter(misfit)
            .map(|m| &*m.name)
            .collect();
        if rest.is_empty() {
            return Ok(());
        }
        Err(Error::PartialAdapter {
            path: self.config.path.clone(),
            bound: self.modules.len() - rest.len(),
            total: self.modules.len(),
            rest: list(rest),
        })
    }

    /// Uploads modules (sorted by name) and makes the views.
    fn place(
        model: &Model,
        config: AdapterConfig,
        mut modules: Vec<LoraModule>,
        role: Role,
    ) -> Result<Self> {
        let squares = start::magnitudes(model, &config, &mut modules)?;
        let mut all = Vec::new();
        for m in &modules {
            match &*m.module {
                EMBEDDING => all.extend(turned(&m.a, m.projection.k)),
                _ => all.extend_from_slice(&m.a),
            }
            all.extend_from_slice(&m.b);
            all.extend(m.magnitude.iter().flatten());
        }
        let params = model.session.tensor(&all, [all.len()], role)?;
        let mut placed = Vec::with_capacity(modules.len());
        let mut offset = 0;
        for (m, squares) in modules.into_iter().zip(squares) {
            let Projection { n, k } = m.projection;
            let (rank, b_at) = (m.rank, offset + m.rank * k);
            let end = b_at + n * rank;
            let view = |at: usize, shape: [usize; 2]| -> Result<Tensor> {
                let flat = params.slice(0, at, shape[0] * shape[1])?;
                Ok(flat.reshape(shape)?)
            };
            let pissa = config.init == Init::Pissa && role == Role::State;
            let a_shape = match &*m.module {
                EMBEDDING => [k, rank],
                _ => [rank, k],
            };
            let mut one = Module {
                a: view(offset, a_shape)?,
                b: view(b_at, [n, rank])?,
                magnitude: None,
                start: match pissa {
                    true => Some(start::frozen(&model.session, &m)?),
                    false => None,
                },
                size: m.projection,
                name: m.module,
                rank,
                scale: m.scale,
                offset,
            };
            offset = end;
            if let Some(squares) = squares {
                let at = [one.offset, b_at, end];
                let made = Magnitude::new(&params, at, [rank, k, n], &squares, &model.session)?;
                one.magnitude = Some(match role {
                    Role::Frozen => made.fixed(model, &one.name, one.scale)?,
                    _ => made,
                });
                offset += n;
            }
            placed.push(one);
        }
        Ok(Self {
            config,
            params,
            modules: placed,
            dropout: None,
            rates: None,
        })
    }
}
