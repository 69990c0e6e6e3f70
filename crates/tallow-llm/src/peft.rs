//! LoRA adapters in PEFT's format, in and out.
//! Invariant: an adapter that was read binds whole: every module its configuration selects has both its
//! tensors, every tensor belongs to such a module, every number is finite, shapes are the base model's.
//! Absent on purpose: other adapter kinds and variants (trained biases, whole modules): refused by name.

mod config;
mod matching;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};
use safetensors::View;

pub use config::{AdapterConfig, Init, Targets};

use crate::config::{EMBEDDING, HEAD, Projection, Projections};
use crate::error::{Error, Result, list, quote};
use crate::files::{self, Staged};
use crate::weights::{StoredDtype, TensorView, Weights};

/// Where an adapter's configuration lies in its folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Where an adapter's tensors lie in its folder.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

const PREFIX: &str = "base_model.model.";
const LORA_A: &str = "lora_A.weight";
const LORA_B: &str = "lora_B.weight";
const MAGNITUDE: &str = "lora_magnitude_vector";
const EMBEDDING_A: &str = "lora_embedding_A";
const EMBEDDING_B: &str = "lora_embedding_B";
/// The base's own weight, which PEFT saves beside an adapter on embedding or output projection.
const BASE: &str = "base_layer.weight";
const HINT: &str =
    "give a PEFT adapter folder, with adapter_config.json and adapter_model.safetensors";

/// The adapter of one projection: `y = x·Wᵀ + scale·(x·Aᵀ)·Bᵀ`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraModule {
    /// The projection, "model.layers.0.self_attn.q_proj".
    pub module: String,
    /// Its sizes in the base model.
    pub projection: Projection,
    /// Rank `r`.
    pub rank: usize,
    /// alpha / r, or alpha / sqrt(r) with rslora; computed in f64.
    pub scale: f32,
    /// `A: [r, k]`, row-major.
    pub a: Vec<f32>,
    /// `B: [n, r]`, row-major.
    pub b: Vec<f32>,
    /// With DoRA: the magnitude of each row of `W + scale·B·A`, `[n]`.
    pub magnitude: Option<Vec<f32>>,
}

impl LoraModule {
    /// Its tensors as PEFT names them in a file, each with its shape.
    fn tensors(&self) -> Vec<(String, Vec<usize>, &[f32])> {
        let (Projection { n, k }, at) = (self.projection, &self.module);
        let (a, b) = match &**at {
            EMBEDDING => (EMBEDDING_A, EMBEDDING_B),
            _ => (LORA_A, LORA_B),
        };
        let mut all = vec![
            (format!("{PREFIX}{at}.{a}"), vec![self.rank, k], &*self.a),
            (format!("{PREFIX}{at}.{b}"), vec![n, self.rank], &*self.b),
        ];
        if let Some(m) = &self.magnitude {
            all.push((format!("{PREFIX}{at}.{MAGNITUDE}"), vec![n], m));
        }
        all
    }
}

/// An adapter that fits a base model.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// `adapter_config.json`.
    pub config: AdapterConfig,
    /// The adapted projections, by name.
    pub modules: Vec<LoraModule>,
    /// What deserves a word to the user, though the adapter works.
    pub warnings: Vec<String>,
}

impl Adapter {
    /// Reads an adapter folder and binds it to the projections of a base model.
    pub fn read(dir: &Path, base: &Projections) -> Result<Self> {
        let config = AdapterConfig::read(dir)?;
        let path = dir.join(WEIGHTS_FILE);
        if !path.exists() && dir.join("adapter_model.bin").exists() {
            return Err(Error::Unsupported {
                path: dir.join("adapter_model.bin"),
                what: "a pickle file, which can run code when it is read,".to_owned(),
                hint: "save the adapter as safetensors (PEFT: save_pretrained)".to_owned(),
            });
        }
        let weights = Weights::open_file_hinted(&path, HINT)?;
        let found = sort_tensors(&weights, config.use_dora)?;
        let mut modules = config.resolve(base)?;
        config.check_outside(&modules)?;
        check_bound(dir, &found, &modules, base, config.use_dora)?;
        for m in &mut modules {
            let of = &found[m.module.as_str()];
            m.a = values(of.a, &[m.rank, m.projection.k])?;
            m.b = values(of.b, &[m.projection.n, m.rank])?;
            if config.use_dora {
                m.magnitude = Some(values(of.magnitude, &[m.projection.n])?);
            }
        }
        Ok(Self {
            config,
            warnings: modules
                .iter()
                .filter_map(rank_warning)
                .chain(base_warning(&weights))
                .collect(),
            modules,
        })
    }

