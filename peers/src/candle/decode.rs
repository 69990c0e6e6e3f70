//! Greedy decode in candle with a key-value cache, by each of the three ways candle 0.11 offers on a CPU.
//! Invariant: one token in, one id out; nothing is recomputed.

use candle_core::{D, Device, IndexOp, Storage, Tensor};
use candle_nn::attention::cpu_flash::causal::causal_decode_f32_interleaved;
use candle_nn::attention::{AttnMask, flash_attn};
use candle_nn::kv_cache::{KvCache, RawInterleavedKvCache};

use super::{rotary_tables, tensor};
use crate::Result;
use crate::weights::{ModelShape, Weights};

/// How attention is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// Two products and the fused softmax, as candle-transformers' Llama does.
    Fused,
    /// `candle_nn::attention::flash_attn`, as candle-transformers' Qwen3 does.
    Flash,
    /// The interleaved decode kernel, as candle-transformers' quantised Qwen3 does.
    Interleaved,
}

impl Attention {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Fused, Self::Flash, Self::Interleaved];

    /// Name in reports.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Fused => "fused ops",
            Self::Flash => "flash",
            Self::Interleaved => "interleaved flash",
        }
    }
}

/// Weights `[k, n]` views of the stored `[n, k]`.
struct Layer {
    norm1: Tensor,
    norm2: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

/// The bare model and one decode path.
pub struct CandleDecoder {
    shape: ModelShape,
    attention: Attention,
    embed: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Tensor,
    cos: Tensor,
    sin: Tensor,
}

/// Keys and values of one layer.
enum Past {
    /// `[1, kv_heads, t, d]` for the fused path, `[1, t, kv_heads, d]` for the flash one.
    Tensors(KvCache),
    /// Interleaved rows, written without making tensors.
    Raw(RawInterleavedKvCache),
}

impl CandleDecoder {
    /// Copies `weights` into candle tensors.
    ///
    /// # Errors
    /// Whatever candle reports.
    pub fn new(weights: &Weights, attention: Attention) -> Result<Self> {
        let base = |name: &str| tensor(&weights.base[&format!("{name}.weight")]);
        let layers = (0..weights.shape.layers)
            .map(|i| {
                let at = |name: &str| base(&format!("model.layers.{i}.{name}"));
                Ok(Layer {
                    norm1: at("input_layernorm")?,
                    norm2: at("post_attention_layernorm")?,
                    q: at("self_attn.q_proj")?.t()?,
                    k: at("self_attn.k_proj")?.t()?,
                    v: at("self_attn.v_proj")?.t()?,
                    o: at("self_attn.o_proj")?.t()?,
                    gate: at("mlp.gate_proj")?.t()?,
                    up: at("mlp.up_proj")?.t()?,
                    down: at("mlp.down_proj")?.t()?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let (cos, sin) = rotary_tables(&weights.shape)?;
        Ok(Self {
            shape: weights.shape,
            attention,
            embed: base("model.embed_tokens")?,
            layers,
            norm: base("model.norm")?,
            head: base("lm_head")?.t()?,
            cos,
            sin,
        })
    }

    /// Reads `prompt` and generates `tokens` greedy ids.
    ///
    /// # Errors
    /// Whatever candle reports.
    pub fn generate(&self, prompt: &[u32], tokens: usize) -> Result<Vec<u32>> {
        let total = prompt.len() + tokens;
        let mut past: Vec<Past> = (0..self.layers.len())
            .map(|_| self.empty_cache(total))
            .collect();
        let mut out = Vec::with_capacity(tokens);
        let mut next = self.forward(prompt, 0, &mut past)?;
        for i in 0..tokens {
            out.push(next);
            if i + 1 < tokens {
                next = self.forward(&[next], prompt.len() + i, &mut past)?;
            }
        }
        Ok(out)
    }

    fn empty_cache(&self, total: usize) -> Past {
        let s = &self.shape;
        match self.attention {
            Attention::Fused => Past::Tensors(KvCache::new(2, total)),
            Attention::Flash => Past::Tensors(KvCache::new(1, total)),
            Attention::Interleaved => {
                Past::Raw(RawInterleavedKvCache::new(s.kv_heads, s.head_dim, total))
            }
        }
    }

    /// Greedy id after `ids`, which stand at `offset` and following.
    fn forward(&self, ids: &[u32], offset: usize, past: &mut [Past]) -> candle_core::Result<u32> {
        let t = ids.len();
        let ids = Tensor::from_slice(ids, t, &Device::Cpu)?;
        let eps = self.shape.norm_eps;
        let mut x = self.embed.index_select(&ids, 0)?;
        for (layer, past) in self.layers.iter().zip(past) {
            let h = candle_nn::ops::rms_norm(&x, &layer.norm1, eps)?;
            x = (x + self.attend(layer, &h, offset, past)?)?;
            let h = candle_nn::ops::rms_norm(&x, &layer.norm2, eps)?;
            let gated = (h.matmul(&layer.gate)?.silu()? * h.matmul(&layer.up)?)?;
            x = (x + gated.matmul(&layer.down)?)?;
        }
        let last = candle_nn::ops::rms_norm(&x.i(t - 1..)?.contiguous()?, &self.norm, eps)?;
        last.matmul(&self.head)?
            .squeeze(0)?
            .argmax(D::Minus1)?
            .to_scalar()
    }

    /// `h: [t, c]` -> `[t, c]`.
    fn attend(
        &self,
        layer: &Layer,
        h: &Tensor,
        offset: usize,
        past: &mut Past,
    ) -> candle_core::Result<Tensor> {
        let s = &self.shape;
        let t = h.dim(0)?;
        let cos = self.cos.narrow(0, offset, t)?;
        let sin = self.sin.narrow(0, offset, t)?;
        let rows = |x: Tensor, n: usize| x.reshape((1, t, n, s.head_dim));
        let rope = |x: Tensor| candle_nn::rotary_emb::rope_thd(&x, &cos, &sin);
        let q = rope(rows(h.matmul(&layer.q)?, s.heads)?)?;
        let k = rope(rows(h.matmul(&layer.k)?, s.kv_heads)?)?;
        let v = rows(h.matmul(&layer.v)?, s.kv_heads)?;
        let scale = 1.0 / (s.head_dim as f32).sqrt();
        let mixed = match past {
            Past::Tensors(cache) if self.attention == Attention::Flash => {
                let (k, v) = cache.append(&k, &v)?;
                let mask = AttnMask::causal_with_offset(offset);
                flash_attn::<f32>(&q, &k, &v, scale, mask, None, None)?.transpose(1, 2)?
            }
            Past::Tensors(cache) => self.fused(&q, &k, &v, offset, cache)?,
            Past::Raw(cache) => self.interleaved((&q, &k, &v), offset, cache)?,
        };
        mixed.reshape((t, s.heads * s.head_dim))?.matmul(&layer.o)
    }

    /// Products and softmax. Query heads of one key head are stacked, so keys are never repeated.
    fn fused(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        offset: usize,
        cache: &mut KvCache,
    ) -> candle_core::Result<Tensor> {
        let s = &self.shape;
        let t = q.dim(1)?;
        let by_head = |x: &Tensor| x.transpose(1, 2)?.contiguous();
        let (k, v) = cache.append(&by_head(k)?, &by_head(v)?)?;
        let group = s.heads / s.kv_heads;
        let q = by_head(q)?.reshape((1, s.kv_heads, group * t, s.head_dim))?;
        let q = (q * (1.0 / (s.head_dim as f64).sqrt()))?;
        let mut scores = q.matmul(&k.t()?)?.reshape((1, s.heads, t, offset + t))?;
        if t > 1 {
            scores = scores.broadcast_add(&prompt_mask(t, offset)?)?;
        }
        let weights = candle_nn::ops::softmax_last_dim(&scores)?;
        let mixed = weights
            .reshape((1, s.kv_heads, group * t, offset + t))?
            .matmul(&v.contiguous()?)?;
        mixed.reshape((1, s.heads, t, s.head_dim))?.transpose(1, 2)
    }

    /// The interleaved kernel for one token, flash attention for a prompt. Everything is `[1, t, heads, d]`.
    fn interleaved(
        &self,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        offset: usize,
        cache: &mut RawInterleavedKvCache,
    ) -> candle_core::Result<Tensor> {
        let s = &self.shape;
        let t = q.dim(1)?;
        let scale = 1.0 / (s.head_dim as f32).sqrt();
        with_f32(k, |k| {
            with_f32(v, |v| {
                cache.write_kv_batch(k, v, t);
                Ok(())
            })
        })?;
        if t > 1 {
            let mask = AttnMask::causal_with_offset(offset);
            return flash_attn::<f32>(q, k, v, scale, mask, None, None)?.transpose(1, 2);
        }
        with_f32(q, |q| {
            let (data, len) = (cache.data(), cache.len());
            causal_decode_f32_interleaved(q, data, s.heads, s.kv_heads, s.head_dim, len, scale)
        })
    }
}

/// Runs `body` on the elements of a contiguous f32 tensor without copying them.
fn with_f32<T>(
    x: &Tensor,
    body: impl FnOnce(&[f32]) -> candle_core::Result<T>,
) -> candle_core::Result<T> {
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(cpu), Some((start, end))) => body(&cpu.as_slice::<f32>()?[start..end]),
        _ => candle_core::bail!("interleaved decode: want a contiguous f32 tensor on the CPU"),
    }
}

/// `[t, offset + t]`: minus infinity where a key comes after its query.
fn prompt_mask(t: usize, offset: usize) -> candle_core::Result<Tensor> {
    let width = offset + t;
    let data: Vec<f32> = (0..t * width)
        .map(|i| {
            if i % width > i / width + offset {
                f32::NEG_INFINITY
            } else {
                0.0
            }
        })
        .collect();
    Tensor::from_vec(data, (t, width), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{AdapterShape, Batch};

    #[test]
    fn all_paths_give_the_same_tokens() {
        let weights = Weights::random(ModelShape::SMALL, AdapterShape::QV8, 1);
        let prompt = Batch::random(&weights.shape, 1, 32, 3).ids;
        let paths = Attention::ALL.map(|a| {
            CandleDecoder::new(&weights, a)
                .unwrap()
                .generate(&prompt, 16)
                .unwrap()
        });
        assert_eq!(paths[0].len(), 16);
        assert_eq!(paths[0], paths[1]);
        assert_eq!(paths[0], paths[2]);
    }
}
