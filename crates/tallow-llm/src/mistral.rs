//! Mistral (Jiang et al. 2023, arXiv:2310.06825).
//! Against Llama: every layer sees only a window of the past, where `sliding_window` says so.
//! Absent on purpose: Mixtral, the mixture of experts.

use tallow_core::tensor::Tensor;

use crate::error::Result;
use crate::layers::{AttentionLayer, Forward};

/// Decoder layer `index`: `x [b, t, c] -> [b, t, c]`.
pub(crate) fn layer(f: &mut Forward, index: usize, x: &Tensor) -> Result<Tensor> {
    let at = format!("model.layers.{index}");
    let attention = AttentionLayer {
        at: &format!("{at}.self_attn"),
        index,
        window: f.window(index),
    };
    let h = f.rms_norm(x, &format!("{at}.input_layernorm"))?;
    let x = f.attention(&attention, &h, x)?;
    let h = f.rms_norm(&x, &format!("{at}.post_attention_layernorm"))?;
    f.gated_mlp(&format!("{at}.mlp"), &h, &x)
}
