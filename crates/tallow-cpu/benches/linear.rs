//! Times of the linear: products against a probed peak, the adapter's tax, decode against the
//! bandwidth of reading.
//! Invariant: the runs of a table are interleaved, each figure is a median, inputs are random.
//! Absent on purpose: peers (they are compared outside this crate) and judgement.
//!
//! `cargo bench -p tallow-cpu --bench linear [-- NAME]`, where NAME picks the tables that contain it.
//! `TALLOW_BENCH=best` prints the fastest sample instead, for a machine that others use too.

use std::hint::black_box;
use std::time::Instant;

use half::bf16;
use tallow_cpu::exec::Exec;
use tallow_cpu::linear::*;
use tallow_cpu::pool::Pool;
use tallow_cpu::probe::{Product, multiply_adds, read};
use tallow_cpu::simd::Isa;
use tallow_cpu::tile::Pairs;

/// Samples of each run.
const ROUNDS: usize = 21;
/// The shortest sample, in seconds: many calls if one is shorter.
const SAMPLE_S: f64 = 300e-6;

fn main() {
    let isa = Isa::detect().unwrap_or_else(|e| panic!("{e}"));
    let all = Pool::from_env().unwrap_or_else(|e| panic!("{e}"));
    let wanted = std::env::args()
        .skip(1)
        .find(|a| !a.starts_with('-'))
        .unwrap_or_default();
    let one = Pool::new(1);
    for pool in [&one, &all] {
        let bench = Bench {
            exec: Exec { isa, pool },
            peak: best(|| multiply_adds(Exec { isa, pool }, Product::F32, 100_000)),
        };
        let data = random(6 << 20, 1);
        let read = best(|| read(bench.exec, &data, 1) as f64);
        println!(
            "\n{} threads, {}: {:.0} GFLOP/s, reading 24 MiB {:.0} GB/s",
            pool.threads(),
            isa.name(),
            bench.peak / 1e9,
            read / 1e9
        );
        let tables: [(&str, Table); 6] = [
            ("forward", forward_table),
            ("backward", backward_table),
            ("decode", decode_table),
            ("pairs", pairs_table),
            ("outer", outer_table),
            ("gemm", gemm_table),
        ];
        for (name, table) in tables {
            if name.contains(&wanted) {
                println!("\n{name}");
                table(&bench);
            }
        }
    }
}

type Table = fn(&Bench<'_>);

struct Bench<'a> {
    exec: Exec<'a>,
    /// FLOP/s of all threads.
    peak: f64,
}

/// The best of some runs, in work a second.
fn best(mut run: impl FnMut() -> f64) -> f64 {
    let rate = |_| {
        let start = Instant::now();
        let work = run();
        work / start.elapsed().as_secs_f64()
    };
    (0..20).map(rate).fold(0.0, f64::max)
}

fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Seconds a call of each run: medians of interleaved samples.
fn medians(runs: &mut [&mut dyn FnMut()]) -> Vec<f64> {
    let mut times = vec![Vec::new(); runs.len()];
    let mut calls = vec![1usize; runs.len()];
    for (run, calls) in runs.iter_mut().zip(&mut calls) {
        run();
        let start = Instant::now();
        run();
        *calls = (SAMPLE_S / start.elapsed().as_secs_f64().max(1e-9))
            .ceil()
            .max(1.0) as usize;
    }
    for _ in 0..ROUNDS {
        for (i, run) in runs.iter_mut().enumerate() {
            let start = Instant::now();
            (0..calls[i]).for_each(|_| run());
            times[i].push(start.elapsed().as_secs_f64() / calls[i] as f64);
        }
    }
    let best = std::env::var_os("TALLOW_BENCH").is_some_and(|v| v == "best");
    times
        .into_iter()
        .map(|mut t| {
            t.sort_by(f64::total_cmp);
            t[if best { 0 } else { t.len() / 2 }]
        })
        .collect()
}

