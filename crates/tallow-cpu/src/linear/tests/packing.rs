//! The layouts of packed weights.
//! Invariant: every element is looked up by hand; padding must be zero though poisoned before.
//! Absent on purpose: products (see the other files).

use half::{bf16, f16};

use super::*;
use crate::tile::NR;

#[test]
fn every_weight_lands_in_its_place() {
    let mut rng = Rng::fresh();
    for pool in pools() {
        for (n, k) in [(1, 1), (31, 7), (32, 33), (65, 64), (0, 5), (5, 0)] {
            let w = rng.vec(n * k);
            let mut nk = vec![POISON; packed_len(n, k)];
            let mut kn = vec![POISON; packed_len(k, n)];
            pack_nk(&pool, &w, (n, k), &mut nk);
            pack_kn(&pool, &w, (n, k), &mut kn);
            for (at, &v) in nk.iter().enumerate() {
                let (p, l, j) = (at / (k * NR), at / NR % k, at % NR);
                let i = p * NR + j;
                assert_eq!(v, if i < n { w[i * k + l] } else { 0.0 }, "nk {n} {k} {at}");
            }
            for (at, &v) in kn.iter().enumerate() {
                let (p, i, j) = (at / (n * NR), at / NR % n, at % NR);
                let l = p * NR + j;
                assert_eq!(v, if l < k { w[i * k + l] } else { 0.0 }, "kn {n} {k} {at}");
            }
        }
    }
}

#[test]
fn narrow_weights_are_widened_exactly_and_rounded_to_nearest() {
    let (mut rng, pool) = (Rng::fresh(), Pool::new(1));
    let (n, k) = (33, 5);
    let w = rng.vec(n * k);
    let half: Vec<f16> = w.iter().map(|&v| f16::from_f32(v)).collect();
    let brain: Vec<bf16> = w.iter().map(|&v| bf16::from_f32(v)).collect();
    let mut from_half = vec![POISON; packed_len(n, k)];
    let mut from_brain = vec![bf16::NAN; packed_len(n, k)];
    let mut from_wide = vec![bf16::NAN; packed_len(n, k)];
    pack_nk(&pool, &half, (n, k), &mut from_half);
    pack_nk(&pool, &brain, (n, k), &mut from_brain);
    pack_nk(&pool, &w, (n, k), &mut from_wide);
    assert_eq!(from_half[1], half[k].to_f32());
    // Column 1 lies third in a row, and row 1 begins after 32 columns.
    assert_eq!(from_brain[32 + 2], brain[k + 1]);
    assert_eq!(from_brain[32 + 1], brain[16 * k + 1]);
    assert_eq!(from_brain, from_wide);
}

#[test]
fn a_tail_is_turned_and_scaled() {
    let mut rng = Rng::fresh();
    for (n, r) in [(1, 1), (40, 3), (64, 8), (33, 0)] {
        let b = rng.vec(n * r);
        let mut out = vec![POISON; packed_len(n, r)];
        pack_tail(&b, (n, r), 2.5, &mut out);
        for (at, &v) in out.iter().enumerate() {
            let j = at / (r * NR) * NR + at % NR;
            let want = if j < n {
                2.5 * b[j * r + at / NR % r]
            } else {
                0.0
            };
            assert_eq!(v, want, "{n} {r} {at}");
        }
    }
}
