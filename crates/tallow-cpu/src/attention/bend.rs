//! Capped scores: `cap * tanh(x / cap)`, and the slope of that.
//! Invariant: a score's bits depend on that score alone, wherever in a row it stands.
//! Absent on purpose: masks; what is hidden is hidden afterwards.

use crate::exec::spans;
use crate::simd::Vector;
use crate::vecmath::tanh;

/// Bends `n` scores in place, where there is a cap.
///
/// # Safety
/// The machine has the instructions; `scores` has `n` elements.
#[inline(always)]
pub(super) unsafe fn bend<V: Vector>(cap: Option<f32>, scores: *mut f32, n: usize) {
    let Some(cap) = cap else { return };
    // SAFETY: the caller's promise.
    unsafe {
        let (cap, part) = (V::splat(cap), V::splat(1.0 / cap));
        spans!(V, n, j, s => {
            let p = scores.add(j);
            s.store(tanh(s.load(p).mul(part)).mul(cap), p);
        });
    }
}

/// `1 - (y / cap)^2` from the bent score `y` and `part = 1 / cap`; 0 for a hidden score, minus infinity.
///
/// # Safety
/// The machine has the instructions.
#[inline(always)]
pub(super) unsafe fn slope<V: Vector>(y: V, part: V) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        let t = y.mul(part);
        let minus = V::zero().sub(t);
        minus.mul_add(t, V::splat(1.0)).max(V::zero())
    }
}