/// The numbers of a linear with one block.
struct World<E> {
    m: usize,
    k: usize,
    n: usize,
    r: usize,
    x: Vec<f32>,
    y: Vec<f32>,
    panels: Vec<E>,
    a: Vec<f32>,
    b: Vec<f32>,
    tail: Vec<f32>,
    turned: Vec<f32>,
    hidden: Vec<f32>,
    workspace: Vec<f32>,
}

impl<E: Packed> World<E> {
    fn new(pool: &Pool, (m, k, n): (usize, usize, usize), r: usize, forward: bool) -> Self {
        let w = random(n * k, 1);
        let panels = if forward {
            packed_len(n, E::rows(k))
        } else {
            packed_len(k, E::rows(n))
        };
        let mut panels = vec![E::narrow(0.0); panels];
        match forward {
            true => pack_nk(pool, &w, (n, k), &mut panels),
            false => pack_kn(pool, &w, (n, k), &mut panels),
        }
        let b = random(n * r, 3);
        let mut tail = vec![0.0; packed_len(n, r)];
        pack_tail(&b, (n, r), 2.0, &mut tail);
        let a = random(r * k, 2);
        let mut turned = vec![0.0; head_len(r, k)];
        pack_head(&a, (r, k), &mut turned);
        let (x, y) = if forward {
            (m * k, m * n)
        } else {
            (m * n, m * k)
        };
        let mut world = Self {
            m,
            k,
            n,
            r,
            x: random(x, 5),
            y: vec![0.0; y],
            panels,
            a,
            b,
            tail,
            turned,
            hidden: vec![0.0; m * r],
            workspace: Vec::new(),
        };
        let blocks = [world.block(false)];
        let floats = forward_workspace(&blocks, 1, k, pool.threads()).max(backward_workspace(
            &blocks,
            1,
            pool.threads(),
        ));
        world.workspace = vec![0.0; floats];
        world
    }

    fn block(&self, packed_tail: bool) -> Block<E> {
        Block {
            n: self.n,
            weights: self.panels.as_ptr(),
            bias: std::ptr::null(),
            adapter: (self.r > 0).then_some(Adapter {
                rank: self.r,
                scale: 2.0,
                a: self.a.as_ptr(),
                b: self.b.as_ptr(),
                tail: if packed_tail {
                    self.tail.as_ptr()
                } else {
                    std::ptr::null()
                },
                turned: if packed_tail
                    && self.m == 1
                    && self.r <= tallow_cpu::tile::head_limit(Isa::best())
                {
                    self.turned.as_ptr()
                } else {
                    std::ptr::null()
                },
            }),
        }
    }

    fn forward(&mut self, exec: Exec<'_>, packed_tail: bool) {
        let blocks = [self.block(packed_tail)];
        let job = Forward {
            m: self.m,
            k: self.k,
            x: Rows {
                at: self.x.as_ptr(),
                row: self.k,
            },
            shares: 1,
            blocks: &blocks,
            y: Rows {
                at: self.y.as_mut_ptr(),
                row: self.n,
            },
            residual: Rows::<*const f32>::NONE,
            h: &[Rows {
                at: self.hidden.as_mut_ptr(),
                row: self.r,
            }],
        };
        // SAFETY: the matrices were made for these sizes.
        unsafe { forward(exec, &job, &mut self.workspace) };
        black_box(&self.y);
    }

    fn call(&mut self, exec: Exec<'_>, forward: bool) {
        match forward {
            true => self.forward(exec, true),
            false => self.backward(exec),
        }
    }

    fn backward(&mut self, exec: Exec<'_>) {
        let blocks = [self.block(false)];
        let job = Backward {
            m: self.m,
            k: self.k,
            dy: Rows {
                at: self.x.as_ptr(),
                row: self.n,
            },
            shares: 1,
            blocks: &blocks,
            dx: Rows {
                at: self.y.as_mut_ptr(),
                row: self.k,
            },
            residual: Rows::<*const f32>::NONE,
            dh: &[Rows {
                at: self.hidden.as_mut_ptr(),
                row: self.r,
            }],
        };
        // SAFETY: the matrices were made for these sizes.
        unsafe { backward(exec, &job, &mut self.workspace) };
        black_box(&self.y);
    }
}

