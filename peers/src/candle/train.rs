//! LoRA training in candle: frozen weights as plain tensors, adapters as `Var`s, AdamW from candle-nn.
//! Invariant: rms_norm, rope and softmax are the decomposed ones; the fused ones have no backward and would leave
//! every adapter gradient at zero without saying so.

use candle_core::{D, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};

use super::{rotary_tables, tensor};
use crate::Result;
use crate::weights::{Batch, ModelShape, Weights, adamw};

/// A projection, adapted or not. `weight: [n, k]`, `lora: (a [r, k], b [n, r])`.
struct Projection {
    weight: Tensor,
    lora: Option<(Var, Var)>,
    scale: f64,
}

impl Projection {
    /// `x: [m, k]` -> `[m, n]`.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = x.matmul(&self.weight.t()?)?;
        let Some((a, b)) = &self.lora else {
            return Ok(y);
        };
        let branch = x.matmul(&a.t()?)?.matmul(&b.t()?)?;
        y + (branch * self.scale)?
    }
}

struct Layer {
    norm1: Tensor,
    norm2: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    o: Projection,
    gate: Projection,
    up: Projection,
    down: Projection,
}

/// The model with its adapters and optimizer.
pub struct CandleTrainer {
    shape: ModelShape,
    embed: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Tensor,
    cos: Tensor,
    sin: Tensor,
    vars: Vec<Var>,
    optimizer: AdamW,
}

impl CandleTrainer {
    /// Copies `weights` into candle tensors and sets up AdamW.
    ///
    /// # Errors
    /// Whatever candle reports.
    pub fn new(weights: &Weights) -> Result<Self> {
        let mut vars = Vec::new();
        let base = |name: &str| tensor(&weights.base[&format!("{name}.weight")]);
        let mut project = |name: String| -> Result<Projection> {
            let part = |end: &str| weights.lora.get(&format!("{name}.lora_{end}.weight"));
            let lora = match (part("A"), part("B")) {
                (Some(a), Some(b)) => {
                    let pair = (
                        Var::from_tensor(&tensor(a)?)?,
                        Var::from_tensor(&tensor(b)?)?,
                    );
                    vars.extend([pair.0.clone(), pair.1.clone()]);
                    Some(pair)
                }
                _ => None,
            };
            Ok(Projection {
                weight: base(&name)?,
                lora,
                scale: f64::from(weights.adapter.scale()),
            })
        };
        let mut layers = Vec::new();
        for i in 0..weights.shape.layers {
            let at = |name: &str| format!("model.layers.{i}.{name}");
            layers.push(Layer {
                norm1: base(&at("input_layernorm"))?,
                norm2: base(&at("post_attention_layernorm"))?,
                q: project(at("self_attn.q_proj"))?,
                k: project(at("self_attn.k_proj"))?,
                v: project(at("self_attn.v_proj"))?,
                o: project(at("self_attn.o_proj"))?,
                gate: project(at("mlp.gate_proj"))?,
                up: project(at("mlp.up_proj"))?,
                down: project(at("mlp.down_proj"))?,
            });
        }
        let (cos, sin) = rotary_tables(&weights.shape)?;
        let optimizer = AdamW::new(
            vars.clone(),
            ParamsAdamW {
                lr: adamw::LR,
                beta1: adamw::BETA1,
                beta2: adamw::BETA2,
                eps: adamw::EPS,
                weight_decay: adamw::WEIGHT_DECAY,
            },
        )?;
        Ok(Self {
            shape: weights.shape,
            embed: base("model.embed_tokens")?,
            layers,
            norm: base("model.norm")?,
            head: base("lm_head")?,
            cos,
            sin,
            vars,
            optimizer,
        })
    }

    /// One AdamW step. Returns the loss a token before it.
    ///
    /// # Errors
    /// Whatever candle reports.
    pub fn step(&mut self, batch: &Batch) -> Result<f32> {
        let loss = self.loss(batch)?;
        self.optimizer.backward_step(&loss)?;
        Ok(loss.to_scalar()?)
    }

