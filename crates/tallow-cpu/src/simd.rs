//! Instruction sets found at run time, and the small vector vocabulary that kernels are written in.
//! Invariant: a kernel body is written once over [`Vector`] and compiled once for each [`Isa`];
//! an [`Isa`] value other than `Portable` exists only on a machine that has those instructions.
//! Absent on purpose: maths functions (they live with the kernels that need them).

use crate::error::Error;

#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use portable::F32x8;

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// As `Avx512`, and products of pairs of bf16 (`vdpbf16ps`).
    Avx512Bf16,
    /// AVX-512 F, VL, DQ, BW, CD: 16 lanes, 32 registers.
    Avx512,
    /// AVX2, FMA, F16C: 8 lanes, 16 registers.
    Avx2,
    /// 64-bit ARM: 4 lanes, 32 registers.
    Neon,
    /// Whatever the compiler's baseline target has.
    Portable,
}

impl Isa {
    /// Every instruction set of this machine, the fastest first. `Portable` is always the last.
    pub fn available() -> impl Iterator<Item = Isa> {
        [
            Isa::Avx512Bf16,
            Isa::Avx512,
            Isa::Avx2,
            Isa::Neon,
            Isa::Portable,
        ]
        .into_iter()
        .filter(|isa| isa.is_available())
    }

    /// The fastest instruction set of this machine, or the one that `TALLOW_ISA` asks for.
    ///
    /// # Errors
    /// [`Error::Isa`] if `TALLOW_ISA` names one that is unknown or not available here.
    pub fn detect() -> Result<Isa, Error> {
        match std::env::var_os("TALLOW_ISA") {
            None => Ok(Isa::best()),
            Some(value) => Isa::named(&value.to_string_lossy()),
        }
    }

    /// The fastest instruction set of this machine, whatever the environment says.
    #[must_use]
    pub fn best() -> Isa {
        Isa::available().next().unwrap_or(Isa::Portable)
    }

    /// The instruction set of that name: `avx512bf16`, `avx512`, `avx2`, `neon` or `portable`.
    ///
    /// # Errors
    /// [`Error::Isa`] if it is unknown or not available here.
    pub fn named(value: &str) -> Result<Isa, Error> {
        Isa::available()
            .find(|isa| isa.name() == value)
            .ok_or_else(|| Error::Isa {
                value: value.to_owned(),
                valid: Isa::available()
                    .map(Isa::name)
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }

    /// The name that `TALLOW_ISA` takes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Neon => "neon",
            Isa::Portable => "portable",
        }
    }

    /// Does it have 16 lanes of f32?
    pub(crate) fn is_512(self) -> bool {
        matches!(self, Isa::Avx512 | Isa::Avx512Bf16)
    }

    fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Isa::Avx512.is_available() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512cd")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            _ => false,
        }
    }

    /// Runs `kernel` compiled for this instruction set.
    ///
    /// # Safety
    /// The machine has `self` (as every value from [`Isa::available`] does), and what the kernel's
    /// own `call` asks for holds.
    #[inline]
    pub unsafe fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the caller promises that the machine has it. Kernels are f32; those of pairs of
            // bf16 are called by name.
            Isa::Avx512 | Isa::Avx512Bf16 => unsafe { x86::call_avx512(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { x86::call_avx2(kernel) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            Isa::Neon => unsafe { neon::call_neon(kernel) },
            // SAFETY: `F32x8` needs nothing of the machine; the rest the caller promises.
            _ => unsafe { kernel.call::<F32x8>() },
        }
    }
}

/// A kernel body, generic over the vector it works with.
///
/// `call` and everything it uses must be `#[inline(always)]` (no closures in hot loops): only then
/// is it compiled with the instructions of the [`Isa`] it was dispatched to.
pub trait Kernel {
    /// What the kernel returns.
    type Output;

    /// The body.
    ///
    /// # Safety
    /// The machine has the instructions of `V`; the rest is the kernel's to say.
    unsafe fn call<V: Vector>(self) -> Self::Output;
}

