//! The model that every contender runs, as plain rows of f32, and the ids it runs on.
//! Invariant: names, layout ([out, in]) and seed are the same for everyone; `write_dir` and `write_adapter` give
//! it to engines that load Hugging Face directories.
//! Absent on purpose: a tokenizer. Ids are random.

use std::collections::BTreeMap;
use std::path::Path;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Normal};
use safetensors::tensor::{Dtype, TensorView};

use crate::Result;

/// Extents of a Llama-architecture model, in elements.
#[derive(Clone, Copy, Debug)]
pub struct ModelShape {
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub mlp: usize,
    pub vocab: usize,
    pub rope_theta: f32,
    pub norm_eps: f32,
    pub max_positions: usize,
}

impl ModelShape {
    /// The model of the CPU comparison: 5.4 M parameters read for each token, 21.6 MB in f32.
    pub const SMALL: Self = Self {
        hidden: 256,
        layers: 6,
        heads: 8,
        kv_heads: 4,
        head_dim: 32,
        mlp: 688,
        vocab: 4096,
        rope_theta: 10_000.0,
        norm_eps: 1e-5,
        max_positions: 512,
    };
}

/// Rank, scale and modules of the trained adapter.
#[derive(Clone, Copy, Debug)]
pub struct AdapterShape {
    pub rank: usize,
    pub alpha: f32,
    pub modules: &'static [&'static str],
}

impl AdapterShape {
    /// Rank 8 on q and v.
    pub const QV8: Self = Self {
        rank: 8,
        alpha: 16.0,
        modules: &["q_proj", "v_proj"],
    };

    /// Factor on the adapter's branch.
    #[must_use]
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }
}

/// AdamW settings shared by all contenders.
pub mod adamw {
    pub const LR: f64 = 1e-3;
    pub const BETA1: f64 = 0.9;
    pub const BETA2: f64 = 0.999;
    pub const EPS: f64 = 1e-8;
    pub const WEIGHT_DECAY: f64 = 0.01;
}

/// One named tensor in row-major order.
#[derive(Clone, Debug)]
pub struct Rows {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

/// Base weights under their Hugging Face names and adapter weights under `<module>.lora_{A,B}.weight`.
#[derive(Clone, Debug)]
pub struct Weights {
    pub shape: ModelShape,
    pub adapter: AdapterShape,
    pub base: BTreeMap<String, Rows>,
    pub lora: BTreeMap<String, Rows>,
}

/// Training batch: `ids` and `targets` are `[rows, len]`, every position counts in the loss.
#[derive(Clone, Debug)]
pub struct Batch {
    pub rows: usize,
    pub len: usize,
    pub ids: Vec<u32>,
    pub targets: Vec<u32>,
}

impl Batch {
    /// Random ids; the target of a position is the id after it.
    #[must_use]
    pub fn random(shape: &ModelShape, rows: usize, len: usize, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let vocab = shape.vocab as u32;
        let (mut ids, mut targets) = (Vec::new(), Vec::new());
        for _ in 0..rows {
            let line: Vec<u32> = (0..=len).map(|_| rng.random_range(0..vocab)).collect();
            ids.extend_from_slice(&line[..len]);
            targets.extend_from_slice(&line[1..]);
        }
        Self {
            rows,
            len,
            ids,
            targets,
        }
    }

    /// Tokens in the batch.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.rows * self.len
    }
}

impl Weights {
    /// Seeded normal weights (std 0.02, adapter `B` std 0.01 so that every gradient is non-zero; norms near 1).
    #[must_use]
    pub fn random(shape: ModelShape, adapter: AdapterShape, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut draw = |dims: &[usize], mean: f32, std: f32| Rows {
            shape: dims.to_vec(),
            data: Normal::new(mean, std)
                .expect("std is positive")
                .sample_iter(&mut rng)
                .take(dims.iter().product())
                .collect(),
        };
        let mut base = BTreeMap::new();
        let mut lora = BTreeMap::new();
        for (name, dims) in base_tensors(&shape) {
            let mean = if dims.len() == 1 { 1.0 } else { 0.0 };
            base.insert(name, draw(&dims, mean, 0.02));
        }
        let ends: Vec<String> = adapter.modules.iter().map(|m| format!(".{m}")).collect();
        for (name, rows) in &base {
            let module = name.trim_end_matches(".weight");
            if ends.iter().any(|end| module.ends_with(end)) {
                let [n, k] = rows.shape[..] else { continue };
                lora.insert(
                    format!("{module}.lora_A.weight"),
                    draw(&[adapter.rank, k], 0.0, 0.05),
                );
                lora.insert(
                    format!("{module}.lora_B.weight"),
                    draw(&[n, adapter.rank], 0.0, 0.01),
                );
            }
        }
        Self {
            shape,
            adapter,
            base,
            lora,
        }
    }

