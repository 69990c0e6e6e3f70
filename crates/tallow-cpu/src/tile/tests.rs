//! Tests of the tile product against f64 sums, on every instruction set of this machine.
//! Invariant: outputs are poisoned beforehand and nothing outside `m` x `cols` may change.
//! Absent on purpose: speed (see `benches/linear.rs`).

use half::bf16;

use super::*;
use crate::testing::{Rng, close};

const POISON: f32 = f32::from_bits(0x7fc0_1234);

#[derive(Clone, Copy, Debug)]
struct Case {
    m: usize,
    k: usize,
    cols: usize,
    tail: usize,
    packed_x: bool,
    padded: bool,
    onto: Onto,
}

/// What the sums are added to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Onto {
    Nothing,
    Itself,
    Matrix,
    OneRow,
}

impl Onto {
    const ALL: [Onto; 4] = [Onto::Nothing, Onto::Itself, Onto::Matrix, Onto::OneRow];
}

/// Runs a case and returns the `m` x `cols` outputs. The panels end exactly where they may be read.
fn check(isa: Isa, case: Case, rng: &mut Rng) -> Vec<f32> {
    let Case {
        m,
        k,
        cols,
        tail,
        packed_x,
        padded,
        onto,
    } = case;
    let width = if padded { NR } else { cols };
    let ld = if padded { NR } else { cols + 3 };
    let panel_len = |k: usize| if k == 0 { 0 } else { (k - 1) * ld + width };
    let (x, p) = (rng.vec(m * k), rng.vec(panel_len(k)));
    let (h, q) = (rng.vec(m * tail), rng.vec(panel_len(tail)));
    let (x_row, x_col) = if packed_x { (1, m) } else { (k, 1) };
    let (h_row, h_col) = if packed_x { (1, m) } else { (tail, 1) };
    let y_row = cols + 5;
    let mut y = vec![POISON; m * y_row];
    let old = rng.vec(m * cols);
    if onto == Onto::Itself {
        for i in 0..m {
            y[i * y_row..][..cols].copy_from_slice(&old[i * cols..][..cols]);
        }
    }
    let tile = Tile {
        m,
        k,
        x: x.as_ptr(),
        x_row,
        x_col,
        panel: p.as_ptr(),
        panel_row: ld,
        padded,
        y: y.as_mut_ptr(),
        y_row,
        cols,
        onto: match onto {
            Onto::Nothing => Rows::<*const f32>::NONE,
            Onto::Itself => Rows::old(y.as_mut_ptr(), y_row, true),
            Onto::Matrix => Rows {
                at: old.as_ptr(),
                row: cols,
            },
            Onto::OneRow => Rows {
                at: old.as_ptr(),
                row: 0,
            },
        },
        next: Next::NONE,
    };
    let more = Tail {
        k: tail,
        x: h.as_ptr(),
        x_row: h_row,
        x_col: h_col,
        panel: q.as_ptr(),
        panel_row: ld,
    };
    // SAFETY: the buffers above have the sizes that the strides ask for.
    unsafe { run_with_tail(isa, &tile, &more) };
    let mut out = Vec::new();
    for i in 0..m {
        for j in 0..cols {
            let mut terms: Vec<f64> = (0..k)
                .map(|l| f64::from(x[i * x_row + l * x_col]) * f64::from(p[l * ld + j]))
                .collect();
            terms.extend(
                (0..tail).map(|l| f64::from(h[i * h_row + l * h_col]) * f64::from(q[l * ld + j])),
            );
            match onto {
                Onto::Nothing => {}
                Onto::OneRow => terms.push(f64::from(old[j])),
                _ => terms.push(f64::from(old[i * cols + j])),
            }
            let got = y[i * y_row + j];
            close(got, &terms).unwrap_or_else(|e| panic!("{} {case:?} [{i},{j}]: {e}", isa.name()));
            out.push(got);
        }
        for j in cols..y_row {
            assert_eq!(
                y[i * y_row + j].to_bits(),
                POISON.to_bits(),
                "{case:?} [{i},{j}] touched"
            );
        }
    }
    out
}

