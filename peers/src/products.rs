//! LoRA forward by matrix-product libraries: `y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ` as three products, and the bare `x·Wᵀ`.
//! `x: [m, k]`, `w: [n, k]` (the checkpoint's layout), `a: [r, k]`, `b: [n, r]`, all row-major f32.
//! Invariant: buffers are made once; a call allocates only what the library itself allocates.

use faer::linalg::matmul::matmul;
use faer::prelude::{Reborrow, ReborrowMut};
use faer::{Accum, MatMut, MatRef, Par};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Extents of a LoRA forward, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoraShape {
    pub m: usize,
    pub k: usize,
    pub n: usize,
    pub r: usize,
}

/// Operands and result of one LoRA forward.
pub struct LoraData {
    pub shape: LoraShape,
    pub scale: f32,
    pub x: Vec<f32>,
    pub w: Vec<f32>,
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub h: Vec<f32>,
    pub y: Vec<f32>,
}

impl LoraData {
    /// Uniform operands in (-1, 1); results poisoned with NaN.
    #[must_use]
    pub fn random(shape: LoraShape, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut draw = |n: usize| (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
        let LoraShape { m, k, n, r } = shape;
        Self {
            shape,
            scale: 2.0,
            x: draw(m * k),
            w: draw(n * k),
            a: draw(r * k),
            b: draw(n * r),
            h: vec![f32::NAN; m * r],
            y: vec![f32::NAN; m * n],
        }
    }

    /// Largest error of `y` against f64, over the bound `eps_f32 · Σ|terms|` of each element. A few units are expected.
    #[must_use]
    pub fn worst_error(&self, with_adapter: bool) -> f64 {
        let LoraShape { m, k, n, r } = self.shape;
        let dot = |p: &[f32], q: &[f32]| -> (f64, f64) {
            p.iter().zip(q).fold((0.0, 0.0), |(s, abs), (&u, &v)| {
                let t = f64::from(u) * f64::from(v);
                (s + t, abs + t.abs())
            })
        };
        let mut worst = 0.0f64;
        for i in 0..m {
            let x = &self.x[i * k..][..k];
            let h: Vec<(f64, f64)> = (0..r).map(|j| dot(x, &self.a[j * k..][..k])).collect();
            for j in 0..n {
                let (mut want, mut bound) = dot(x, &self.w[j * k..][..k]);
                if with_adapter {
                    for (l, (value, abs)) in h.iter().enumerate() {
                        let b = f64::from(self.b[j * r + l]) * f64::from(self.scale);
                        want += value * b;
                        bound += abs * b.abs();
                    }
                }
                let error = (f64::from(self.y[i * n + j]) - want).abs();
                worst = worst.max(error / (f64::from(f32::EPSILON) * bound));
                if error.is_nan() {
                    return f64::NAN;
                }
            }
        }
        worst
    }
}

/// LoRA forward with `gemm`; bare where `with_adapter` is false.
pub fn gemm_forward(d: &mut LoraData, with_adapter: bool, threads: usize) {
    let LoraShape { m, k, n, r } = d.shape;
    gemm_xwt((m, n, k), &mut d.y, &d.x, &d.w, None, threads);
    if with_adapter {
        gemm_xwt((m, r, k), &mut d.h, &d.x, &d.a, None, threads);
        gemm_xwt((m, n, r), &mut d.y, &d.h, &d.b, Some(d.scale), threads);
    }
}

/// `y = x·wᵀ`, or `y += scale·x·wᵀ`. `x: [m, k]`, `w: [n, k]`, `y: [m, n]`.
fn gemm_xwt(
    (m, n, k): (usize, usize, usize),
    y: &mut [f32],
    x: &[f32],
    w: &[f32],
    add_scaled: Option<f32>,
    threads: usize,
) {
    assert!(y.len() == m * n && x.len() == m * k && w.len() == n * k);
    let parallelism = if threads > 1 {
        gemm::Parallelism::Rayon(threads)
    } else {
        gemm::Parallelism::None
    };
    // SAFETY: the assertion above gives every pointer the m·n, m·k and n·k elements that these strides reach, and `y` is
    // borrowed mutably, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            y.as_mut_ptr(),
            1,
            n as isize,
            add_scaled.is_some(),
            x.as_ptr(),
            1,
            k as isize,
            w.as_ptr(),
            k as isize,
            1,
            1.0,
            add_scaled.unwrap_or(1.0),
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// LoRA forward with `faer`; bare where `with_adapter` is false.
pub fn faer_forward(d: &mut LoraData, with_adapter: bool, threads: usize) {
    let LoraShape { m, k, n, r } = d.shape;
    let par = if threads > 1 {
        Par::rayon(threads)
    } else {
        Par::Seq
    };
    let x = MatRef::from_row_major_slice(&d.x, m, k);
    let w = MatRef::from_row_major_slice(&d.w, n, k);
    let mut y = MatMut::from_row_major_slice_mut(&mut d.y, m, n);
    matmul(y.rb_mut(), Accum::Replace, x, w.transpose(), 1.0, par);
    if with_adapter {
        let a = MatRef::from_row_major_slice(&d.a, r, k);
        let b = MatRef::from_row_major_slice(&d.b, n, r);
        let mut h = MatMut::from_row_major_slice_mut(&mut d.h, m, r);
        matmul(h.rb_mut(), Accum::Replace, x, a.transpose(), 1.0, par);
        matmul(y.rb_mut(), Accum::Add, h.rb(), b.transpose(), d.scale, par);
    }
}

/// LoRA forward in candle, made into tensors beforehand.
pub struct CandleLora {
    x: candle_core::Tensor,
    w: candle_core::Tensor,
    a: candle_core::Tensor,
    b: candle_core::Tensor,
    scale: f64,
}

impl CandleLora {
    /// Copies the operands of `d`.
    ///
    /// # Errors
    /// Whatever candle reports.
    pub fn new(d: &LoraData) -> candle_core::Result<Self> {
        let LoraShape { m, k, n, r } = d.shape;
        let make = |v: &[f32], rows, cols| {
            candle_core::Tensor::from_slice(v, (rows, cols), &candle_core::Device::Cpu)
        };
        Ok(Self {
            x: make(&d.x, m, k)?,
            w: make(&d.w, n, k)?.t()?,
            a: make(&d.a, r, k)?.t()?,
            b: make(&d.b, n, r)?.t()?,
            scale: f64::from(d.scale),
        })
    }

    /// The result, eagerly computed.
    ///
    /// # Errors
    /// Whatever candle reports.
    pub fn forward(&self, with_adapter: bool) -> candle_core::Result<candle_core::Tensor> {
        let y = self.x.matmul(&self.w)?;
        if !with_adapter {
            return Ok(y);
        }
        y + (self.x.matmul(&self.a)?.matmul(&self.b)? * self.scale)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPES: [LoraShape; 2] = [
        LoraShape {
            m: 1,
            k: 96,
            n: 64,
            r: 8,
        },
        LoraShape {
            m: 17,
            k: 33,
            n: 29,
            r: 5,
        },
    ];

    #[test]
    fn libraries_agree_with_f64() {
        for shape in SHAPES {
            for with_adapter in [false, true] {
                for forward in [gemm_forward, faer_forward] {
                    let mut d = LoraData::random(shape, 5);
                    forward(&mut d, with_adapter, 2);
                    assert!(d.worst_error(with_adapter) < 4.0, "{shape:?}");
                }
            }
        }
    }

    #[test]
    fn a_dropped_adapter_is_noticed() {
        let mut d = LoraData::random(SHAPES[1], 5);
        faer_forward(&mut d, false, 1);
        assert!(d.worst_error(true) > 1000.0);
    }
}