fn product_table(bench: &Bench<'_>, forward: bool) {
    println!("    m     k     n |  bare us  % of peak |   r=8 us   tax  floor");
    for (m, k, n) in [
        (32, 512, 512),
        (128, 256, 256),
        (128, 512, 512),
        (512, 256, 256),
        (512, 256, 512),
        (512, 256, 688),
        (512, 688, 256),
        (512, 512, 512),
        (512, 896, 896),
        (512, 1024, 1024),
        (512, 2048, 2048),
        (128, 2048, 2048),
        (128, 896, 4864),
    ] {
        let exec = bench.exec;
        let mut bare = World::<f32>::new(exec.pool, (m, k, n), 0, forward);
        let mut with = World::<f32>::new(exec.pool, (m, k, n), 8, forward);
        let call = |w: &mut World<f32>| match forward {
            true => w.forward(exec, false),
            false => w.backward(exec),
        };
        let t = medians(&mut [&mut || call(&mut bare), &mut || call(&mut with)]);
        println!(
            "{m:5} {k:5} {n:5} | {:8.1}     {:5.1} % | {:8.1} {:5.3}  {:5.3}",
            t[0] * 1e6,
            (2 * m * k * n) as f64 / t[0] / bench.peak * 100.0,
            t[1] * 1e6,
            t[1] / t[0],
            1.0 + 8.0 / k as f64 + 8.0 / n as f64,
        );
    }
}

fn forward_table(bench: &Bench<'_>) {
    product_table(bench, true);
}

fn backward_table(bench: &Bench<'_>) {
    product_table(bench, false);
}

/// Products of bf16 weights: widened to f32, and, where the machine can, by pairs.
fn pairs_table(bench: &Bench<'_>) {
    let exec = bench.exec;
    if exec.isa != Isa::Avx512Bf16 {
        println!("this machine has no products of bf16, or TALLOW_ISA masks them");
        return;
    }
    let peak = best(|| multiply_adds(exec, Product::BF16, 100_000));
    println!("peak of pairs {:.0} GFLOP/s", peak / 1e9);
    println!("    m     k     n          |  widened us | pairs us  % of peak |   r=8 us   tax");
    for (m, k, n) in [
        (1, 256, 256),
        (1, 1024, 1024),
        (1, 2048, 2048),
        (1, 4096, 4096),
        (2, 1024, 1024),
        (8, 1024, 1024),
        (128, 512, 512),
        (128, 1024, 1024),
        (128, 2048, 2048),
        (128, 4096, 4096),
        (512, 256, 256),
        (512, 256, 688),
        (512, 688, 256),
        (512, 896, 4864),
    ] {
        for forward in [true, false] {
            let sizes = (m, k, n);
            let mut wide = World::<bf16>::new(exec.pool, sizes, 0, forward);
            let mut bare = World::<Pairs>::new(exec.pool, sizes, 0, forward);
            let mut with = World::<Pairs>::new(exec.pool, sizes, 8, forward);
            let t = medians(&mut [
                &mut || wide.call(exec, forward),
                &mut || bare.call(exec, forward),
                &mut || with.call(exec, forward),
            ]);
            println!(
                "{m:5} {k:5} {n:5} {} |    {:8.1} | {:8.1}    {:5.1} % | {:8.1} {:5.3}",
                if forward { "forward " } else { "backward" },
                t[0] * 1e6,
                t[1] * 1e6,
                (2 * m * k * n) as f64 / t[1] / peak * 100.0,
                t[2] * 1e6,
                t[2] / t[1],
            );
        }
    }
}

