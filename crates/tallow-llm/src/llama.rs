//! Llama (Touvron et al. 2023, arXiv:2302.13971; Llama 3, arXiv:2407.21783).
//! Norm, attention, norm, gated MLP; every token sees all before it. Biases where the checkpoint has them
//! (`attention_bias`, `mlp_bias`). Absent on purpose: sizes, which are the configuration's.

use tallow_core::tensor::Tensor;

use crate::error::Result;
use crate::layers::{AttentionLayer, Forward};

/// Decoder layer `index`: `x [b, t, c] -> [b, t, c]`.
pub(crate) fn layer(f: &mut Forward, index: usize, x: &Tensor) -> Result<Tensor> {
    let at = format!("model.layers.{index}");
    let attention = AttentionLayer {
        at: &format!("{at}.self_attn"),
        index,
        window: None,
    };
    let h = f.rms_norm(x, &format!("{at}.input_layernorm"))?;
    let x = f.attention(&attention, &h, x)?;
    let h = f.rms_norm(&x, &format!("{at}.post_attention_layernorm"))?;
    f.gated_mlp(&format!("{at}.mlp"), &h, &x)
}
