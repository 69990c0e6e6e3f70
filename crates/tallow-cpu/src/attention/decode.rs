//! Attention of one query a batch row over a cache: bound by reading keys and values once.
//! Invariant: one task computes all query heads of a key head; keys after `pos` are not read.
//! Absent on purpose: splitting the keys of one head over threads.

use std::ops::Range;

use super::bend::bend;
use super::{Forward, Shape};
use crate::exec::{Exec, RowKernel, spans};
use crate::simd::Vector;
use crate::vecmath::{exp_nonpos, log_lane};

/// Scratch of one worker: the scores of a group of heads.
pub(super) fn worker_elems(shape: &Shape) -> usize {
    shape.group() * row_elems(shape)
}

fn row_elems(shape: &Shape) -> usize {
    shape.s.next_multiple_of(16)
}

/// # Safety
/// As for [`Forward::run`]; `t == 1`.
pub(super) unsafe fn run(args: &Forward, exec: Exec<'_>) {
    let shape = &args.shape;
    let seen = |b: usize| {
        // SAFETY: `queries` covers `[b, 1]`.
        let (lo, hi) = unsafe { args.queries.visible(shape, b) };
        hi - lo
    };
    let most = (0..shape.b).map(seen).max().unwrap_or(0);
    let head_ns = most * (shape.group() * (shape.d / 16 + 4) + shape.d / 8) / 2 + 50;
    // SAFETY: the caller's promise.
    unsafe { exec.over(shape.b * shape.hk, head_ns, &DecodeHeads(args)) }
}

struct DecodeHeads<'a>(&'a Forward);

// SAFETY: a key head's task writes the outputs of its own query heads.
unsafe impl RowKernel for DecodeHeads<'_> {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, worker: usize) {
        let a = self.0;
        for row in rows {
            // SAFETY: the caller's promise; `row` is a key head of a batch row.
            unsafe {
                let head = Head {
                    args: a,
                    b: row / a.shape.hk,
                    kv: row % a.shape.hk,
                    seen: a.queries.visible(&a.shape, row / a.shape.hk),
                    scores: a.workspace.add(worker * worker_elems(&a.shape)),
                };
                head.compute::<V>();
            }
        }
    }
}

/// One key head of one batch row.
struct Head<'a> {
    args: &'a Forward,
    b: usize,
    kv: usize,
    /// Keys `lo..hi`.
    seen: (usize, usize),
    /// `[group, row_elems]`
    scores: *mut f32,
}

