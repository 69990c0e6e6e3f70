//! The product of few outputs: `y = x Wᵀ + bias` with `W: [n, k]` as a checkpoint has it.
//! Invariant: an output's bits depend on the instruction set and `k` alone.
//! Absent on purpose: adapters, a residual, and panels: 32 columns wide, they would mostly be padding.

use super::dots::{self, Dots};
use super::{Raw, Rows, add_row};
use crate::exec::Exec;

/// The most outputs for which this is worth trying.
pub const THIN: usize = 64;

/// A product.
#[derive(Clone, Copy, Debug)]
pub struct Thin {
    /// Rows.
    pub m: usize,
    /// Inputs.
    pub k: usize,
    /// Outputs.
    pub n: usize,
    /// `[m, k]`
    pub x: Rows<*const f32>,
    /// `[n, k]`, dense.
    pub w: *const f32,
    /// `[n]`, or null.
    pub bias: *const f32,
    /// `[m, n]`, written.
    pub y: Rows<*mut f32>,
}

/// Terms of a task: a microsecond or two of a vector unit.
const MIN_TERMS: usize = 1 << 17;
/// Tasks a thread, so that a thread that comes late leaves its share to others.
const PER_THREAD: usize = 2;

/// Computes `job` on the threads of `exec`.
///
/// # Safety
/// The machine has `exec.isa`; the matrices are readable and writable as [`Thin`] says, and `y` overlaps nothing that is read.
pub unsafe fn thin(exec: Exec<'_>, job: &Thin) {
    let threads = exec.pool.threads();
    let most = match threads {
        1 => 1,
        n => (n * PER_THREAD).min(job.m),
    };
    let tasks = (job.m * job.n * job.k / MIN_TERMS).clamp(1, most.max(1));
    let shared = Raw(*job);
    exec.pool.run(tasks, &|task, _| {
        let job = shared.get();
        let (row, end) = (task * job.m / tasks, (task + 1) * job.m / tasks);
        let y = Rows {
            at: job.y.at.wrapping_add(row * job.y.row),
            ..job.y
        };
        let dots = Dots {
            m: end - row,
            n: job.n,
            k: job.k,
            x: job.x.at.wrapping_add(row * job.x.row),
            x_row: job.x.row,
            w: job.w,
            w_row: job.k,
            y: y.at,
            y_row: y.row,
        };
        // SAFETY: the caller's promise; each task writes rows of its own.
        unsafe {
            dots::run(exec.isa, &dots);
            if !job.bias.is_null() {
                add_row(end - row, job.n, y, job.bias);
            }
        }
    });
}
