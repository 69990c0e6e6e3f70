//! `config.json` of a Hugging Face model folder, in the old and the new layout, as plain numbers.
//! Invariant: a `ModelConfig` is consistent: every size is above zero and within sane limits, `heads` is a
//! multiple of `kv_heads`, `head_dim` is even, `windows` has one entry a layer, ids are below `vocab`.
//! Absent on purpose: anything approximate. What this version does not compute exactly is refused by name.

mod ids;
mod rope;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

pub use rope::{Rope, RopeKind};

use crate::error::{Error, Result, quote};
use crate::json::{self, Fields, brief, truthy};
use crate::weights::StoredDtype;

/// The model families this version computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Llama 1 to 3 and everything that uses its architecture.
    Llama,
    /// Qwen2 and Qwen2.5 (dense): biases on q, k and v.
    Qwen2,
    /// Mistral: Llama with a sliding window.
    Mistral,
}

impl Family {
    /// Every family.
    pub const ALL: [Self; 3] = [Self::Llama, Self::Qwen2, Self::Mistral];

    /// `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Mistral => "mistral",
        }
    }

    /// The entry of `architectures` in `config.json`.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Mistral => "MistralForCausalLM",
        }
    }
}

/// The sizes of one projection: its weight is `[n, k]`, `n` values out for `k` values in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Projection {
    /// Values out: rows of the weight.
    pub n: usize,
    /// Values in: columns of the weight.
    pub k: usize,
}

/// Module path ("model.layers.0.self_attn.q_proj") to sizes: what adapters can bind to.
pub type Projections = BTreeMap<String, Projection>;

/// Module path of the output projection.
pub const HEAD: &str = "lm_head";
/// Module path of the embedding.
pub const EMBEDDING: &str = "model.embed_tokens";

/// What a model computes, without its weights.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The `config.json` this was read from, for messages.
    pub path: PathBuf,
    /// The family, which decides the graph.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even; `heads * head_dim` need not be `hidden`.
    pub head_dim: usize,
    /// Width of the MLP between gate/up and down.
    pub mlp: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Added to the mean square in every RMS norm.
    pub eps: f32,
    /// True where the output projection is the embedding.
    pub tied: bool,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub o_bias: bool,
    /// Biases on gate, up and down.
    pub mlp_bias: bool,
    /// Rotary position embedding.
    pub rope: Rope,
    /// By layer: `Some(w)` sees itself and the `w - 1` positions before it, `None` sees all before it.
    pub windows: Vec<Option<u32>>,
    /// The longest sequence the model was made for, in tokens.
    pub max_positions: usize,
    /// Begins a text, where the model has one.
    pub bos: Option<u32>,
    /// Ends a text. The first is written when training; all of them stop generation. May be empty.
    pub eos: Vec<u32>,
    /// Fills batches, where the model has one.
    pub pad: Option<u32>,
    /// The type `config.json` says the weights are stored in; the weight files themselves decide.
    pub stored: Option<StoredDtype>,
}

impl ModelConfig {
    /// Reads `config.json` and, where it is there, `generation_config.json` of a model folder.
    pub fn read(dir: &Path) -> Result<Self> {
        const HINT: &str =
            "give a Hugging Face model folder, with config.json and model.safetensors";
        let path = dir.join("config.json");
        let (map, _) = json::read_object(&path, HINT)?;
        let fields = Fields {
            path: &path,
            prefix: "",
            map: &map,
        };
        let mut config = parse(&fields)?;
        let generation = dir.join("generation_config.json");
        if generation.exists() {
            let (map, _) = json::read_object(&generation, HINT)?;
            let more = Fields {
                path: &generation,
                prefix: "",
                map: &map,
            };
            ids::add_generation_eos(&mut config, &fields, &more)?;
        }
        Ok(config)
    }

    /// Every linear projection of the decoder layers; the output projection is not one of them.
    pub fn projections(&self) -> Projections {
        let q = self.heads * self.head_dim;
        let kv = self.kv_heads * self.head_dim;
        let (h, mlp) = (self.hidden, self.mlp);
        let each = [
            ("self_attn.q_proj", q, h),
            ("self_attn.k_proj", kv, h),
            ("self_attn.v_proj", kv, h),
            ("self_attn.o_proj", h, q),
            ("mlp.gate_proj", mlp, h),
            ("mlp.up_proj", mlp, h),
            ("mlp.down_proj", h, mlp),
        ];
        let mut all = Projections::new();
        for layer in 0..self.layers {
            for (name, n, k) in each {
                all.insert(format!("model.layers.{layer}.{name}"), Projection { n, k });
            }
        }
        all
    }

