//! Models of known sizes with random weights, written like any other model's files.
//! Invariant: equal seeds give equal files. Whether a model fits is asked before its first byte is written.
//! Absent on purpose: a tokenizer. Ids are random.

use std::io::{BufWriter, Write as _};
use std::path::Path;

use half::bf16;
use serde_json::json;
use tallow::DType;
use tallow::llm::{ModelConfig, weights};
use tallow::train::memory::{free_bytes, show};

use crate::{Error, Result};

/// Extents of a Llama, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// As on the command line.
    pub name: &'static str,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads, key and value heads, elements of a head.
    pub heads: [usize; 3],
    /// Width of the MLP.
    pub mlp: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Is the output projection the embedding?
    pub tied: bool,
    /// What its files hold.
    pub stored: DType,
}

/// The model of the tax and of the comparisons on a CPU: 5.4 M weights read for each token.
pub const SMALL: ModelShape = ModelShape {
    name: "small",
    hidden: 256,
    layers: 6,
    heads: [8, 4, 32],
    mlp: 688,
    vocab: 4096,
    tied: false,
    stored: DType::F32,
};

/// What `--shape` knows.
pub const SHAPES: [ModelShape; 4] = [
    SMALL,
    ModelShape {
        name: "0.5b",
        hidden: 896,
        layers: 24,
        heads: [14, 2, 64],
        mlp: 4864,
        vocab: 151_936,
        tied: true,
        stored: DType::BF16,
    },
    ModelShape {
        name: "1b",
        hidden: 2048,
        layers: 16,
        heads: [32, 8, 64],
        mlp: 8192,
        vocab: 128_256,
        tied: true,
        stored: DType::BF16,
    },
    ModelShape {
        name: "8b",
        hidden: 4096,
        layers: 32,
        heads: [32, 8, 128],
        mlp: 14_336,
        vocab: 128_256,
        tied: false,
        stored: DType::BF16,
    },
];

impl ModelShape {
    /// A shape by its name.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn named(name: &str) -> Result<Self> {
        let found = SHAPES.into_iter().find(|s| s.name == name);
        found.ok_or_else(|| Error::Setting {
            name: "--shape",
            want: "small, 0.5b, 1b or 8b",
            got: name.to_owned(),
        })
    }

    /// All weights.
    #[must_use]
    pub fn parameters(&self) -> usize {
        let [h, hk, d] = self.heads;
        let (c, mlp) = (self.hidden, self.mlp);
        let layer = 2 * c * h * d + 2 * c * hk * d + 3 * c * mlp + 2 * c;
        let tables = if self.tied { 1 } else { 2 };
        self.layers * layer + tables * self.vocab * c + c
    }

    /// Refuses what does not fit into the memory that is free, for weights computed in `dtype`.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn fits(&self, dtype: DType) -> Result<()> {
        let need = self.need(dtype);
        match free_bytes() {
            Some(have) if need > have => Err(Error::Memory {
                what: format!("a model of shape {}", self.name),
                need: show(need),
                have: show(have),
            }),
            _ => Ok(()),
        }
    }

    /// The files, which stay in memory while they are read; the weights laid out for the kernels; the same for the kernels that
    /// judge; beside them, a tenth, activations, gradients and caches.
    fn need(&self, dtype: DType) -> usize {
        let weights = self.parameters();
        (weights * self.stored.bytes() + 2 * weights * dtype.bytes()) / 10 * 11
    }

    /// Writes `config.json` and `model.safetensors` into `dir`.
    ///
    /// # Errors
    /// A full disk.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let [heads, kv_heads, head_dim] = self.heads;
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": head_dim, "intermediate_size": self.mlp,
            "vocab_size": self.vocab, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "max_position_embeddings": 2048, "tie_word_embeddings": self.tied, "attention_bias": false,
            "mlp_bias": false, "bos_token_id": 0, "eos_token_id": 1,
        });
        let path = dir.join("config.json");
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { path, source }
        };
        std::fs::write(&path, config.to_string()).map_err(io(&path))?;
        let tensors = weights::expected(&ModelConfig::read(dir)?);
        let path = dir.join("model.safetensors");
        self.write_tensors(&path, &tensors).map_err(io(&path))
    }

    /// The format is a length, a header in JSON, and the numbers; written as they are drawn.
    fn write_tensors(&self, path: &Path, tensors: &[(String, Vec<usize>)]) -> std::io::Result<()> {
        let (mut header, mut at) = (serde_json::Map::new(), 0);
        for (name, shape) in tensors {
            let end = at + shape.iter().product::<usize>() * self.stored.bytes();
            let dtype = if self.stored == DType::BF16 {
                "BF16"
            } else {
                "F32"
            };
            let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": [at, end] });
            header.insert(name.clone(), entry);
            at = end;
        }
        let mut header = serde_json::Value::Object(header).to_string();
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let mut file = BufWriter::with_capacity(1 << 20, std::fs::File::create(path)?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        let mut rng = fastrand::Rng::with_seed(1);
        for (_, shape) in tensors {
            let (mean, n) = (
                if shape.len() == 1 { 1.0 } else { 0.0 },
                shape.iter().product(),
            );
            for _ in 0..n {
                let v: f32 = mean + 0.035 * (2.0 * rng.f32() - 1.0);
                match self.stored {
                    DType::BF16 => file.write_all(&bf16::from_f32(v).to_le_bytes())?,
                    _ => file.write_all(&v.to_le_bytes())?,
                }
            }
        }
        file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_what_their_names_say() {
        let millions = |name: &str| ModelShape::named(name).unwrap().parameters() / 1_000_000;
        assert_eq!(
            ["small", "0.5b", "1b", "8b"].map(millions),
            [6, 494, 1235, 8030]
        );
        assert!(ModelShape::named("70b").is_err());
    }

    #[test]
    fn what_cannot_fit_is_refused() {
        let huge = ModelShape {
            layers: 1 << 20,
            ..SHAPES[3]
        };
        let e = huge.fits(DType::BF16).unwrap_err().to_string();
        assert!(e.contains("--shape") && e.contains("GiB"), "{e}");
        assert!(SMALL.fits(DType::F32).is_ok());
    }

    #[test]
    fn what_is_needed_follows_the_type_that_is_computed_in() {
        let gib = |name: &str, dtype| ModelShape::named(name).unwrap().need(dtype) >> 30;
        assert_eq!([gib("0.5b", DType::F32), gib("1b", DType::F32)], [5, 12]);
        assert_eq!([gib("1b", DType::BF16), gib("8b", DType::BF16)], [7, 49]);
    }
}
