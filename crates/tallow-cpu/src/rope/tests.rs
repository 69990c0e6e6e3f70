//! Tests of the rotation against f64.
//! Invariant: the angle is the f32 product; views are strided with poisoned gaps.
//! Absent on purpose: speed.

use super::*;
use crate::pool::Pool;
use crate::simd::Isa;
use crate::testing::{Rng, close};

#[test]
fn turns_there_and_back() {
    let mut rng = Rng::fresh();
    for [b, t, h, d] in [
        [1, 1, 1, 2],
        [2, 3, 5, 6],
        [1, 7, 2, 32],
        [3, 2, 3, 64],
        [1, 40, 2, 34],
    ] {
        let (head, token) = (d + 1, (d + 1) * h + 2);
        let n = b * t * token;
        let x = rng.vec(n);
        let pos: Vec<u32> = (0..b * t)
            .map(|_| (rng.next_u64() % 1_000_000) as u32)
            .collect();
        let inv_freq: Vec<f32> = (0..d / 2)
            .map(|i| 10_000f32.powf(-2.0 * i as f32 / d as f32))
            .collect();
        for isa in Isa::available() {
            for turn in [Turn::Forward, Turn::Back] {
                let mut first = None;
                for threads in 1..=3 {
                    let pool = Pool::new(threads);
                    let mut y = vec![f32::NAN; n];
                    let mut ws = vec![f32::NAN; Rope::workspace_elems(d, threads)];
                    let batch = t * token;
                    let args = Rope {
                        b,
                        t,
                        h,
                        d,
                        x: Heads {
                            ptr: x.as_ptr(),
                            batch,
                            token,
                            head,
                        },
                        pos: pos.as_ptr(),
                        inv_freq: inv_freq.as_ptr(),
                        turn,
                        y: Heads {
                            ptr: y.as_mut_ptr(),
                            batch,
                            token,
                            head,
                        },
                        workspace: ws.as_mut_ptr(),
                    };
                    // SAFETY: both views are of buffers made for them.
                    unsafe { args.run(Exec { isa, pool: &pool }) };
                    let sign = if turn == Turn::Forward { 1.0 } else { -1.0 };
                    let mut seen = vec![false; n];
                    for row in 0..b * t * h {
                        let (i, at) = (row / h, row / h * token + row % h * head);
                        for l in 0..d / 2 {
                            let angle = f64::from(pos[i] as f32 * inv_freq[l]);
                            let (s, c) = (angle.sin() * sign, angle.cos());
                            let (x0, x1) = (f64::from(x[at + l]), f64::from(x[at + d / 2 + l]));
                            close(y[at + l], &[x0 * c, -x1 * s]).unwrap();
                            close(y[at + d / 2 + l], &[x1 * c, x0 * s]).unwrap();
                            seen[at + l] = true;
                            seen[at + d / 2 + l] = true;
                        }
                    }
                    assert!((0..n).all(|i| seen[i] || y[i].is_nan()));
                    let bits: Vec<u32> = y.iter().map(|y| y.to_bits()).collect();
                    assert_eq!(*first.get_or_insert(bits.clone()), bits);
                    if turn == Turn::Forward {
                        // In place, back: the input again.
                        let back = Rope {
                            x: Heads {
                                ptr: y.as_ptr(),
                                batch,
                                token,
                                head,
                            },
                            turn: Turn::Back,
                            ..args
                        };
                        // SAFETY: as above.
                        unsafe { back.run(Exec { isa, pool: &pool }) };
                        assert!((0..n).all(|i| !seen[i] || (y[i] - x[i]).abs() < 1e-6));
                    }
                }
            }
        }
    }
}