    /// Norm of the gradient of every adapter matrix on `batch`, in the order they were made.
    ///
    /// # Errors
    /// Whatever candle reports, and an adapter without any gradient.
    pub fn gradient_norms(&self, batch: &Batch) -> Result<Vec<f32>> {
        let grads = self.loss(batch)?.backward()?;
        self.vars
            .iter()
            .map(|var| {
                let grad = grads
                    .get(var)
                    .ok_or("candle made no gradient for an adapter")?;
                Ok(grad.sqr()?.sum_all()?.sqrt()?.to_scalar()?)
            })
            .collect()
    }

    fn loss(&self, batch: &Batch) -> Result<Tensor> {
        let (b, t) = (batch.rows, batch.len);
        let ids = Tensor::from_slice(&batch.ids, b * t, &Device::Cpu)?;
        let targets = Tensor::from_slice(&batch.targets, b * t, &Device::Cpu)?;
        let mask = causal_mask(t)?;
        let mut x = self.embed.index_select(&ids, 0)?;
        for layer in &self.layers {
            let h = rms_norm(&x, &layer.norm1, self.shape.norm_eps)?;
            x = (x + self.attention(layer, &h, (b, t), &mask)?)?;
            let h = rms_norm(&x, &layer.norm2, self.shape.norm_eps)?;
            let gated = (layer.gate.forward(&h)?.silu()? * layer.up.forward(&h)?)?;
            x = (x + layer.down.forward(&gated)?)?;
        }
        let x = rms_norm(&x, &self.norm, self.shape.norm_eps)?;
        let logits = x.matmul(&self.head.t()?)?;
        Ok(candle_nn::loss::cross_entropy(&logits, &targets)?)
    }

    /// `h: [b*t, c]` -> `[b*t, c]`. Query heads of one key head are stacked, so keys are never repeated.
    fn attention(
        &self,
        layer: &Layer,
        h: &Tensor,
        (b, t): (usize, usize),
        mask: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let s = &self.shape;
        let heads = |x: Tensor, n: usize| {
            x.reshape((b, t, n, s.head_dim))?
                .transpose(1, 2)?
                .contiguous()
        };
        let q = self.rope(&heads(layer.q.forward(h)?, s.heads)?, t)?;
        let k = self.rope(&heads(layer.k.forward(h)?, s.kv_heads)?, t)?;
        let v = heads(layer.v.forward(h)?, s.kv_heads)?;
        let group = s.heads / s.kv_heads;
        let q = (q * (1.0 / (s.head_dim as f64).sqrt()))?;
        let q = q.reshape((b, s.kv_heads, group * t, s.head_dim))?;
        let scores = q.matmul(&k.t()?)?.reshape((b, s.heads, t, t))?;
        let weights = candle_nn::ops::softmax(&scores.broadcast_add(mask)?, D::Minus1)?;
        let mixed = weights.reshape((b, s.kv_heads, group * t, t))?.matmul(&v)?;
        let mixed = mixed
            .reshape((b, s.heads, t, s.head_dim))?
            .transpose(1, 2)?;
        layer
            .o
            .forward(&mixed.reshape((b * t, s.heads * s.head_dim))?)
    }

    fn rope(&self, x: &Tensor, t: usize) -> candle_core::Result<Tensor> {
        candle_nn::rotary_emb::rope_slow(x, &self.cos.narrow(0, 0, t)?, &self.sin.narrow(0, 0, t)?)
    }
}

fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> candle_core::Result<Tensor> {
    candle_nn::ops::rms_norm_slow(x, weight, eps)
}

/// `[t, t]`: 0 on and below the diagonal, minus infinity above.
fn causal_mask(t: usize) -> candle_core::Result<Tensor> {
    let data: Vec<f32> = (0..t * t)
        .map(|i| {
            if i % t > i / t {
                f32::NEG_INFINITY
            } else {
                0.0
            }
        })
        .collect();
    Tensor::from_vec(data, (t, t), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::AdapterShape;

    #[test]
    fn every_adapter_matrix_gets_a_gradient() {
        let weights = Weights::random(ModelShape::SMALL, AdapterShape::QV8, 1);
        let trainer = CandleTrainer::new(&weights).unwrap();
        let norms = trainer
            .gradient_norms(&Batch::random(&weights.shape, 1, 16, 2))
            .unwrap();
        assert_eq!(norms.len(), 24);
        assert!(norms.iter().all(|n| *n > 0.0), "{norms:?}");
    }
}
