//! The vector of machines without a known instruction set: eight lanes left to the compiler.
//! Invariant: plain Rust, valid anywhere.
//! Absent on purpose: fused multiply-add. Without the instruction it is a slow library call.

use super::Vector;

/// Eight f32 lanes in an array.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub struct F32x8([f32; 8]);

impl F32x8 {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }

    #[inline(always)]
    fn map(self, f: impl Fn(f32) -> f32) -> Self {
        Self(self.0.map(f))
    }
}

// SAFETY: loads and stores go through unaligned reads and writes of exactly the named elements.
unsafe impl Vector for F32x8 {
    const LANES: usize = 8;
    const TILE_ROWS: usize = 1;
    type Mask = usize;

    #[inline(always)]
    unsafe fn mask(n: usize) -> usize {
        n
    }
    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; 8])
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; 8])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller gives eight readable elements.
        Self(unsafe { p.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_mask(p: *const f32, mask: usize) -> Self {
        let mut out = [0.0; 8];
        for (i, o) in out.iter_mut().enumerate() {
            if i < mask {
                // SAFETY: the caller gives `mask` readable elements.
                *o = unsafe { *p.add(i) };
            }
        }
        Self(out)
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: the caller gives eight readable elements.
        let bits = unsafe { p.cast::<[u16; 8]>().read_unaligned() };
        Self(bits.map(|b| f32::from_bits(u32::from(b) << 16)))
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(p: *const u16) -> (Self, Self) {
        // SAFETY: the caller gives sixteen readable elements.
        let bits = unsafe { p.cast::<[u16; 16]>().read_unaligned() };
        let widen = |b: u16| f32::from_bits(u32::from(b) << 16);
        let odd = std::array::from_fn(|i| widen(bits[2 * i + 1]));
        (Self(std::array::from_fn(|i| widen(bits[2 * i]))), Self(odd))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller gives eight writable elements.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn store_mask(self, p: *mut f32, mask: usize) {
        for (i, v) in self.0.into_iter().enumerate() {
            if i < mask {
                // SAFETY: the caller gives `mask` writable elements.
                unsafe { *p.add(i) = v }
            }
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        self.zip(b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * b.0[i] + c.0[i]))
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        self.zip(b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        self.zip(b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        self.map(f32::sqrt)
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // Adding 1.5 * 2^23 leaves no fraction bits; the addition rounds to nearest even.
        const SHIFT: f32 = 12_582_912.0;
        self.map(|a| (a + SHIFT) - SHIFT)
    }
    #[inline(always)]
    unsafe fn exp2i(self) -> Self {
        self.map(|a| f32::from_bits(((a as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn lt_select(self, b: Self, x: Self, y: Self) -> Self {
        let mut out = y.0;
        for (i, o) in out.iter_mut().enumerate() {
            if self.0[i] < b.0[i] {
                *o = x.0[i];
            }
        }
        Self(out)
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let a = self.0;
        let b = [a[0] + a[4], a[1] + a[5], a[2] + a[6], a[3] + a[7]];
        (b[0] + b[2]) + (b[1] + b[3])
    }
    #[inline(always)]
    unsafe fn max_lane(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}
