//! Tests of attention against loops in f64, and of those loops against finite differences.
//! Invariant: outputs are poisoned, gaps of strided views must stay poisoned, and keys that nobody
//! may see hold NaN.
//! Absent on purpose: long sequences; chunk borders are crossed with a few hundred keys.

use reference::{Data, NOWHERE, Reference};

use super::*;
use crate::exec::Exec;
use crate::pool::Pool;
use crate::simd::Isa;
use crate::testing::Rng;

mod reference;

/// A test case: kernel inputs with NaN where nothing may be read, reference inputs with zero there.
struct Case {
    reference: Reference,
    q: Data,
    k: Data,
    v: Data,
    gaps: bool,
}

impl Case {
    fn new(shape: Shape, pos: Vec<u32>, gaps: bool, rng: &mut Rng) -> Self {
        let Shape {
            b, t, s, h, hk, d, ..
        } = shape;
        let mut q = Data::random([b, t, h, d], gaps, rng);
        let mut k = Data::random([b, s, hk, d], gaps, rng);
        let mut v = Data::random([b, s, hk, d], gaps, rng);
        let (zq, zk, zv) = (q.dense(), k.dense(), v.dense());
        for bi in 0..b {
            let row = &pos[bi * t..(bi + 1) * t];
            if shape.mask == Mask::Full {
                continue;
            }
            let last = row.iter().filter(|p| (**p as usize) < s).max();
            for (i, _) in row.iter().enumerate().filter(|x| *x.1 as usize >= s) {
                for hi in 0..h {
                    let at = q.index(bi, i, hi);
                    q.x[at..at + d].fill(f32::NAN);
                }
            }
            for j in last.map_or(0, |p| *p as usize + 1)..s {
                for hi in 0..hk {
                    let at = k.index(bi, j, hi);
                    k.x[at..at + d].fill(f32::NAN);
                    v.x[at..at + d].fill(f32::NAN);
                }
            }
        }
        let reference = Reference {
            shape,
            pos,
            starts: vec![],
            q: zq,
            k: zk,
            v: zv,
        };
        Case {
            reference,
            q,
            k,
            v,
            gaps,
        }
    }

    fn forward(&self, exec: Exec<'_>) -> (Data, Vec<f32>) {
        let shape = self.reference.shape;
        let mut out = Data::poisoned(self.q.n, self.gaps);
        let mut lse = vec![f32::NAN; shape.b * shape.h * shape.t];
        let mut workspace = vec![f32::NAN; Forward::workspace_elems(&shape, exec.pool.threads())];
        let args = Forward {
            shape,
            q: self.q.heads(),
            k: self.k.heads(),
            v: self.v.heads(),
            queries: self.reference.queries(),
            out: out.heads_mut(),
            lse: lse.as_mut_ptr(),
            workspace: workspace.as_mut_ptr(),
        };
        // SAFETY: all views are of buffers made for them.
        unsafe { args.run(exec) };
        (out, lse)
    }

    fn backward(&self, dout: &Data, exec: Exec<'_>, wanted: [bool; 3]) -> [Data; 3] {
        let shape = self.reference.shape;
        let (out, lse) = self.forward(exec);
        let mut grads = [&self.q, &self.k, &self.v].map(|x| Data::poisoned(x.n, self.gaps));
        let mut workspace = vec![f32::NAN; Backward::workspace_elems(&shape, exec.pool.threads())];
        let [dq, dk, dv] = &mut grads;
        let view = |x: &mut Data, wanted: bool| {
            let mut view = x.heads_mut();
            if !wanted {
                view.ptr = std::ptr::null_mut();
            }
            view
        };
        let args = Backward {
            shape,
            q: self.q.heads(),
            k: self.k.heads(),
            v: self.v.heads(),
            queries: self.reference.queries(),
            out: out.heads(),
            lse: lse.as_ptr(),
            dout: dout.heads(),
            dq: view(dq, wanted[0]),
            dk: view(dk, wanted[1]),
            dv: view(dv, wanted[2]),
            workspace: workspace.as_mut_ptr(),
        };
        // SAFETY: all views are of buffers made for them.
        unsafe { args.run(exec) };
        grads
    }
}

fn near(what: &str, got: &[f64], want: &[f64], size: &[f64], score: f64) {
    // A score is off by a few eps of its sum of magnitudes, a probability by that factor.
    let factor = f64::from(f32::EPSILON) * (16.0 + 8.0 * score);
    for (i, ((g, w), s)) in got.iter().zip(want).zip(size).enumerate() {
        let bound = factor * s + 1e-37;
        assert!(
            (g - w).abs() <= bound,
            "{what} [{i}]: want {w}, got {g}, bound {bound:e}"
        );
    }
}

