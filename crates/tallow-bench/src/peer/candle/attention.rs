//! Attention by each of the four ways that candle 0.11 offers on a CPU.
//! Invariant: causal; query heads that share a key head are stacked, so keys are never repeated.

use candle_core::{D, Device, Storage, Tensor};
use candle_nn::attention::cpu_flash::causal::causal_decode_f32_interleaved;
use candle_nn::attention::{AttnMask, flash_attn};

/// How attention is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Two products and the softmax in parts, which alone has a backward.
    Differentiable,
    /// Two products and the fused softmax, as candle-transformers' Llama does.
    Fused,
    /// `candle_nn::attention::flash_attn`, as candle-transformers' Qwen3 does.
    Flash,
    /// The decode kernel over interleaved keys and values, as candle-transformers' quantised Qwen3 does.
    Interleaved,
}

impl Kind {
    /// As in a report.
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Differentiable => "",
            Kind::Fused => "fused softmax",
            Kind::Flash => "flash",
            Kind::Interleaved => "interleaved flash",
        }
    }
}

/// `q [b, h, t, d]`, `k` and `v [b, hk, s, d]`, `mask [t, s]` where there is more than one query -> `[b, t, h, d]`.
pub(super) fn by_products(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    mask: Option<&Tensor>,
    kind: Kind,
) -> candle_core::Result<Tensor> {
    let (b, h, t, d) = q.dims4()?;
    let (_, hk, s, _) = k.dims4()?;
    let q = (q * (1.0 / (d as f64).sqrt()))?;
    let q = q.reshape((b, hk, h / hk * t, d))?;
    let mut scores = q.matmul(&k.t()?)?.reshape((b, h, t, s))?;
    if let Some(mask) = mask {
        scores = scores.broadcast_add(mask)?;
    }
    let weights = match kind {
        Kind::Differentiable => candle_nn::ops::softmax(&scores, D::Minus1)?,
        _ => candle_nn::ops::softmax_last_dim(&scores)?,
    };
    let weights = weights.reshape((b, hk, h / hk * t, s))?;
    let mixed = weights.matmul(&v.contiguous()?)?;
    mixed.reshape((b, h, t, d))?.transpose(1, 2)
}

/// `q [b, t, h, d]`, `k` and `v [b, offset + t, hk, d]` -> `[b, t, h, d]`.
pub(super) fn flash(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    offset: usize,
) -> candle_core::Result<Tensor> {
    let scale = 1.0 / (q.dim(3)? as f32).sqrt();
    let mask = AttnMask::causal_with_offset(offset);
    flash_attn::<f32>(q, k, v, scale, mask, None, None)?.transpose(1, 2)
}

/// One token, `q [1, 1, h, d]`, over `past [s, hk, 2, d]` -> `[h, 1, d]`.
pub(super) fn interleaved(
    q: &Tensor,
    past: &[f32],
    [s, hk]: [usize; 2],
) -> candle_core::Result<Tensor> {
    let (_, _, h, d) = q.dims4()?;
    let scale = 1.0 / (d as f32).sqrt();
    with_f32(q, |q| {
        causal_decode_f32_interleaved(q, past, h, hk, d, s, scale)
    })
}

/// Runs `body` on the elements of a contiguous f32 tensor without copying them.
pub(super) fn with_f32<T>(
    x: &Tensor,
    body: impl FnOnce(&[f32]) -> candle_core::Result<T>,
) -> candle_core::Result<T> {
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(cpu), Some((start, end))) => body(&cpu.as_slice::<f32>()?[start..end]),
        _ => candle_core::bail!("interleaved decode: want a contiguous f32 tensor on the CPU"),
    }
}

/// `[t, offset + t]`: minus infinity where a key comes after its query. None where every key may be seen.
pub(super) fn causal_mask(t: usize, offset: usize) -> candle_core::Result<Option<Tensor>> {
    if t == 1 {
        return Ok(None);
    }
    let width = offset + t;
    let masked = |i: usize| match i % width > i / width + offset {
        true => f32::NEG_INFINITY,
        false => 0.0,
    };
    let data: Vec<f32> = (0..t * width).map(masked).collect();
    Tensor::from_vec(data, (t, width), &Device::Cpu).map(Some)
}
