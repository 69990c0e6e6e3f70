//! One row times many panels: what decoding a token does.
//! Invariant: the bits are those of the tile product; only the order in which columns are worked on
//! differs, so that several chains of multiply-adds run at once.
//! Absent on purpose: more than one row. Two rows already keep the multipliers busy.

use super::{Element, NR, Rows};
use crate::simd::{Isa, Kernel, Vector, prefetch};

/// `y[j] (+)= sum_l x[l] * panel[l, j]`, then the terms of the tail, over any number of columns.
/// Panels are packed and padded, `[columns / 32][stride][32]`.
#[derive(Clone, Copy, Debug)]
pub struct Strip<E = f32> {
    /// Terms.
    pub k: usize,
    /// `[k]`
    pub x: *const f32,
    /// Element `(l, j)` is at `panels + j / 32 * panel_len + l * 32 + j % 32`.
    pub panels: *const E,
    /// Distance between panels, at least `32 k`.
    pub panel_len: usize,
    /// More terms after those, `tail_k` of them: `[tail_k]`.
    pub tail_x: *const f32,
    /// How many; 0 for none.
    pub tail_k: usize,
    /// Panels for those terms, `32 tail_k` apart.
    pub tail: *const f32,
    /// Where the factors of the tail come from, if they are made on the way.
    pub head: Head,
    /// `[columns]`
    pub y: *mut f32,
    /// How many columns count. No other element of `y` is touched.
    pub columns: usize,
    /// What is added to the sums: as many elements, `y` itself, or null for nothing.
    pub onto: *const f32,
}

/// The factors of a strip's tail, `tail_x[i] (+)= sum_l x[l] * a[l, i]`: summed in the same pass over `x`
/// as the first panels, so that reading `a` waits for nothing.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// `[k, tail_k]`, with [`HEAD_PAD`] readable elements behind it; null if `tail_x` is there already.
    pub a: *const f32,
    /// `[tail_k]`, with [`HEAD_PAD`] writable elements behind it; what `tail_x` points to.
    pub out: *mut f32,
    /// Adds to `out` instead of setting it.
    pub accumulate: bool,
    /// Terms of the tail, at most [`head_limit`]: `tail_k`, also where this strip has no tail.
    pub r: usize,
}

impl Head {
    /// None.
    pub const NONE: Self = Self {
        a: std::ptr::null(),
        out: std::ptr::null_mut(),
        accumulate: false,
        r: 0,
    };
}

/// Elements beyond a [`Head`]'s that are read and written: whole vectors are.
pub const HEAD_PAD: usize = 16;

/// Vectors of a head that are summed at once.
pub(super) const HEAD_VECTORS: usize = 4;

/// The most terms of a [`Head`].
#[must_use]
pub fn head_limit(isa: Isa) -> usize {
    HEAD_VECTORS
        * match isa {
            Isa::Avx512 | Isa::Avx512Bf16 => 16,
            Isa::Avx2 | Isa::Portable => 8,
            Isa::Neon => 4,
        }
}

/// Computes `strip`.
///
/// # Safety
/// The machine has `isa`. All elements that [`Strip`] names are readable, in whole panels (`y`:
/// writable, and readable when accumulating), and `y` overlaps nothing that is read. A head has at most
/// [`head_limit`] terms.
pub unsafe fn run_strip<E: Element>(isa: Isa, strip: &Strip<E>) {
    // SAFETY: the caller's promise.
    unsafe { isa.dispatch(Columns(strip)) }
}

struct Columns<'a, E>(&'a Strip<E>);

impl<E: Element> Kernel for Columns<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn call<V: Vector>(self) {
        let panels = self.0.columns.div_ceil(NR);
        let mut p = 0;
        // SAFETY: panels below `panels` are in the strip.
        unsafe {
            if !self.0.head.a.is_null() {
                p += self.first::<V>(panels);
            }
            if V::LANES == 16 {
                while p + 4 <= panels {
                    self.group::<V, 4, 0>(p);
                    p += 4;
                }
            }
            if V::LANES >= 8 {
                while p + 2 <= panels {
                    self.group::<V, 2, 0>(p);
                    p += 2;
                }
            }
            while p < panels {
                self.group::<V, 1, 0>(p);
                p += 1;
            }
        }
    }
}

