//! The kernels over pairs of bf16, in intrinsics of x86-64.
//! Invariant: every function here is compiled with, and called only on machines with, AVX512-BF16.
//! Absent on purpose: choosing (see the parent).

use std::arch::x86_64::*;
use std::ops::Range;

use super::{PairStrip, PairTile, Pairs};
use crate::simd::{prefetch, prefetch_far};
use crate::tile::strip::HEAD_VECTORS;
use crate::tile::{FAR_TERMS, MAX_VECTORS, MR, NR, Rows, Sums, Tail, Terms, masks, put, write};

/// Terms of a pair of elements.
const PAIR: usize = 2;
/// Elements of a pair of panel rows.
const STEP: usize = PAIR * NR;
/// Elements of a cache line.
const LINE: usize = 32;
/// Panels that one row is multiplied with at once.
const AT_ONCE: usize = 4;

/// `sums + a . w` by pairs; `a` is the same pair in every lane.
///
/// # Safety
/// The machine has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn dot(sum: __m512, a: __m512i, w: __m512i) -> __m512 {
    // SAFETY: vectors of one size, every bit pattern of which is a value of either type.
    let (a, w) = unsafe {
        (
            std::mem::transmute::<__m512i, __m512bh>(a),
            std::mem::transmute::<__m512i, __m512bh>(w),
        )
    };
    _mm512_dpbf16_ps(sum, w, a)
}

/// # Safety
/// As for [`super::narrow`].
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512bf16")]
pub(super) unsafe fn narrow(x: *const f32, n: usize, to: *mut u32) {
    // SAFETY: the caller's promise; the last lanes are masked, and those beyond `n` written as zeros
    // only where a pair is.
    unsafe {
        let to = to.cast::<u16>();
        let mut i = 0;
        while i + 32 <= n {
            let lo = _mm512_loadu_ps(x.add(i));
            let hi = _mm512_loadu_ps(x.add(i + 16));
            let both = _mm512_cvtne2ps_pbh(hi, lo);
            _mm512_storeu_si512(
                to.add(i).cast(),
                std::mem::transmute::<__m512bh, __m512i>(both),
            );
            i += 32;
        }
        while i < n {
            let left = (n - i).min(16);
            let v = _mm512_maskz_loadu_ps(first(left), x.add(i));
            let half = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v));
            let mask = first(left.next_multiple_of(PAIR));
            _mm256_mask_storeu_epi16(to.add(i).cast(), mask, half);
            i += left;
        }
    }
}

/// # Safety
/// As for [`super::interleave`].
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512bf16")]
pub(super) unsafe fn interleave(x: *const f32, n: usize, to: *mut u32) {
    // SAFETY: the caller's promise.
    unsafe {
        for i in (0..n).step_by(PAIR) {
            for j in (0..NR).step_by(16) {
                let low = wide(_mm512_loadu_ps(x.add(i * NR + j)));
                let both = if i + 1 < n {
                    let high = wide(_mm512_loadu_ps(x.add((i + 1) * NR + j)));
                    _mm512_or_si512(low, _mm512_slli_epi32::<16>(high))
                } else {
                    low
                };
                _mm512_storeu_si512(to.add(i / PAIR * NR + j).cast(), both);
            }
        }
    }
}

/// 16 elements rounded to bf16, each in the low half of a lane.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512bf16")]
fn wide(x: __m512) -> __m512i {
    // SAFETY: vectors of one size, every bit pattern of which is a value of either type.
    let half = unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x)) };
    _mm512_cvtepu16_epi32(half)
}

/// The first `n` lanes of sixteen.
#[inline(always)]
fn first(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as u16
}

/// # Safety
/// As for [`super::run_pairs`].
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512cd,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn tile(tile: &PairTile, tail: &Tail) {
    let blocks = tile.m.div_ceil(MR);
    let mut row = 0;
    for block in 0..blocks {
        // Even blocks, as for the f32 tile.
        let rows = (tile.m - row).div_ceil(blocks - block);
        let line = |block: usize| block * tile.ahead_lines / blocks;
        let ahead = line(block)..line(block + 1);
        macro_rules! by_rows {
            ($($n:literal)*) => {
                match rows {
                    // SAFETY: the caller's promise: `rows` rows from `row` on are part of the tile.
                    $($n => unsafe { rows_of::<$n>(tile, tail, row, ahead) },)*
                    _ => unreachable!("bug in tallow: {rows} rows in a register block"),
                }
            };
        }
        by_rows!(1 2 3 4 5 6 7 8 9 10 11 12);
        row += rows;
    }
}

/// A register block of `R` rows from `row` on.
///
/// # Safety
/// As for [`super::run_pairs`]; the rows are in the tile.
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512cd,avx512bf16,avx2,fma,f16c")]
unsafe fn rows_of<const R: usize>(t: &PairTile, tail: &Tail, row: usize, ahead: Range<usize>) {
    // SAFETY: the caller's promise; `l` stays below `pairs`.
    unsafe {
        let mut sums: Sums<__m512, R> = [[_mm512_setzero_ps(); MAX_VECTORS]; R];
        let y = t.y.wrapping_add(row * t.y_row);
        if PAIR * t.pairs >= FAR_TERMS {
            for i in 0..R {
                prefetch(y.wrapping_add(i * t.y_row));
                prefetch(y.wrapping_add(i * t.y_row + NR / 2));
            }
        }
        let mut x = t.x.wrapping_add(row * t.x_row);
        let mut p = t.panel;
        let mut next = t.ahead.wrapping_add(ahead.start * LINE);
        for l in 0..t.pairs {
            // One at a time: many at once would have to wait for each other, and the product for them.
            if l < ahead.len() {
                prefetch_far(next);
                next = next.wrapping_add(LINE);
            }
            let w = [load(p), load(p.add(NR))];
            for (i, row) in sums.iter_mut().enumerate() {
                let a = _mm512_set1_epi32(x.add(i * t.x_row).read().cast_signed());
                row[0] = dot(row[0], a, w[0]);
                row[1] = dot(row[1], a, w[1]);
            }
            x = x.wrapping_add(t.x_col);
            p = p.wrapping_add(STEP);
        }
        if tail.k > 0 {
            let terms = Terms {
                k: tail.k,
                x: tail.x.wrapping_add(row * tail.x_row),
                x_row: tail.x_row,
                x_col: tail.x_col,
                panel: tail.panel,
                panel_row: tail.panel_row,
                cols: t.cols,
                next: (tail.panel, 0),
            };
            terms.add::<__m512, R, false, false, NR>(&mut sums);
        }
        let y = Rows {
            at: y,
            row: t.y_row,
        };
        write::<__m512, R, NR>(&sums, y, t.cols, t.onto.from(row, 0));
    }
}

