//! LoRA and DoRA adapters in mlx-lm's format, in and out.
//! Invariant: what is read or written computes what the other format's adapter does; what the format cannot say is
//! refused, or folded into numbers where that changes nothing (ranks are padded with zeros, scales go into `B`).
//! Absent on purpose: full fine-tuning ("full"), DoRA on embeddings, switch layers: refused by name.
//!
//! A folder holds `adapters.safetensors` with `<module>.lora_a [k, r]`, `.lora_b [r, n]` and, for DoRA, `.m [n]`, and
//! `adapter_config.json` with `fine_tune_type`, `num_layers` (counted from the last; -1 is all) and `lora_parameters`
//! (`rank`, `scale`, `dropout`, `keys`). A key is a module's path inside a layer, or its whole path.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use serde_json::{Value, json};

use crate::config::{Projection, Projections};
use crate::error::{Error, Result, list, quote};
use crate::files::{self, Staged};
use crate::json::{self, Fields, brief};
use crate::peft::{self, Adapter, AdapterConfig, CONFIG_FILE, LoraModule, Targets, turned};
use crate::weights::{TensorView, Weights};

/// Where an adapter's tensors lie in its folder.
pub const WEIGHTS_FILE: &str = "adapters.safetensors";
const HINT: &str =
    "give an mlx-lm adapter folder, with adapter_config.json and adapters.safetensors";

/// Reads an mlx-lm adapter folder. With `base`, the projections of a model, it must fit that model whole.
///
/// # Errors
/// Files that are missing or damaged, tensors that belong to no module, another kind of adapter.
pub fn read(dir: &Path, base: Option<&Projections>) -> Result<Adapter> {
    let about = About::read(dir)?;
    let weights = Weights::open_file_hinted(&dir.join(WEIGHTS_FILE), HINT)?;
    let found = sort(&weights, about.dora)?;
    let mut unbound = Vec::new();
    let mut modules = Vec::new();
    for (name, of) in &found {
        let (Some(a), Some(b)) = (of.a, of.b) else {
            let lost = if of.a.is_none() { "lora_a" } else { "lora_b" };
            unbound.push(format!("{} (no {lost})", quote(name)));
            continue;
        };
        if about.dora && of.m.is_none() {
            unbound.push(format!("{} (no m)", quote(name)));
            continue;
        }
        let &[k, _] = &a.shape[..] else {
            return Err(a.wrong_shape(vec![0, about.rank]));
        };
        let n = b.shape.last().copied().unwrap_or(0);
        let size = match base {
            None => Projection { n, k },
            Some(base) => match base.get(*name) {
                Some(size) => *size,
                None => {
                    unbound.push(format!("{} (not in the base model)", quote(name)));
                    continue;
                }
            },
        };
        modules.push(about.module(name, size, of)?);
    }
    let path = dir.to_path_buf();
    if !unbound.is_empty() {
        return Err(Error::PartialAdapter {
            path,
            bound: modules.len(),
            total: found.len(),
            rest: list(unbound),
        });
    }
    if modules.is_empty() {
        return Err(Error::Tensors {
            path,
            count: 0,
            problem: "no tensors of an adapter",
            names: "none".to_owned(),
            hint: HINT,
        });
    }
    let names = modules.iter().map(|m| m.module.clone()).collect();
    let mut config = AdapterConfig::new(
        about.rank,
        f64::from(about.scale) * about.rank as f64,
        Targets::Names(names),
    );
    config.use_dora = about.dora;
    config.dropout = about.dropout;
    config.base_model = about.model;
    config.path = dir.join(CONFIG_FILE);
    config.check_outside(&modules)?;
    Ok(Adapter {
        config,
        modules,
        warnings: Vec::new(),
    })
}

/// Writes an adapter as mlx-lm does, in f32. With `base` its modules are named by layer wherever they are the same in
/// each of the last layers, as mlx-lm itself does; else by their whole paths.
///
/// # Errors
/// A folder that cannot be written; numbers that are not finite.
pub fn write(adapter: &Adapter, dir: &Path, base: Option<&Projections>) -> Result<()> {
    let rank = adapter.modules.iter().map(|m| m.rank).max().unwrap_or(1);
    let scale = adapter.modules.first().map_or(1.0, |m| m.scale);
    files::prepare_output_dir(dir)?;
    let path = dir.join(WEIGHTS_FILE);
    let mut tensors = Vec::new();
    for m in &adapter.modules {
        for (name, shape, values) in tensors_of(m, rank, scale) {
            peft::finite(&path, &name, &values)?;
            tensors.push((name, peft::F32View { shape, values }));
        }
    }
    let about = HashMap::from([("format".to_owned(), "mlx".to_owned())]);
    let bytes = safetensors::serialize(tensors, Some(about)).map_err(|e| Error::Safetensors {
        path: path.clone(),
        problem: quote(&e.to_string()),
    })?;
    let (num_layers, keys) = keys(&adapter.modules, base);
    let config = json!({
        "fine_tune_type": if adapter.config.use_dora { "dora" } else { "lora" },
        "model": adapter.config.base_model,
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": adapter.config.dropout,
            "keys": keys,
        },
    });
    let text = format!("{config:#}");
    let weights = Staged::write(&path, |w| w.write_all(&bytes))?;
    let config = Staged::write(&dir.join(CONFIG_FILE), |w| w.write_all(text.as_bytes()))?;
    weights.commit()?;
    config.commit()
}

/// What `adapter_config.json` says.
struct About {
    dora: bool,
    rank: usize,
    scale: f32,
    dropout: f64,
    model: Option<String>,
}

