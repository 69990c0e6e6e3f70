//! Times of the kernels that are not projections: attention, loss, norms, elementwise.
//! Invariant: inputs are random, every result is read, and the best of several runs is printed with
//! the median and the mean, so that a disturbed machine shows.
//! Absent on purpose: peers and judgements.
//!
//! `cargo bench -p tallow-cpu --bench ops -- [name part]`; `TALLOW_THREADS`, `TALLOW_ISA` apply.

use std::time::Instant;

use tallow_core::scalar::{Inst, ScalarOp, ScalarProgram};
use tallow_core::types::DType;
use tallow_cpu::attention::{Backward, Forward, Heads, Mask, Queries, Shape};
use tallow_cpu::elementwise::{Elementwise, Operand};
use tallow_cpu::exec::Exec;
use tallow_cpu::linear::{pack_nk, packed_len};
use tallow_cpu::loss::{CrossEntropy, WeightLayout};
use tallow_cpu::norm::{Residual, RmsNorm, RmsNormBackward, Rows};
use tallow_cpu::optim::AdamW;
use tallow_cpu::pool::Pool;
use tallow_cpu::reduce::Softmax;
use tallow_cpu::rope::{Rope, Turn};
use tallow_cpu::simd::Isa;
use tallow_cpu::swiglu::{SwiGlu, SwiGluBackward};

