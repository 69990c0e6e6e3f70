//! A Llama in candle: frozen weights as plain tensors, adapters beside them, keys and values of earlier tokens.
//! Invariant: where gradients are wanted, norms and rope are the ones in parts: the fused ones have no backward and would
//! leave every adapter gradient at zero without saying so.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;

use candle_core::{DType, Device, IndexOp as _, Tensor};
use candle_nn::kv_cache::KvCache;
use tallow::llm::ModelConfig;

use super::attention::{Kind, by_products, causal_mask, flash, interleaved, with_f32};

/// Factor on an adapter's branch: alpha is twice the rank.
const SCALE: f64 = 2.0;

/// Tensors of all `.safetensors` files of a folder, in f32.
pub(super) fn read(dir: &Path) -> candle_core::Result<HashMap<String, Tensor>> {
    let mut all = HashMap::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            for (name, t) in candle_core::safetensors::load(&path, &Device::Cpu)? {
                all.insert(name, t.to_dtype(DType::F32)?);
            }
        }
    }
    Ok(all)
}

/// A and B of the adapted modules: `[rank, k]`, `[n, rank]`.
pub(super) type Adapter = HashMap<String, [Tensor; 2]>;

/// `weight [k, n]`, a view of the stored `[n, k]`; `lora`: `a [rank, k]`, `b [n, rank]`.
struct Projection {
    weight: Tensor,
    lora: Option<[Tensor; 2]>,
}

impl Projection {
    /// `x [m, k]` -> `[m, n]`.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = x.matmul(&self.weight)?;
        let Some([a, b]) = &self.lora else {
            return Ok(y);
        };
        let branch = x.matmul(&a.t()?)?.matmul(&b.t()?)?;
        y + (branch * SCALE)?
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

/// Keys and values of one layer. A clone shares its memory and has its own length: what is appended to it lies behind the
/// tokens that both have.
#[derive(Clone)]
pub(super) enum Past {
    /// None are kept.
    None,
    /// `[1, hk, s, d]` for products, `[1, s, hk, d]` for flash.
    Tensors(KvCache),
    /// `[s, hk, 2, d]`, as the interleaved kernel reads them; written in place.
    Interleaved(Rc<RefCell<Vec<f32>>>),
}

/// Where tokens stand: rows, tokens a row, tokens before them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) b: usize,
    pub(super) t: usize,
    pub(super) offset: usize,
}

/// The model.
pub(super) struct Net {
    config: ModelConfig,
    kind: Kind,
    span: Span,
    embed: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    /// `[c, vocab]`, a view.
    head: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Option<Tensor>,
}

impl Net {
    pub(super) fn new(
        config: &ModelConfig,
        w: HashMap<String, Tensor>,
        mut adapter: Adapter,
        (kind, span): (Kind, Span),
    ) -> candle_core::Result<Self> {
        let embed = take(&w, "model.embed_tokens")?;
        let head = match config.tied {
            true => embed.t()?,
            false => take(&w, "lm_head")?.t()?,
        };
        let layer = |i| layer(&w, &mut adapter, i);
        let layers = (0..config.layers).map(layer).collect::<Result<_, _>>()?;
        let (cos, sin) = rotary_tables(config, span)?;
        Ok(Net {
            config: config.clone(),
            kind,
            span,
            embed,
            layers,
            norm: take(&w, "model.norm")?,
            head,
            cos,
            sin,
            mask: causal_mask(span.t, span.offset)?,
        })
    }

    /// `ids [b * t]` -> `[b * t, c]`, the last norm included. What is new is appended to `past`, one for each layer.
    pub(super) fn hidden(&self, ids: &Tensor, past: &mut [Past]) -> candle_core::Result<Tensor> {
        let mut x = self.embed.index_select(ids, 0)?;
        for (layer, past) in self.layers.iter().zip(past) {
            let h = self.rms_norm(&x, &layer.norm1)?;
            x = (x + self.attend(layer, &h, past)?)?;
            let h = self.rms_norm(&x, &layer.norm2)?;
            let gated = (layer.gate.forward(&h)?.silu()? * layer.up.forward(&h)?)?;
            x = (x + layer.down.forward(&gated)?)?;
        }
        self.rms_norm(&x, &self.norm)
    }

    /// `x [m, c]` -> `[m, vocab]`.
    pub(super) fn logits(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.matmul(&self.head)
    }

    /// `[m, c]` -> `[1, c]`.
    pub(super) fn last_row(x: &Tensor) -> candle_core::Result<Tensor> {
        x.i(x.dim(0)? - 1..)?.contiguous()
    }

    fn rms_norm(&self, x: &Tensor, w: &Tensor) -> candle_core::Result<Tensor> {
        match self.kind {
            Kind::Differentiable => candle_nn::ops::rms_norm_slow(x, w, self.config.eps),
            _ => candle_nn::ops::rms_norm(x, w, self.config.eps),
        }
    }