impl About {
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG_FILE);
        let (map, _) = json::read_object(&path, HINT)?;
        let f = Fields {
            path: &path,
            prefix: "",
            map: &map,
        };
        let dora = match f.text("fine_tune_type")?.unwrap_or("lora") {
            "lora" => false,
            "dora" => true,
            other => {
                return Err(Error::Unsupported {
                    path: path.clone(),
                    what: format!("fine_tune_type {}", quote(other)),
                    hint: "only lora and dora adapters are converted".to_owned(),
                });
            }
        };
        let inner = match f.get("lora_parameters") {
            Some(Value::Object(inner)) => inner,
            Some(other) => return Err(f.bad("lora_parameters", "an object", brief(other))),
            None => return Err(f.bad("lora_parameters", "an object", "nothing")),
        };
        let p = Fields {
            path: &path,
            prefix: "lora_parameters.",
            map: inner,
        };
        let scale = p.number("scale")?;
        let scale = scale.ok_or_else(|| p.bad("scale", "a number", "nothing"))?;
        let dropout = p.number("dropout")?.unwrap_or(0.0);
        if !(0.0..1.0).contains(&dropout) {
            return Err(p.bad("dropout", "a number from 0 to below 1", dropout.to_string()));
        }
        Ok(Self {
            dora,
            rank: p.need_count("rank", 1 << 20)?,
            scale: scale as f32,
            dropout,
            model: f.text("model")?.map(str::to_owned),
        })
    }

    fn module(&self, name: &str, size: Projection, of: &Parts) -> Result<LoraModule> {
        let Projection { n, k } = size;
        let r = self.rank;
        let m = match self.dora {
            true => Some(peft::values(of.m, &[n])?),
            false => None,
        };
        Ok(LoraModule {
            module: name.to_owned(),
            projection: size,
            rank: r,
            scale: self.scale,
            a: turned(&peft::values(of.a, &[k, r])?, r),
            b: turned(&peft::values(of.b, &[r, n])?, n),
            magnitude: m,
        })
    }
}

/// The tensors of a module, as far as they were found.
#[derive(Default)]
struct Parts<'a> {
    a: Option<&'a TensorView>,
    b: Option<&'a TensorView>,
    m: Option<&'a TensorView>,
}

fn sort(weights: &Weights, dora: bool) -> Result<BTreeMap<&str, Parts<'_>>> {
    let mut found: BTreeMap<&str, Parts> = BTreeMap::new();
    let mut foreign = Vec::new();
    for t in weights.iter() {
        match t.name.rsplit_once('.') {
            Some((module, "lora_a")) => found.entry(module).or_default().a = Some(t),
            Some((module, "lora_b")) => found.entry(module).or_default().b = Some(t),
            Some((module, "m")) if dora => found.entry(module).or_default().m = Some(t),
            _ => foreign.push(quote(&t.name)),
        }
    }
    if foreign.is_empty() {
        return Ok(found);
    }
    Err(Error::Tensors {
        path: weights.path().to_path_buf(),
        count: foreign.len(),
        problem: "tensors that do not belong to an mlx-lm adapter",
        names: list(foreign),
        hint: "only <module>.lora_a and .lora_b are understood, and with fine_tune_type dora .m",
    })
}

/// A module's tensors at another rank and scale, with the same product.
fn tensors_of(m: &LoraModule, rank: usize, scale: f32) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let (Projection { n, k }, at) = (m.projection, &m.module);
    let mut a = m.a.clone();
    a.resize(rank * k, 0.0);
    // `B [n, r]` turned is `[r, n]`, so that new rank is new rows here too.
    let mut b = turned(&m.b, m.rank);
    if m.scale != scale {
        let by = f64::from(m.scale) / f64::from(scale);
        b.iter_mut().for_each(|v| *v = (f64::from(*v) * by) as f32);
    }
    b.resize(rank * n, 0.0);
    let mut all = vec![
        (format!("{at}.lora_a"), vec![k, rank], turned(&a, k)),
        (format!("{at}.lora_b"), vec![rank, n], b),
    ];
    if let Some(magnitude) = &m.magnitude {
        all.push((format!("{at}.m"), vec![n], magnitude.clone()));
    }
    all
}

/// `model.layers.3.mlp.up_proj` as layer and path inside it.
fn inside(module: &str) -> Option<(usize, &str)> {
    let (layer, path) = module.strip_prefix("model.layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, path))
}

/// `num_layers` and `keys` that select exactly these modules.
fn keys(modules: &[LoraModule], base: Option<&Projections>) -> (i64, Vec<String>) {
    let whole = || (-1, modules.iter().map(|m| m.module.clone()).collect());
    let layers = base.and_then(|b| b.keys().filter_map(|m| inside(m)).map(|l| l.0 + 1).max());
    let Some(layers) = layers else {
        return whole();
    };
    let mut by_layer: BTreeMap<usize, BTreeSet<&str>> = BTreeMap::new();
    for m in modules {
        let Some((layer, path)) = inside(&m.module) else {
            return whole();
        };
        by_layer.entry(layer).or_default().insert(path);
    }
    let last = by_layer.last_key_value().map(|(layer, _)| layer + 1);
    let first = by_layer.first_key_value().map_or(0, |(layer, _)| *layer);
    let paths = by_layer.values().next().cloned().unwrap_or_default();
    let regular = by_layer.len() == layers - first && by_layer.values().all(|p| *p == paths);
    match last == Some(layers) && regular {
        true => (
            (layers - first) as i64,
            paths.into_iter().map(str::to_owned).collect(),
        ),
        false => whole(),
    }
}

#[cfg(test)]
mod tests;