/// Calls `f` until half a second has passed and prints best, median and mean.
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
    let mean = begin.elapsed().as_secs_f64() / times.len() as f64;
    times.sort_by(f64::total_cmp);
    let (best, median) = (times[0], times[times.len() / 2]);
    println!(
        "{name:44} {:9.1} us best {:9.1} us median {:9.1} us mean {:7.1} GFLOP/s {:6.1} GB/s",
        best * 1e6,
        median * 1e6,
        mean * 1e6,
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

/// Queries of rows that hold one sequence each.
fn alone(pos: &[u32]) -> Queries {
    Queries {
        pos: pos.as_ptr(),
        starts: std::ptr::null(),
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
        cap: None,
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
        queries: alone(&pos),
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
        queries: alone(&pos),
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
        cap: None,
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
        queries: alone(&pos),
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
    let n = CrossEntropy::workspace_elems(rows, c, exec.pool.threads());
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

/// Rows of a dense matrix.
fn rows_of(x: &[f32], ld: usize) -> Rows {
    let ptr = x.as_ptr();
    Rows { ptr, ld }
}

fn rows_of_mut(x: &mut [f32], ld: usize) -> Rows<*mut f32> {
    let ptr = x.as_mut_ptr();
    Rows { ptr, ld }
}

fn rows_ops(exec: Exec<'_>, rows: usize, c: usize) {
    let n = rows * c;
    let (a, b, d) = (random(n, 1), random(n, 2), random(n, 3));
    let w = random(c, 4);
    let (mut y, mut z) = (vec![0.0; n], vec![0.0; n]);
    let bytes = |arrays: usize| (arrays * n * 4) as f64;
    let norm = RmsNorm {
        rows,
        c,
        eps: 1e-5,
        x: rows_of(&a, c),
        residual: Some(Residual {
            other: rows_of(&b, c),
            sum: rows_of_mut(&mut z, c),
        }),
        w: w.as_ptr(),
        y: rows_of_mut(&mut y, c),
    };
    time(&format!("add + rms norm {rows}x{c}"), 0.0, bytes(4), || {
        // SAFETY: all matrices are `[rows, c]`.
        unsafe { norm.run(exec) }
    });
    let norm = RmsNorm {
        residual: None,
        ..norm
    };
    time(&format!("rms norm {rows}x{c}"), 0.0, bytes(2), || {
        // SAFETY: as above.
        unsafe { norm.run(exec) }
    });
    let norm = RmsNormBackward {
        rows,
        c,
        eps: 1e-5,
        x: rows_of(&a, c),
        w: w.as_ptr(),
        dy: rows_of(&b, c),
        residual: Some(rows_of(&d, c)),
        dx: rows_of_mut(&mut y, c),
        dw: std::ptr::null_mut(),
        workspace: std::ptr::null_mut(),
    };
    time(
        &format!("rms norm backward {rows}x{c}"),
        0.0,
        bytes(4),
        || {
            // SAFETY: as above.
            unsafe { norm.run(exec) }
        },
    );
    let (g, u) = (rows_of(&a, c), rows_of(&b, c));
    let swiglu = SwiGlu {
        rows,
        c,
        g,
        u,
        y: rows_of_mut(&mut y, c),
    };
    time(&format!("swiglu {rows}x{c}"), 0.0, bytes(3), || {
        // SAFETY: as above.
        unsafe { swiglu.run(exec) }
    });
    let swiglu = SwiGluBackward {
        rows,
        c,
        g,
        u,
        dy: rows_of(&d, c),
        dg: rows_of_mut(&mut y, c),
        du: rows_of_mut(&mut z, c),
    };
    time(
        &format!("swiglu backward {rows}x{c}"),
        0.0,
        bytes(5),
        || {
            // SAFETY: as above.
            unsafe { swiglu.run(exec) }
        },
    );
    let softmax = Softmax {
        rows,
        c,
        x: rows_of(&a, c),
        y: rows_of_mut(&mut y, c),
    };
    time(&format!("softmax {rows}x{c}"), 0.0, bytes(2), || {
        // SAFETY: as above.
        unsafe { softmax.run(exec) }
    });
    elementwise(exec, &[rows, c], [&a, &b, &w], &mut y);
}

/// `tanh(a * b) + w`, `w` a row, by the interpreter.
fn elementwise(exec: Exec<'_>, shape: &[usize; 2], x: [&[f32]; 3], y: &mut [f32]) {
    let apply = |op, args: &[u16]| Inst::Apply(op, args.to_vec());
    let program = ScalarProgram {
        n_inputs: 3,
        insts: vec![
            apply(ScalarOp::Mul, &[0, 1]),
            apply(ScalarOp::Tanh, &[3]),
            apply(ScalarOp::Add, &[4, 2]),
        ],
        outputs: vec![5],
    };
    let operand = |strides: [usize; 2]| Operand {
        dtype: DType::F32,
        strides: strides.to_vec(),
    };
    let dense = || operand([shape[1], 1]);
    let inputs = [dense(), dense(), operand([0, 1])];
    let code = Elementwise::new(&program, shape, &inputs, &[dense()]);
    let mut ws = vec![0.0; code.workspace_elems(exec.pool.threads())];
    let x = x.map(|x| x.as_ptr().cast());
    let to = [y.as_mut_ptr().cast()];
    let name = format!("elementwise tanh(a b) + w {}x{}", shape[0], shape[1]);
    time(&name, 0.0, (3 * y.len() * 4) as f64, || {
        // SAFETY: all buffers are as long as the shape says.
        unsafe { code.run(exec, &x, &to, ws.as_mut_ptr()) }
    });
}

fn rope(exec: Exec<'_>, b: usize, t: usize, h: usize, d: usize) {
    let x = random(b * t * h * d, 1);
    let mut y = x.clone();
    let pos: Vec<u32> = (0..b * t).map(|i| (i % t) as u32).collect();
    let inv_freq = random(d / 2, 2);
    let mut ws = vec![0.0; Rope::workspace_elems(d, exec.pool.threads())];
    let job = Rope {
        b,
        t,
        h,
        d,
        x: dense(&x, [t, h, d]),
        pos: pos.as_ptr(),
        inv_freq: inv_freq.as_ptr(),
        turn: Turn::Forward,
        y: dense_mut(&mut y, [t, h, d]),
        workspace: ws.as_mut_ptr(),
    };
    time(
        &format!("rope b{b} t{t} h{h} d{d}"),
        0.0,
        (x.len() * 8) as f64,
        || {
            // SAFETY: all views are of live buffers of their size.
            unsafe { job.run(exec) }
        },
    );
}

fn adamw(exec: Exec<'_>, n: usize) {
    let g = random(n, 1);
    let (mut p, mut m, mut v) = (random(n, 2), vec![0.0; n], vec![0.0; n]);
    let numbers = [1e-3, 0.9, 0.999, 1e-8, 0.01, 0.1, 0.03, 1.0];
    let job = AdamW {
        n,
        p: p.as_mut_ptr(),
        g: g.as_ptr(),
        m: m.as_mut_ptr(),
        v: v.as_mut_ptr(),
        numbers: &numbers,
    };
    time(&format!("adamw {n}"), 0.0, (n * 28) as f64, || {
        // SAFETY: all arrays hold `n` elements.
        unsafe { job.run(exec) }
    });
}

/// What it costs to have each thread do nothing.
fn handover(pool: &Pool) {
    time("hand-over", 0.0, 0.0, || {
        pool.run(pool.threads(), &|task, _| {
            std::hint::black_box(task);
        });
    });
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
    handover(&pool);
    rows_ops(exec, 64, 1024);
    rows_ops(exec, 512, 256);
    rows_ops(exec, 512, 688);
    rope(exec, 4, 128, 8, 32);
    adamw(exec, 1 << 18);
}
