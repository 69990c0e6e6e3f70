//! One instruction over the lanes of a block.
//! Invariant: lanes are read before they are written, so the result may lie where an operand does; an
//! op without a vector version here runs by the table's reference, so a new op runs everywhere.
//! Absent on purpose: anything that sees more than one lane.

use tallow_core::scalar::ScalarOp;

use crate::exec::spans;
use crate::simd::{F32x8, Vector};
use crate::vecmath::{self, WIDE, log_lane};

/// Lanes computed side by side.
type Wide = [f32; WIDE];

/// `to[i] = op(args[0][i], ..)` for `i < n`. Arguments beyond the op's arity are not read.
///
/// # Safety
/// The machine has the instructions; `n` elements are readable and writable; an argument lies
/// exactly where the result does or does not overlap it.
#[inline(always)]
pub(super) unsafe fn apply<V: Vector>(op: ScalarOp, to: *mut f32, args: [*const f32; 3], n: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        if !vector::<V>(op, to, args, n) {
            reference(op, to, args, n);
        }
    }
}

/// Has `op` a vector version?
pub(super) fn has_vector(op: ScalarOp) -> bool {
    // SAFETY: of no lanes, none is read or written; `F32x8` needs nothing of the machine.
    unsafe { vector::<F32x8>(op, std::ptr::null_mut(), [std::ptr::null(); 3], 0) }
}

/// [`apply`] for the ops that have a vector version; for others nothing, and false.
///
/// # Safety
/// As for [`apply`].
#[inline(always)]
unsafe fn vector<V: Vector>(op: ScalarOp, to: *mut f32, args: [*const f32; 3], n: usize) -> bool {
    let [a, b, c] = args;
    // SAFETY: the caller's promise.
    unsafe {
        match op {
            ScalarOp::Add => binary(to, a, b, n, |a, b| a + b),
            ScalarOp::Sub => binary(to, a, b, n, |a, b| a - b),
            ScalarOp::Mul => binary(to, a, b, n, |a, b| a * b),
            ScalarOp::Div => binary(to, a, b, n, |a, b| a / b),
            ScalarOp::Max => binary(to, a, b, n, f32::max),
            ScalarOp::Min => binary(to, a, b, n, f32::min),
            ScalarOp::Less => binary(to, a, b, n, |a, b| if a < b { 1.0 } else { 0.0 }),
            ScalarOp::Equal => binary(to, a, b, n, |a, b| if a == b { 1.0 } else { 0.0 }),
            ScalarOp::Select => select(to, a, b, c, n),
            ScalarOp::Neg => unary(to, a, n, |a| -a),
            ScalarOp::Abs => unary(to, a, n, f32::abs),
            ScalarOp::Sqrt => unary(to, a, n, f32::sqrt),
            ScalarOp::Rsqrt => unary(to, a, n, |a| 1.0 / a.sqrt()),
            ScalarOp::Recip => unary(to, a, n, |a| 1.0 / a),
            ScalarOp::Log => unary(to, a, n, log_lane),
            ScalarOp::Sin => wide(to, a, n, |x| vecmath::sin_cos(x).0),
            ScalarOp::Cos => wide(to, a, n, |x| vecmath::sin_cos(x).1),
            ScalarOp::Exp => {
                spans!(V, n, i, s => { s.store(vecmath::exp(s.load(a.add(i))), to.add(i)) });
            }
            ScalarOp::Tanh => {
                spans!(V, n, i, s => { s.store(vecmath::tanh(s.load(a.add(i))), to.add(i)) });
            }
            ScalarOp::Sigmoid => {
                spans!(V, n, i, s => { s.store(vecmath::sigmoid(s.load(a.add(i))), to.add(i)) });
            }
            _ => return false,
        }
    }
    true
}

/// # Safety
/// `k <= 16` elements are readable.
#[inline(always)]
unsafe fn read(p: *const f32, k: usize) -> Wide {
    // SAFETY: the caller's promise.
    unsafe {
        if k == WIDE {
            return p.cast::<Wide>().read_unaligned();
        }
        let mut x = [0.0; WIDE];
        std::ptr::copy_nonoverlapping(p, x.as_mut_ptr(), k);
        x
    }
}

/// # Safety
/// `k <= 16` elements are writable.
#[inline(always)]
unsafe fn write(x: &Wide, p: *mut f32, k: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        if k == WIDE {
            p.cast::<Wide>().write_unaligned(*x);
        } else {
            std::ptr::copy_nonoverlapping(x.as_ptr(), p, k);
        }
    }
}

/// # Safety
/// As for [`apply`].
#[inline(always)]
unsafe fn unary(to: *mut f32, a: *const f32, n: usize, f: impl Fn(f32) -> f32) {
    for i in (0..n).step_by(WIDE) {
        let k = WIDE.min(n - i);
        // SAFETY: the caller's promise.
        unsafe {
            let mut x = read(a.add(i), k);
            for x in &mut x {
                *x = f(*x);
            }
            write(&x, to.add(i), k);
        }
    }
}

/// As [`unary`], for a function of 16 lanes.
///
/// # Safety
/// As for [`apply`].
#[inline(always)]
unsafe fn wide(to: *mut f32, a: *const f32, n: usize, f: impl Fn(&Wide) -> Wide) {
    for i in (0..n).step_by(WIDE) {
        let k = WIDE.min(n - i);
        // SAFETY: the caller's promise.
        unsafe { write(&f(&read(a.add(i), k)), to.add(i), k) };
    }
}

/// # Safety
/// As for [`apply`].
#[inline(always)]
unsafe fn binary(
    to: *mut f32,
    a: *const f32,
    b: *const f32,
    n: usize,
    f: impl Fn(f32, f32) -> f32,
) {
    for i in (0..n).step_by(WIDE) {
        let k = WIDE.min(n - i);
        // SAFETY: the caller's promise.
        unsafe {
            let mut x = read(a.add(i), k);
            let y = read(b.add(i), k);
            for (x, y) in x.iter_mut().zip(y) {
                *x = f(*x, y);
            }
            write(&x, to.add(i), k);
        }
    }
}

/// # Safety
/// As for [`apply`].
#[inline(always)]
unsafe fn select(to: *mut f32, a: *const f32, b: *const f32, c: *const f32, n: usize) {
    for i in (0..n).step_by(WIDE) {
        let k = WIDE.min(n - i);
        // SAFETY: the caller's promise.
        unsafe {
            let (a, b) = (read(a.add(i), k), read(b.add(i), k));
            let mut x = read(c.add(i), k);
            for l in 0..WIDE {
                x[l] = if a[l] != 0.0 { b[l] } else { x[l] };
            }
            write(&x, to.add(i), k);
        }
    }
}

/// The meaning of any op, one lane after another in f64.
///
/// # Safety
/// As for [`apply`].
pub(super) unsafe fn reference(op: ScalarOp, to: *mut f32, args: [*const f32; 3], n: usize) {
    let mut x = [0.0; 3];
    let x = &mut x[..op.arity()];
    for i in 0..n {
        // SAFETY: the caller's promise.
        unsafe {
            for (x, from) in x.iter_mut().zip(&args) {
                *x = f64::from(*from.add(i));
            }
            *to.add(i) = op.eval(x) as f32;
        }
    }
}