fn bits(x: &Data) -> Vec<u32> {
    x.x.iter().map(|v| v.to_bits()).collect()
}

/// On every instruction set: right, gaps untouched, the same bits for 1, 2 and 3 threads.
fn check(case: &Case, rng: &mut Rng) {
    let want = case.reference.forward();
    let shape = case.reference.shape;
    let mut dout = Data::random(case.q.n, case.gaps, rng);
    let (grad, size) = case.reference.backward(&dout.dense());
    for (row, p) in case.reference.pos.iter().enumerate() {
        for h in 0..shape.h {
            if shape.mask != Mask::Full && *p as usize >= shape.s {
                let at = dout.index(row / shape.t, row % shape.t, h);
                dout.x[at..at + shape.d].fill(f32::NAN);
            }
        }
    }
    for isa in Isa::available() {
        let mut first = None;
        for threads in 1..=3 {
            let pool = Pool::new(threads);
            let exec = Exec { isa, pool: &pool };
            let (out, lse) = case.forward(exec);
            let grads = case.backward(&dout, exec, [true; 3]);
            let what = format!("{} {shape:?}", isa.name());
            if threads == 1 {
                near(
                    &format!("{what} out"),
                    &out.dense(),
                    &want.out,
                    &want.size,
                    want.score,
                );
                for (got, want_lse) in lse.iter().zip(&want.lse) {
                    let off = (f64::from(*got) - want_lse).abs();
                    let bound = 1e-6 * (4.0 + want.score);
                    assert!(
                        f64::from(*got) == *want_lse || off <= bound,
                        "{what}: lse {got}, want {want_lse}"
                    );
                }
                for (i, name) in ["dq", "dk", "dv"].into_iter().enumerate() {
                    let got = grads[i].dense();
                    near(
                        &format!("{what} {name}"),
                        &got,
                        &grad[i],
                        &size[i],
                        want.score,
                    );
                    assert!(grads[i].gaps_untouched(), "{what} {name}");
                }
                assert!(out.gaps_untouched(), "{what}");
            }
            let all: Vec<Vec<u32>> = [&out].into_iter().chain(&grads).map(bits).collect();
            assert_eq!(
                first.get_or_insert_with(|| all.clone()),
                &all,
                "{what}, {threads} threads"
            );
        }
    }
}

fn shape(n: [usize; 6], window: Option<usize>) -> Shape {
    let [b, t, s, h, hk, d] = n;
    Shape {
        b,
        t,
        s,
        h,
        hk,
        d,
        scale: 1.0 / (d as f32).sqrt(),
        mask: Mask::Causal { window },
        cap: None,
    }
}

fn counting(b: usize, t: usize, from: u32) -> Vec<u32> {
    (0..b)
        .flat_map(|_| (0..t as u32).map(move |i| from + i))
        .collect()
}

#[test]
fn training_shapes() {
    let mut rng = Rng::fresh();
    for (n, window) in [
        ([1, 1, 1, 1, 1, 1], None),
        ([1, 2, 2, 2, 1, 2], None),
        ([2, 3, 3, 3, 3, 5], Some(2)),
        ([1, 31, 31, 2, 2, 7], None),
        ([2, 33, 33, 4, 2, 31], Some(5)),
        ([1, 32, 32, 6, 2, 32], Some(1)),
        ([1, 127, 127, 2, 1, 33], None),
        ([2, 65, 65, 7, 1, 13], Some(40)),
        ([1, 224, 224, 2, 1, 64], None),
        ([1, 300, 300, 1, 1, 16], Some(130)),
    ] {
        for gaps in [false, true] {
            let case = Case::new(shape(n, window), counting(n[0], n[1], 0), gaps, &mut rng);
            check(&case, &mut rng);
        }
    }
}

#[test]
fn chunks_of_a_prompt_over_a_cache() {
    let mut rng = Rng::fresh();
    for (n, from, window) in [
        ([1, 7, 50, 4, 2, 32], 13, None),
        ([2, 40, 260, 2, 1, 16], 190, None),
        ([1, 5, 431, 3, 1, 8], 400, Some(33)),
        // Queries beyond the capacity are padding.
        ([1, 4, 9, 2, 2, 4], 7, None),
    ] {
        let case = Case::new(shape(n, window), counting(n[0], n[1], from), true, &mut rng);
        check(&case, &mut rng);
    }
}