    /// Writes `config.json` and `model.safetensors` (f32) as Hugging Face lays them out, base weights only.
    ///
    /// # Errors
    /// Any failure to create or write the files.
    pub fn write_dir(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir)?;
        let s = &self.shape;
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": s.hidden, "num_hidden_layers": s.layers, "num_attention_heads": s.heads,
            "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim, "intermediate_size": s.mlp,
            "vocab_size": s.vocab, "rms_norm_eps": s.norm_eps, "rope_theta": s.rope_theta,
            "max_position_embeddings": s.max_positions, "tie_word_embeddings": false,
            "attention_bias": false, "mlp_bias": false, "torch_dtype": "float32",
            "bos_token_id": 0, "eos_token_id": 1,
        });
        std::fs::write(dir.join("config.json"), serde_json::to_vec_pretty(&config)?)?;
        write_tensors(&dir.join("model.safetensors"), "", &self.base)
    }

    /// Writes the adapter as PEFT lays it out, in f32.
    ///
    /// # Errors
    /// Any failure to create or write the files.
    pub fn write_adapter(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir)?;
        let config = serde_json::json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": true,
            "r": self.adapter.rank, "lora_alpha": self.adapter.alpha, "lora_dropout": 0.0,
            "target_modules": self.adapter.modules,
        });
        let path = dir.join("adapter_config.json");
        std::fs::write(path, serde_json::to_vec_pretty(&config)?)?;
        let path = dir.join("adapter_model.safetensors");
        write_tensors(&path, "base_model.model.", &self.lora)
    }
}

/// Writes f32 tensors as one safetensors file, every name behind `prefix`.
fn write_tensors(path: &Path, prefix: &str, tensors: &BTreeMap<String, Rows>) -> Result<()> {
    let bytes: Vec<(String, &Rows, Vec<u8>)> = tensors
        .iter()
        .map(|(name, rows)| {
            let raw = rows.data.iter().flat_map(|v| v.to_le_bytes()).collect();
            (format!("{prefix}{name}"), rows, raw)
        })
        .collect();
    let views = bytes
        .iter()
        .map(|(name, rows, raw)| Ok((name, TensorView::new(Dtype::F32, rows.shape.clone(), raw)?)))
        .collect::<Result<Vec<_>>>()?;
    let file = safetensors::serialize(views, None)?;
    std::fs::write(path, file)?;
    Ok(())
}

/// Names and extents of the base tensors.
fn base_tensors(s: &ModelShape) -> Vec<(String, Vec<usize>)> {
    let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
    let mut all = vec![
        (
            "model.embed_tokens.weight".to_owned(),
            vec![s.vocab, s.hidden],
        ),
        ("model.norm.weight".to_owned(), vec![s.hidden]),
        ("lm_head.weight".to_owned(), vec![s.vocab, s.hidden]),
    ];
    for layer in 0..s.layers {
        for (name, dims) in [
            ("input_layernorm", vec![s.hidden]),
            ("self_attn.q_proj", vec![q, s.hidden]),
            ("self_attn.k_proj", vec![kv, s.hidden]),
            ("self_attn.v_proj", vec![kv, s.hidden]),
            ("self_attn.o_proj", vec![s.hidden, q]),
            ("post_attention_layernorm", vec![s.hidden]),
            ("mlp.gate_proj", vec![s.mlp, s.hidden]),
            ("mlp.up_proj", vec![s.mlp, s.hidden]),
            ("mlp.down_proj", vec![s.hidden, s.mlp]),
        ] {
            all.push((format!("model.layers.{layer}.{name}.weight"), dims));
        }
    }
    all
}
