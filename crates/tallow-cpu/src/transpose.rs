//! 32 rows of a matrix as 32 lanes.
//! Invariant: whole blocks of four by four, which compilers turn into shuffles.
//! Absent on purpose: general transposition; that is a strided copy.

/// Rows that become lanes.
pub(crate) const LANES: usize = 32;

/// `dst[l, lane] = rows[lane, l]` for `l < d`; `rows: [32, padded]`, `dst: [padded, 32]`.
///
/// # Safety
/// Both have that many elements and do not overlap.
#[inline(always)]
pub(crate) unsafe fn transpose(rows: *const f32, padded: usize, dst: *mut f32) {
    const N: usize = 4;
    for i in (0..LANES).step_by(N) {
        for l in (0..padded).step_by(N) {
            // SAFETY: `padded` and 32 are multiples of four: all within both.
            unsafe {
                let at = |k: usize| rows.add((i + k) * padded + l).cast::<[f32; N]>();
                let a: [[f32; N]; N] = std::array::from_fn(|k| at(k).read_unaligned());
                let columns: [[f32; N]; N] = std::array::from_fn(|k| a.map(|row| row[k]));
                for (k, column) in columns.into_iter().enumerate() {
                    let to = dst.add((l + k) * LANES + i);
                    to.cast::<[f32; N]>().write_unaligned(column);
                }
            }
        }
    }
}
