//! The vector of 64-bit ARM.
//! Invariant: one intrinsic (or a short run of them) a method.
//! Absent on purpose: SVE. Run under emulation only so far.

use std::arch::aarch64::*;

use super::{Kernel, Vector};

/// # Safety
/// The machine has NEON, and what `kernel` asks for holds.
#[target_feature(enable = "neon")]
pub(super) unsafe fn call_neon<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's promise.
    unsafe { kernel.call::<float32x4_t>() }
}

// SAFETY: unaligned or masked loads and stores touch exactly the lanes that the method names.
unsafe impl Vector for float32x4_t {
    const LANES: usize = 4;
    const TILE_ROWS: usize = 3;
    type Mask = usize;

    #[inline(always)]
    unsafe fn mask(n: usize) -> Self::Mask {
        n
    }
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { vdupq_n_f32(0.0) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { vld1q_f32(p) }
    }
    #[inline(always)]
    unsafe fn load_mask(p: *const f32, mask: Self::Mask) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe {
            let mut t = [0.0f32; 4];
            for (i, t) in t.iter_mut().enumerate() {
                if i < mask {
                    *t = *p.add(i);
                }
            }
            vld1q_f32(t.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(vld1_u16(p)))) }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(p: *const u16) -> (Self, Self) {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe {
            let both = vreinterpretq_u32_u16(vld1q_u16(p));
            let odd = vandq_u32(both, vdupq_n_u32(0xffff_0000));
            (
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(both)),
                vreinterpretq_f32_u32(odd),
            )
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { vst1q_f32(p, self) }
    }
    #[inline(always)]
    unsafe fn store_mask(self, p: *mut f32, mask: Self::Mask) {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe {
            let mut t = [0.0f32; 4];
            vst1q_f32(t.as_mut_ptr(), self);
            for (i, t) in t.into_iter().enumerate() {
                if i < mask {
                    *p.add(i) = t;
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { vaddq_f32(self, b) }
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { vsubq_f32(self, b) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { vmulq_f32(self, b) }
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { vdivq_f32(self, b) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { vfmaq_f32(c, self, b) }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { vbslq_f32(vcgtq_f32(self, b), self, b) }
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { vbslq_f32(vcltq_f32(self, b), self, b) }
    }
    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { vsqrtq_f32(self) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { vrndnq_f32(self) }
    }
    #[inline(always)]
    unsafe fn exp2i(self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe {
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(
                vcvtq_s32_f32(self),
                vdupq_n_s32(127),
            )))
        }
    }
    #[inline(always)]
    unsafe fn lt_select(self, b: Self, x: Self, y: Self) -> Self {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { vbslq_f32(vcltq_f32(self, b), x, y) }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe {
            let d = vadd_f32(vget_low_f32(self), vget_high_f32(self));
            vget_lane_f32::<0>(d) + vget_lane_f32::<1>(d)
        }
    }
    #[inline(always)]
    unsafe fn max_lane(self) -> f32 {
        // SAFETY: the caller has the instructions and gives the elements.
        unsafe { vmaxvq_f32(self) }
    }
}