    /// Everything an adapter can be on: [`projections`](Self::projections), the output projection `lm_head`, and the
    /// embedding `model.embed_tokens` as a projection of one-hot rows (`n` hidden, `k` vocabulary).
    pub fn adaptable(&self) -> Projections {
        let (h, v) = (self.hidden, self.vocab);
        let mut all = self.projections();
        all.insert(HEAD.to_owned(), Projection { n: v, k: h });
        all.insert(EMBEDDING.to_owned(), Projection { n: h, k: v });
        all
    }

    /// True where this projection of a layer ("self_attn.q_proj", "mlp.up_proj") adds a bias.
    pub fn has_bias(&self, projection: &str) -> bool {
        match projection {
            "self_attn.q_proj" | "self_attn.k_proj" | "self_attn.v_proj" => self.qkv_bias,
            "self_attn.o_proj" => self.o_bias,
            "mlp.gate_proj" | "mlp.up_proj" | "mlp.down_proj" => self.mlp_bias,
            _ => false,
        }
    }
}

fn parse(f: &Fields) -> Result<ModelConfig> {
    let family = family(f)?;
    refuse_unsupported(f)?;
    let hidden = f.need_count("hidden_size", 1 << 20)?;
    let layers = f.need_count("num_hidden_layers", 1 << 12)?;
    let heads = f.need_count("num_attention_heads", 1 << 16)?;
    let kv_heads = kv_heads(f, heads)?;
    let head_dim = head_dim(f, hidden, heads)?;
    let vocab = f.need_count("vocab_size", 1 << 28)?;
    let max_positions = f
        .count("max_position_embeddings", 1 << 31)?
        .unwrap_or(match family {
            Family::Llama => 2048,
            Family::Qwen2 => 32_768,
            Family::Mistral => 131_072,
        });
    let bias = family == Family::Llama && f.flag("attention_bias", false)?;
    Ok(ModelConfig {
        path: f.path.to_path_buf(),
        family,
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        mlp: f.need_count("intermediate_size", 1 << 24)?,
        vocab,
        eps: eps(f)?,
        tied: f.flag("tie_word_embeddings", false)?,
        qkv_bias: bias || family == Family::Qwen2,
        o_bias: bias,
        mlp_bias: family == Family::Llama && f.flag("mlp_bias", false)?,
        rope: rope::read(f, head_dim, max_positions)?,
        windows: windows(f, family, layers)?,
        max_positions,
        bos: ids::bos(f, family, vocab)?,
        eos: ids::eos(f, family, vocab)?,
        pad: ids::pad(f, vocab),
        stored: stored(f),
    })
}

/// `model_type` and the first of `architectures` must name the same known family; one of them may be absent.
fn family(f: &Fields) -> Result<Family> {
    let known_type = |t: &str| Family::ALL.into_iter().find(|k| k.model_type() == t);
    let known_arch = |a: &str| {
        let same = |k: &Family| k.architecture().eq_ignore_ascii_case(a);
        Family::ALL.into_iter().find(same)
    };
    let model_type = f.text("model_type")?;
    let architecture = f.texts("architectures")?.unwrap_or_default();
    let architecture = architecture.first().map(String::as_str);
    let found = match (model_type, architecture) {
        (None, None) => None,
        (Some(t), None) => known_type(t),
        (None, Some(a)) => known_arch(a),
        (Some(t), Some(a)) => known_type(t).filter(|k| known_arch(a) == Some(*k)),
    };
    found.ok_or_else(|| Error::Architecture {
        path: f.path.to_path_buf(),
        found: match (architecture, model_type) {
            (Some(a), Some(t)) => format!("{} (model_type {})", quote(a), quote(t)),
            (Some(name), None) | (None, Some(name)) => quote(name),
            (None, None) => "without a name (no `architectures`, no `model_type`)".to_owned(),
        },
        known: Family::ALL.map(Family::architecture).join(", "),
    })
}

fn refuse_unsupported(f: &Fields) -> Result<()> {
    if let Some(q) = f.get("quantization_config").filter(|v| truthy(v)) {
        let method = q.get("quant_method").and_then(Value::as_str).unwrap_or("?");
        return Err(unsupported(
            f,
            format!("quantization_config ({})", quote(method)),
            "use the model in f32, bf16 or f16",
        ));
    }
    if let Some(act) = f.text("hidden_act")?
        && act != "silu"
        && act != "swish"
    {
        return Err(unsupported(
            f,
            format!("hidden_act {}", quote(act)),
            "this version computes silu only",
        ));
    }
    Ok(())
}

