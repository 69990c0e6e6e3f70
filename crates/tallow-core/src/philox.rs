//! Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): random
//! numbers as a pure function of a key and a counter.
//! Invariant: every device draws exactly these numbers; the tests are Random123's known answers.
//! Absent on purpose: state and other distributions.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Four random words for `counter` under `key`.
#[inline]
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [0, 1].map(|i| key[i].wrapping_add(WEYL[i]));
        }
        let wide = |i: usize| u64::from(MULTIPLIERS[i]) * u64::from(counter[2 * i]);
        let (p, q) = (wide(0), wide(1));
        counter = [
            (q >> 32) as u32 ^ counter[1] ^ key[0],
            q as u32,
            (p >> 32) as u32 ^ counter[3] ^ key[1],
            p as u32,
        ];
    }
    counter
}

/// A random word as a number in `[0, 1)` that f32 holds exactly.
#[inline]
pub fn unit(word: u32) -> f32 {
    (word >> 8) as f32 / (1 << 24) as f32
}

/// Element `index` of the draw `id` under `seed`: lane `index % 4` of counter `[index / 4, 0, id, 0]`.
#[inline]
pub fn uniform(seed: [u32; 2], id: u32, index: usize) -> f32 {
    let block = (index / 4) as u64;
    let words = philox4x32([block as u32, (block >> 32) as u32, id, 0], seed);
    unit(words[index % 4])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_known_answers_of_random123() {
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
            assert_eq!(philox4x32(counter, key), want);
        }
    }

    #[test]
    fn numbers_are_uniform_and_differ_by_id() {
        let draw = |id| (0..4096).map(move |i| f64::from(uniform([1, 2], id, i)));
        let mean = draw(7).sum::<f64>() / 4096.0;
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
        assert!(draw(7).all(|x| (0.0..1.0).contains(&x)));
        assert!(draw(7).zip(draw(8)).all(|(a, b)| a != b));
    }
}