impl<E: Element> Columns<'_, E> {
    /// The first panels and the head, of which there is one. Returns how many panels.
    ///
    /// # Safety
    /// As for [`Columns::group`]; `panels` are in the strip.
    #[inline(always)]
    unsafe fn first<V: Vector>(&self, panels: usize) -> usize {
        macro_rules! at_once {
            ($panels:literal) => {
                // SAFETY: the caller's promise; the head's terms fit the vectors.
                unsafe {
                    match self.0.head.r.div_ceil(V::LANES) {
                        1 => self.group::<V, $panels, 1>(0),
                        2 => self.group::<V, $panels, 2>(0),
                        3 => self.group::<V, $panels, 3>(0),
                        _ => self.group::<V, $panels, HEAD_VECTORS>(0),
                    }
                    $panels
                }
            };
        }
        match (V::LANES, panels) {
            (16, 4..) => at_once!(4),
            (8.., 2..) => at_once!(2),
            _ => at_once!(1),
        }
    }

    /// Panels `p..p + P`, and the head in `H` vectors.
    ///
    /// # Safety
    /// They are in the strip; the machine has the instructions of `V`; if `H` is not 0 there is a head
    /// whose terms fit `H` vectors.
    #[inline(always)]
    unsafe fn group<V: Vector, const P: usize, const H: usize>(&self, p: usize) {
        let s = self.0;
        let vectors = NR / V::LANES;
        // SAFETY: the caller's promise; terms stay below `k` and `tail_k`.
        unsafe {
            let tail = s.tail.wrapping_add(p * s.tail_k * NR);
            let lines = P * s.tail_k * NR / 16;
            let mut sums = [[V::zero(); 8]; P];
            let mut factors = [V::zero(); H];
            let panels = s.panels.add(p * s.panel_len);
            for l in 0..s.k {
                let a = V::splat(*s.x.add(l));
                // The tail is too short for the machine to see it coming.
                if l < lines {
                    prefetch(tail.wrapping_add(l * 16));
                }
                for (i, sum) in factors.iter_mut().enumerate() {
                    let at = s.head.a.add(l * s.head.r + i * V::LANES);
                    *sum = a.mul_add(V::load(at), *sum);
                }
                for (q, row) in sums.iter_mut().enumerate() {
                    let at = panels.add(q * s.panel_len + l * NR);
                    for j in 0..vectors / 2 {
                        let (lo, hi) = E::pair::<V>(at, j * V::LANES);
                        row[j] = a.mul_add(lo, row[j]);
                        row[j + vectors / 2] = a.mul_add(hi, row[j + vectors / 2]);
                    }
                }
            }
            // Lanes beyond the head's terms hold nothing and go to its padding.
            for (i, sum) in factors.iter().enumerate() {
                let at = s.head.out.add(i * V::LANES);
                match s.head.accumulate {
                    true => V::load(at).add(*sum).store(at),
                    false => sum.store(at),
                }
            }
            for l in 0..s.tail_k {
                let a = V::splat(*s.tail_x.add(l));
                for (q, row) in sums.iter_mut().enumerate() {
                    let at = tail.add((q * s.tail_k + l) * NR);
                    for (j, sum) in row.iter_mut().enumerate().take(vectors) {
                        *sum = a.mul_add(V::load(at.add(j * V::LANES)), *sum);
                    }
                }
            }
            for (q, row) in sums.iter().enumerate() {
                let first = (p + q) * NR;
                let cols = (s.columns - first).min(NR);
                let masks = super::masks::<V>(cols);
                for (j, sum) in row.iter().enumerate().take(vectors) {
                    let at = s.y.wrapping_add(first + j * V::LANES);
                    let old = Rows { at: s.onto, row: 0 }.from(0, first + j * V::LANES).at;
                    super::put(*sum, at, old, cols < NR, masks[j]);
                }
            }
        }
    }
}
