//! The vectors of x86-64: AVX-512 and AVX2 with FMA.
//! Invariant: one intrinsic (or a short run of them) a method; no method looks at the machine.
//! Absent on purpose: SSE. A machine without AVX2 takes the portable path.

use std::arch::x86_64::*;

use super::{Kernel, Vector};

/// # Safety
/// The machine has the instructions named, and what `kernel` asks for holds.
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512cd,avx2,fma,f16c")]
pub(super) unsafe fn call_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's promise.
    unsafe { kernel.call::<__m512>() }
}

/// # Safety
/// The machine has the instructions named, and what `kernel` asks for holds.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn call_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's promise.
    unsafe { kernel.call::<__m256>() }
}

// SAFETY: unaligned or masked loads and stores touch exactly the lanes that the method names.
unsafe impl Vector for __m512 {
    const LANES: usize = 16;
    const TILE_ROWS: usize = 12;
    type Mask = __mmask16;

    #[inline(always)]
    unsafe fn mask(n: usize) -> Self::Mask {
        debug_assert!(n <= 16);
        ((1u32 << n) - 1) as u16
    }
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_mask(p: *const f32, mask: Self::Mask) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm512_maskz_loadu_ps(mask, p) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(
                _mm256_loadu_si256(p.cast()),
            )))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(p: *const u16) -> (Self, Self) {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe {
            let both = _mm512_loadu_si512(p.cast());
            let even = _mm512_slli_epi32::<16>(both);
            let odd = _mm512_and_si512(both, _mm512_set1_epi32(0xffff_0000u32 as i32));
            (_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd))
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm512_storeu_ps(p, self) }
    }
    #[inline(always)]
    unsafe fn store_mask(self, p: *mut f32, mask: Self::Mask) {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm512_mask_storeu_ps(p, mask, self) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm512_add_ps(self, b) }
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm512_sub_ps(self, b) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm512_mul_ps(self, b) }
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm512_div_ps(self, b) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm512_fmadd_ps(self, b, c) }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm512_max_ps(self, b) }
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm512_min_ps(self, b) }
    }
    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm512_sqrt_ps(self) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self) }
    }
    #[inline(always)]
    unsafe fn exp2i(self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe {
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(
                _mm512_cvtps_epi32(self),
                _mm512_set1_epi32(127),
            )))
        }
    }
    #[inline(always)]
    unsafe fn scale2(self, n: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm512_scalef_ps(self, n) }
    }
    #[inline(always)]
    unsafe fn lt_select(self, b: Self, x: Self, y: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(self, b), y, x) }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe {
            let (lo, hi) = (
                _mm512_castps512_ps256(self),
                _mm512_extractf32x8_ps::<1>(self),
            );
            _mm256_add_ps(lo, hi).sum()
        }
    }
    #[inline(always)]
    unsafe fn sum_each(all: [Self; 4]) -> [f32; 4] {
        // SAFETY: the caller has the instructions.
        unsafe {
            // Halves of two vectors at once, then quarters of four, then within each quarter.
            let [a, b, c, d] = all;
            let halves = |a, b| {
                let (lo, hi) = (
                    _mm512_shuffle_f32x4::<0x44>(a, b),
                    _mm512_shuffle_f32x4::<0xee>(a, b),
                );
                _mm512_add_ps(lo, hi)
            };
            let (ab, cd) = (halves(a, b), halves(c, d));
            let (lo, hi) = (
                _mm512_shuffle_f32x4::<0x88>(ab, cd),
                _mm512_shuffle_f32x4::<0xdd>(ab, cd),
            );
            let q = _mm512_add_ps(lo, hi);
            let q = _mm512_add_ps(q, _mm512_permute_ps::<0b11_10_11_10>(q));
            let q = _mm512_add_ps(q, _mm512_movehdup_ps(q));
            let firsts = _mm512_maskz_compress_ps(0x1111, q);
            let mut sums = [0.0; 4];
            _mm_storeu_ps(sums.as_mut_ptr(), _mm512_castps512_ps128(firsts));
            sums
        }
    }
    #[inline(always)]
    unsafe fn max_lane(self) -> f32 {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm512_reduce_max_ps(self) }
    }
}

// SAFETY: unaligned or masked loads and stores touch exactly the lanes that the method names.
unsafe impl Vector for __m256 {
    const LANES: usize = 8;
    const TILE_ROWS: usize = 3;
    type Mask = __m256i;

    #[inline(always)]
    unsafe fn mask(n: usize) -> Self::Mask {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe {
            debug_assert!(n <= 8);
            _mm256_cmpgt_epi32(
                _mm256_set1_epi32(n as i32),
                _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
            )
        }
    }
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_mask(p: *const f32, mask: Self::Mask) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm256_maskload_ps(p, mask) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(
                _mm_loadu_si128(p.cast()),
            )))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(p: *const u16) -> (Self, Self) {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe {
            let both = _mm256_loadu_si256(p.cast());
            let even = _mm256_slli_epi32::<16>(both);
            let odd = _mm256_and_si256(both, _mm256_set1_epi32(0xffff_0000u32 as i32));
            (_mm256_castsi256_ps(even), _mm256_castsi256_ps(odd))
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm256_storeu_ps(p, self) }
    }
    #[inline(always)]
    unsafe fn store_mask(self, p: *mut f32, mask: Self::Mask) {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm256_maskstore_ps(p, mask, self) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm256_add_ps(self, b) }
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm256_sub_ps(self, b) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm256_mul_ps(self, b) }
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm256_div_ps(self, b) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm256_fmadd_ps(self, b, c) }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm256_max_ps(self, b) }
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm256_min_ps(self, b) }
    }
    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm256_sqrt_ps(self) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self) }
    }
    #[inline(always)]
    unsafe fn exp2i(self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe {
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
                _mm256_cvtps_epi32(self),
                _mm256_set1_epi32(127),
            )))
        }
    }
    #[inline(always)]
    unsafe fn lt_select(self, b: Self, x: Self, y: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(self, b)) }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe {
            let q = _mm_add_ps(
                _mm256_castps256_ps128(self),
                _mm256_extractf128_ps::<1>(self),
            );
            let d = _mm_add_ps(q, _mm_movehl_ps(q, q));
            _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)))
        }
    }
    #[inline(always)]
    unsafe fn sum_each(all: [Self; 4]) -> [f32; 4] {
        // SAFETY: the caller has the instructions; the array is as large as the vector.
        unsafe {
            let half = |v: Self| {
                let (lo, hi) = (_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
                _mm_add_ps(lo, hi)
            };
            let [a, b, c, d] = all.map(half);
            let ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
            let cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
            let even = _mm_shuffle_ps::<0b10_00_10_00>(ab, cd);
            let odd = _mm_shuffle_ps::<0b11_01_11_01>(ab, cd);
            let mut sums = [0.0; 4];
            _mm_storeu_ps(sums.as_mut_ptr(), _mm_add_ps(even, odd));
            sums
        }
    }
    #[inline(always)]
    unsafe fn max_lane(self) -> f32 {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe {
            let q = _mm_max_ps(
                _mm256_castps256_ps128(self),
                _mm256_extractf128_ps::<1>(self),
            );
            let d = _mm_max_ps(q, _mm_movehl_ps(q, q));
            _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)))
        }
    }
}