impl Head<'_> {
    /// # Safety
    /// As for [`Forward::run`]; `scores` belongs to this worker.
    #[inline(always)]
    unsafe fn compute<V: Vector>(&self) {
        let shape = &self.args.shape;
        let group = shape.group();
        let first = self.kv * group;
        let n = self.seen.1 - self.seen.0;
        // SAFETY: the caller's promise.
        unsafe {
            if n > 0 {
                self.dots::<V>(n);
            }
            for g in 0..group {
                let head = first + g;
                let scores = self.scores.add(g * row_elems(shape));
                bend::<V>(shape.cap, scores, n);
                let lse = normalise::<V>(scores, n);
                if !self.args.lse.is_null() {
                    *self.args.lse.add(self.b * shape.h + head) = lse;
                }
                if n == 0 {
                    let out = self.args.out.at(self.b, 0, head);
                    out.write_bytes(0, shape.d);
                }
            }
            if n == 0 {
                return;
            }
            let mut g = 0;
            while g < group {
                match group - g {
                    1 => self.weigh::<V, 1>(n, g),
                    2 | 3 => self.weigh::<V, 2>(n, g),
                    _ => self.weigh::<V, 4>(n, g),
                }
                g += match group - g {
                    1 => 1,
                    2 | 3 => 2,
                    _ => 4,
                };
            }
        }
    }

    /// `scores[g, j] = scale q[g] . k[lo + j]`, four keys at a time.
    ///
    /// # Safety
    /// As for [`Head::compute`].
    #[inline(always)]
    unsafe fn dots<V: Vector>(&self, n: usize) {
        const KEYS: usize = 4;
        let a = self.args;
        let shape = &a.shape;
        let (group, d, step) = (shape.group(), shape.d, a.k.token);
        // SAFETY: keys `lo..lo + n` are below `s`.
        unsafe {
            let keys = a.k.at(self.b, self.seen.0, self.kv);
            for j in (0..n).step_by(KEYS) {
                // A last short group reads its first keys again.
                let at: [*const f32; KEYS] =
                    std::array::from_fn(|i| keys.add(if j + i < n { j + i } else { j } * step));
                for g in 0..group {
                    let q = a.q.at(self.b, 0, self.kv * group + g);
                    let mut sums = [V::zero(); KEYS];
                    spans!(V, d, l, s => {
                        let x = s.load(q.add(l));
                        for i in 0..KEYS {
                            sums[i] = x.mul_add(s.load(at[i].add(l)), sums[i]);
                        }
                    });
                    let out = self.scores.add(g * row_elems(shape) + j);
                    for (i, sum) in sums.into_iter().enumerate().take(n - j) {
                        *out.add(i) = sum.sum() * shape.scale;
                    }
                }
            }
        }
    }

    /// Weighs the values for `G` heads from `g` on, two vectors of columns at a time.
    ///
    /// # Safety
    /// As for [`Head::compute`]; `scores` holds probabilities.
    #[inline(always)]
    unsafe fn weigh<V: Vector, const G: usize>(&self, n: usize, g: usize) {
        let a = self.args;
        let shape = &a.shape;
        let (d, step, row) = (shape.d, a.v.token, row_elems(shape));
        let first = self.kv * shape.group() + g;
        // SAFETY: keys `lo..lo + n` are below `s`; masked lanes stay within `d`.
        unsafe {
            let values = a.v.at(self.b, self.seen.0, self.kv);
            let scores = self.scores.add(g * row);
            let mut col = 0;
            while col + 2 * V::LANES <= d {
                let mut sums = [[V::zero(); 2]; G];
                for j in 0..n {
                    let v = values.add(j * step + col);
                    let v = [V::load(v), V::load(v.add(V::LANES))];
                    for (i, sum) in sums.iter_mut().enumerate() {
                        let p = V::splat(*scores.add(i * row + j));
                        sum[0] = p.mul_add(v[0], sum[0]);
                        sum[1] = p.mul_add(v[1], sum[1]);
                    }
                }
                for (i, sum) in sums.into_iter().enumerate() {
                    let out = a.out.at(self.b, 0, first + i).add(col);
                    sum[0].store(out);
                    sum[1].store(out.add(V::LANES));
                }
                col += 2 * V::LANES;
            }
            spans!(V, d - col, l, s => {
                let mut sums = [V::zero(); G];
                for j in 0..n {
                    let v = s.load(values.add(j * step + col + l));
                    for (i, sum) in sums.iter_mut().enumerate() {
                        *sum = V::splat(*scores.add(i * row + j)).mul_add(v, *sum);
                    }
                }
                for (i, sum) in sums.into_iter().enumerate() {
                    s.store(sum, a.out.at(self.b, 0, first + i).add(col + l));
                }
            });
        }
    }
}

/// Softmax of `n` scores in place. Returns the logarithm of the sum of `e^score`, zero for none.
///
/// # Safety
/// The machine has the instructions; `scores` has `n` elements.
#[inline(always)]
unsafe fn normalise<V: Vector>(scores: *mut f32, n: usize) -> f32 {
    if n == 0 {
        return 0.0;
    }
    // SAFETY: the caller's promise.
    unsafe {
        let whole = n - n % V::LANES;
        let mut most = V::splat(f32::MIN);
        for j in (0..whole).step_by(V::LANES) {
            most = most.max(V::load(scores.add(j)));
        }
        let mut max = most.max_lane();
        for j in whole..n {
            max = max.max(*scores.add(j));
        }
        let mut sum = V::zero();
        for j in (0..whole).step_by(V::LANES) {
            let p = exp_nonpos(V::load(scores.add(j)).sub(V::splat(max)));
            p.store(scores.add(j));
            sum = sum.add(p);
        }
        if whole < n {
            let mask = V::mask(n - whole);
            let p = exp_nonpos(V::load_mask(scores.add(whole), mask).sub(V::splat(max)));
            p.store_mask(scores.add(whole), mask);
        }
        let mut sum = sum.sum();
        for j in whole..n {
            sum += *scores.add(j);
        }
        let inverse = V::splat(1.0 / sum);
        spans!(V, n, j, s => { s.store(s.load(scores.add(j)).mul(inverse), scores.add(j)) });
        max + log_lane(sum)
    }
}