    /// `h [b * t, c]` -> `[b * t, c]`.
    fn attend(&self, layer: &Layer, h: &Tensor, past: &mut Past) -> candle_core::Result<Tensor> {
        let (c, Span { b, t, offset }) = (&self.config, self.span);
        let split = |p: &Projection, n: usize| p.forward(h)?.reshape((b, t, n, c.head_dim));
        let (q, k) = (split(&layer.q, c.heads)?, split(&layer.k, c.kv_heads)?);
        let v = split(&layer.v, c.kv_heads)?;
        let (cos, sin) = (&self.cos, &self.sin);
        let mixed = match self.kind {
            Kind::Differentiable | Kind::Fused => {
                let by_head = |x: Tensor| x.transpose(1, 2)?.contiguous();
                let rope = |x: Tensor| match self.kind {
                    Kind::Differentiable => candle_nn::rotary_emb::rope_slow(&x, cos, sin),
                    _ => candle_nn::rotary_emb::rope(&x, cos, sin),
                };
                let (q, k) = (rope(by_head(q)?)?, rope(by_head(k)?)?);
                let (k, v) = past.append(k, by_head(v)?)?;
                by_products((&q, &k, &v), self.mask.as_ref(), self.kind)?
            }
            Kind::Flash => {
                let rope = |x: Tensor| candle_nn::rotary_emb::rope_thd(&x, cos, sin);
                let (k, v) = past.append(rope(k)?, v)?;
                flash(&rope(q)?, &k, &v, offset)?
            }
            Kind::Interleaved => {
                let rope = |x: Tensor| candle_nn::rotary_emb::rope_thd(&x, cos, sin);
                let past = past.write(&rope(k)?, &v, offset)?;
                interleaved(&rope(q)?, &past.borrow(), [offset + t, c.kv_heads])?
            }
        };
        let mixed = mixed.reshape((b * t, c.heads * c.head_dim))?;
        layer.o.forward(&mixed)
    }
}

impl Past {
    /// What was kept, with `k` and `v` behind it.
    fn append(&mut self, k: Tensor, v: Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        match self {
            Past::None => Ok((k, v)),
            Past::Tensors(cache) => cache.append(&k, &v),
            Past::Interleaved(_) => candle_core::bail!("want keys as tensors (bug in tallow)"),
        }
    }

    /// Writes `k` and `v [1, 1, hk, d]` at position `at`.
    fn write(
        &mut self,
        k: &Tensor,
        v: &Tensor,
        at: usize,
    ) -> candle_core::Result<Rc<RefCell<Vec<f32>>>> {
        let Past::Interleaved(rows) = self else {
            candle_core::bail!("want interleaved keys (bug in tallow)");
        };
        let (_, _, hk, d) = k.dims4()?;
        for (part, x) in [k, v].into_iter().enumerate() {
            with_f32(x, |x| {
                let mut rows = rows.borrow_mut();
                for (head, x) in x.chunks_exact(d).enumerate() {
                    let to = ((at * hk + head) * 2 + part) * d;
                    rows[to..to + d].copy_from_slice(x);
                }
                Ok(())
            })?;
        }
        Ok(rows.clone())
    }
}

fn take(w: &HashMap<String, Tensor>, name: &str) -> candle_core::Result<Tensor> {
    match w.get(&format!("{name}.weight")) {
        Some(t) => Ok(t.clone()),
        None => candle_core::bail!("{name} is not in the model's files"),
    }
}

fn layer(
    w: &HashMap<String, Tensor>,
    adapter: &mut Adapter,
    i: usize,
) -> candle_core::Result<Layer> {
    let mut project = |name: &str| {
        let name = format!("model.layers.{i}.{name}");
        Ok::<_, candle_core::Error>(Projection {
            weight: take(w, &name)?.t()?,
            lora: adapter.remove(&name),
        })
    };
    let [q, k, v, o] = ["q", "k", "v", "o"].map(|p| project(&format!("self_attn.{p}_proj")));
    let [gate, up, down] = ["gate", "up", "down"].map(|p| project(&format!("mlp.{p}_proj")));
    let norm = |name: &str| take(w, &format!("model.layers.{i}.{name}"));
    Ok(Layer {
        norm1: norm("input_layernorm")?,
        norm2: norm("post_attention_layernorm")?,
        q: q?,
        k: k?,
        v: v?,
        o: o?,
        gate: gate?,
        up: up?,
        down: down?,
    })
}

/// Cosines and sines `[t, d / 2]` of the positions in use.
fn rotary_tables(config: &ModelConfig, span: Span) -> candle_core::Result<(Tensor, Tensor)> {
    let freq = &config.rope.inv_freq;
    let positions = span.offset..span.offset + span.t;
    let angles = positions.flat_map(|p| freq.iter().map(move |f| p as f32 * f));
    let angles = Tensor::from_iter(angles, &Device::Cpu)?.reshape((span.t, freq.len()))?;
    Ok((angles.cos()?, angles.sin()?))
}
