//! Keys and values of the tokens so far, one pair of state leaves a layer, indexed by position.
//! Invariant: the capacity is one of few sizes, so that few plans serve all lengths; a slot past the last
//! position written is never seen, so nothing has to be cleared between two texts.
//! Absent on purpose: several sequences, paging, eviction behind a sliding window.

use tallow_core::op::Role;
use tallow_core::tensor::Tensor;
use tallow_core::types::TensorType;

use crate::error::{Error, Result};
use crate::model::Model;

/// The smallest cache, in tokens.
const SMALLEST: usize = 256;
/// Each size is this many times the one before.
const GROWTH: usize = 8;

/// Memory of one sequence: for each layer keys and values `[1, capacity, kv_heads, head_dim]` f32.
#[derive(Clone, Debug)]
pub struct Cache {
    capacity: usize,
    layers: Vec<(Tensor, Tensor)>,
}

impl Cache {
    /// A cache for at least `tokens` positions. Memory that is never written costs nothing where the
    /// operating system hands out pages on first use.
    ///
    /// # Errors
    /// More positions than the model allows; no memory.
    pub fn new(model: &Model, tokens: usize) -> Result<Self> {
        let c = &model.config;
        let capacity = Self::capacity_for(tokens, c.max_positions)?;
        let ty = TensorType::f32([1, capacity, c.kv_heads, c.head_dim]);
        let leaf = || model.session.zeros(ty.clone(), Role::State);
        let layers = (0..c.layers).map(|_| Ok((leaf()?, leaf()?)));
        Ok(Self {
            capacity,
            layers: layers.collect::<Result<_>>()?,
        })
    }

    /// The size of cache that `tokens` positions get: 256, 2048, 16384, ..., at most `max_positions`.
    pub fn capacity_for(tokens: usize, max_positions: usize) -> Result<usize> {
        if tokens > max_positions {
            return Err(Error::TooLong {
                tokens,
                limit: max_positions,
            });
        }
        let mut size = SMALLEST;
        while size < tokens {
            size = size.saturating_mul(GROWTH);
        }
        Ok(size.min(max_positions))
    }

    /// Positions it holds.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Keys and values of a layer.
    pub(crate) fn layer(&self, index: usize) -> Result<(&Tensor, &Tensor)> {
        let pair = self.layers.get(index).ok_or(Error::Setting {
            name: "cache",
            want: "one made for this model",
            got: format!("one of {} layers", self.layers.len()),
        })?;
        Ok((&pair.0, &pair.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_lengths_share_few_sizes() {
        let size = |tokens| Cache::capacity_for(tokens, 10_000).unwrap();
        assert_eq!([1, 256, 257, 2048].map(size), [256, 256, 2048, 2048]);
        assert_eq!([2049, 10_000].map(size), [10_000, 10_000]);
        assert_eq!(Cache::capacity_for(3, 8).unwrap(), 8);
        assert!(Cache::capacity_for(9, 8).is_err());
    }
}
