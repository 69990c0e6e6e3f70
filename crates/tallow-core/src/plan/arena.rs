//! Offsets for values with known lifetimes: the largest first, each at the lowest free offset.
//! Greedy by size as in Pisarchyk & Lee 2020 (arXiv:2001.03288), within a few per cent of the bound.
use crate::backend::ArenaRules;

/// A value that needs memory from step `first` to step `last`, both included.
#[derive(Clone, Copy, Debug)]
pub(super) struct Life {
    pub(super) bytes: usize,
    pub(super) first: usize,
    pub(super) last: usize,
}

/// Offset of each life, and the size of the arena, in bytes.
pub(super) fn pack(lives: &[Life], rules: ArenaRules) -> (Vec<usize>, usize) {
    let round = |b: usize| b.max(1).div_ceil(rules.align) * rules.align;
    let mut order: Vec<usize> = (0..lives.len()).collect();
    order.sort_by_key(|i| (std::cmp::Reverse(lives[*i].bytes), lives[*i].first));
    let mut offsets = vec![0; lives.len()];
    // Placed so far, sorted by offset.
    let mut placed: Vec<usize> = Vec::with_capacity(lives.len());
    let mut high = 0;
    for i in order {
        let (life, need) = (lives[i], round(lives[i].bytes));
        let mut at = 0;
        for &j in &placed {
            let other = lives[j];
            if other.last < life.first || life.last < other.first {
                continue;
            }
            if offsets[j] >= at + need {
                break;
            }
            at = at.max(offsets[j] + round(other.bytes));
        }
        offsets[i] = at;
        high = high.max(at + need);
        let slot = placed.partition_point(|j| offsets[*j] <= at);
        placed.insert(slot, i);
    }
    (offsets, high)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn living_values_never_overlap(raw in prop::collection::vec((1usize..2000, 0usize..40, 0usize..10), 1..60)) {
            let lives: Vec<Life> = raw.iter().map(|(b, f, n)| Life { bytes: *b, first: *f, last: f + n }).collect();
            let (offsets, high) = pack(&lives, ArenaRules { align: 64 });
            for (i, a) in lives.iter().enumerate() {
                prop_assert!(offsets[i] % 64 == 0 && offsets[i] + a.bytes <= high);
                for (j, b) in lives.iter().enumerate().skip(i + 1) {
                    let together = a.first <= b.last && b.first <= a.last;
                    let apart = offsets[i] + a.bytes <= offsets[j] || offsets[j] + b.bytes <= offsets[i];
                    prop_assert!(!together || apart);
                }
            }
        }
    }
}