#[test]
fn every_shape_on_every_isa() {
    let mut rng = Rng::fresh();
    for isa in Isa::available() {
        for m in [1, 2, 3, 5, 7, 11, 12, 13, 25, 31] {
            for k in [0, 1, 2, 5, 33, 127] {
                for cols in [1, 2, 7, 8, 15, 16, 17, 31, 32] {
                    let bit = |n: usize| ((m + k + cols) / n).is_multiple_of(2);
                    let tail = [0, 1, 8, 3][(m + cols) % 4];
                    for packed_x in [false, true] {
                        let (padded, onto) = (bit(1), Onto::ALL[(m + k + cols / 2) % 4]);
                        check(
                            isa,
                            Case {
                                m,
                                k,
                                cols,
                                tail,
                                packed_x,
                                padded,
                                onto,
                            },
                            &mut rng,
                        );
                    }
                }
            }
        }
        let big = Case {
            m: 40,
            k: 4096,
            cols: 32,
            tail: 64,
            packed_x: true,
            padded: true,
            onto: Onto::Nothing,
        };
        check(isa, big, &mut rng);
    }
}

#[test]
fn bits_do_not_depend_on_rows_strides_or_padding() {
    let seed = Rng::fresh().seed();
    for isa in Isa::available() {
        let (m, k, cols) = (29, 77, 32);
        let rows = |packed: bool, split: usize| {
            let mut rng = Rng::new(seed);
            let (x, p) = (rng.vec(m * k), rng.vec(k * NR));
            let xt: Vec<f32> = (0..k * m).map(|i| x[i % m * k + i / m]).collect();
            let mut y = vec![POISON; m * cols];
            for row in (0..m).step_by(split) {
                let tile = Tile {
                    m: split.min(m - row),
                    k,
                    x: if packed {
                        &raw const xt[row]
                    } else {
                        &raw const x[row * k]
                    },
                    x_row: if packed { 1 } else { k },
                    x_col: if packed { m } else { 1 },
                    panel: p.as_ptr(),
                    panel_row: NR,
                    padded: packed,
                    y: &raw mut y[row * cols],
                    y_row: cols,
                    cols,
                    onto: Rows::<*const f32>::NONE,
                    next: Next::NONE,
                };
                // SAFETY: rows from `row` on are inside the buffers.
                unsafe { run(isa, &tile) };
            }
            y.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        let want = rows(true, m);
        for split in [1, 2, 5, 12, 29] {
            assert_eq!(rows(true, split), want, "{} packed by {split}", isa.name());
            assert_eq!(
                rows(false, split),
                want,
                "{} strided by {split}",
                isa.name()
            );
        }
    }
}

#[test]
fn bf16_panels_are_widened_exactly() {
    let mut rng = Rng::fresh();
    for isa in Isa::available() {
        for (m, k, cols) in [(1, 64, 32), (13, 31, 9), (7, 33, 19), (40, 5, 1)] {
            let (x, wide) = (rng.vec(m * k), rng.vec(k * NR));
            let wide: Vec<f32> = wide.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
            let mut narrow = vec![bf16::NAN; k * NR];
            for (at, v) in wide.iter().enumerate() {
                narrow[at / NR * NR + bf16::place(at % NR)] = bf16::from_f32(*v);
            }
            let from = (m, k, x.as_slice());
            let got = padded_product(isa, from, narrow.as_slice(), cols);
            let want = padded_product(isa, from, wide.as_slice(), cols);
            assert!(got.iter().all(|v| !v.is_nan()), "{}", isa.name());
            assert_eq!(got, want, "{} {m} {k} {cols}", isa.name());
        }
    }
}

/// Dense `x` times a padded panel.
fn padded_product<E: Element>(
    isa: Isa,
    (m, k, x): (usize, usize, &[f32]),
    panel: &[E],
    cols: usize,
) -> Vec<f32> {
    let mut y = vec![POISON; m * cols];
    let tile = Tile {
        m,
        k,
        x: x.as_ptr(),
        x_row: k,
        x_col: 1,
        panel: panel.as_ptr(),
        panel_row: NR,
        padded: true,
        y: y.as_mut_ptr(),
        y_row: cols,
        cols,
        onto: Rows::<*const f32>::NONE,
        next: Next::NONE,
    };
    // SAFETY: `x` is `[m, k]`, the panel `[k, 32]`, `y` `[m, cols]`.
    unsafe { run(isa, &tile) };
    y
}