#[test]
fn padding_rows_are_zero_and_are_not_read() {
    let mut rng = Rng::fresh();
    for t in [3, 33, 70] {
        let mut pos = counting(3, t, 0);
        for p in &mut pos[t / 2..t] {
            *p = NOWHERE;
        }
        // A row of padding alone.
        for p in &mut pos[2 * t..] {
            *p = NOWHERE;
        }
        let case = Case::new(shape([3, t, t, 4, 2, 9], None), pos, true, &mut rng);
        check(&case, &mut rng);
    }
}

#[test]
fn without_a_mask_all_keys_are_seen() {
    let mut rng = Rng::fresh();
    for n in [
        [2, 7, 7, 3, 3, 16],
        [1, 40, 201, 4, 2, 5],
        [2, 1, 33, 2, 1, 8],
    ] {
        let shape = Shape {
            mask: Mask::Full,
            ..shape(n, None)
        };
        let pos = vec![NOWHERE; n[0] * n[1]];
        check(&Case::new(shape, pos, true, &mut rng), &mut rng);
    }
}

#[test]
fn unwanted_gradients_are_left_out() {
    let mut rng = Rng::fresh();
    let n = [1, 40, 40, 2, 1, 8];
    let case = Case::new(shape(n, None), counting(1, 40, 0), false, &mut rng);
    let dout = Data::random(case.q.n, false, &mut rng);
    let pool = Pool::new(1);
    let exec = Exec {
        isa: Isa::best(),
        pool: &pool,
    };
    let all = case.backward(&dout, exec, [true; 3]);
    for i in 0..3 {
        let wanted = [0, 1, 2].map(|k| k == i);
        let one = case.backward(&dout, exec, wanted);
        for k in 0..3 {
            let want = if k == i {
                bits(&all[k])
            } else {
                bits(&Data::poisoned(all[k].n, false))
            };
            assert_eq!(bits(&one[k]), want);
        }
    }
}

#[test]
fn positions_in_any_order() {
    let mut rng = Rng::fresh();
    let (t, s) = (37, 250);
    let pos = (0..t).map(|_| (rng.next_u64() % s as u64) as u32).collect();
    let case = Case::new(shape([1, t, s, 2, 1, 12], Some(50)), pos, false, &mut rng);
    check(&case, &mut rng);
}

#[test]
fn documents_of_a_packed_row_do_not_see_each_other() {
    let mut rng = Rng::fresh();
    let of = |lengths: &[usize]| -> Vec<u32> {
        let mut starts = vec![];
        for n in lengths {
            starts.resize(starts.len() + n, starts.len() as u32);
        }
        starts
    };
    for (n, window, lengths) in [
        ([1, 7, 7, 2, 1, 5], None, [3, 4].as_slice()),
        ([2, 40, 40, 2, 2, 9], None, &[1, 38, 1, 20, 20]),
        ([1, 300, 300, 4, 2, 16], None, &[10, 100, 3, 97, 90]),
        ([1, 230, 230, 1, 1, 33], Some(7), &[5, 150, 75]),
    ] {
        let mut case = Case::new(shape(n, window), counting(n[0], n[1], 0), true, &mut rng);
        let mut starts = of(lengths);
        // A row's starts count within the row.
        for (i, s) in starts.iter_mut().enumerate() {
            *s -= (i / n[1] * n[1]) as u32;
        }
        case.reference.starts = starts;
        check(&case, &mut rng);
    }
    // Any start will do; one behind the query makes it padding.
    let pos = vec![0, 60, 3, 30, 62, 5];
    for t in [1, 3] {
        let n = [6 / t, t, 63, 4, 2, 8];
        let mut case = Case::new(shape(n, Some(20)), pos.clone(), false, &mut rng);
        case.reference.starts = vec![0, 50, 4, 1, NOWHERE, 5];
        check(&case, &mut rng);
    }
}

#[test]
fn scores_under_a_cap() {
    let mut rng = Rng::fresh();
    // A block that sees all and blocks that do not, over several chunks; a window; one token.
    for (n, from, window) in [
        ([1, 1, 1, 1, 1, 1], 0, None),
        ([1, 31, 31, 2, 2, 7], 0, None),
        ([2, 33, 33, 4, 2, 31], 0, Some(5)),
        ([1, 224, 224, 2, 1, 64], 0, None),
        ([2, 40, 260, 2, 1, 16], 190, None),
        ([2, 1, 300, 6, 2, 33], 257, None),
        ([1, 1, 127, 7, 1, 128], 100, Some(13)),
    ] {
        for cap in [0.2, 1.0, 30.0] {
            let cap = Some(cap);
            let shape = Shape {
                cap,
                ..shape(n, window)
            };
            let case = Case::new(shape, counting(n[0], n[1], from), true, &mut rng);
            check(&case, &mut rng);
        }
    }
    let (mask, cap) = (Mask::Full, Some(0.5));
    let plain = shape([1, 40, 201, 4, 2, 5], None);
    let shape = Shape { mask, cap, ..plain };
    check(
        &Case::new(shape, vec![NOWHERE; 40], true, &mut rng),
        &mut rng,
    );
}

