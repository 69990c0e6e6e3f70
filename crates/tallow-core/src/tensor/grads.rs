//! Gradients of lazy tensors as lazy tensors.
//! Invariant: the loss handed back shares its forward pass with the gradients.
use super::{Tensor, lift, lower};
use crate::{Result, grad, pass};

/// A loss with its gradients.
pub struct Grads {
    /// The loss, in the same form as the gradients use, so that both share their forward pass.
    pub loss: Tensor,
    /// One gradient for each tensor asked for.
    pub grads: Vec<Tensor>,
}

/// Gradients of the scalar `loss` in each of `wrt`, as lazy tensors. `wrt` may be any tensors the
/// loss was computed from, views of state included; what leads to none of them is not differentiated.
/// What lies between two [barriers](Tensor::barrier) is computed again rather than kept.
pub fn value_and_grad(loss: &Tensor, wrt: &[&Tensor]) -> Result<Grads> {
    let mut outs = vec![loss.clone()];
    outs.extend(wrt.iter().map(|t| (*t).clone()));
    let low = lower(&outs, &[])?;
    // Gradients follow the composites that user code is recognised as.
    let mut g = pass::canonical(&low.graph)?.0;
    let wrt = g.outputs.split_off(1);
    let g = pass::recompute(&grad::grad(&g, &wrt)?)?;
    let mut all = lift(&g, &low.leaves);
    let grads = all.split_off(1);
    Ok(Grads {
        loss: all.remove(0),
        grads,
    })
}
