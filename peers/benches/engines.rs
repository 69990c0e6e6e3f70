//! Training steps and greedy decode, engine beside engine, round by round in one process.
//! `cargo bench --manifest-path peers/Cargo.toml --bench engines -- [--rounds N] [--steps N]`

use std::hint::black_box;
use std::time::Instant;

use tallow_peers::candle::{Attention, Candle, CandleDecoder};
use tallow_peers::tallow::Tallow;
use tallow_peers::weights::{AdapterShape, Batch, ModelShape, Weights};
use tallow_peers::{Contender, Result, Settings, Summary, rounds, threads, versions};

fn main() -> Result<()> {
    if threads::run_again_with_all()? {
        return Ok(());
    }
    let settings = Settings {
        rounds: argument("--rounds")?.unwrap_or(15),
        steps: argument("--steps")?.unwrap_or(4),
        batch: (4, 128),
        decode: (32, 64),
        decodes: 8,
    };
    let shape = ModelShape::SMALL;
    let weights = Weights::random(shape, AdapterShape::QV8, 1);
    println!("{}, peers use {}", versions::line(), threads::given());
    println!("{shape:?}, {:?}", weights.adapter);
    println!("{settings:?}, decode counts generated tokens over prompt and generation time");
    let (attention, paths) = fastest_decode(&weights, &shape, &settings)?;
    println!("candle's decode paths, tokens/s: {paths}");
    let mut candle = Candle::new(&weights, attention)?;
    let norms = candle
        .trainer()
        .gradient_norms(&Batch::random(&shape, 1, 16, 2))?;
    let alive = norms.iter().filter(|n| **n > 0.0).count();
    println!(
        "candle: {alive} of {} adapter gradients are non-zero",
        norms.len()
    );
    // The last one is what the others are compared with.
    let mut contenders: Vec<Box<dyn Contender>> =
        vec![Box::new(Tallow::new(&weights)?), Box::new(candle)];
    let all = rounds::run(&shape, &mut contenders, &settings)?;
    rounds::print(&all);
    rounds::check(&all)
}

/// The attention path that decodes fastest here, and the medians of all.
fn fastest_decode(
    weights: &Weights,
    shape: &ModelShape,
    settings: &Settings,
) -> Result<(Attention, String)> {
    let prompt = Batch::random(shape, 1, settings.decode.0, 77).ids;
    let decoders = Attention::ALL
        .map(|attention| CandleDecoder::new(weights, attention))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let mut rates = vec![Vec::new(); decoders.len()];
    for round in 0..6 {
        for (decoder, rates) in decoders.iter().zip(&mut rates) {
            let start = Instant::now();
            black_box(decoder.generate(&prompt, settings.decode.1)?);
            if round > 0 {
                rates.push(settings.decode.1 as f64 / start.elapsed().as_secs_f64());
            }
        }
    }
    let medians: Vec<f64> = rates
        .iter()
        .filter_map(|r| Summary::of(r).map(|s| s.median))
        .collect();
    let (best, _) = Attention::ALL
        .into_iter()
        .zip(&medians)
        .max_by(|a, b| a.1.total_cmp(b.1))
        .ok_or("no decode path was measured")?;
    let line: Vec<String> = Attention::ALL
        .iter()
        .zip(&medians)
        .map(|(attention, rate)| format!("{} {rate:.0}", attention.label()))
        .collect();
    Ok((best, line.join(", ")))
}

/// Value of `--name N` on the command line.
fn argument(name: &str) -> Result<Option<usize>> {
    let mut args = std::env::args().skip_while(|a| a != name).skip(1);
    Ok(args.next().map(|v| v.parse()).transpose()?)
}
