//! The one call of another library whose interface is unsafe.
//! Invariant: lengths are asserted before pointers are made.
#![expect(unsafe_code, reason = "gemm has no safe interface")]

/// See [`super::local::Product`].
pub(super) fn gemm_xwt(
    (m, n, k): (usize, usize, usize),
    y: &mut [f32],
    x: &[f32],
    w: &[f32],
    add_scaled: Option<f32>,
    threads: usize,
) {
    assert!(y.len() == m * n && x.len() == m * k && w.len() == n * k);
    let parallelism = match threads {
        0 | 1 => gemm::Parallelism::None,
        _ => gemm::Parallelism::Rayon(threads),
    };
    // SAFETY: the assertion above gives every pointer the m·n, m·k and n·k elements that these strides reach, and `y` is
    // borrowed mutably, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            y.as_mut_ptr(),
            1,
            n as isize,
            add_scaled.is_some(),
            x.as_ptr(),
            1,
            k as isize,
            w.as_ptr(),
            k as isize,
            1,
            1.0,
            add_scaled.unwrap_or(1.0),
            false,
            false,
            false,
            parallelism,
        );
    }
}