    /// A fresh adapter: every `A` uniform in ±1/sqrt(k) (PEFT's default), every `B` zero (on the embedding the other
    /// way round), magnitudes not set (they are the base model's). The numbers of a module depend on the seed and its name only.
    pub fn init(config: AdapterConfig, base: &Projections, seed: u64) -> Result<Self> {
        let mut modules = config.resolve(base)?;
        config.check_outside(&modules)?;
        for m in &mut modules {
            let Projection { n, k } = m.projection;
            if m.module == EMBEDDING {
                // The other way round, as PEFT does: a token's row of `A` is read, so it is `A` that starts at zero.
                // Of the variance of PEFT's normals.
                m.a = vec![0.0; m.rank * k];
                m.b = uniform(seed, &m.module, n * m.rank, 1);
                m.b.iter_mut().for_each(|v| *v *= 3.0_f32.sqrt());
            } else {
                m.a = uniform(seed, &m.module, m.rank * k, k);
                m.b = vec![0.0; n * m.rank];
            }
        }
        Ok(Self {
            config,
            warnings: modules.iter().filter_map(rank_warning).collect(),
            modules,
        })
    }

    /// Writes the adapter as PEFT does, in f32. Both files are whole and synced before either takes its place.
    pub fn write(&self, dir: &Path) -> Result<()> {
        files::prepare_output_dir(dir)?;
        let path = dir.join(WEIGHTS_FILE);
        let bytes = self.serialize(&path)?;
        let weights = Staged::write(&path, |w| w.write_all(&bytes))?;
        let text = self.config.to_json();
        let config = Staged::write(&dir.join(CONFIG_FILE), |w| w.write_all(text.as_bytes()))?;
        weights.commit()?;
        config.commit()
    }

    fn serialize(&self, path: &Path) -> Result<Vec<u8>> {
        let mut tensors = Vec::with_capacity(2 * self.modules.len());
        for m in &self.modules {
            for (name, shape, values) in m.tensors() {
                finite(path, &name, values)?;
                tensors.push((name, F32View { shape, values }));
            }
        }
        let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize(tensors, Some(about)).map_err(|e| Error::Safetensors {
            path: path.to_path_buf(),
            problem: quote(&e.to_string()),
        })
    }
}

/// The tensors of a module, as far as they were found.
#[derive(Clone, Copy, Default)]
struct Parts<'a> {
    a: Option<&'a TensorView>,
    b: Option<&'a TensorView>,
    magnitude: Option<&'a TensorView>,
}

/// Sorts an adapter's tensors by module; anything that is not one of a LoRA (or, with `dora`, DoRA) module is an error.
fn sort_tensors(weights: &Weights, dora: bool) -> Result<BTreeMap<&str, Parts<'_>>> {
    let mut found: BTreeMap<&str, Parts> = BTreeMap::new();
    let mut foreign = Vec::new();
    for tensor in weights.iter() {
        let name = tensor.name.strip_prefix(PREFIX);
        let of = |end: &str| name?.strip_suffix(end)?.strip_suffix('.');
        let embedded = |end: &str| of(end).filter(|m| *m == EMBEDDING);
        let linear = |end: &str| of(end).filter(|m| *m != EMBEDDING);
        if let Some(module) = linear(LORA_A).or_else(|| embedded(EMBEDDING_A)) {
            found.entry(module).or_default().a = Some(tensor);
        } else if let Some(module) = linear(LORA_B).or_else(|| embedded(EMBEDDING_B)) {
            found.entry(module).or_default().b = Some(tensor);
        } else if let Some(module) = linear(MAGNITUDE).filter(|_| dora) {
            found.entry(module).or_default().magnitude = Some(tensor);
        } else if of(BASE).is_none_or(|m| m != HEAD && m != EMBEDDING) {
            foreign.push(quote(&tensor.name));
        }
    }
    if foreign.is_empty() {
        return Ok(found);
    }
    Err(Error::Tensors {
        path: weights.path().to_path_buf(),
        count: foreign.len(),
        problem: "tensors that do not belong to a LoRA adapter",
        names: list(foreign),
        hint: "only <module>.lora_A.weight and .lora_B.weight (on the embedding lora_embedding_A and _B) are understood, and with use_dora .lora_magnitude_vector",
    })
}

/// Every selected module has its tensors, and every tensor a selected module.
fn check_bound(
    dir: &Path,
    found: &BTreeMap<&str, Parts<'_>>,
    wanted: &[LoraModule],
    base: &Projections,
    dora: bool,
) -> Result<()> {
    let mut unbound = Vec::new();
    let selected = |module: &str| {
        let place = wanted.binary_search_by(|w| w.module.as_str().cmp(module));
        place.is_ok()
    };
    for LoraModule { module, .. } in wanted {
        let of = found.get(module.as_str()).copied().unwrap_or_default();
        let reason = match (of.a, of.b) {
            (Some(_), Some(_)) if dora && of.magnitude.is_none() => "no lora_magnitude_vector",
            (Some(_), Some(_)) => continue,
            (None, None) => "no tensors",
            (None, Some(_)) => "no lora_A",
            (Some(_), None) => "no lora_B",
        };
        unbound.push(format!("{module} ({reason})"));
    }
    for module in found.keys().filter(|m| !selected(m)) {
        let reason = match base.contains_key(*module) {
            true => "not selected by adapter_config.json",
            false => "not in the base model",
        };
        unbound.push(format!("{} ({reason})", quote(module)));
    }
    if unbound.is_empty() {
        return Ok(());
    }
    let total = wanted.len() + found.keys().filter(|m| !selected(m)).count();
    Err(Error::PartialAdapter {
        path: dir.to_path_buf(),
        bound: total - unbound.len(),
        total,
        rest: list(unbound),
    })
}

