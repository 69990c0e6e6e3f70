//! The linear's kernels allocate nothing: counted over all threads while they run.
//! Invariant: this file has one test, so nothing else in the process allocates meanwhile.
//! Absent on purpose: results. They are tested beside the kernels.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use tallow_cpu::exec::Exec;
use tallow_cpu::linear::*;
use tallow_cpu::pool::Pool;
use tallow_cpu::simd::Isa;

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const M: usize = 130;
const K: usize = 96;
const N: usize = 80;
const R: usize = 8;

#[test]
fn kernels_allocate_nothing() {
    let pool = Pool::new(3);
    let exec = Exec {
        isa: Isa::best(),
        pool: &pool,
    };
    let ones = vec![1.0f32; M * N.max(K)];
    let w = vec![0.5f32; N * K];
    let (mut nk, mut kn) = (
        vec![0.0f32; packed_len(N, K)],
        vec![0.0f32; packed_len(K, N)],
    );
    pack_nk(&pool, &w, (N, K), &mut nk);
    pack_kn(&pool, &w, (N, K), &mut kn);
    let adapter = Some(Adapter {
        rank: R,
        scale: 2.0,
        a: w.as_ptr(),
        b: w.as_ptr(),
        tail: std::ptr::null(),
        turned: std::ptr::null(),
    });
    let block = |weights: &[f32]| Block {
        n: N,
        weights: weights.as_ptr(),
        bias: std::ptr::null(),
        adapter,
    };
    let (up, down) = ([block(&nk)], [block(&kn)]);
    let floats = forward_workspace(&up, 1, K, 3)
        .max(backward_workspace(&down, 1, 3))
        .max(gemm_workspace(3));
    let mut workspace = vec![0.0f32; floats];
    let (mut y, mut h) = (vec![0.0f32; M * N.max(K)], vec![0.0f32; M * R]);
    let none = Rows::<*const f32>::NONE;
    let rows = |at: &[f32], row: usize| Rows {
        at: at.as_ptr(),
        row,
    };
    let mut all = || {
        let out = Rows {
            at: y.as_mut_ptr(),
            row: N,
        };
        let hidden = Rows {
            at: h.as_mut_ptr(),
            row: R,
        };
        let x = rows(&ones, K);
        let job = Forward {
            m: M,
            k: K,
            x,
            shares: 1,
            blocks: &up,
            y: out,
            residual: none,
            h: &[hidden],
        };
        // SAFETY: every matrix was made for these sizes.
        unsafe { forward(exec, &job, &mut workspace) };
        let dx = Rows {
            at: y.as_mut_ptr(),
            row: K,
        };
        let dy = rows(&ones, N);
        let job = Backward {
            m: M,
            k: K,
            dy,
            shares: 1,
            blocks: &down,
            dx,
            residual: none,
            dh: &[hidden],
        };
        // SAFETY: as above.
        unsafe { backward(exec, &job, &mut workspace) };
        let (a, b) = (rows(&ones, R), rows(&ones, K));
        let job = Outer {
            m: M,
            r: R,
            n: K,
            scale: 1.0,
            a,
            b,
            out: dx,
            transposed: false,
        };
        // SAFETY: as above.
        unsafe { outer(exec, &job) };
        let strided = |at: &[f32], row: usize| Strided {
            at: at.as_ptr(),
            batch: 0,
            row,
            col: 1,
        };
        let job = Gemm {
            batch: 1,
            m: M,
            n: K,
            k: N,
            alpha: 1.0,
            a: strided(&ones, N),
            b: strided(&w, K),
            c: dx,
            c_batch: 0,
        };
        // SAFETY: as above.
        unsafe { gemm(exec, &job, &mut workspace) };
    };
    // A busy machine may start the workers late, and starting allocates.
    for _ in 0..20 {
        all();
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for _ in 0..50 {
        all();
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0);
    assert!(h.iter().all(|v| v.is_finite()));
}