/// A vector of f32 lanes.
///
/// # Safety
/// An implementor reads and writes exactly the lanes that a method names.
/// Every method may be called only where the machine has the vector's instructions; pointers need
/// the alignment of one element.
#[expect(
    clippy::missing_safety_doc,
    reason = "said once, for all methods, above"
)]
pub unsafe trait Vector: Copy {
    /// Lanes: 4, 8 or 16.
    const LANES: usize;
    /// Rows of a register block 32 columns wide that fit the register file.
    const TILE_ROWS: usize;
    /// Which of the lanes take part in a load or a store.
    type Mask: Copy;

    /// The first `n` lanes, `n <= LANES`.
    unsafe fn mask(n: usize) -> Self::Mask;
    /// All lanes zero.
    unsafe fn zero() -> Self;
    /// All lanes `x`.
    unsafe fn splat(x: f32) -> Self;
    /// `LANES` elements from `p`.
    unsafe fn load(p: *const f32) -> Self;
    /// The masked elements from `p`, zero elsewhere. The others are not touched.
    unsafe fn load_mask(p: *const f32, mask: Self::Mask) -> Self;
    /// `LANES` bf16 bit patterns from `p`, widened.
    unsafe fn load_bf16(p: *const u16) -> Self;
    /// `2 * LANES` bf16 bit patterns from `p`, widened: those at even places, those at odd ones.
    unsafe fn load_bf16_pairs(p: *const u16) -> (Self, Self);
    /// Writes `LANES` elements to `p`.
    unsafe fn store(self, p: *mut f32);
    /// Writes the masked elements to `p`. The others are not touched.
    unsafe fn store_mask(self, p: *mut f32, mask: Self::Mask);
    /// `self + b`
    unsafe fn add(self, b: Self) -> Self;
    /// `self - b`
    unsafe fn sub(self, b: Self) -> Self;
    /// `self * b`
    unsafe fn mul(self, b: Self) -> Self;
    /// `self / b`
    unsafe fn div(self, b: Self) -> Self;
    /// `self * b + c`, rounded once where the machine can (not in `F32x8`).
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// The larger of each pair. `b` where either is NaN.
    unsafe fn max(self, b: Self) -> Self;
    /// The smaller of each pair. `b` where either is NaN.
    unsafe fn min(self, b: Self) -> Self;
    /// The square root.
    unsafe fn sqrt(self) -> Self;
    /// The nearest integer, ties to even, for magnitudes below 2^22.
    unsafe fn round(self) -> Self;
    /// Two to the power of `self`, an integer from -126 to 127.
    unsafe fn exp2i(self) -> Self;
    /// `self * 2^n` for an integer `n` from -252 to 254; a result below the normal numbers may be
    /// rounded twice.
    #[inline(always)]
    unsafe fn scale2(self, n: Self) -> Self {
        // SAFETY: the caller has the instructions.
        unsafe {
            let half = n.mul(Self::splat(0.5)).round();
            self.mul(half.exp2i()).mul(n.sub(half).exp2i())
        }
    }
    /// `x` in the lanes where `self < b`, `y` elsewhere (also where one is NaN).
    unsafe fn lt_select(self, b: Self, x: Self, y: Self) -> Self;
    /// The sum of all lanes, as a balanced tree: halves are added until one lane is left.
    unsafe fn sum(self) -> f32;
    /// [`Vector::sum`] of each, in fewer steps and with the same bits.
    #[inline(always)]
    unsafe fn sum_each(all: [Self; 4]) -> [f32; 4] {
        // SAFETY: the caller's promise.
        all.map(|v| unsafe { v.sum() })
    }
    /// The largest lane. Unspecified if one is NaN.
    unsafe fn max_lane(self) -> f32;
}

/// Elements of a cache line.
pub(crate) const LINE_ELEMS: usize = 16;

/// Asks for the cache line of `p` ahead of its use. Any address will do.
#[inline(always)]
pub fn prefetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address is harmless, and every x86-64 has it.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Asks for the cache line of `p` into the second-level cache ahead of its use. Any address will do.
#[inline(always)]
pub fn prefetch_far<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address is harmless, and every x86-64 has it.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

#[cfg(test)]
mod tests;