fn unsupported(f: &Fields, what: String, hint: &str) -> Error {
    Error::Unsupported {
        path: f.path.to_path_buf(),
        what,
        hint: hint.to_owned(),
    }
}

fn kv_heads(f: &Fields, heads: usize) -> Result<usize> {
    let kv_heads = f.count("num_key_value_heads", 1 << 16)?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        let want = format!("a divisor of num_attention_heads ({heads})");
        return Err(f.bad("num_key_value_heads", want, kv_heads.to_string()));
    }
    Ok(kv_heads)
}

fn head_dim(f: &Fields, hidden: usize, heads: usize) -> Result<usize> {
    let (key, head_dim) = match f.count("head_dim", 1 << 14)? {
        Some(d) => ("head_dim", d),
        None if hidden.is_multiple_of(heads) => ("hidden_size", hidden / heads),
        None => {
            let want =
                format!("a multiple of num_attention_heads ({heads}) where head_dim is absent");
            return Err(f.bad("hidden_size", want, hidden.to_string()));
        }
    };
    if !head_dim.is_multiple_of(2) {
        let want = "an even width of a head, because rope turns pairs";
        return Err(f.bad(key, want, format!("heads of {head_dim}")));
    }
    Ok(head_dim)
}

fn eps(f: &Fields) -> Result<f32> {
    let eps = f.number("rms_norm_eps")?.unwrap_or(1e-6);
    let as_f32 = eps as f32;
    if !(as_f32 > 0.0 && as_f32 < 1.0) {
        return Err(f.bad(
            "rms_norm_eps",
            "a number above 0 and below 1",
            eps.to_string(),
        ));
    }
    Ok(as_f32)
}

/// Which layers see only a window of the past.
fn windows(f: &Fields, family: Family, layers: usize) -> Result<Vec<Option<u32>>> {
    /// The class default of both families in transformers; only an explicit null turns the window off.
    const ABSENT: u32 = 4096;
    let window = || -> Result<Option<u32>> {
        if !f.map.contains_key("sliding_window") {
            return Ok(Some(ABSENT));
        }
        let window = f.count("sliding_window", u64::from(u32::MAX))?;
        Ok(window.map(|w| w as u32))
    };
    match family {
        Family::Llama => Ok(vec![None; layers]),
        Family::Mistral => Ok(vec![window()?; layers]),
        Family::Qwen2 => {
            let window = match f.flag("use_sliding_window", false)? {
                true => window()?,
                false => None,
            };
            qwen2_windows(f, layers, window)
        }
    }
}

fn qwen2_windows(f: &Fields, layers: usize, window: Option<u32>) -> Result<Vec<Option<u32>>> {
    let Some(types) = f.get("layer_types") else {
        let first = match f.get("max_window_layers") {
            None => 28,
            Some(v) => json::whole(v)
                .ok_or_else(|| f.bad("max_window_layers", "a whole number", brief(v)))?,
        };
        let slides = |layer: usize| layer as u64 >= first;
        return Ok((0..layers).map(|l| window.filter(|_| slides(l))).collect());
    };
    let want = || format!("a list of {layers} times \"full_attention\" or \"sliding_attention\"");
    let types = types
        .as_array()
        .filter(|t| t.len() == layers)
        .ok_or_else(|| f.bad("layer_types", want(), brief(types)))?;
    let one = |t: &Value| match (t.as_str(), window) {
        (Some("full_attention"), _) => Ok(None),
        (Some("sliding_attention"), Some(w)) => Ok(Some(w)),
        (Some("sliding_attention"), None) => Err(f.bad(
            "layer_types",
            "\"full_attention\" where use_sliding_window is false or sliding_window is null",
            brief(t),
        )),
        _ => Err(f.bad("layer_types", want(), brief(t))),
    };
    types.iter().map(one).collect()
}

/// `dtype` (new) or `torch_dtype` (old). Only a hint, so an unknown name is not an error.
fn stored(f: &Fields) -> Option<StoredDtype> {
    let name = f.get("dtype").or_else(|| f.get("torch_dtype"))?.as_str()?;
    match name.trim_start_matches("torch.") {
        "float32" => Some(StoredDtype::F32),
        "bfloat16" => Some(StoredDtype::BF16),
        "float16" => Some(StoredDtype::F16),
        _ => None,
    }
}
