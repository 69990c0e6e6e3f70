//! Weights in the layout that the tile product reads: panels of 32 columns, done once at load.
//! Invariant: columns beyond the matrix are zero, so a panel may always be read in full.
//! Absent on purpose: quantised weights, and unpacking. The checkpoint on disk stays what it is.

use half::{bf16, f16};

use super::Raw;
use crate::pool::Pool;
use crate::tile::{Element, HEAD_PAD, NR, Pairs};

/// A number that weights are stored as in a checkpoint.
pub trait Source: Copy + Send + Sync + 'static {
    /// The value in f32; exact.
    fn widen(self) -> f32;
}

/// A number that panels are made of: `f32`, or half the bytes with sums still in f32: `bf16`, and
/// [`Pairs`] of it where the machine multiplies them as such.
pub trait Packed: Element {
    /// The nearest value, ties to even. Exact for `f32`.
    fn narrow(value: f32) -> Self;
}

impl Source for f32 {
    fn widen(self) -> f32 {
        self
    }
}

impl Source for bf16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Source for f16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Packed for f32 {
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Packed for bf16 {
    fn narrow(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

impl Packed for Pairs {
    fn narrow(value: f32) -> Self {
        Pairs(bf16::from_f32(value))
    }
}

/// Elements of `columns` columns in panels of `rows` rows each ([`Element::rows`] of the terms).
#[must_use]
pub fn packed_len(columns: usize, rows: usize) -> usize {
    columns.div_ceil(NR) * NR * rows
}

/// Packs `w: [n, k]`, row-major, for the forward product: `out: [ceil(n / 32)][k][32]`
/// (elements of bf16 panels in the order of [`Element::index`]).
///
/// # Panics
/// If `w` has not `n * k` elements or `out` not `packed_len(n, E::rows(k))`.
pub fn pack_nk<S: Source, E: Packed>(pool: &Pool, w: &[S], (n, k): (usize, usize), out: &mut [E]) {
    assert_eq!(
        w.len(),
        n * k,
        "bug in tallow: pack_nk: weights want n * k elements"
    );
    assert_eq!(
        out.len(),
        packed_len(n, E::rows(k)),
        "bug in tallow: pack_nk: panels want packed_len(n, k)"
    );
    each_panel(pool, out, E::rows(k), &|p, panel| {
        let columns = (n - p * NR).min(NR);
        panel.fill(E::narrow(0.0));
        // Sixteen terms at a time: a row's cache line is used up while it is there.
        for (block, rows) in panel.chunks_mut(16 * NR).enumerate() {
            for j in 0..columns {
                let terms = &w[(p * NR + j) * k..][..k];
                for (l, v) in terms.iter().skip(block * 16).take(16).enumerate() {
                    rows[E::index(l, j)] = E::narrow(v.widen());
                }
            }
        }
    });
}

/// Packs `w: [n, k]`, row-major, for the backward product: `out: [ceil(k / 32)][n][32]`
/// (elements of bf16 panels in the order of [`Element::index`]).
///
/// # Panics
/// If `w` has not `n * k` elements or `out` not `packed_len(k, E::rows(n))`.
pub fn pack_kn<S: Source, E: Packed>(pool: &Pool, w: &[S], (n, k): (usize, usize), out: &mut [E]) {
    assert_eq!(
        w.len(),
        n * k,
        "bug in tallow: pack_kn: weights want n * k elements"
    );
    assert_eq!(
        out.len(),
        packed_len(k, E::rows(n)),
        "bug in tallow: pack_kn: panels want packed_len(k, n)"
    );
    each_panel(pool, out, E::rows(n), &|p, panel| {
        let columns = (k - p * NR).min(NR);
        panel.fill(E::narrow(0.0));
        for i in 0..n {
            for (j, v) in w[i * k + p * NR..][..columns].iter().enumerate() {
                panel[E::index(i, j)] = E::narrow(v.widen());
            }
        }
    });
}

/// Packs `b: [n, r]`, row-major, times `scale`, for the tail of the forward product:
/// `out: [ceil(n / 32)][r][32]`. For an adapter that does not change; otherwise each call of the
/// forward product does this for itself.
///
/// # Panics
/// If `b` has not `n * r` elements or `out` not `packed_len(n, r)`.
pub fn pack_tail(b: &[f32], (n, r): (usize, usize), scale: f32, out: &mut [f32]) {
    assert_eq!(
        b.len(),
        n * r,
        "bug in tallow: pack_tail: want n * r elements"
    );
    assert_eq!(
        out.len(),
        packed_len(n, r),
        "bug in tallow: pack_tail: want packed_len(n, r)"
    );
    if r == 0 {
        return;
    }
    for (p, panel) in out.chunks_exact_mut(r * NR).enumerate() {
        let rows = &b[p * NR * r..n.min((p + 1) * NR) * r];
        // SAFETY: `rows` has `columns * r` elements and `panel` `r * 32`.
        unsafe { tail_panel(rows.as_ptr(), rows.len() / r, r, scale, panel.as_mut_ptr()) };
    }
}

/// Elements of an `A: [r, k]` turned by [`pack_head`].
#[must_use]
pub fn head_len(r: usize, k: usize) -> usize {
    r * k + HEAD_PAD
}

/// Turns `a: [r, k]`, row-major, to `out: [k][r]` and some zeros, for a forward product of one row.
///
/// # Panics
/// If `a` has not `r * k` elements or `out` not `head_len(r, k)`.
pub fn pack_head(a: &[f32], (r, k): (usize, usize), out: &mut [f32]) {
    assert_eq!(
        a.len(),
        r * k,
        "bug in tallow: pack_head: want r * k elements"
    );
    assert_eq!(
        out.len(),
        head_len(r, k),
        "bug in tallow: pack_head: want head_len(r, k)"
    );
    out[r * k..].fill(0.0);
    for (i, row) in a.chunks_exact(k.max(1)).enumerate() {
        for (l, &v) in row.iter().enumerate() {
            out[l * r + i] = v;
        }
    }
}

/// One panel of [`pack_tail`]: `columns <= 32` rows of `r` elements.
///
/// # Safety
/// `columns * r` elements at `b` are readable, `r * 32` at `out` writable, and they do not overlap.
pub(crate) unsafe fn tail_panel(
    b: *const f32,
    columns: usize,
    r: usize,
    scale: f32,
    out: *mut f32,
) {
    let (whole, across) = (r - r % 4, columns - columns % 4);
    // SAFETY: `j < columns <= 32` and `i < r`.
    unsafe {
        if columns < NR {
            std::slice::from_raw_parts_mut(out, r * NR).fill(0.0);
        }
        turn(b, r, (whole, across), scale, out);
        for i in 0..r {
            for j in if i < whole { across } else { 0 }..columns {
                *out.add(i * NR + j) = scale * *b.add(j * r + i);
            }
        }
    }
}

/// `to[i, j] = scale * from[j, i]`, `i < terms`, `j < cols`, both multiples of four, in blocks of
/// four by four, which compilers turn into shuffles. Rows of `from` are `stride` apart, those of
/// `to` 32.
///
/// # Safety
/// The elements are readable and writable.
pub(super) unsafe fn turn(
    from: *const f32,
    stride: usize,
    (terms, cols): (usize, usize),
    scale: f32,
    to: *mut f32,
) {
    // Sixteen terms at a time: a cache line of `from` is used up while it is there.
    for start in (0..terms).step_by(16) {
        for j in (0..cols).step_by(4) {
            for i in (start..terms.min(start + 16)).step_by(4) {
                // SAFETY: the block at `(i, j)` lies inside, for both extents are multiples of four.
                unsafe {
                    let at = |q: usize| from.add((j + q) * stride + i).cast::<[f32; 4]>();
                    let block: [[f32; 4]; 4] = std::array::from_fn(|q| at(q).read_unaligned());
                    for q in 0..4 {
                        let row = to.add((i + q) * NR + j).cast::<[f32; 4]>();
                        row.write_unaligned(block.map(|r| scale * r[q]));
                    }
                }
            }
        }
    }
}

/// Calls `fill` with each panel of `rows` rows of `out`, on all threads.
fn each_panel<E: Packed>(
    pool: &Pool,
    out: &mut [E],
    rows: usize,
    fill: &(dyn Fn(usize, &mut [E]) + Sync),
) {
    if rows == 0 {
        return;
    }
    let len = rows * NR;
    let panels = out.len() / len;
    let out = Raw(out.as_mut_ptr());
    pool.run(panels, &|p, _| {
        // SAFETY: panel `p` lies inside `out`, and each task has a panel of its own.
        let panel = unsafe { std::slice::from_raw_parts_mut(out.get().add(p * len), len) };
        fill(p, panel);
    });
}
