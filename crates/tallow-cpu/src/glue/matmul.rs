//! Plain products over the two innermost axes, with any strides; gradients of adapters are the narrow ones.
//! Invariant: only f32 matrices at even distances are offered a kernel.
//! Absent on purpose: packed weights; a product with frozen ones is a linear.
use super::linear::{out_rows, rows_of};
use super::{Io, Offer, row_stride};
use crate::device::Cpu;
use crate::linear::{Gemm, Outer, Strided, gemm_workspace, outer};
use tallow_core::{
    kernel::{KernelSpec, Operand},
    types::DType,
};

/// Products over the two innermost axes, with any strides.
pub(super) fn matmul(cpu: &Cpu, ta: bool, tb: bool, alpha: f32, spec: &KernelSpec) -> Vec<Offer> {
    const DEARER: f64 = 1.5;
    let packed = general(cpu, ta, tb, alpha, spec);
    let narrow = adapter_gradient(ta, tb, alpha, spec);
    match narrow {
        Some((narrow, few)) if few <= FEW => {
            let packed = packed.map(|p| p.dearer(DEARER));
            [narrow].into_iter().chain(packed).collect()
        }
        narrow => {
            let narrow = narrow.map(|(n, _)| n.dearer(DEARER));
            packed.into_iter().chain(narrow).collect()
        }
    }
}

/// Up to so many columns the narrow kernel is thought to be the faster one.
const FEW: usize = 64;
/// Beyond so many it is not worth trying.
const MOST: usize = 256;

/// `dA = dhᵀ x` and `dB = s dyᵀ h`: few columns on one side (how many is in the answer), a long sum over rows.
fn adapter_gradient(ta: bool, tb: bool, alpha: f32, spec: &KernelSpec) -> Option<(Offer, usize)> {
    let (a, b, c) = (&spec.inputs[0], &spec.inputs[1], spec.outputs[0].as_ref()?);
    let f32s = [a, b, c].iter().all(|o| o.dtype == DType::F32);
    if !(ta && !tb && f32s && a.layout.shape.rank() == 2) {
        return None;
    }
    let (m, p, q) = (
        a.layout.shape.0[0],
        a.layout.shape.0[1],
        b.layout.shape.0[1],
    );
    let (a_row, b_row, c_row) = (row_stride(a)?, row_stride(b)?, row_stride(c)?);
    let transposed = p > q;
    let r = p.min(q);
    if r > MOST {
        return None;
    }
    let offer = Offer::new("matmul_tn_outer_f32", move |io| {
        let (first, second) = (rows_of(io, 0, a_row), rows_of(io, 1, b_row));
        let (few, many) = if transposed {
            (second, first)
        } else {
            (first, second)
        };
        let job = Outer {
            m,
            r,
            n: p.max(q),
            scale: alpha,
            a: few,
            b: many,
            out: out_rows(io, 0, c_row),
            transposed,
        };
        // SAFETY: the plan's spans hold these matrices, and the result overlaps neither operand.
        unsafe { outer(io.exec, &job) };
    });
    Some((offer, r))
}

fn general(cpu: &Cpu, ta: bool, tb: bool, alpha: f32, spec: &KernelSpec) -> Option<Offer> {
    let (a, b, c) = (&spec.inputs[0], &spec.inputs[1], spec.outputs[0].as_ref()?);
    if [a, b, c].iter().any(|o| o.dtype != DType::F32) {
        return None;
    }
    let (a, b) = (matrices(a, ta)?, matrices(b, tb)?);
    let out = matrices(c, false)?;
    if out.col != 1 {
        return None;
    }
    let scratch = gemm_workspace(cpu.threads());
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let run = move |io: &Io| {
        let strided = |i: usize, x: &Matrices| Strided {
            at: io.read(i),
            batch: x.batch,
            row: x.row,
            col: x.col,
        };
        let job = Gemm {
            batch: out.count,
            m,
            n,
            k,
            alpha,
            a: strided(0, &a),
            b: strided(1, &b),
            c: out_rows(io, 0, out.row),
            c_batch: out.batch,
        };
        // SAFETY: the plan's spans hold these matrices, and the result overlaps neither operand.
        unsafe { crate::linear::gemm(io.exec, &job, io.scratch()) };
    };
    Some(Offer::new("matmul_packed_f32", run).scratch(scratch))
}

/// Matrices at even distances, maybe read transposed.
#[derive(Clone, Copy)]
struct Matrices {
    count: usize,
    batch: usize,
    rows: usize,
    cols: usize,
    row: usize,
    col: usize,
}

fn matrices(o: &Operand, transposed: bool) -> Option<Matrices> {
    let l = &o.layout;
    let rank = l.shape.rank();
    let (outer, inner) = (&l.shape.0[..rank - 2], &l.shape.0[rank - 2..]);
    let (mut count, mut batch) = (1, 0);
    for (n, s) in outer.iter().zip(&l.strides).rev() {
        if *n == 1 {
            continue;
        }
        if count == 1 {
            batch = *s;
        } else if *s != batch * count {
            return None;
        }
        count *= n;
    }
    let (rows, cols, row, col) = (inner[0], inner[1], l.strides[rank - 2], l.strides[rank - 1]);
    Some(match transposed {
        false => Matrices {
            count,
            batch,
            rows,
            cols,
            row,
            col,
        },
        true => Matrices {
            count,
            batch,
            rows: cols,
            cols: rows,
            row: col,
            col: row,
        },
    })
}
