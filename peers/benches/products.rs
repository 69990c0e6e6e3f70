//! LoRA forward shapes through tallow, candle, gemm and faer; microseconds, medians with p10-p90.
//! Invariant: engines take turns within a round and begin in turn; results are poisoned before the last round and
//! checked against f64 after it. tallow's time includes reading its result out; the others leave theirs where it is.
//! `cargo bench --manifest-path peers/Cargo.toml --bench products`

use std::hint::black_box;
use std::time::Instant;

use candle_core::Tensor;
use tallow_peers::products::{CandleLora, LoraData, LoraShape, faer_forward, gemm_forward};
use tallow_peers::tallow::TallowLora;
use tallow_peers::{Result, Summary, threads, versions};

const ROUNDS: usize = 15;
/// Errors allowed, in units of `eps_f32 · Σ|terms|`.
const WORST: f64 = 16.0;

fn main() -> Result<()> {
    if threads::run_again_with_all()? {
        return Ok(());
    }
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{}, peers use {}", versions::line(), threads::given());
    for (m, k) in [(1, 1024), (1, 2048), (128, 512), (128, 2048)] {
        let shape = LoraShape { m, k, n: k, r: 8 };
        compare("bare product", shape, false, all)?;
        compare("LoRA forward", shape, true, all)?;
    }
    let seed = LoraShape {
        m: 128,
        k: 512,
        n: 8,
        r: 1,
    };
    compare("seed product", seed, false, 1)
}

/// An engine with its operands.
trait Engine {
    fn name(&self) -> &'static str;
    /// One forward, finished when this returns.
    fn call(&mut self, d: &mut LoraData) -> Result<()>;
    /// Puts the last result into `d.y`, where it is not there already.
    fn collect(&self, _: &mut LoraData) -> Result<()> {
        Ok(())
    }
}

struct Tallow(TallowLora);

impl Engine for Tallow {
    fn name(&self) -> &'static str {
        "tallow"
    }

    fn call(&mut self, d: &mut LoraData) -> Result<()> {
        self.0.forward(&mut d.y)
    }
}

struct Candle {
    operands: CandleLora,
    with_adapter: bool,
    last: Option<Tensor>,
}

impl Engine for Candle {
    fn name(&self) -> &'static str {
        "candle"
    }

    fn call(&mut self, _: &mut LoraData) -> Result<()> {
        self.last = Some(self.operands.forward(self.with_adapter)?);
        Ok(())
    }

    fn collect(&self, d: &mut LoraData) -> Result<()> {
        let last = self.last.as_ref().ok_or("candle was not called")?;
        d.y = last.flatten_all()?.to_vec1()?;
        Ok(())
    }
}

/// `gemm` and `faer`: functions of the operands.
struct Library {
    name: &'static str,
    forward: fn(&mut LoraData, bool, usize),
    with_adapter: bool,
    threads: usize,
}

impl Engine for Library {
    fn name(&self) -> &'static str {
        self.name
    }

    fn call(&mut self, d: &mut LoraData) -> Result<()> {
        (self.forward)(black_box(d), self.with_adapter, self.threads);
        Ok(())
    }
}

fn engines(d: &LoraData, with_adapter: bool, threads: usize) -> Result<Vec<Box<dyn Engine>>> {
    let library = |name, forward| {
        Box::new(Library {
            name,
            forward,
            with_adapter,
            threads,
        })
    };
    let mut all: Vec<Box<dyn Engine>> = vec![
        Box::new(Tallow(TallowLora::new(d, with_adapter, threads)?)),
        library("gemm", gemm_forward),
        library("faer", faer_forward),
    ];
    // candle has no way to use one thread in a process that elsewhere uses more.
    if threads > 1 {
        all.push(Box::new(Candle {
            operands: CandleLora::new(d)?,
            with_adapter,
            last: None,
        }));
    }
    Ok(all)
}

fn compare(what: &str, shape: LoraShape, with_adapter: bool, threads: usize) -> Result<()> {
    let LoraShape { m, k, n, .. } = shape;
    println!("{what} {m}x{k} @ {k}x{n}, {threads} threads");
    let mut d = LoraData::random(shape, 7);
    let mut engines = engines(&d, with_adapter, threads)?;
    let calls = (40_000_000 / (m * k * n)).clamp(3, 200);
    let mut times = vec![Vec::new(); engines.len()];
    let mut worst = vec![0.0; engines.len()];
    for round in 0..=ROUNDS {
        for turn in 0..engines.len() {
            let who = (turn + round) % engines.len();
            d.y.fill(f32::NAN);
            let start = Instant::now();
            for _ in 0..calls {
                engines[who].call(&mut d)?;
            }
            let us = start.elapsed().as_secs_f64() * 1e6 / calls as f64;
            // The first round warms up.
            if round > 0 {
                times[who].push(us);
            }
            if round == ROUNDS {
                engines[who].collect(&mut d)?;
                worst[who] = d.worst_error(with_adapter);
            }
        }
    }
    for ((engine, times), worst) in engines.iter().zip(&times).zip(worst) {
        let name = engine.name();
        if worst.is_nan() || worst >= WORST {
            return Err(
                format!("INVALID: {name}: {what} is wrong by {worst:.1} times its bound").into(),
            );
        }
        if let Some(s) = Summary::of(times) {
            println!(
                "  {name:<8} {:>9.1} us  ({:.1} - {:.1})",
                s.median, s.p10, s.p90
            );
        }
    }
    Ok(())
}