/// The numbers of a tensor in f32, after a look at its shape and at each of them.
pub(crate) fn values(tensor: Option<&TensorView>, shape: &[usize]) -> Result<Vec<f32>> {
    let tensor = tensor.expect("bug in tallow: check_bound saw the tensors of every module");
    match tensor.dtype {
        StoredDtype::F32 | StoredDtype::BF16 | StoredDtype::F16 => {}
        _ => return Err(tensor.wrong_type("F32, BF16 or F16")),
    }
    if tensor.shape != shape {
        return Err(tensor.wrong_shape(shape.to_vec()));
    }
    let values = tensor.to_f32()?;
    finite(&tensor.file, &tensor.name, &values)?;
    Ok(values)
}

pub(crate) fn finite(path: &Path, name: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(index) => Err(Error::NotFinite {
            path: path.to_path_buf(),
            name: quote(name),
            value: values[index],
            index,
        }),
    }
}

/// PEFT writes the base's embedding into such a file; it is the model's own that is used.
fn base_warning(weights: &Weights) -> Option<String> {
    let copy = |module| weights.find(&format!("{PREFIX}{module}.{BASE}"));
    let found = copy(HEAD).or_else(|| copy(EMBEDDING))?;
    Some(format!(
        "{}: {} is a copy of the base's weight; the base model's own is used",
        weights.path().display(),
        quote(&found.name)
    ))
}

/// PEFT accepts such an adapter; it only wastes work.
fn rank_warning(m: &LoraModule) -> Option<String> {
    let LoraModule { module, rank, .. } = m;
    let least = m.projection.n.min(m.projection.k);
    (*rank > least).then(|| {
        format!("{module}: rank {rank} is above {least}, the smaller side of the projection; it adds cost, not capacity")
    })
}

/// `count` numbers uniform in ±1/sqrt(k), from a stream of their own for each name.
pub(crate) fn uniform(seed: u64, name: &str, count: usize, k: usize) -> Vec<f32> {
    // FNV-1a: stable over versions and machines, unlike the standard hasher.
    let stream = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(stream);
    let bound = 1.0 / (k as f64).sqrt();
    let one = |_| {
        let unit = f64::from(random.next_u32()) / f64::from(u32::MAX);
        ((2.0 * unit - 1.0) * bound) as f32
    };
    (0..count).map(one).collect()
}

/// A row-major matrix of rows of `width` with rows and columns exchanged.
pub(crate) fn turned(values: &[f32], width: usize) -> Vec<f32> {
    let columns = 0..width;
    columns
        .flat_map(|c| values.iter().skip(c).step_by(width).copied())
        .collect()
}

/// Values on their way into a file.
pub(crate) struct F32View<V> {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: V,
}

impl<V: AsRef<[f32]>> View for F32View<V> {
    fn dtype(&self) -> StoredDtype {
        StoredDtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.values
            .as_ref()
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<u8>>()
            .into()
    }

    fn data_len(&self) -> usize {
        size_of_val(self.values.as_ref())
    }
}

/// The projections that the tensors of a PEFT folder are for, by their shapes: for work on an adapter whose base is
/// not at hand. What is missing from the folder cannot be noticed then.
///
/// # Errors
/// A folder without usable tensors.
pub fn shapes(dir: &Path) -> Result<Projections> {
    let weights = Weights::open_file_hinted(&dir.join(WEIGHTS_FILE), HINT)?;
    let side = |t: &TensorView, axis: usize| t.shape.get(axis).copied().unwrap_or(0);
    let mut found: BTreeMap<String, [usize; 2]> = BTreeMap::new();
    for t in weights.iter() {
        let Some(name) = t.name.strip_prefix(PREFIX) else {
            continue;
        };
        let of = |end: &str| Some(name.strip_suffix(end)?.strip_suffix('.')?.to_owned());
        if let Some(module) = of(LORA_A).or_else(|| of(EMBEDDING_A)) {
            found.entry(module).or_default()[1] = side(t, 1);
        } else if let Some(module) = of(LORA_B).or_else(|| of(EMBEDDING_B)) {
            found.entry(module).or_default()[0] = side(t, 0);
        }
    }
    let one = |(name, [n, k]): (String, [usize; 2])| (name, Projection { n, k });
    Ok(found.into_iter().map(one).collect())
}
