//! What this machine could do at most: multiply-adds that depend on nothing, and reading that computes nothing.
//! Invariant: each run does exactly the work it reports; whoever calls holds the clock.
//! Absent on purpose: time, and any judgement of what is measured.

use std::hint::black_box;

use crate::exec::Exec;
use crate::simd::{Isa, Kernel, Vector};

/// Independent sums: enough to hide the latency of a multiply-add on every processor known.
const CHAINS: usize = 12;

/// Which multiply-add is probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// f32 into f32.
    F32,
    /// Pairs of bf16 into f32. Where the processor has no instruction for it, they are widened and it is as [`Product::F32`].
    BF16,
}

/// Runs `steps` rounds of multiply-adds on every thread of `exec`. Returns the floating point operations done.
///
/// # Panics
/// If this machine lacks `exec.isa`.
pub fn multiply_adds(exec: Exec<'_>, product: Product, steps: usize) -> f64 {
    let isa = checked(exec.isa);
    let pairs = product == Product::BF16 && isa == Isa::Avx512Bf16;
    exec.pool.run(exec.pool.threads(), &|_, _| {
        if pairs {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `checked` says that the machine has the instructions.
            black_box(unsafe { burn_bf16_pairs(steps) });
        } else {
            // SAFETY: `checked` says that the machine has `isa`.
            black_box(unsafe { isa.dispatch(Burn(steps)) });
        }
    });
    let each = lanes(isa) * if pairs { 4 } else { 2 };
    (each * CHAINS * steps * exec.pool.threads()) as f64
}

/// Reads all of `data` `passes` times, each thread its own part, the same part in every call. Returns the bytes read.
///
/// # Panics
/// If this machine lacks `exec.isa`.
pub fn read(exec: Exec<'_>, data: &[f32], passes: usize) -> usize {
    let isa = checked(exec.isa);
    let threads = exec.pool.threads();
    let group = 8 * lanes(isa);
    let per = data.len() / threads / group * group;
    exec.pool.run(threads, &|part, _| {
        for _ in 0..passes {
            let part = black_box(&data[part * per..][..per]);
            // SAFETY: `checked` says that the machine has `isa`.
            black_box(unsafe { isa.dispatch(Read(part)) });
        }
    });
    per * threads * 4 * passes
}

fn checked(isa: Isa) -> Isa {
    match Isa::named(isa.name()) {
        Ok(isa) => isa,
        Err(_) => panic!("bug in tallow: this machine lacks {}", isa.name()),
    }
}

fn lanes(isa: Isa) -> usize {
    match isa {
        Isa::Avx512 | Isa::Avx512Bf16 => 16,
        Isa::Neon => 4,
        _ => 8,
    }
}

struct Burn(usize);

impl Kernel for Burn {
    type Output = f32;

    #[inline(always)]
    unsafe fn call<V: Vector>(self) -> f32 {
        // SAFETY: dispatched, so the machine has the instructions.
        unsafe {
            let mut sums = [V::splat(black_box(0.5)); CHAINS];
            let (a, b) = (V::splat(black_box(0.999)), V::splat(black_box(1e-3)));
            for _ in 0..self.0 {
                for s in &mut sums {
                    *s = s.mul_add(a, b);
                }
            }
            sums.into_iter().fold(V::zero(), |x, y| x.add(y)).sum()
        }
    }
}

/// # Safety
/// The machine has the instructions named.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn burn_bf16_pairs(steps: usize) -> f32 {
    use std::arch::x86_64::*;
    let one = _mm512_set1_ps(black_box(1e-3));
    let a = _mm512_cvtne2ps_pbh(one, one);
    let mut sums = [_mm512_set1_ps(black_box(0.5)); CHAINS];
    for _ in 0..steps {
        for s in &mut sums {
            *s = _mm512_dpbf16_ps(*s, a, a);
        }
    }
    let sum = sums.into_iter().fold(one, |x, y| _mm512_add_ps(x, y));
    _mm512_reduce_add_ps(sum)
}

/// Sums a slice with eight chains.
struct Read<'a>(&'a [f32]);

impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn call<V: Vector>(self) -> f32 {
        // SAFETY: dispatched; whole groups of eight vectors stay inside the slice.
        unsafe {
            let mut sums = [V::zero(); 8];
            let group = 8 * V::LANES;
            for i in 0..self.0.len() / group {
                for (j, s) in sums.iter_mut().enumerate() {
                    *s = s.add(V::load(self.0.as_ptr().add(i * group + j * V::LANES)));
                }
            }
            sums.into_iter().fold(V::zero(), |x, y| x.add(y)).sum()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::Pool;

    #[test]
    fn what_is_done_is_what_is_reported() {
        let pool = Pool::new(2);
        for isa in Isa::available() {
            let exec = Exec { isa, pool: &pool };
            let flops = multiply_adds(exec, Product::F32, 10);
            assert_eq!(flops, (2 * lanes(isa) * CHAINS * 10 * 2) as f64);
            assert!(multiply_adds(exec, Product::BF16, 10) >= flops);
            // Two parts of whole groups; what is left over is neither read nor counted.
            let group = 8 * lanes(isa);
            let data = vec![1.0; 4 * group + 2 * group - 1];
            assert_eq!(read(exec, &data, 3), 3 * 4 * 4 * group);
            // SAFETY: `isa` is available.
            let sum = unsafe { isa.dispatch(Read(&data[..2 * group])) };
            assert_eq!(sum, (2 * group) as f32);
        }
    }
}