/// Half a step of a panel: 16 columns.
///
/// # Safety
/// 32 elements are readable.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(p: *const Pairs) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_loadu_si512(p.cast()) }
}

/// # Safety
/// As for [`super::run_pair_strip`].
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512cd,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn strip(s: &PairStrip) {
    let panels = s.columns.div_ceil(NR);
    let mut p = 0;
    macro_rules! with_head {
        ($panels:literal) => {
            match s.head.r.div_ceil(16) {
                1 => group::<$panels, 1>(s, 0),
                2 => group::<$panels, 2>(s, 0),
                3 => group::<$panels, 3>(s, 0),
                _ => group::<$panels, HEAD_VECTORS>(s, 0),
            }
        };
    }
    // SAFETY: panels below `panels` are in the strip; the head's terms fit its vectors.
    unsafe {
        if !s.head.a.is_null() {
            match panels {
                AT_ONCE.. => {
                    with_head!(4);
                    p = AT_ONCE;
                }
                _ => {
                    with_head!(1);
                    p = 1;
                }
            }
        }
        while p + AT_ONCE <= panels {
            group::<AT_ONCE, 0>(s, p);
            p += AT_ONCE;
        }
        while p < panels {
            group::<1, 0>(s, p);
            p += 1;
        }
    }
}

/// Panels `p..p + P`, and the head in `H` vectors.
///
/// # Safety
/// As for [`super::run_pair_strip`]; they are in the strip; if `H` is not 0 there is a head whose terms
/// fit `H` vectors.
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512cd,avx512bf16,avx2,fma,f16c")]
unsafe fn group<const P: usize, const H: usize>(s: &PairStrip, p: usize) {
    // SAFETY: the caller's promise; terms stay below `k`, pairs below `pairs`.
    unsafe {
        let tail = s.tail.wrapping_add(p * s.tail_k * NR);
        let lines = P * s.tail_k * NR / 16;
        let mut sums = [[_mm512_setzero_ps(); 2]; P];
        let mut factors = [_mm512_setzero_ps(); H];
        let panels = s.panels.add(p * s.panel_len);
        for l in 0..s.pairs {
            // The tail is too short for the machine to see it coming.
            if l < lines {
                prefetch(tail.wrapping_add(l * 16));
            }
            if H > 0 {
                add_head(s, l * PAIR, &mut factors);
                if l * PAIR + 1 < s.k {
                    add_head(s, l * PAIR + 1, &mut factors);
                }
            }
            let a = _mm512_set1_epi32(s.x.add(l).read().cast_signed());
            for (q, sum) in sums.iter_mut().enumerate() {
                let at = panels.add(q * s.panel_len + l * STEP);
                sum[0] = dot(sum[0], a, load(at));
                sum[1] = dot(sum[1], a, load(at.add(NR)));
            }
        }
        for (i, sum) in factors.iter().enumerate() {
            let at = s.head.out.add(i * 16);
            match s.head.accumulate {
                true => _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), *sum)),
                false => _mm512_storeu_ps(at, *sum),
            }
        }
        for l in 0..s.tail_k {
            let a = _mm512_set1_ps(*s.tail_x.add(l));
            for (q, sum) in sums.iter_mut().enumerate() {
                let at = tail.add((q * s.tail_k + l) * NR);
                sum[0] = _mm512_fmadd_ps(a, _mm512_loadu_ps(at), sum[0]);
                sum[1] = _mm512_fmadd_ps(a, _mm512_loadu_ps(at.add(16)), sum[1]);
            }
        }
        for (q, sum) in sums.iter().enumerate() {
            let first = (p + q) * NR;
            let cols = (s.columns - first).min(NR);
            let masks = masks::<__m512>(cols);
            for j in 0..2 {
                let at = s.y.wrapping_add(first + j * 16);
                let old = Rows { at: s.onto, row: 0 }.from(0, first + j * 16).at;
                put(sum[j], at, old, cols < NR, masks[j]);
            }
        }
    }
}

/// Adds term `l` to the factors of a tail.
///
/// # Safety
/// As for [`group`]; `l` is below `k`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn add_head<const H: usize>(s: &PairStrip, l: usize, factors: &mut [__m512; H]) {
    // SAFETY: the caller's promise; the head is padded.
    unsafe {
        let a = _mm512_set1_ps(*s.wide.add(l));
        for (i, sum) in factors.iter_mut().enumerate() {
            let at = s.head.a.add(l * s.head.r + i * 16);
            *sum = _mm512_fmadd_ps(a, _mm512_loadu_ps(at), *sum);
        }
    }
}