fn decode_table(bench: &Bench<'_>) {
    println!("    k     n |  bare us   GB/s |   r=8 us   tax  floor |  bf16 us   GB/s");
    for (k, n) in [
        (256, 256),
        (256, 1376),
        (688, 256),
        (512, 512),
        (1024, 1024),
        (2048, 2048),
        (4096, 4096),
        (256, 4096),
    ] {
        let exec = bench.exec;
        let mut bare = World::<f32>::new(exec.pool, (1, k, n), 0, true);
        let mut with = World::<f32>::new(exec.pool, (1, k, n), 8, true);
        let mut narrow = World::<bf16>::new(exec.pool, (1, k, n), 0, true);
        let t = medians(&mut [
            &mut || bare.forward(exec, true),
            &mut || with.forward(exec, true),
            &mut || narrow.forward(exec, true),
        ]);
        println!(
            "{k:5} {n:5} | {:8.2} {:6.1} | {:8.2} {:5.3}  {:5.3} | {:8.2} {:6.1}",
            t[0] * 1e6,
            (4 * k * n) as f64 / t[0] / 1e9,
            t[1] * 1e6,
            t[1] / t[0],
            1.0 + 8.0 / k as f64 + 8.0 / n as f64,
            t[2] * 1e6,
            (2 * k * n) as f64 / t[2] / 1e9,
        );
    }
}

fn outer_table(bench: &Bench<'_>) {
    println!("    m   r     n |  r x n us  % of peak |  n x r us");
    for (m, r, n) in [
        (512, 8, 256),
        (512, 8, 688),
        (512, 24, 256),
        (4096, 8, 896),
        (512, 8, 4096),
    ] {
        let (a, b) = (random(m * r, 1), random(m * n, 2));
        let mut out = vec![0.0f32; r * n];
        let mut call = |transposed: bool| {
            let job = Outer {
                m,
                r,
                n,
                scale: 2.0,
                a: Rows {
                    at: a.as_ptr(),
                    row: r,
                },
                b: Rows {
                    at: b.as_ptr(),
                    row: n,
                },
                out: Rows {
                    at: out.as_mut_ptr(),
                    row: if transposed { r } else { n },
                },
                transposed,
            };
            // SAFETY: the matrices were made for these sizes.
            unsafe { outer(bench.exec, &job) };
            black_box(&out);
        };
        let first = medians(&mut [&mut || call(false)])[0];
        let second = medians(&mut [&mut || call(true)])[0];
        println!(
            "{m:5} {r:3} {n:5} | {:9.1}     {:5.1} % | {:9.1}",
            first * 1e6,
            (2 * m * r * n) as f64 / first / bench.peak * 100.0,
            second * 1e6
        );
    }
}

fn gemm_table(bench: &Bench<'_>) {
    println!("    m     k     n |    a b us  % |   a bT us  % |   aT b us  %");
    for (m, k, n) in [
        (1, 512, 512),
        (4, 512, 512),
        (64, 64, 64),
        (128, 512, 512),
        (512, 512, 512),
        (512, 2048, 512),
    ] {
        let (a, b) = (random(m * k, 1), random(k * n, 2));
        let mut c = vec![0.0f32; m * n];
        let mut workspace = vec![0.0; gemm_workspace(bench.exec.pool.threads())];
        let mut call = |turn_a: bool, turn_b: bool| {
            let strided = |at: &[f32], rows: usize, cols: usize, turn: bool| Strided {
                at: at.as_ptr(),
                batch: 0,
                row: if turn { 1 } else { cols },
                col: if turn { rows } else { 1 },
            };
            let job = Gemm {
                batch: 1,
                m,
                n,
                k,
                alpha: 1.0,
                a: strided(&a, m, k, turn_a),
                b: strided(&b, k, n, turn_b),
                c: Rows {
                    at: c.as_mut_ptr(),
                    row: n,
                },
                c_batch: 0,
            };
            // SAFETY: the matrices were made for these sizes.
            unsafe { gemm(bench.exec, &job, &mut workspace) };
            black_box(&c);
        };
        print!("{m:5} {k:5} {n:5}");
        for (turn_a, turn_b) in [(false, false), (false, true), (true, false)] {
            let t = medians(&mut [&mut || call(turn_a, turn_b)])[0];
            let share = (2 * m * k * n) as f64 / t / bench.peak * 100.0;
            print!(" | {:9.1} {share:3.0}", t * 1e6);
        }
        println!();
    }
}
