//! A linear of few outputs.
//! Invariant: offered for one projection alone, without adapter and residual; the weight is read where it lies if that is
//! f32, row after row, and else from a copy of that kind.

use half::{bf16, f16};
use tallow_core::{
    kernel::{Format, KernelSpec, Operand},
    op::{Bits, Linear},
    types::DType,
};

use super::{Order, Source, order, out_rows, row_stride, rows_of};
use crate::glue::Offer;
use crate::linear::{THIN, Thin, thin as run};

pub(super) const ROWS_F32: &str = "rows_f32";

/// Up to so many outputs it is thought to be faster than panels, by so much.
const FEW: usize = 32;
const CHEAPER: f64 = 0.5;
const DEARER: f64 = 1.25;

pub(in crate::glue) fn thin(l: &Linear, spec: &KernelSpec) -> Option<Offer> {
    let [block] = &l.blocks[..] else { return None };
    if block.n > THIN || l.residual || block.adapters.iter().any(Option::is_some) {
        return None;
    }
    let at = l.ins().pop()?;
    let (x, w, y) = (
        &spec.inputs[0],
        &spec.inputs[at.w],
        spec.outputs[0].as_ref()?,
    );
    let order = order(w).filter(|_| w.dtype.is_float())?;
    let (n, k) = (block.n, x.layout.shape.last());
    let mut prepare = vec![];
    if order != Order::RowMajor || w.dtype != DType::F32 {
        if !w.frozen {
            return None;
        }
        let format = Format {
            name: ROWS_F32,
            bytes: n * k * 4,
            scale: Bits::from(1.0),
        };
        prepare.push((at.w, format));
    }
    if at.bias.is_some_and(|i| !spec.inputs[i].is_dense()) {
        return None;
    }
    let (m, x_row, y_row) = (x.layout.shape.rows(), row_stride(x)?, row_stride(y)?);
    let offer = Offer::new("linear_dots_f32", move |io| {
        let job = Thin {
            m,
            k,
            n,
            x: rows_of(io, 0, x_row),
            w: io.read(at.w),
            bias: at.bias.map_or(std::ptr::null(), |i| io.read(i)),
            y: out_rows(io, 0, y_row),
        };
        // SAFETY: the plan's spans hold these matrices, and the result overlaps no operand.
        unsafe { run(io.exec, &job) };
    });
    let offer = offer.dearer(if n <= FEW { CHEAPER } else { DEARER });
    Some(Offer { prepare, ..offer })
}

/// Writes a weight `[n, k]` as rows of f32.
///
/// # Safety
/// `from` holds the operand, dense in some order, and `to` has room for its `len` elements.
pub(super) unsafe fn widen(from: *const u8, op: &Operand, to: *mut f32, len: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let out = std::slice::from_raw_parts_mut(to, len);
        match op.dtype {
            DType::BF16 => rows(
                std::slice::from_raw_parts(from.cast::<bf16>(), len),
                op,
                out,
            ),
            DType::F16 => rows(std::slice::from_raw_parts(from.cast::<f16>(), len), op, out),
            _ => rows(std::slice::from_raw_parts(from.cast::<f32>(), len), op, out),
        }
    }
}

fn rows<S: Source>(w: &[S], op: &Operand, out: &mut [f32]) {
    let (n, k) = (op.layout.shape.0[0], op.layout.shape.0[1]);
    let transposed = order(op) == Some(Order::Transposed);
    for (i, row) in out.chunks_exact_mut(k.max(1)).enumerate() {
        for (l, to) in row.iter_mut().enumerate() {
            *to = w[if transposed { l * n + i } else { i * k + l }].widen();
        }
    }
}
