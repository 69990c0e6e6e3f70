//! Tests of the product over pairs of bf16 against f64 sums of what was rounded.
//! Invariant: outputs are poisoned beforehand; one row alone gives the bits it gives among others.
//! Absent on purpose: processors without the instruction. There is nothing to run on them.

use super::*;
use crate::testing::{Rng, close};
use crate::tile::HEAD_PAD;

const POISON: f32 = f32::from_bits(0x7fc0_1234);
const ISA: Isa = Isa::Avx512Bf16;

fn missing() -> bool {
    let missing = !Isa::available().any(|isa| isa == ISA);
    if missing {
        println!("SKIP: this machine does not multiply bf16");
    }
    missing
}

fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter().map(|v| bf16::from_f32(*v).to_f32()).collect()
}

/// Rows of `k` elements as pairs, `row` pairs apart.
fn narrowed(x: &[f32], k: usize, row: usize) -> Vec<u32> {
    let m = x.len().checked_div(k).unwrap_or(0);
    let mut out = vec![0xdead_beef; m * row];
    for i in 0..m {
        // SAFETY: both rows are as long as is said.
        unsafe { narrow(ISA, x[i * k..].as_ptr(), k, out[i * row..].as_mut_ptr()) };
    }
    out
}

/// A panel of `k` rows of 32.
fn packed(w: &[f32], k: usize) -> Vec<Pairs> {
    let mut out = vec![Pairs(bf16::ZERO); Pairs::rows(k) * NR];
    for (at, v) in w.iter().enumerate() {
        out[Pairs::index(at / NR, at % NR)] = Pairs(bf16::from_f32(*v));
    }
    out
}

#[test]
fn x_is_rounded_to_nearest_and_padded_with_a_zero() {
    if missing() {
        return;
    }
    let mut rng = Rng::fresh();
    for n in [0, 1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 127] {
        let mut x = rng.vec(n);
        if n > 2 {
            (x[0], x[1], x[2]) = (f32::INFINITY, 1.003_906_3, -1.011_718_8);
        }
        let pairs = n.div_ceil(2);
        let out = narrowed(&[x.as_slice(), &[7.0]].concat(), n.max(1), pairs.max(1) + 1);
        let half = |i: usize| (out[i / 2] >> (16 * (i % 2))) as u16;
        for (i, v) in x.iter().enumerate() {
            assert_eq!(half(i), bf16::from_f32(*v).to_bits(), "{n} [{i}] {v}");
        }
        if n > 0 {
            assert!(n % 2 == 0 || half(n) == 0, "{n}: an odd end");
            assert_eq!(out[pairs], 0xdead_beef, "{n}: beyond");
        }
    }
}

/// `m` rows of `k` terms, `cols` columns, a tail, added to nothing, to old values, or to a matrix (`onto` 0, 1, 2); checks
/// every element.
fn check(rng: &mut Rng, (m, k, cols): (usize, usize, usize), r: usize, onto: usize) {
    let (x, w) = (rng.vec(m * k), rng.vec(k * NR));
    let (h, b) = (rng.vec(m * r), rng.vec(r * NR));
    let (pairs, x_row, y_row) = (k.div_ceil(2), k.div_ceil(2) + 3, cols + 5);
    let (xp, panel) = (narrowed(&x, k, x_row), packed(&w, k));
    let old = rng.vec(m * cols);
    let mut y = vec![POISON; m * y_row];
    if onto == 1 {
        for i in 0..m {
            y[i * y_row..][..cols].copy_from_slice(&old[i * cols..][..cols]);
        }
    }
    let mut alone = y.clone();
    let tail = |i: usize| Tail {
        k: r,
        x: h[i * r..].as_ptr(),
        x_row: r,
        x_col: 1,
        panel: b.as_ptr(),
        panel_row: NR,
    };
    let (in_place, matrix) = (
        Rows::old(y.as_mut_ptr(), y_row, true),
        Rows {
            at: old.as_ptr(),
            row: cols,
        },
    );
    let tile = PairTile {
        m,
        pairs,
        x: xp.as_ptr(),
        x_row,
        x_col: 1,
        panel: panel.as_ptr(),
        y: y.as_mut_ptr(),
        y_row,
        cols,
        onto: [Rows::<*const f32>::NONE, in_place, matrix][onto],
        ahead: panel.as_ptr(),
        ahead_lines: pairs,
    };
    // SAFETY: the buffers have the sizes that the strides ask for.
    unsafe { run_pairs(ISA, &tile, &tail(0)) };
    for i in 0..m {
        let strip = PairStrip {
            pairs,
            x: xp[i * x_row..].as_ptr(),
            panels: panel.as_ptr(),
            panel_len: panel.len(),
            tail_x: tail(i).x,
            tail_k: r,
            tail: b.as_ptr(),
            head: Head::NONE,
            wide: std::ptr::null(),
            k,
            y: alone[i * y_row..].as_mut_ptr(),
            columns: cols,
            onto: [
                std::ptr::null(),
                alone[i * y_row..].as_ptr(),
                matrix.from(i, 0).at,
            ][onto],
        };
        // SAFETY: as above.
        unsafe { run_pair_strip(ISA, &strip) };
    }
    let bits = |y: &[f32]| y.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&y), bits(&alone), "{m} {k} {cols} {r}: row by row");
    let (x, w) = (rounded(&x), rounded(&w));
    for i in 0..m {
        for j in 0..y_row {
            let got = y[i * y_row + j];
            if j >= cols {
                assert_eq!(got.to_bits(), POISON.to_bits(), "[{i},{j}] touched");
                continue;
            }
            let base = (0..k).map(|l| f64::from(x[i * k + l]) * f64::from(w[l * NR + j]));
            let more = (0..r).map(|l| f64::from(h[i * r + l]) * f64::from(b[l * NR + j]));
            let mut terms: Vec<f64> = base.chain(more).collect();
            if onto > 0 {
                terms.push(f64::from(old[i * cols + j]));
            }
            close(got, &terms).unwrap_or_else(|e| panic!("{m} {k} {cols} {r} [{i},{j}]: {e}"));
        }
    }
}

