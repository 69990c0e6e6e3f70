//! Qwen2 and Qwen2.5, dense (Yang et al. 2024, arXiv:2407.10671).
//! Against Llama: biases on q, k and v, and some layers may see only a window of the past
//! (`layer_types`, or those from `max_window_layers` on). Absent on purpose: the mixture-of-experts models.

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
