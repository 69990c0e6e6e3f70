//! Training steps and greedy decode, engine beside engine, round by round in one process.
//! `cargo bench --manifest-path peers/Cargo.toml --bench engines -- [--rounds N] [--steps N]`

use tallow_peers::candle::{Attention, Candle};
use tallow_peers::weights::{AdapterShape, Batch, ModelShape, Weights};
use tallow_peers::{Contender, Result, Settings, rounds, versions};

fn main() -> Result<()> {
    let settings = Settings {
        rounds: argument("--rounds")?.unwrap_or(9),
        steps: argument("--steps")?.unwrap_or(4),
        batch: (4, 128),
        decode: (32, 64),
        decodes: 8,
    };
    let shape = ModelShape::SMALL;
    let weights = Weights::random(shape, AdapterShape::QV8, 1);
    println!("{}", versions::line());
    println!("{shape:?}, {:?}", weights.adapter);
    println!("{settings:?}, decode counts generated tokens over prompt and generation time");
    let mut contenders: Vec<Box<dyn Contender>> = Vec::new();
    for attention in Attention::ALL {
        let mut candle = Candle::new(&weights, attention)?;
        let norms = candle
            .trainer()
            .gradient_norms(&Batch::random(&shape, 1, 16, 2))?;
        let alive = norms.iter().filter(|n| **n > 0.0).count();
        println!(
            "{}: {alive} of {} adapter gradients are non-zero",
            candle.name(),
            norms.len()
        );
        contenders.push(Box::new(candle));
    }
    rounds::print(&rounds::run(&shape, &mut contenders, &settings)?);
    Ok(())
}

/// Value of `--name N` on the command line.
fn argument(name: &str) -> Result<Option<usize>> {
    let mut args = std::env::args().skip_while(|a| a != name).skip(1);
    Ok(args.next().map(|v| v.parse()).transpose()?)
}
