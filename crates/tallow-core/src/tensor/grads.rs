//! Gradients of lazy tensors as lazy tensors.
//! Invariant: the loss handed back shares its forward pass with the gradients.
use super::{Tensor, lift, lower};
use crate::{Error, Result, grad, pass};

/// A loss (or several in one tensor) with its gradients.
pub struct Grads {
    /// The loss, in the same form as the gradients use, so that both share their forward pass.
    pub loss: Tensor,
    /// One gradient for each tensor asked for.
    pub grads: Vec<Tensor>,
}

/// Gradients of the scalar `loss` in each of `wrt`, as lazy tensors. `wrt` may be any tensors the
/// loss was computed from, views of state included; what leads to none of them is not differentiated.
/// What lies between two [barriers](Tensor::barrier) is computed again rather than kept.
///
/// # Errors
/// A loss that is not one float; an op without a gradient.
pub fn value_and_grad(loss: &Tensor, wrt: &[&Tensor]) -> Result<Grads> {
    if loss.shape().numel() != 1 {
        return Err(Error::NoGradient {
            op: "loss".into(),
            why: format!("the loss must be one float, not {}", loss.ty()),
        });
    }
    values_and_grads(loss, wrt)
}

/// As [`value_and_grad`] for several losses in one tensor: gradients of their sum. Where each of `wrt` leads to one
/// loss only, these are the gradients of that one.
///
/// # Errors
/// As [`value_and_grad`].
pub fn values_and_grads(losses: &Tensor, wrt: &[&Tensor]) -> Result<Grads> {
    let mut outs = vec![losses.clone()];
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_loss_is_one_number() {
        let x = Tensor::scalar(2.0).broadcast([3]).unwrap();
        let losses = x.mul(&x).unwrap();
        let error = value_and_grad(&losses, &[&x]).err().unwrap().to_string();
        assert!(error.contains("the loss must be one float"), "{error}");
        assert_eq!(values_and_grads(&losses, &[&x]).unwrap().grads.len(), 1);
    }
}
