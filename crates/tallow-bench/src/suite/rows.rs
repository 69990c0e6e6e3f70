//! Softmax, RMSNorm and LayerNorm on 4x16x1024.

use tallow::{DType, Tensor, TensorType};

use super::{Context, Suite, Task};
use crate::Result;
use crate::ours::{Fill, Join, Operands, Ours, Reference, Subject};
use crate::peer::{Job, RowOp};
use crate::probe::Cost;

/// Extents of `x`.
pub const SHAPE: [usize; 3] = [4, 16, 1024];
/// Added under the root.
pub const EPS: f32 = 1e-5;

/// The tasks.
pub fn tasks() -> impl Iterator<Item = Task> {
    RowOp::ALL.into_iter().map(|op| Task {
        suite: Suite::Seed,
        name: format!("{} 4x16x1024", op.title()),
        tokens: None,
        peers: vec![(String::new(), Job::Rows(op))],
        make: Box::new(move |cx: &Context| Ok(vec![cx.ours("tallow", work(cx, op)?, &cost(op))])),
    })
}

/// Least bytes and arithmetic.
#[must_use]
pub fn cost(op: RowOp) -> Cost {
    let n: usize = SHAPE.iter().product();
    let weights = match op {
        RowOp::Softmax => 0,
        RowOp::RmsNorm => 1,
        RowOp::LayerNorm => 2,
    };
    Cost {
        bytes: 4 * (2 * n + weights * SHAPE[2]),
        // A square or an exponential, a sum, a product.
        flops: 3.0 * n as f64,
        dtype: DType::F32,
    }
}

/// The work in tallow.
///
/// # Errors
/// No memory.
pub fn work(cx: &Context, op: RowOp) -> Result<Ours> {
    let mut o = Operands::new(&cx.session, 12);
    let x = o.data(TensorType::f32(SHAPE), Fill::Signed(2.0))?;
    let w = o.weights(&[SHAPE[2]], DType::F32, 1.0)?;
    let b = o.weights(&[SHAPE[2]], DType::F32, 1.0)?;
    let again = move |x: &[Tensor]| {
        Ok(vec![match op {
            RowOp::Softmax => x[0].softmax()?,
            RowOp::RmsNorm => x[0].rms_norm(&w, EPS)?,
            RowOp::LayerNorm => x[0].layer_norm(&w, &b, EPS)?,
        }])
    };
    let subject = Subject {
        carried: vec![x],
        again: Box::new(again),
        updates: vec![],
        join: Join::Feed,
        reference: Reference::Whole,
    };
    Ours::new(o, subject)
}
