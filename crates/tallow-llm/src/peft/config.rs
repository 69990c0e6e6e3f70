//! `adapter_config.json`.
//! Invariant: every key of the file is either understood, known to change nothing, or refused by name.
//! Absent on purpose: guesses. A key this version does not know is refused where it is switched on.

use std::path::{Path, PathBuf};

use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde_json::{Value, json};

use super::{CONFIG_FILE, HINT};
use crate::config::EMBEDDING;
use crate::error::{Error, Result, quote};
use crate::json::{self, Fields, brief, truthy};

/// Which projections an adapter is on.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// Each is a whole module path or its end: "q_proj".
    Names(Vec<String>),
    /// Every projection of the layers.
    AllLinear,
    /// A regular expression that matches whole module paths.
    Regex(String),
}

/// How a fresh adapter starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Init {
    /// As PEFT does: `A` uniform in ±1/sqrt(k), `B` zero, so that it changes nothing yet.
    #[default]
    Uniform,
    /// PiSSA (Meng et al. 2024, arXiv:2404.02948): `A` and `B` from the largest singular values of `W`, whose share
    /// is taken off again by a frozen second block. Saved as plain LoRA of twice the rank.
    Pissa,
}

/// What `adapter_config.json` says. Public fields; [`AdapterConfig::new`] fills in the usual rest.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// The file, for messages.
    pub path: PathBuf,
    /// The rank where no pattern says otherwise.
    pub rank: usize,
    /// The numerator of the scale where no pattern says otherwise.
    pub alpha: f64,
    /// Scale is alpha / sqrt(rank) and not alpha / rank.
    pub use_rslora: bool,
    /// The result is rescaled row by row to a trained magnitude (DoRA, Liu et al. 2024, arXiv:2402.09353).
    pub use_dora: bool,
    /// How a fresh adapter starts. Not in the file: what is saved is an adapter of the base as it is.
    pub init: Init,
    /// Probability that an input of the branch is dropped while training.
    pub dropout: f64,
    /// The adapted projections.
    pub targets: Targets,
    /// Projections left out of them.
    pub exclude: Option<Targets>,
    /// Only these layers; `None` is all.
    pub layers: Option<Vec<usize>>,
    /// Names of the list of layers in a module path; empty takes the first number.
    pub layers_pattern: Vec<String>,
    /// Patterns of module paths with their own rank; the first match counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Patterns of module paths with their own alpha; the first match counts.
    pub alpha_pattern: Vec<(String, f64)>,
    /// The base model, as the author named it.
    pub base_model: Option<String>,
    /// "CAUSAL_LM" for what this version trains.
    pub task_type: Option<String>,
}

/// Switched on, these change what an adapter computes, and this version does not compute it.
const REFUSED: [&str; 14] = [
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];

/// Understood elsewhere in this file, or without effect on a trained adapter.
const KNOWN: [&str; 28] = [
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
];

impl AdapterConfig {
    /// A plain adapter: no dropout, no patterns, every layer.
    pub fn new(rank: usize, alpha: f64, targets: Targets) -> Self {
        Self {
            path: PathBuf::from(CONFIG_FILE),
            rank,
            alpha,
            use_rslora: false,
            use_dora: false,
            init: Init::Uniform,
            dropout: 0.0,
            targets,
            exclude: None,
            layers: None,
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            base_model: None,
            task_type: Some("CAUSAL_LM".to_owned()),
        }
    }

    /// Refuses what an embedding cannot be: its rows are looked up, and no product with them is made.
    pub(crate) fn check_outside(&self, modules: &[super::LoraModule]) -> Result<()> {
        let what = match (self.use_dora, self.init) {
            (true, _) => "use_dora on the embedding",
            (_, Init::Pissa) => "the start pissa on the embedding",
            _ => return Ok(()),
        };
        match modules.iter().any(|m| m.module == EMBEDDING) {
            false => Ok(()),
            true => Err(Error::Unsupported {
                path: self.path.clone(),
                what: what.to_owned(),
                hint: "leave embed_tokens out, or train it as plain LoRA".to_owned(),
            }),
        }
    }

    /// The configuration of the same adapter with a second block of its rank: twice the ranks at the same scales.
    pub(crate) fn doubled(mut self) -> Self {
        let factor = match self.use_rslora {
            true => std::f64::consts::SQRT_2,
            false => 2.0,
        };
        self.rank *= 2;
        self.alpha *= factor;
        self.rank_pattern.iter_mut().for_each(|(_, r)| *r *= 2);
        self.alpha_pattern
            .iter_mut()
            .for_each(|(_, a)| *a *= factor);
        self.init = Init::Uniform;
        self
    }

