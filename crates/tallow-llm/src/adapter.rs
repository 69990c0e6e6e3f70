//! A LoRA adapter on a device: one flat buffer, of which every `A` and `B` is a view.
//! Invariant: the views cover the buffer exactly once, in order of offset; modules are sorted by name, `A`
//! before `B`. So the gradient of the buffer is the gradients of the views, one after another.
//! Absent on purpose: files (see `peft.rs`), optimizers, merging into the weights.

use std::path::Path;

use tallow_core::op::Role;
use tallow_core::session::Session;
use tallow_core::tensor::Tensor;

use crate::config::{ModelConfig, Projection};
use crate::error::{Error, Result, list, quote};
use crate::model::Model;
use crate::peft::{self, AdapterConfig, LoraModule};

/// An adapter of a model: `y = x·Wᵀ + scale·(x·Aᵀ)·Bᵀ` for each adapted projection. Cheap to clone; clones
/// share the parameters.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// What it is on, and how strong.
    pub config: AdapterConfig,
    /// Every parameter, `[P]` f32: state where it is trained, frozen where it only runs.
    pub params: Tensor,
    modules: Vec<Module>,
}

/// One adapted projection.
#[derive(Clone, Debug)]
struct Module {
    name: String,
    size: Projection,
    rank: usize,
    scale: f32,
    /// `A [r, k]` and `B [n, r]`, views of the parameters.
    a: Tensor,
    b: Tensor,
    /// Where `A` begins in the parameters; `B` follows it.
    offset: usize,
}

impl Module {
    fn parts(&self) -> [(String, &Tensor, usize); 2] {
        let Self { name, a, b, .. } = self;
        [
            (format!("{name}.lora_A.weight"), a, self.offset),
            (
                format!("{name}.lora_B.weight"),
                b,
                self.offset + self.rank * self.size.k,
            ),
        ]
    }
}

impl Adapter {
    /// A fresh adapter to train, as PEFT starts one: every `A` uniform in ±1/sqrt(k), every `B` zero, so that
    /// it changes nothing yet. Equal seeds give equal adapters.
    ///
    /// # Errors
    /// A configuration that selects nothing of the model, or more than its projections.
    pub fn new(model: &Model, config: &AdapterConfig, seed: u64) -> Result<Self> {
        let made = peft::Adapter::init(config.clone(), &model.config.projections(), seed)?;
        Self::place(model, made.config, made.modules, Role::State)
    }

    /// Reads a PEFT folder; also returns what deserves a word to the user though the adapter works.
    /// `role`: [`Role::State`] to train it, [`Role::Frozen`] to run it only (the device may then lay it out once).
    ///
    /// # Errors
    /// Files that are missing or damaged, an adapter that does not fit the model whole.
    pub fn load(model: &Model, dir: &Path, role: Role) -> Result<(Self, Vec<String>)> {
        let read = peft::Adapter::read(dir, &model.config.projections())?;
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
            let from = &all[m.offset..m.offset + a + b];
            LoraModule {
                module: m.name.clone(),
                projection: m.size,
                rank: m.rank,
                scale: m.scale,
                a: from[..a].to_vec(),
                b: from[a..].to_vec(),
            }
        };
        let config = AdapterConfig {
            base_model: Some(base_name.to_owned()),
            ..self.config.clone()
        };
        let file = peft::Adapter {
            config,
            modules: self.modules.iter().map(module).collect(),
            warnings: Vec::new(),
        };
        file.write(dir)
    }

    /// Every `A` and `B` by PEFT's name ("model.layers.0.self_attn.q_proj.lora_A.weight") as a view `[r, k]` or
    /// `[n, r]` of the parameters. In order of offset and covering all of them once: their gradients, flattened
    /// and joined, are the gradient of [`params`](Self::params).
    pub fn parts(&self) -> Result<Vec<(String, Tensor)>> {
        let of = |m: &Module| m.parts().map(|(name, view, _)| (name, view.clone()));
        Ok(self.modules.iter().flat_map(of).collect())
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

    /// `A`, `B` and the scale of a projection, where it is adapted.
    pub(crate) fn of(&self, module: &str) -> Option<(Tensor, Tensor, f32)> {
        let at = self
            .modules
            .binary_search_by(|m| m.name.as_str().cmp(module));
        let m = &self.modules[at.ok()?];
        Some((m.a.clone(), m.b.clone(), m.scale))
    }

    /// Every module is a projection of this model, so that none is left out silently.
    pub(crate) fn check_fits(&self, config: &ModelConfig) -> Result<()> {
        let base = config.projections();
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
        modules: Vec<LoraModule>,
        role: Role,
    ) -> Result<Self> {
        let mut all = Vec::new();
        for m in &modules {
            all.extend_from_slice(&m.a);
            all.extend_from_slice(&m.b);
        }
        let params = model.session.tensor(&all, [all.len()], role)?;
        let mut at = 0;
        let mut view = |rows: usize, columns: usize| -> Result<Tensor> {
            let flat = params.slice(0, at, rows * columns)?;
            at += rows * columns;
            Ok(flat.reshape([rows, columns])?)
        };
        let mut placed = Vec::with_capacity(modules.len());
        let mut offset = 0;
        for m in modules {
            let Projection { n, k } = m.projection;
            placed.push(Module {
                a: view(m.rank, k)?,
                b: view(n, m.rank)?,
                size: m.projection,
                name: m.module,
                rank: m.rank,
                scale: m.scale,
                offset,
            });
            offset += m.rank * (n + k);
        }
        Ok(Self {
            config,
            params,
            modules: placed,
        })
    }
}
