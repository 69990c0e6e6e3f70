//! Products by Apple's Metal Performance Shaders: which specs they can run, as numbers of operands, extents and strides.
//! Invariant: offered only where the adapter is Metal's ([`Target::mps`]), beside the kernels in WGSL and never instead.
//! Absent on purpose: calls of the framework, which are in `crate::mps` and compile for macOS alone; adapters, whose
//! tails MPS cannot add in the same pass.
use super::{Offer, Target};
use tallow_core::{
    kernel::{Body, KernelSpec, Operand},
    op::{Composite, Linear},
    types::DType,
};

/// `y [m, n] = alpha op(a) op(b)` over `k`, f32.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Gemm {
    pub(crate) sizes: [usize; 3],
    /// Is `a` stored `[k, m]`, and is `b` stored `[n, k]`?
    pub(crate) turned: [bool; 2],
    /// Operands that are `a` and `b`; the result is number 0.
    pub(crate) operands: [usize; 2],
    /// Elements from a row to the next as stored: of `a`, `b` and `y`.
    pub(crate) rows: [usize; 3],
    pub(crate) alpha: f32,
}

/// An offer of the framework's classes for `spec`, if they take it.
pub(super) fn offer(t: &Target, spec: &KernelSpec) -> Option<Offer> {
    if !t.mps {
        return None;
    }
    let gemm = gemm(spec)?;
    let [m, n, k] = gemm.sizes;
    let name = match m.min(n) {
        1 => "matmul_mps_vector",
        _ => "matmul_mps",
    };
    // Where tiles are full it is hard to beat; of small products nothing is known, so they are left to be measured.
    let small = 2.0 * (m * n * k) as f64 / 1e12;
    Some(Offer {
        gemm: Some(gemm),
        extra: 30e-6 + small,
        ..Offer::new(name, vec![])
    })
}

/// `spec` as one bare product.
fn gemm(spec: &KernelSpec) -> Option<Gemm> {
    let y = spec.outputs[0].as_ref()?;
    let (turned, operands, alpha) = match &spec.body {
        Body::MatMul { ta, tb, alpha } => ([*ta, *tb], [0, 1], alpha.get()),
        Body::Composite(Composite::Linear(l)) if bare(l) => {
            // A frozen weight may be wanted in bf16; here it is read as it lies.
            ([false, true], [0, 1], 1.0)
        }
        _ => return None,
    };
    let [a, b] = operands.map(|i| &spec.inputs[i]);
    let all = [a, b, y];
    if all.iter().any(|o| o.dtype != DType::F32) || spec.outputs[1..].iter().any(Option::is_some) {
        return None;
    }
    let extents = |o: &Operand| [o.layout.shape.rows(), o.layout.shape.last()];
    // Outer axes are rows of one matrix only if nothing but the rows of `a` has them.
    let rank = |o: &Operand| o.layout.shape.rank();
    let batched = matches!(spec.body, Body::MatMul { .. }) && all.iter().any(|o| rank(o) != 2);
    let ([m, n], [p, q]) = (extents(y), extents(a));
    let k = if turned[0] { p } else { q };
    if batched || m * n * k == 0 {
        return None;
    }
    let mut rows = [0; 3];
    for (row, o) in rows.iter_mut().zip(all) {
        *row = o.layout.row_stride()?.max(o.layout.shape.last());
    }
    Some(Gemm {
        sizes: [m, n, k],
        turned,
        operands,
        rows,
        alpha,
    })
}

/// One projection and nothing else.
fn bare(l: &Linear) -> bool {
    let plain = |b: &tallow_core::op::Block| !b.bias && b.adapters.iter().all(Option::is_none);
    !l.residual && l.blocks.len() == 1 && l.blocks.iter().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tallow_core::types::TensorType;

    fn matmul(ta: bool, tb: bool, shapes: [&[usize]; 3]) -> KernelSpec {
        let dense = |s: &[usize]| Operand::dense(&TensorType::f32(s));
        let alpha = 0.5.into();
        KernelSpec {
            body: Body::MatMul { ta, tb, alpha },
            inputs: vec![dense(shapes[0]), dense(shapes[1])],
            outputs: vec![Some(dense(shapes[2]))],
        }
    }

    #[test]
    fn products_are_told_by_their_extents() {
        let made = gemm(&matmul(true, true, [&[7, 5], &[3, 7], &[5, 3]])).unwrap();
        assert_eq!((made.sizes, made.rows), ([5, 3, 7], [5, 7, 3]));
        assert_eq!((made.turned, made.alpha), ([true, true], 0.5));
        let batched = matmul(false, false, [&[2, 5, 7], &[2, 7, 3], &[2, 5, 3]]);
        assert_eq!(gemm(&batched), None);
        let mut half = matmul(false, false, [&[5, 7], &[7, 3], &[5, 3]]);
        half.inputs[1].dtype = DType::BF16;
        assert_eq!(gemm(&half), None);
    }
}
