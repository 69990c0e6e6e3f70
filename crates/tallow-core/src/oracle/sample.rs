//! Operands to try composites on: the ranges in which each op is meant to run.
//! Invariant: the same call gives the same values everywhere; every float is exact in its dtype.
//! Absent on purpose: hostile values. Those belong to the tests that look for them.
use super::{Value, store};
use crate::{
    op::Composite,
    philox::uniform,
    types::{DType, TensorType},
};

/// Floats of magnitude 0.1 to 1 of either sign, or integers below `limit`; `id` tells draws apart.
pub fn random(ty: &TensorType, limit: u32, seed: u32, id: u32) -> Value {
    let one = |i: usize| {
        let u = f64::from(uniform([seed, 0x7a11], id, i));
        match ty.dtype {
            DType::F32 => f64::from(signed(u) as f32),
            d if d.is_float() => store(d, signed(u)),
            _ => (u * f64::from(limit)).floor(),
        }
    };
    Value::new(ty.clone(), (0..ty.shape.numel()).map(one).collect())
}

/// `[0, 1)` to `±[0.1, 1)`.
fn signed(u: f64) -> f64 {
    let v = 2.0 * u - 1.0;
    v.signum() * (0.1 + 0.9 * v.abs())
}

/// Operands for `c` of types `tys`. Positions and targets hold padding (`u32::MAX`) wherever there is
/// more than one; of the positions written to a cache two are equal if there are three or more.
pub fn operands(c: &Composite, tys: &[TensorType], seed: u32) -> Vec<Value> {
    let limit = match c {
        Composite::Attention(_) | Composite::AttentionGrad(_) => tys[1].shape.0[1],
        Composite::KvWrite(_) => tys[0].shape.0[1],
        Composite::CrossEntropy(_) => tys[1].shape.0[0],
        _ => 40,
    };
    let mut all: Vec<Value> = tys
        .iter()
        .enumerate()
        .map(|(i, t)| random(t, limit as u32, seed, i as u32))
        .collect();
    let positive = match c {
        Composite::AdamW(_) => 3..5,
        _ => 0..0,
    };
    for v in &mut all[positive] {
        v.data.iter_mut().for_each(|x| *x = x.abs());
    }
    if matches!(c, Composite::KvWrite(_)) {
        for row in all[2].data.chunks_mut(tys[2].shape.last()) {
            for (i, p) in row.iter_mut().enumerate() {
                *p = (i % limit) as f64;
            }
            if row.len() > 2 {
                row[1] = row[0];
            }
        }
    }
    // The angle of a padded position means nothing, so rotations get none.
    if !matches!(c, Composite::Rope(_)) {
        let ids = all.iter_mut().filter(|v| v.ty.dtype == DType::U32);
        for v in ids.filter(|v| v.data.len() > 1) {
            let last = v.data.len() - 1;
            v.data[last] = f64::from(u32::MAX);
        }
    }
    all
}
