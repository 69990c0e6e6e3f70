//! Programs with 32-bit integers: one element after another, in f64, by the reference meaning.
//! Invariant: integers are exact; a result outside its type's range saturates.
//! Absent on purpose: speed. Such programs make positions and masks, once a step.

use std::ops::Range;

use tallow_core::scalar::Inst;
use tallow_core::types::DType;

use super::Blocks;
use crate::exec::RowKernel;
use crate::gather::{Number, with_type};
use crate::simd::Vector;

/// A program over its outer rows.
pub(super) struct Rows<'a>(pub(super) Blocks<'a>);

// SAFETY: rows write different elements.
unsafe impl RowKernel for Rows<'_> {
    #[inline(always)]
    unsafe fn rows<V: Vector>(&self, rows: Range<usize>, worker: usize) {
        let (code, pointers) = (self.0.code, self.0.pointers);
        // SAFETY: the caller's promise; scratch by worker.
        unsafe {
            let registers = pointers.workspace.add(worker * code.worker_elems());
            for row in rows {
                for lane in 0..code.len {
                    self.element(row, lane, registers.cast());
                }
            }
        }
    }
}

impl Rows<'_> {
    /// # Safety
    /// As for [`super::Elementwise::run`]; `registers` has room for all, at any alignment.
    unsafe fn element(&self, row: usize, lane: usize, registers: *mut f64) {
        let (code, pointers) = (self.0.code, self.0.pointers);
        // SAFETY: the caller's promise.
        unsafe {
            for (i, view) in code.inputs.iter().enumerate() {
                let at = code.offset(view, row) + lane * view.step;
                let value = with_type!(view.dtype, T => {
                    pointers.inputs[i].cast::<T>().add(at).read_unaligned().wide()
                });
                registers.add(i).write_unaligned(value);
            }
            for (i, inst) in code.program.insts.iter().enumerate() {
                let value = match inst {
                    Inst::Const(bits) => f64::from(f32::from_bits(*bits)),
                    Inst::Apply(op, names) => {
                        let mut x = [0.0; 3];
                        for (x, name) in x.iter_mut().zip(names) {
                            *x = registers.add(usize::from(*name)).read_unaligned();
                        }
                        op.eval(&x[..op.arity()])
                    }
                };
                registers.add(code.inputs.len() + i).write_unaligned(value);
            }
            for (o, (view, name)) in code.outputs.iter().zip(&code.program.outputs).enumerate() {
                let value = registers.add(usize::from(*name)).read_unaligned();
                let at = code.offset(view, row) + lane * view.step;
                with_type!(view.dtype, T => {
                    let to = pointers.outputs[o].cast::<T>().add(at);
                    to.write_unaligned(<T as Number>::narrow(value));
                });
            }
        }
    }
}
