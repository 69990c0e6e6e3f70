//! LoRA forward shapes through candle, gemm and faer, interleaved; microseconds, medians with p10-p90.
//! `cargo bench --manifest-path peers/Cargo.toml --bench products`

use std::hint::black_box;
use std::time::Instant;

use tallow_peers::products::{CandleLora, LoraData, LoraShape, faer_forward, gemm_forward};
use tallow_peers::{Result, Summary, versions};

const ROUNDS: usize = 15;

fn main() -> Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{}", versions::line());
    for (m, k) in [(1, 1024), (1, 2048), (128, 512), (128, 2048)] {
        let shape = LoraShape { m, k, n: k, r: 8 };
        for with_adapter in [false, true] {
            compare(shape, with_adapter, threads)?;
        }
    }
    println!("seed product 128x512 @ 512x8, one thread");
    let mut d = LoraData::random(
        LoraShape {
            m: 128,
            k: 512,
            n: 8,
            r: 1,
        },
        9,
    );
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        times[0].push(repeat(200, || gemm_forward(black_box(&mut d), false, 1)));
        times[1].push(repeat(200, || faer_forward(black_box(&mut d), false, 1)));
    }
    print("gemm", &times[0]);
    print("faer", &times[1]);
    Ok(())
}

fn compare(shape: LoraShape, with_adapter: bool, threads: usize) -> Result<()> {
    let what = if with_adapter {
        "LoRA forward"
    } else {
        "bare product"
    };
    println!(
        "{what} {}x{} @ {}x{}, {threads} threads",
        shape.m, shape.k, shape.k, shape.n
    );
    let mut d = LoraData::random(shape, 7);
    let candle = CandleLora::new(&d)?;
    let repeats = (20_000_000 / (shape.m * shape.k * shape.n)).clamp(3, 100);
    let mut times = [Vec::new(), Vec::new(), Vec::new()];
    let mut worst = [0.0f64; 3];
    for _ in 0..ROUNDS {
        times[0].push(repeat(repeats, || {
            black_box(candle.forward(with_adapter)).expect("same shapes every time");
        }));
        times[1].push(repeat(repeats, || {
            gemm_forward(black_box(&mut d), with_adapter, threads)
        }));
        worst[1] = d.worst_error(with_adapter);
        d.y.fill(f32::NAN);
        times[2].push(repeat(repeats, || {
            faer_forward(black_box(&mut d), with_adapter, threads)
        }));
        worst[2] = d.worst_error(with_adapter);
        d.y.fill(f32::NAN);
    }
    d.y = candle.forward(with_adapter)?.flatten_all()?.to_vec1()?;
    worst[0] = d.worst_error(with_adapter);
    for (i, name) in ["candle", "gemm", "faer"].into_iter().enumerate() {
        print(name, &times[i]);
        if worst[i].is_nan() || worst[i] >= 16.0 {
            return Err(
                format!("{name}: {what} is wrong by {:.1} times its bound", worst[i]).into(),
            );
        }
    }
    Ok(())
}

/// Microseconds of one call, over `n` calls in a row.
fn repeat(n: usize, mut call: impl FnMut()) -> f64 {
    let start = Instant::now();
    for _ in 0..n {
        call();
    }
    start.elapsed().as_secs_f64() * 1e6 / n as f64
}

fn print(name: &str, times: &[f64]) {
    if let Some(s) = Summary::of(times) {
        println!(
            "  {name:<8} {:>9.1} us  ({:.1} - {:.1})",
            s.median, s.p10, s.p90
        );
    }
}