    /// Reads `adapter_config.json` of an adapter folder.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG_FILE);
        let (map, text) = json::read_object(&path, HINT)?;
        let f = Fields {
            path: &path,
            prefix: "",
            map: &map,
        };
        refuse(&f)?;
        let config = Self {
            rank: f.count("r", LARGEST_RANK)?.unwrap_or(8),
            alpha: f.number("lora_alpha")?.unwrap_or(8.0),
            use_rslora: f.flag("use_rslora", false)?,
            use_dora: f.flag("use_dora", false)?,
            init: Init::Uniform,
            dropout: dropout(&f)?,
            targets: targets(&f, "target_modules")?
                .ok_or_else(|| f.bad("target_modules", "module names or a pattern", "nothing"))?,
            exclude: targets(&f, "exclude_modules")?,
            layers: layers(&f)?,
            layers_pattern: names(&f, "layers_pattern")?,
            rank_pattern: rank_pattern(&f, &text)?,
            alpha_pattern: alpha_pattern(&f, &text)?,
            base_model: f.text("base_model_name_or_path")?.map(str::to_owned),
            task_type: f.text("task_type")?.map(str::to_owned),
            path: path.clone(),
        };
        let by_name = matches!(config.targets, Targets::Names(_));
        if config.layers.is_some() && !by_name {
            return Err(f.bad(
                "layers_to_transform",
                "null where target_modules is a string",
                "a value",
            ));
        }
        if !config.layers_pattern.is_empty() && config.layers.is_none() {
            return Err(f.bad(
                "layers_pattern",
                "null without layers_to_transform",
                "a value",
            ));
        }
        Ok(config)
    }

    /// The file as PEFT 0.21 writes it: every key it knows, sorted, two spaces deep.
    pub(super) fn to_json(&self) -> String {
        let pattern = |p: &Vec<(String, Value)>| Value::Object(p.iter().cloned().collect());
        let ranks = self.rank_pattern.iter().map(|(k, r)| (k.clone(), json!(r)));
        let alphas = self
            .alpha_pattern
            .iter()
            .map(|(k, a)| (k.clone(), number(*a)));
        let value = json!({
            "alora_invocation_tokens": null,
            "alpha_pattern": pattern(&alphas.collect()),
            "arrow_config": null,
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model,
            "bias": "none",
            "corda_config": null,
            "ensure_weight_tying": false,
            "eva_config": null,
            "exclude_modules": self.exclude.as_ref().map(targets_json),
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "kasa_config": null,
            "layer_replication": null,
            "layers_pattern": (!self.layers_pattern.is_empty()).then_some(&self.layers_pattern),
            "layers_to_transform": self.layers,
            "loftq_config": {},
            "lora_alpha": number(self.alpha),
            "lora_bias": false,
            "lora_dropout": self.dropout,
            "lora_ga_config": null,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": null,
            "monteclora_config": null,
            "peft_type": "LORA",
            "peft_version": "0.21.0",
            "qalora_group_size": 16,
            "r": self.rank,
            "rank_pattern": pattern(&ranks.collect()),
            "revision": null,
            "target_modules": targets_json(&self.targets),
            "target_parameters": null,
            "task_type": self.task_type,
            "trainable_token_indices": null,
            "use_bdlora": null,
            "use_dora": self.use_dora,
            "use_qalora": false,
            "use_rslora": self.use_rslora,
            "velora_config": null,
        });
        format!("{value:#}")
    }
}

/// No rank is larger than the widest model.
const LARGEST_RANK: u64 = 1 << 20;

/// PEFT writes whole alphas as integers.
fn number(value: f64) -> Value {
    match value.fract() == 0.0 && value.abs() < 9e15 {
        true => json!(value as i64),
        false => json!(value),
    }
}

fn targets_json(targets: &Targets) -> Value {
    match targets {
        Targets::Names(names) => json!(names),
        Targets::AllLinear => json!("all-linear"),
        Targets::Regex(pattern) => json!(pattern),
    }
}

fn refuse(f: &Fields) -> Result<()> {
    let unsupported = |what: String| Error::Unsupported {
        path: f.path.to_path_buf(),
        what,
        hint: "this version reads LoRA, rsLoRA and DoRA; merge or retrain the adapter without it"
            .to_owned(),
    };
    match f.text("peft_type")? {
        Some("LORA") => {}
        Some(other) => return Err(unsupported(format!("peft_type {}", quote(other)))),
        None => return Err(f.bad("peft_type", "\"LORA\"", "nothing")),
    }
    if let Some(bias) = f.text("bias")?
        && bias != "none"
    {
        return Err(unsupported(format!("bias {}", quote(bias))));
    }
    // The other initialisations change the base weights, so their adapters belong to another base.
    match f.get("init_lora_weights") {
        None | Some(Value::Bool(_)) => {}
        Some(Value::String(s)) if ["gaussian", "eva", "orthogonal"].contains(&s.as_str()) => {}
        Some(other) => return Err(unsupported(format!("init_lora_weights {}", brief(other)))),
    }
    for (key, value) in f.map {
        if KNOWN.contains(&key.as_str()) || !truthy(value) {
            continue;
        }
        let what = match REFUSED.contains(&key.as_str()) {
            true => key.clone(),
            false => format!("the unknown setting {} ({})", quote(key), brief(value)),
        };
        return Err(unsupported(what));
    }
    Ok(())
}

