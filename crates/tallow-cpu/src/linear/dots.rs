//! `y = x * wᵀ` as dot products along `k`, for a `w` of few rows in the checkpoint's layout.
//! Invariant: an element is one sum a lane in the order of `k`, then a fixed tree over the lanes: its
//! bits depend on the instruction set and `k` alone.
//! Absent on purpose: threads and blocking over `k`. A row of `x` is in cache when this is called.

use crate::simd::{Isa, Kernel, Vector};

/// `y[i, j] = sum_l x[i, l] * w[j, l]`, `i < m`, `j < n`, `l < k`. Strides count elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dots {
    /// Rows of `x` and `y`.
    pub(crate) m: usize,
    /// Rows of `w`, columns of `y`.
    pub(crate) n: usize,
    /// Length of the sums.
    pub(crate) k: usize,
    pub(crate) x: *const f32,
    pub(crate) x_row: usize,
    pub(crate) w: *const f32,
    pub(crate) w_row: usize,
    pub(crate) y: *mut f32,
    pub(crate) y_row: usize,
}

/// Computes `dots`.
///
/// # Safety
/// The machine has `isa`; the elements that `dots` names are readable (`y`: writable), and `y`
/// overlaps neither `x` nor `w`.
pub(crate) unsafe fn run(isa: Isa, dots: &Dots) {
    let (rows, columns) = match isa {
        Isa::Avx512 | Isa::Avx512Bf16 => (6, 4),
        Isa::Avx2 => (3, 4),
        Isa::Neon => (5, 4),
        Isa::Portable => (2, 2),
    };
    let blocks = dots.m.div_ceil(rows);
    let mut i = 0;
    for done in 0..blocks {
        // Even blocks: a lone last row would leave the multipliers waiting.
        let r = (dots.m - i).div_ceil(blocks - done);
        let mut j = 0;
        while j < dots.n {
            let c = columns.min(dots.n - j);
            // SAFETY: rows `i..i + r` and columns `j..j + c` are inside; the caller's promise.
            unsafe { block(isa, dots, (i, r), (j, c)) };
            j += c;
        }
        i += r;
    }
}

/// # Safety
/// As for [`run`]; the rows and columns, each a start and a count, are inside.
unsafe fn block(isa: Isa, dots: &Dots, (i, r): (usize, usize), (j, c): (usize, usize)) {
    macro_rules! sizes {
        ($($r:literal)*) => {
            // SAFETY: the caller's promise.
            unsafe {
                match (r, c) {
                    $(($r, 1) => isa.dispatch(Block::<$r, 1> { dots, i, j }),
                      ($r, 2) => isa.dispatch(Block::<$r, 2> { dots, i, j }),
                      ($r, 3) => isa.dispatch(Block::<$r, 3> { dots, i, j }),
                      ($r, 4) => isa.dispatch(Block::<$r, 4> { dots, i, j }),)*
                    _ => unreachable!("bug in tallow: a block of {r} x {c} dot products"),
                }
            }
        };
    }
    sizes!(1 2 3 4 5 6)
}

/// `R` rows of `x` from `i` on, `C` rows of `w` from `j` on.
struct Block<'a, const R: usize, const C: usize> {
    dots: &'a Dots,
    i: usize,
    j: usize,
}

impl<const R: usize, const C: usize> Kernel for Block<'_, R, C> {
    type Output = ();

    #[inline(always)]
    unsafe fn call<V: Vector>(self) {
        let d = self.dots;
        let x = d.x.wrapping_add(self.i * d.x_row);
        let w = d.w.wrapping_add(self.j * d.w_row);
        // SAFETY: the caller of `block` promises the rows; `l` stays below `k`, the last lanes masked.
        unsafe {
            let mut sums = [[V::zero(); C]; R];
            let whole = d.k - d.k % V::LANES;
            let mut l = 0;
            while l < whole {
                let mut a = [V::zero(); R];
                for (i, a) in a.iter_mut().enumerate() {
                    *a = V::load(x.add(i * d.x_row + l));
                }
                let b: [V; C] = std::array::from_fn(|j| V::load(w.add(j * d.w_row + l)));
                for (sums, a) in sums.iter_mut().zip(a) {
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = a.mul_add(b, *sum);
                    }
                }
                l += V::LANES;
            }
            if l < d.k {
                let mask = V::mask(d.k - l);
                for (i, sums) in sums.iter_mut().enumerate() {
                    let a = V::load_mask(x.add(i * d.x_row + l), mask);
                    for (j, sum) in sums.iter_mut().enumerate() {
                        let b = V::load_mask(w.add(j * d.w_row + l), mask);
                        *sum = a.mul_add(b, *sum);
                    }
                }
            }
            for (i, sums) in sums.into_iter().enumerate() {
                let y = d.y.add((self.i + i) * d.y_row + self.j);
                if C == 4 {
                    let four = std::array::from_fn(|j| sums[j % C]);
                    y.cast::<[f32; 4]>().write_unaligned(V::sum_each(four));
                    continue;
                }
                for (j, sum) in sums.into_iter().enumerate() {
                    *y.add(j) = sum.sum();
                }
            }
        }
    }
}