#[test]
fn every_shape_is_the_sum_of_what_was_rounded() {
    if missing() {
        return;
    }
    let mut rng = Rng::fresh();
    for m in [1, 2, 3, 5, 7, 11, 12, 13, 25, 31] {
        for k in [1, 2, 5, 33, 64, 127] {
            for cols in [1, 7, 16, 17, 31, 32] {
                let r = [0, 1, 8, 3][(m + cols) % 4];
                check(&mut rng, (m, k, cols), r, (m + k + cols) % 3);
            }
        }
    }
    check(&mut rng, (40, 4097, 32), 64, 0);
}

#[test]
fn a_strip_makes_its_head_from_x_as_it_was() {
    if missing() {
        return;
    }
    let mut rng = Rng::fresh();
    for (k, r, panels) in [
        (1, 1, 1),
        (33, 8, 5),
        (64, 16, 4),
        (127, 33, 9),
        (40, 64, 3),
    ] {
        let (x, w) = (rng.vec(k), rng.vec(panels * k * NR));
        let mut a = rng.vec(k * r + HEAD_PAD);
        a[k * r..].fill(0.0);
        // The last vector of a row reads on into the next.
        a.extend([0.0; 64]);
        let panel: Vec<Pairs> = w.chunks(k * NR).flat_map(|w| packed(w, k)).collect();
        let xp = narrowed(&x, k, k.div_ceil(2));
        let mut h = vec![POISON; r.next_multiple_of(16) + HEAD_PAD];
        let mut y = vec![POISON; panels * NR];
        let strip = PairStrip {
            pairs: k.div_ceil(2),
            x: xp.as_ptr(),
            panels: panel.as_ptr(),
            panel_len: Pairs::rows(k) * NR,
            tail_x: std::ptr::null(),
            tail_k: 0,
            tail: std::ptr::null(),
            head: Head {
                a: a.as_ptr(),
                out: h.as_mut_ptr(),
                accumulate: false,
                r,
            },
            wide: x.as_ptr(),
            k,
            y: y.as_mut_ptr(),
            columns: panels * NR - 3,
            onto: std::ptr::null(),
        };
        // SAFETY: the buffers have the sizes that the strip asks for.
        unsafe { run_pair_strip(ISA, &strip) };
        for (c, got) in h[..r].iter().enumerate() {
            let terms: Vec<f64> = (0..k)
                .map(|l| f64::from(x[l]) * f64::from(a[l * r + c]))
                .collect();
            close(*got, &terms).unwrap_or_else(|e| panic!("{k} {r} h[{c}]: {e}"));
        }
        let (x, w) = (rounded(&x), rounded(&w));
        for (j, got) in y[..panels * NR - 3].iter().enumerate() {
            let at = |l: usize| j / NR * k * NR + l * NR + j % NR;
            let terms: Vec<f64> = (0..k)
                .map(|l| f64::from(x[l]) * f64::from(w[at(l)]))
                .collect();
            close(*got, &terms).unwrap_or_else(|e| panic!("{k} {r} y[{j}]: {e}"));
        }
        assert!(
            y[panels * NR - 3..]
                .iter()
                .all(|v| v.to_bits() == POISON.to_bits())
        );
    }
}
