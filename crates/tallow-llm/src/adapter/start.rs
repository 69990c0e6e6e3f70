//! How fresh adapters start where that depends on the base model's weights: DoRA's magnitudes, PiSSA's factors.
//! Invariant: the base is read and never altered; one weight is on the host at a time; equal seeds give equal numbers.
//! Absent on purpose: a full singular value decomposition. Only the largest values are wanted.

use nalgebra::{DMatrix, linalg::SVD};
use tallow_core::op::Role;
use tallow_core::session::Session;
use tallow_core::tensor::Tensor;
use tallow_core::types::DType;

use super::branch::row_squares;
use crate::config::Projection;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::peft::{AdapterConfig, LoraModule, uniform};

/// Directions found beyond those wanted, and passes over the weight: those of Halko et al. 2011
/// (arXiv:0909.4061), where the values fall slowly.
const SPARE: usize = 10;
const PASSES: usize = 4;
/// No decomposition of a finite matrix takes as many rounds.
const ROUNDS: usize = 10_000;

/// With DoRA `‖W‖²` of each row of each module; fills in the magnitudes of a fresh adapter, whose `B` is zero.
pub(super) fn magnitudes(
    model: &Model,
    config: &AdapterConfig,
    modules: &mut [LoraModule],
) -> Result<Vec<Option<Vec<f32>>>> {
    let one = |m: &mut LoraModule| {
        if !config.use_dora {
            return Ok(None);
        }
        let w = model.base_weight(&m.module)?;
        let squares = row_squares(&model.session, w)?;
        if m.magnitude.is_none() {
            m.magnitude = Some(squares.iter().map(|s| s.sqrt()).collect());
        }
        Ok(Some(squares))
    };
    modules.iter_mut().map(one).collect()
}

/// `A = sqrt(S/s)·Vᵀ`, `B = U·sqrt(S/s)` of the largest singular values of each `W = U·S·Vᵀ`.
pub(super) fn pissa(model: &Model, modules: &mut [LoraModule], seed: u64) -> Result<()> {
    for m in modules {
        let Projection { n, k } = m.projection;
        let most = n.min(k);
        if m.rank > most {
            return Err(Error::Setting {
                name: "rank",
                want: "no more than the smaller side of every adapted projection, with the start pissa",
                got: format!("{} for {} of {n} x {k}", m.rank, m.module),
            });
        }
        let name = format!("{}.weight", m.module);
        let w = model
            .session
            .read(&model.base_weight(&m.module)?.cast(DType::F32)?)?;
        let bad = |got: String| Error::Setting {
            name: "weights to start pissa from",
            want: "finite numbers that have a decomposition",
            got,
        };
        if w.iter().any(|v| !v.is_finite()) {
            return Err(bad(format!("NaN or infinity in {name}")));
        }
        let wide = (m.rank + SPARE).min(most);
        let test = uniform(seed, &name, n * wide, 1);
        let test = DMatrix::from_vec(n, wide, test);
        let found = largest(w, [n, k], test).ok_or_else(|| bad(format!("none for {name}")))?;
        let (u, values, v) = found;
        let root = |j: usize| (values[j] / m.scale).sqrt();
        m.a = (0..m.rank * k)
            .map(|i| v[(i % k, i / k)] * root(i / k))
            .collect();
        m.b = (0..n * m.rank)
            .map(|i| u[(i / m.rank, i % m.rank)] * root(i % m.rank))
            .collect();
    }
    Ok(())
}

/// The largest singular values of `w [n, k]` (row-major) with their vectors, `U [n, l]` and `V [k, l]`, by subspace
/// iteration from the random `test [n, l]`. Exact up to rounding where `l` is the smaller side.
fn largest(
    w: Vec<f32>,
    [n, k]: [usize; 2],
    test: DMatrix<f32>,
) -> Option<(DMatrix<f32>, Vec<f32>, DMatrix<f32>)> {
    // Row-major `W` is column-major `Wᵀ`.
    let wt = DMatrix::from_vec(k, n, w);
    let w = wt.transpose();
    let mut q = (&wt * test).qr().q();
    for _ in 0..PASSES {
        q = (&w * &q).qr().q();
        q = (&wt * &q).qr().q();
    }
    // `W Q` is `U S (Vᵀ Q)`: thin, and its left vectors are W's.
    let svd = SVD::try_new(&w * &q, true, true, f32::EPSILON * 5.0, ROUNDS)?;
    let (u, vt) = (svd.u?, svd.v_t?);
    let values: Vec<f32> = svd.singular_values.iter().copied().collect();
    Some((u, values, q * vt.transpose()))
}

/// `A` and `-B` of the start, which take its share off again while the adapter is trained.
pub(super) fn frozen(session: &Session, m: &LoraModule) -> Result<[Tensor; 2]> {
    let Projection { n, k } = m.projection;
    let minus: Vec<f32> = m.b.iter().map(|v| -v).collect();
    Ok([
        session.tensor(&m.a, [m.rank, k], Role::Frozen)?,
        session.tensor(&minus, [n, m.rank], Role::Frozen)?,
    ])
}

/// `m` with a second block: `A' = [A; A0]`, `B' = [B, -B0]`, twice the rank at the same scale.
pub(super) fn double(m: &mut LoraModule, a0: &[f32], minus_b0: &[f32]) {
    m.a.extend_from_slice(a0);
    let rows = m.b.chunks(m.rank).zip(minus_b0.chunks(m.rank));
    m.b = rows.flat_map(|(b, b0)| [b, b0].concat()).collect();
    m.rank *= 2;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_values_of_a_known_matrix_are_found() {
        // Orthogonal columns of lengths 9, 4 and 1, and noise of 1e-3 below them.
        let (n, k) = (40, 30);
        let noise = uniform(1, "noise", n * k, 1);
        let mut w: Vec<f32> = noise.iter().map(|v| v * 1e-3).collect();
        for (i, size) in [9.0, 4.0, 1.0].into_iter().enumerate() {
            w[i * k + 2 * i] += size;
        }
        for wide in [13, 30] {
            let test = DMatrix::from_vec(n, wide, uniform(2, "test", n * wide, 1));
            let (u, s, v) = largest(w.clone(), [n, k], test).unwrap();
            for (i, size) in [9.0_f32, 4.0, 1.0].into_iter().enumerate() {
                assert!((s[i] - size).abs() < 0.01, "{s:?}");
                assert!((u[(i, i)].abs() - 1.0).abs() < 0.01);
                assert!((v[(2 * i, i)].abs() - 1.0).abs() < 0.01);
                // One sign for both: the product is the value.
                assert!((u[(i, i)] * s[i] * v[(2 * i, i)] - size).abs() < 0.01);
            }
        }
    }
}