#[test]
fn decode_of_one_token() {
    let mut rng = Rng::fresh();
    for (n, pos, window) in [
        ([1, 1, 1, 1, 1, 1], vec![0], None),
        ([1, 1, 300, 8, 4, 32], vec![257], None),
        ([3, 1, 65, 6, 2, 33], vec![0, NOWHERE, 64], None),
        ([2, 1, 127, 7, 1, 128], vec![100, 31], Some(13)),
        ([2, 1, 40, 5, 5, 5], vec![7, 39], None),
        ([1, 1, 20, 2, 2, 48], vec![500], None),
    ] {
        for gaps in [false, true] {
            let case = Case::new(shape(n, window), pos.clone(), gaps, &mut rng);
            check(&case, &mut rng);
        }
    }
}

#[test]
fn reference_gradients_agree_with_finite_differences() {
    for cap in [None, Some(0.7)] {
        let shape = Shape {
            cap,
            ..shape([2, 4, 6, 4, 2, 3], Some(3))
        };
        let mut rng = Rng::fresh();
        let pos = vec![1, 2, 3, 4, 5, 0, NOWHERE, 2];
        agrees_with_finite_differences(&Case::new(shape, pos, false, &mut rng).reference, &mut rng);
    }
}

fn agrees_with_finite_differences(r: &Reference, rng: &mut Rng) {
    let dout: Vec<f64> = r.q.iter().map(|_| f64::from(rng.f32())).collect();
    let loss =
        |r: &Reference| -> f64 { r.forward().out.iter().zip(&dout).map(|(o, g)| o * g).sum() };
    let (grad, _) = r.backward(&dout);
    for (which, grad) in grad.iter().enumerate() {
        for i in 0..grad.len() {
            let moved = |by: f64| {
                let mut r = r.clone();
                [&mut r.q, &mut r.k, &mut r.v][which][i] += by;
                loss(&r)
            };
            let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!(
                (slope - grad[i]).abs() < 1e-8,
                "{which} {i}: {slope} {}",
                grad[i]
            );
        }
    }
}

#[test]
fn a_query_has_the_same_bits_in_any_batch_and_block() {
    let mut rng = Rng::fresh();
    let pool = Pool::new(1);
    for isa in Isa::available() {
        let exec = Exec { isa, pool: &pool };
        let all = Case::new(
            shape([1, 70, 70, 2, 1, 32], None),
            counting(1, 70, 0),
            false,
            &mut rng,
        );
        let (whole, _) = all.forward(exec);
        // The same sequence without its first 33 queries: other lanes, other blocks.
        let mut part = Case::new(
            shape([1, 37, 70, 2, 1, 32], None),
            counting(1, 37, 33),
            false,
            &mut rng,
        );
        part.q.x.copy_from_slice(&all.q.x[33 * 64..]);
        part.k = all.k.clone();
        part.v = all.v.clone();
        let (tail, _) = part.forward(exec);
        assert_eq!(tail.x, whole.x[33 * 64..], "{}", isa.name());
    }
}

#[test]
fn cache_rows_are_written_where_their_position_says() {
    let mut rng = Rng::fresh();
    for isa in Isa::available() {
        for threads in 1..=3 {
            let pool = Pool::new(threads);
            for d in [1, 5, 32, 33] {
                let src = Data::random([2, 3, 2, d], true, &mut rng);
                let mut cache = Data::poisoned([2, 4, 2, d], true);
                let pos = [3, NOWHERE, 0, 2, 4, 2];
                let args = KvWrite {
                    b: 2,
                    t: 3,
                    s: 4,
                    hk: 2,
                    d,
                    pos: pos.as_ptr(),
                    src: src.heads(),
                    cache: cache.heads_mut(),
                };
                // SAFETY: both views are of buffers made for them.
                unsafe { args.run(Exec { isa, pool: &pool }) };
                let mut want = Data::poisoned([2, 4, 2, d], true);
                for (row, p) in pos.iter().enumerate().filter(|x| *x.1 < 4) {
                    for h in 0..2 {
                        let from = src.index(row / 3, row % 3, h);
                        let to = want.index(row / 3, *p as usize, h);
                        want.x[to..to + d].copy_from_slice(&src.x[from..from + d]);
                    }
                }
                assert_eq!(bits(&cache), bits(&want), "{} {d}", isa.name());
            }
        }
    }
}
