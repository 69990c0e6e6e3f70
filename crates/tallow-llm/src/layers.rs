//! The parts decoder layers are made of: norms, projections with their adapters, attention, the gated MLP.
//! Invariant: projections that read the same tensor are one product, and their adapters ride in it; their
//! results are views of it. A residual stream is added inside the product that ends a branch.
//! Absent on purpose: what makes a family. The families call these by name, one file each.

use tallow_core::op::Mask;
use tallow_core::tensor::Tensor;
use tallow_core::types::DType;

use crate::adapter::Adapters;
use crate::adapter::branch::{self, Part};
use crate::cache::Cache;
use crate::config::EMBEDDING;
use crate::error::Result;
use crate::model::Model;

/// One forward pass while it is written down.
pub(crate) struct Forward<'a> {
    model: &'a Model,
    /// `[b, t]`, what rotates queries and keys.
    pos: &'a Tensor,
    /// Where rows hold several documents: each token's index in the row, and that of its document's first.
    packed: Option<[&'a Tensor; 2]>,
    adapters: Adapters<'a>,
    cache: Option<&'a Cache>,
    /// Cache leaves and their next values.
    pub(crate) updates: Vec<(Tensor, Tensor)>,
}

/// What an attention layer does beyond its weights.
pub(crate) struct AttentionLayer<'a> {
    /// "model.layers.0.self_attn".
    pub(crate) at: &'a str,
    /// Its number, which is its place in the cache.
    pub(crate) index: usize,
    /// Keys a query sees, its own included; `None`: all before it.
    pub(crate) window: Option<u32>,
}

impl<'a> Forward<'a> {
    pub(crate) fn new(
        model: &'a Model,
        pos: &'a Tensor,
        packed: Option<[&'a Tensor; 2]>,
        adapters: Adapters<'a>,
        cache: Option<&'a Cache>,
    ) -> Self {
        Self {
            model,
            pos,
            packed,
            adapters,
            cache,
            updates: Vec::new(),
        }
    }

    /// A leaf by its name in the checkpoint.
    pub(crate) fn weight(&self, name: &str) -> Result<&'a Tensor> {
        self.model.weight(name)
    }

    /// The rows of the embedding for `ids [b, t]`, `[b, t, c]` f32. An adapter on it is a second look-up: a token's row
    /// of `A`, times `B`.
    pub(crate) fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let x = self
            .weight("model.embed_tokens.weight")?
            .gather(ids, DType::F32)?;
        let all = self.adapters.of(EMBEDDING)?;
        if all.iter().all(Option::is_none) {
            return Ok(x);
        }
        let up = branch::each_share(ids, all.len(), |g, ids| {
            let shape = [ids.dims(), &x.dims()[2..]].concat();
            let Some(on) = &all[g] else {
                return Ok(Tensor::scalar(0.0).broadcast(shape)?);
            };
            let rows = on.a.gather(ids, DType::F32)?;
            let rows = rows.reshape([rows.shape().rows(), rows.shape().last()])?;
            let up = rows.matmul_t(false, &on.b, true)?.mul_scalar(on.scale)?;
            Ok(up.reshape(shape)?)
        })?;
        Ok(x.add(&up)?)
    }

    /// Keys a query of this layer sees, by the configuration.
    pub(crate) fn window(&self, layer: usize) -> Option<u32> {
        self.model.config.windows.get(layer).copied().flatten()
    }

    /// `x [.., c]` normed with the weight `{at}.weight`.
    pub(crate) fn rms_norm(&self, x: &Tensor, at: &str) -> Result<Tensor> {
        let w = self.weight(&format!("{at}.weight"))?;
        Ok(x.rms_norm(w, self.model.config.eps)?)
    }

    /// Projections of one `x [.., k]`, side by side `[.., Σn]`, with the biases and adapters they have,
    /// plus `residual` if given.
    pub(crate) fn project(
        &self,
        x: &Tensor,
        at: &str,
        names: &[&str],
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let one = |name: &&str| {
            let module = format!("{at}.{name}");
            Ok(Part {
                w: self.weight(&format!("{module}.weight"))?.clone(),
                bias: self.model.weights.get(&format!("{module}.bias")).cloned(),
                branches: self.adapters.of(&module)?,
            })
        };
        let parts = names.iter().map(one).collect::<Result<Vec<_>>>()?;
        branch::project(x, &parts, residual)
    }

    /// Grouped-query attention with rotary positions: `x` normed and `residual`, both `[b, t, c]`, to
    /// `residual + attention(x)`.
    pub(crate) fn attention(
        &mut self,
        layer: &AttentionLayer,
        x: &Tensor,
        residual: &Tensor,
    ) -> Result<Tensor> {
        let c = &self.model.config;
        let (h, hk, d) = (c.heads, c.kv_heads, c.head_dim);
        let (b, t) = (x.dims()[0], x.dims()[1]);
        let qkv = self.project(x, layer.at, &["q_proj", "k_proj", "v_proj"], None)?;
        let heads = |from: usize, n: usize| qkv.slice(2, from * d, n * d)?.reshape([b, t, n, d]);
        // Queries and keys lie side by side and turn alike.
        let qk = heads(0, h + hk)?.rope(self.pos, &self.model.inv_freq)?;
        let (q, k) = (qk.slice(2, 0, h)?, qk.slice(2, h, hk)?);
        let (k, v) = self.remember(layer.index, k, heads(h + hk, hk)?)?;
        let scale = 1.0 / (d as f32).sqrt();
        let mask = Mask::Causal {
            window: layer.window,
        };
        let o = match self.packed {
            None => q.attention(&k, &v, self.pos, scale, mask)?,
            Some(rows) => q.attention_packed(&k, &v, rows, scale, mask)?,
        };
        let o = o.reshape([b, t, h * d])?;
        self.project(&o, layer.at, &["o_proj"], Some(residual))
    }

    /// With a cache: the new keys and values `[b, t, hk, d]` written into it, and all of it `[b, capacity, hk, d]`.
    fn remember(&mut self, layer: usize, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
        let Some(cache) = self.cache else {
            return Ok((k, v));
        };
        let (old_k, old_v) = cache.layer(layer)?;
        let (k, v) = (old_k.kv_write(&k, self.pos)?, old_v.kv_write(&v, self.pos)?);
        self.updates.push((old_k.clone(), k.clone()));
        self.updates.push((old_v.clone(), v.clone()));
        Ok((k, v))
    }

    /// SwiGLU: `x` normed and `residual`, both `[b, t, c]`, to `residual + down(silu(gate(x)) * up(x))`.
    pub(crate) fn gated_mlp(&self, at: &str, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let mlp = self.model.config.mlp;
        let both = self.project(x, at, &["gate_proj", "up_proj"], None)?;
        let axis = both.shape().rank() - 1;
        let (gate, up) = (both.slice(axis, 0, mlp)?, both.slice(axis, mlp, mlp)?);
        self.project(&gate.swiglu(&up)?, at, &["down_proj"], Some(residual))
    }
}
