//! Times of the kernels that are not projections: attention, loss, norms, elementwise.
//! Invariant: inputs are random, every result is read, and the best of several runs is printed with
//! the median, so that a disturbed machine shows.
//! Absent on purpose: peers and judgements.
//!
//! `cargo bench -p tallow-cpu --bench ops -- [name part]`; `TALLOW_THREADS`, `TALLOW_ISA` apply.

use std::time::Instant;

use tallow_cpu::attention::{Backward, Forward, Heads, Mask, Shape};
use tallow_cpu::exec::Exec;
use tallow_cpu::linear::{pack_nk, packed_len};
use tallow_cpu::loss::{CrossEntropy, WeightLayout};
use tallow_cpu::norm::Rows;
use tallow_cpu::pool::Pool;
use tallow_cpu::simd::Isa;

/// Calls `f` until half a second has passed and prints best and median.
fn time(name: &str, flops: f64, bytes: f64, mut f: impl FnMut()) {
    let filter: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    if !filter.is_empty() && !filter.iter().any(|p| name.contains(p.as_str())) {
        return;
    }
    let begin = Instant::now();
    let mut times = Vec::new();
    while begin.elapsed().as_secs_f64() < 0.5 || times.len() < 5 {
        let start = Instant::now();
        f();
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let (best, median) = (times[0], times[times.len() / 2]);
    println!(
        "{name:44} {:9.1} us best {:9.1} us median {:7.1} GFLOP/s {:6.1} GB/s",
        best * 1e6,
        median * 1e6,
        flops / best * 1e-9,
        bytes / best * 1e-9
    );
}

/// Numbers from -1 to 1, the same in every run.
fn random(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_769) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32 * 2.0 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn dense(x: &[f32], n: [usize; 3]) -> Heads {
    let [n, h, d] = n;
    Heads {
        ptr: x.as_ptr(),
        batch: n * h * d,
        token: h * d,
        head: d,
    }
}

fn dense_mut(x: &mut [f32], n: [usize; 3]) -> Heads<*mut f32> {
    let [n, h, d] = n;
    Heads {
        ptr: x.as_mut_ptr(),
        batch: n * h * d,
        token: h * d,
        head: d,
    }
}

fn attention(exec: Exec<'_>, b: usize, t: usize, h: usize, hk: usize, d: usize) {
    let shape = Shape {
        b,
        t,
        s: t,
        h,
        hk,
        d,
        scale: 1.0 / (d as f32).sqrt(),
        mask: Mask::Causal { window: None },
    };
    let (nq, nk) = ([t, h, d], [t, hk, d]);
    let (q, dout) = (random(b * t * h * d, 1), random(b * t * h * d, 4));
    let (k, v) = (random(b * t * hk * d, 2), random(b * t * hk * d, 3));
    let pos: Vec<u32> = (0..b * t).map(|i| (i % t) as u32).collect();
    let mut out = vec![0.0; q.len()];
    let mut lse = vec![0.0; b * h * t];
    let (mut dq, mut dk, mut dv) = (q.clone(), k.clone(), v.clone());
    let threads = exec.pool.threads();
    let mut ws = vec![0.0; Forward::workspace_elems(&shape, threads)];
    let forward = Forward {
        shape,
        q: dense(&q, nq),
        k: dense(&k, nk),
        v: dense(&v, nk),
        pos: pos.as_ptr(),
        out: dense_mut(&mut out, nq),
        lse: lse.as_mut_ptr(),
        workspace: ws.as_mut_ptr(),
    };
    // What causality leaves: half of all pairs.
    let pairs = (b * h * t * (t + 1) / 2) as f64;
    let name = format!("b{b} t{t} h{h} hk{hk} d{d}");
    time(
        &format!("attention forward {name}"),
        pairs * 4.0 * d as f64,
        0.0,
        || {
            // SAFETY: all views are of live buffers of their size.
            unsafe { forward.run(exec) }
        },
    );
    let mut ws = vec![0.0; Backward::workspace_elems(&shape, threads)];
    let backward = Backward {
        shape,
        q: dense(&q, nq),
        k: dense(&k, nk),
        v: dense(&v, nk),
        pos: pos.as_ptr(),
        out: dense(&out, nq),
        lse: lse.as_ptr(),
        dout: dense(&dout, nq),
        dq: dense_mut(&mut dq, nq),
        dk: dense_mut(&mut dk, nk),
        dv: dense_mut(&mut dv, nk),
        workspace: ws.as_mut_ptr(),
    };
    time(
        &format!("attention backward {name}"),
        pairs * 10.0 * d as f64,
        0.0,
        || {
            // SAFETY: as above.
            unsafe { backward.run(exec) }
        },
    );
}

fn decode(exec: Exec<'_>, s: usize, h: usize, hk: usize, d: usize) {
    let shape = Shape {
        b: 1,
        t: 1,
        s,
        h,
        hk,
        d,
        scale: 1.0 / (d as f32).sqrt(),
        mask: Mask::Causal { window: None },
    };
    let q = random(h * d, 1);
    let (k, v) = (random(s * hk * d, 2), random(s * hk * d, 3));
    let pos = [s as u32 - 1];
    let mut out = vec![0.0; q.len()];
    let mut ws = vec![0.0; Forward::workspace_elems(&shape, exec.pool.threads())];
    let forward = Forward {
        shape,
        q: dense(&q, [1, h, d]),
        k: dense(&k, [s, hk, d]),
        v: dense(&v, [s, hk, d]),
        pos: pos.as_ptr(),
        out: dense_mut(&mut out, [1, h, d]),
        lse: std::ptr::null_mut(),
        workspace: ws.as_mut_ptr(),
    };
    let name = format!("attention decode s{s} h{h} hk{hk} d{d}");
    time(
        &name,
        (s * h * d * 4) as f64,
        (s * hk * d * 8) as f64,
        || {
            // SAFETY: all views are of live buffers of their size.
            unsafe { forward.run(exec) }
        },
    );
}

fn loss(exec: Exec<'_>, rows: usize, c: usize, v: usize) {
    let (x, w) = (random(rows * c, 1), random(v * c, 2));
    let mut packed = vec![0.0; packed_len(v, c)];
    pack_nk(exec.pool, &w, (v, c), &mut packed);
    let targets: Vec<u32> = (0..rows).map(|i| (i * 7919 % v) as u32).collect();
    let (mut nll, mut dx) = (vec![0.0; rows], vec![0.0; rows * c]);
    let n = CrossEntropy::workspace_elems(rows, c, v, exec.pool.threads());
    let mut ws = vec![0.0; n];
    let layouts = [
        ("panels", &packed, WeightLayout::Panels),
        ("rows", &w, WeightLayout::Rows(c)),
    ];
    for (layout_name, w, layout) in layouts {
        for gradient in [false, true] {
            let ptr = if gradient {
                dx.as_mut_ptr()
            } else {
                std::ptr::null_mut()
            };
            let job = CrossEntropy {
                rows,
                c,
                v,
                x: Rows {
                    ptr: x.as_ptr(),
                    ld: c,
                },
                w: w.as_ptr(),
                layout,
                targets: targets.as_ptr(),
                nll: nll.as_mut_ptr(),
                dx: Rows { ptr, ld: c },
                workspace: ws.as_mut_ptr(),
            };
            let what = if gradient { "+ gradient" } else { "" };
            let name = format!("loss {rows}x{c}x{v} {layout_name} {what}");
            let products = if gradient { 2.0 } else { 1.0 };
            time(&name, products * 2.0 * (rows * c * v) as f64, 0.0, || {
                // SAFETY: all buffers are as long as the arguments say.
                unsafe { job.run(exec) }
            });
        }
    }
}

fn main() {
    let pool = Pool::from_env().expect("TALLOW_THREADS");
    let isa = Isa::detect().expect("TALLOW_ISA");
    let exec = Exec { isa, pool: &pool };
    println!("{} on {} threads", isa.name(), pool.threads());
    attention(exec, 4, 128, 8, 4, 32);
    attention(exec, 1, 1024, 14, 2, 64);
    for s in [96, 512, 1024] {
        decode(exec, s, 8, 4, 32);
    }
    decode(exec, 512, 14, 2, 64);
    loss(exec, 512, 256, 4096);
    loss(exec, 256, 896, 8192);
}
