//! Tests of draws: that filling follows the core's definition.
//! Invariant: the core's reference draws the same numbers.
//! Absent on purpose: statistics; the generator's authors did them.

use super::*;
use crate::pool::Pool;
use crate::simd::Isa;

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
