//! Tests of Philox: the known answers of Random123, and that filling follows the definition.
//! Invariant: the core's reference draws the same numbers.
//! Absent on purpose: statistics; the generator's authors did them.

use super::*;
use crate::pool::Pool;
use crate::simd::Isa;

#[test]
fn known_answers_of_random123() {
    let known = [
        (
            [0; 4],
            [0; 2],
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
        ),
        (
            [u32::MAX; 4],
            [u32::MAX; 2],
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
        ),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ];
    for (counter, key, want) in known {
        assert_eq!(philox(counter, key), want);
    }
}

#[test]
fn fills_with_what_the_core_draws() {
    let seed = [0x1234_5678, 0x9abc_def0];
    for n in [1, 2, 3, 5, 31, 64, 127, 20_000] {
        for isa in Isa::available() {
            for threads in 1..=3 {
                let pool = Pool::new(threads);
                let mut y = vec![f32::NAN; n];
                let args = Uniform {
                    n,
                    id: 7,
                    seed: &seed,
                    y: y.as_mut_ptr(),
                };
                // SAFETY: `y` holds `n` elements.
                unsafe { args.run(Exec { isa, pool: &pool }) };
                for (i, y) in y.iter().enumerate() {
                    assert_eq!(*y, tallow_core::philox::uniform(seed, 7, i), "{i}");
                }
            }
        }
    }
}
