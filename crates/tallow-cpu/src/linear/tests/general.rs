//! The general product and the gradients of an adapter.
//! Invariant: as for the linear: f64 sums, poison, threads that agree bit for bit.
//! Absent on purpose: a second writing of the kernels. The terms are listed one by one.

use super::*;

const SIZES: [usize; 12] = [0, 1, 2, 3, 5, 7, 13, 31, 32, 33, 64, 127];

#[test]
fn outer_is_the_sum_it_says() {
    let (mut rng, pools) = (Rng::fresh(), pools());
    each_isa(&mut |isa, name| {
        for m in [0, 1, 2, 5, 31, 64, 127, 300] {
            for r in [1, 2, 3, 8, 13, 24, 33, 64] {
                let n = SIZES[rng.next_u64() as usize % SIZES.len()];
                let transposed = rng.next_u64() % 2 == 0;
                let (a, b) = (
                    Matrix::random(&mut rng, m, r),
                    Matrix::random(&mut rng, m, n),
                );
                let run = |pool: &Pool| {
                    let (rows, cols) = if transposed { (n, r) } else { (r, n) };
                    let mut out = Matrix::poisoned(rows, cols);
                    let (a, b, out_rows) = (a.input(), b.input(), out.output());
                    let job = Outer {
                        m,
                        r,
                        n,
                        scale: 1.75,
                        a,
                        b,
                        out: out_rows,
                        transposed,
                    };
                    // SAFETY: the matrices have these sizes.
                    unsafe { outer(Exec { isa, pool }, &job) };
                    out
                };
                let out = run(&pools[0]);
                out.check(
                    &format!("{name} outer {m} {r} {n} {transposed}"),
                    &|i, j| {
                        let (i, j) = if transposed { (j, i) } else { (i, j) };
                        (0..m)
                            .map(|t| 1.75 * product(a.at(t, i), b.at(t, j)))
                            .collect()
                    },
                );
                for pool in &pools[1..] {
                    assert_eq!(run(pool).bits(), out.bits(), "{name} {m} {r} {n}");
                }
            }
        }
    });
}

#[test]
fn thin_is_the_sum_it_says() {
    let (mut rng, pools) = (Rng::fresh(), pools());
    each_isa(&mut |isa, name| {
        for m in &SIZES[1..] {
            for n in [1, 2, 3, 4, 5, 7, 8, 9, 16, 31] {
                let k = [1, 2, 15, 16, 17, 64, 127, 1031][rng.next_u64() as usize % 8];
                let (x, w) = (Matrix::random(&mut rng, *m, k), rng.vec(n * k));
                let bias = (rng.next_u64() % 2 == 0).then(|| rng.vec(n));
                let run = |pool: &Pool| {
                    let mut y = Matrix::poisoned(*m, n);
                    let job = Thin {
                        m: *m,
                        k,
                        n,
                        x: x.input(),
                        w: w.as_ptr(),
                        bias: bias.as_ref().map_or(std::ptr::null(), |b| b.as_ptr()),
                        y: y.output(),
                    };
                    // SAFETY: the matrices have these sizes.
                    unsafe { thin(Exec { isa, pool }, &job) };
                    y
                };
                let y = run(&pools[0]);
                y.check(&format!("{name} thin {m} {n} {k}"), &|i, j| {
                    let terms = (0..k).map(|l| product(x.at(i, l), w[j * k + l]));
                    let bias = bias.as_ref().map(|b| f64::from(b[j]));
                    terms.chain(bias).collect()
                });
                for pool in &pools[1..] {
                    assert_eq!(run(pool).bits(), y.bits(), "{name} thin {m} {n} {k}");
                }
            }
        }
    });
}

/// The sizes of a general product and which factors are stored transposed.
#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    m: usize,
    n: usize,
    k: usize,
    turn_a: bool,
    turn_b: bool,
}

fn check_gemm(isa: Isa, name: &str, pools: &[Pool], case: Case, rng: &mut Rng) {
    let Case {
        batch,
        m,
        n,
        k,
        turn_a,
        turn_b,
    } = case;
    let (a, b) = (rng.vec(batch * m * k), rng.vec(k * n));
    let strided = |at: &[f32], batch: usize, rows: usize, cols: usize, turn: bool| Strided {
        at: at.as_ptr(),
        batch,
        row: if turn { 1 } else { cols },
        col: if turn { rows } else { 1 },
    };
    let left = strided(&a, m * k, m, k, turn_a);
    // One right factor for the whole batch.
    let right = strided(&b, 0, k, n, turn_b);
    let run = |pool: &Pool| {
        let mut c = Matrix::poisoned(batch * m, n);
        let c_batch = m * (n + GAP);
        let job = Gemm {
            batch,
            m,
            n,
            k,
            alpha: 0.25,
            a: left,
            b: right,
            c: c.output(),
            c_batch,
        };
        let mut workspace = vec![POISON; gemm_workspace(pool.threads())];
        // SAFETY: the matrices have these sizes.
        unsafe { gemm(Exec { isa, pool }, &job, &mut workspace) };
        c
    };
    let c = run(&pools[0]);
    c.check(&format!("{name} {case:?}"), &|row, j| {
        let (g, i) = (row / m, row % m);
        let term = |l: usize| {
            let x = a[g * left.batch + i * left.row + l * left.col];
            0.25 * product(x, b[l * right.row + j * right.col])
        };
        (0..k).map(term).collect()
    });
    for pool in &pools[1..] {
        assert_eq!(
            run(pool).bits(),
            c.bits(),
            "{name} {case:?} on {} threads",
            pool.threads()
        );
    }
}

#[test]
fn gemm_is_the_sum_it_says() {
    let (mut rng, pools) = (Rng::fresh(), pools());
    each_isa(&mut |isa, name| {
        for m in &SIZES[1..] {
            for k in SIZES {
                let n = SIZES[rng.next_u64() as usize % SIZES.len()];
                let batch = 1 + rng.next_u64() as usize % 3;
                for (turn_a, turn_b) in [(false, false), (false, true), (true, false), (true, true)]
                {
                    let case = Case {
                        batch,
                        m: *m,
                        n,
                        k,
                        turn_a,
                        turn_b,
                    };
                    check_gemm(isa, name, &pools, case, &mut rng);
                }
            }
        }
        for (turn_a, turn_b) in [(false, true), (true, false)] {
            let case = Case {
                batch: 1,
                m: 110,
                n: 70,
                k: 2100,
                turn_a,
                turn_b,
            };
            check_gemm(isa, name, &pools, case, &mut rng);
        }
    });
}
