//! 32 rows of a matrix as 32 lanes, and softmax over lanes as their scores arrive piece by piece.
//! Invariant: a lane's bits depend on that lane alone.
//! Absent on purpose: masks; a score of minus infinity counts for nothing.

use crate::simd::Vector;
use crate::vecmath::exp_nonpos;

/// Rows that become lanes.
pub(crate) const LANES: usize = 32;

/// One number for each lane.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct Row(pub(crate) [f32; LANES]);

impl Row {
    pub(crate) fn splat(x: f32) -> Self {
        Row([x; LANES])
    }
}

/// Softmax under way: maximum and sum of each lane so far.
pub(crate) struct Softmax {
    pub(crate) max: Row,
    pub(crate) sum: Row,
    /// What sums made before the last piece must be multiplied with.
    pub(crate) fade: Row,
}

impl Softmax {
    pub(crate) fn new() -> Self {
        Softmax {
            // The least number, not minus infinity: a difference with it is no NaN.
            max: Row::splat(f32::MIN),
            sum: Row::splat(0.0),
            fade: Row::splat(1.0),
        }
    }

    /// Turns `n` rows of scores into `e^(score - max)`, in the first `cols` lanes rounded up to
    /// whole vectors.
    ///
    /// # Safety
    /// The machine has the instructions; `scores` is `[n, 32]`.
    #[inline(always)]
    pub(crate) unsafe fn add<V: Vector>(&mut self, scores: *mut f32, n: usize, cols: usize) {
        for lane in (0..cols).step_by(V::LANES) {
            // SAFETY: lanes of rows below `n`.
            unsafe {
                let at = scores.add(lane);
                let before = V::load(self.max.0.as_ptr().add(lane));
                let mut max = before;
                for j in 0..n {
                    max = max.max(V::load(at.add(j * LANES)));
                }
                let mut sums = [V::zero(); 2];
                for j in 0..n {
                    let p = exp_nonpos(V::load(at.add(j * LANES)).sub(max));
                    p.store(at.add(j * LANES));
                    sums[j % 2] = sums[j % 2].add(p);
                }
                let fade = exp_nonpos(before.sub(max));
                let sum = V::load(self.sum.0.as_ptr().add(lane));
                let sum = sum.mul_add(fade, sums[0].add(sums[1]));
                max.store(self.max.0.as_mut_ptr().add(lane));
                fade.store(self.fade.0.as_mut_ptr().add(lane));
                sum.store(self.sum.0.as_mut_ptr().add(lane));
            }
        }
    }

    /// Multiplies `rows: [32, padded]`, a row a lane, with `fade`.
    ///
    /// # Safety
    /// The machine has the instructions; `padded` is a multiple of 32.
    #[inline(always)]
    pub(crate) unsafe fn fade_rows<V: Vector>(&self, rows: *mut f32, padded: usize) {
        for (i, f) in self.fade.0.iter().enumerate() {
            if *f == 1.0 {
                continue;
            }
            for l in (0..padded).step_by(V::LANES) {
                // SAFETY: the caller's promise.
                unsafe {
                    let p = rows.add(i * padded + l);
                    V::load(p).mul(V::splat(*f)).store(p);
                }
            }
        }
    }

    /// Multiplies `columns: [n, 32]`, a column a lane, with `fade`.
    ///
    /// # Safety
    /// The machine has the instructions.
    #[inline(always)]
    pub(crate) unsafe fn fade_columns<V: Vector>(&self, columns: *mut f32, n: usize) {
        if self.fade.0.iter().all(|f| *f == 1.0) {
            return;
        }
        for lane in (0..LANES).step_by(V::LANES) {
            // SAFETY: the caller's promise.
            unsafe {
                let fade = V::load(self.fade.0.as_ptr().add(lane));
                for l in 0..n {
                    let p = columns.add(l * LANES + lane);
                    V::load(p).mul(fade).store(p);
                }
            }
        }
    }
}

/// `dst[l, lane] = rows[lane, l]` for `l < d`; `rows: [32, padded]`, `dst: [padded, 32]`.
///
/// # Safety
/// Both have that many elements and do not overlap.
#[inline(always)]
pub(crate) unsafe fn transpose(rows: *const f32, padded: usize, dst: *mut f32) {
    const N: usize = 4;
    for i in (0..LANES).step_by(N) {
        for l in (0..padded).step_by(N) {
            // SAFETY: `padded` and 32 are multiples of four: all within both.
            unsafe {
                let at = |k: usize| rows.add((i + k) * padded + l).cast::<[f32; N]>();
                let a: [[f32; N]; N] = std::array::from_fn(|k| at(k).read_unaligned());
                let columns: [[f32; N]; N] = std::array::from_fn(|k| a.map(|row| row[k]));
                for (k, column) in columns.into_iter().enumerate() {
                    let to = dst.add((l + k) * LANES + i);
                    to.cast::<[f32; N]>().write_unaligned(column);
                }
            }
        }
    }
}
