//! A short run without a fuzzer: every reader over its seeds, cut and changed at random.
//! Absent on purpose: coverage. `fuzz/` finds more in the same time; this runs everywhere.
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};
use tallow_fuzz::TARGETS;

const RUNS: usize = 4000;
/// Bytes that mean something to one format or another.
const TELLING: &[u8] = b"\0\x01\x7f\x80\xff\"{}[]:,\\-019eE.\n";

fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    (rng.next_u64() % n.max(1) as u64) as usize
}

/// A seed with a few changes.
fn mutated(rng: &mut ChaCha8Rng, seed: &[u8]) -> Vec<u8> {
    let mut data = seed.to_vec();
    for _ in 0..=below(rng, 4) {
        let at = below(rng, data.len());
        match below(rng, 6) {
            0 => data.truncate(at),
            1 if !data.is_empty() => data[at] = TELLING[below(rng, TELLING.len())],
            2 if !data.is_empty() => data[at] ^= 1 << below(rng, 8),
            3 => data.insert(at, TELLING[below(rng, TELLING.len())]),
            4 => {
                let to = (at + below(rng, 40)).min(data.len());
                data.drain(at..to);
            }
            _ => {
                let to = (at + below(rng, 40)).min(data.len());
                let piece = data[at..to].to_vec();
                data.splice(at..at, piece.repeat(1 + below(rng, 50)));
            }
        }
    }
    data
}

#[test]
fn no_reader_panics() {
    let seed = std::env::var("TALLOW_TEST_SEED")
        .ok()
        .and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| std::process::id().into());
    println!("TALLOW_TEST_SEED={seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for target in TARGETS {
        for start in target.seeds {
            (target.run)(start);
            for _ in 0..RUNS {
                let data = mutated(&mut rng, start);
                let outcome = std::panic::catch_unwind(|| (target.run)(&data));
                assert!(outcome.is_ok(), "{}: {}", target.name, data.escape_ascii());
            }
        }
    }
}