fn dropout(f: &Fields) -> Result<f64> {
    match f.number("lora_dropout")?.unwrap_or(0.0) {
        p if (0.0..1.0).contains(&p) => Ok(p),
        p => Err(f.bad("lora_dropout", "a number from 0 to below 1", p.to_string())),
    }
}

/// A string is "all-linear" or a pattern; a list is names. Empty means absent, as in Python.
fn targets(f: &Fields, key: &'static str) -> Result<Option<Targets>> {
    let found = match f.get(key) {
        None => return Ok(None),
        Some(Value::String(s)) if s.is_empty() => return Ok(None),
        Some(Value::String(s))
            if key == "target_modules" && s.eq_ignore_ascii_case("all-linear") =>
        {
            Targets::AllLinear
        }
        Some(Value::String(s)) => Targets::Regex(s.clone()),
        Some(_) => Targets::Names(names(f, key)?),
    };
    Ok(Some(found).filter(|t| *t != Targets::Names(Vec::new())))
}

/// A string or a list of strings; empty where absent.
fn names(f: &Fields, key: &str) -> Result<Vec<String>> {
    let mut names = f.texts(key)?.unwrap_or_default();
    names.retain(|n| !n.is_empty());
    Ok(names)
}

fn layers(f: &Fields) -> Result<Option<Vec<usize>>> {
    let key = "layers_to_transform";
    let items = match f.get(key) {
        None => return Ok(None),
        Some(Value::Array(items)) if items.is_empty() => return Ok(None),
        Some(Value::Array(items)) => items.as_slice(),
        Some(one) => std::slice::from_ref(one),
    };
    let one = |v: &Value| {
        let whole = json::whole(v).map(|n| n as usize);
        whole.ok_or_else(|| f.bad(key, "a layer's number or a list of them", brief(v)))
    };
    items.iter().map(one).collect::<Result<_>>().map(Some)
}

fn rank_pattern(f: &Fields, text: &[u8]) -> Result<Vec<(String, usize)>> {
    let want = format!("patterns with ranks from 1 to {LARGEST_RANK}");
    let one = |(key, value): (String, Value)| match json::whole(&value) {
        Some(r @ 1..=LARGEST_RANK) => Ok((key, r as usize)),
        _ => Err(f.bad("rank_pattern", want.as_str(), brief(&value))),
    };
    ordered(f, "rank_pattern", text)?
        .into_iter()
        .map(one)
        .collect()
}

fn alpha_pattern(f: &Fields, text: &[u8]) -> Result<Vec<(String, f64)>> {
    let one = |(key, value): (String, Value)| match value.as_f64() {
        Some(alpha) if alpha.is_finite() => Ok((key, alpha)),
        _ => Err(f.bad("alpha_pattern", "patterns with numbers", brief(&value))),
    };
    ordered(f, "alpha_pattern", text)?
        .into_iter()
        .map(one)
        .collect()
}

/// The entries of an object in the file's order, which decides where several patterns match.
fn ordered(f: &Fields, key: &'static str, text: &[u8]) -> Result<Vec<(String, Value)>> {
    match f.get(key) {
        None => return Ok(Vec::new()),
        Some(Value::Object(_)) => {}
        Some(other) => return Err(f.bad(key, "an object of patterns", brief(other))),
    }
    let mut reader = serde_json::Deserializer::from_slice(text);
    let found = serde::Deserializer::deserialize_map(&mut reader, Find(key));
    found.map_err(|e| f.bad(key, "an object of patterns", quote(&e.to_string())))
}

/// Walks the file's object for one key.
struct Find(&'static str);

impl<'de> Visitor<'de> for Find {
    type Value = Vec<(String, Value)>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(
        self,
        mut map: A,
    ) -> std::result::Result<Self::Value, A::Error> {
        let mut found = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            if key == self.0 {
                found = map.next_value::<Entries>()?.0;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

/// An object's entries in order; of a repeated key the last value counts, as in Python.
struct Entries(Vec<(String, Value)>);

impl<'de> serde::Deserialize<'de> for Entries {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Entries;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Entries, A::Error> {
                let mut entries: Vec<(String, Value)> = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    match entries.iter_mut().find(|e| e.0 == key) {
                        Some(entry) => entry.1 = value,
                        None => entries.push((key, value)),
                    }
                }
                Ok(Entries(entries))
            }
        }
        d.deserialize_map(All)
    }
}
