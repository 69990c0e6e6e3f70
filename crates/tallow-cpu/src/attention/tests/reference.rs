//! What attention is compared with: strided test data, and the definition in loops over f64.
//! Invariant: nothing here is shared with the kernels but the shape.
//! Absent on purpose: speed.

use super::super::*;
use crate::testing::Rng;

/// The position of a padding row.
pub(super) const NOWHERE: u32 = u32::MAX;

/// A view's data with gaps between tokens, heads and batch rows.
#[derive(Clone)]
pub(super) struct Data {
    pub(super) n: [usize; 4],
    pub(super) view: (usize, usize, usize),
    pub(super) x: Vec<f32>,
}

impl Data {
    /// All NaN.
    pub(super) fn poisoned(n: [usize; 4], gaps: bool) -> Self {
        let g = usize::from(gaps);
        let head = n[3] + 2 * g;
        let token = head * n[2] + 3 * g;
        let batch = token * n[1] + 5 * g;
        Data {
            n,
            view: (batch, token, head),
            x: vec![f32::NAN; batch * n[0]],
        }
    }
    pub(super) fn random(n: [usize; 4], gaps: bool, rng: &mut Rng) -> Self {
        let mut data = Self::poisoned(n, gaps);
        for at in data.places() {
            data.x[at] = rng.f32() * 1.5;
        }
        data
    }
    pub(super) fn index(&self, b: usize, i: usize, h: usize) -> usize {
        b * self.view.0 + i * self.view.1 + h * self.view.2
    }
    pub(super) fn places(&self) -> Vec<usize> {
        let [b, n, h, d] = self.n;
        let rows = (0..b * n * h).map(|r| self.index(r / (n * h), r / h % n, r % h));
        rows.flat_map(|r| r..r + d).collect()
    }
    pub(super) fn dense(&self) -> Vec<f64> {
        self.places()
            .iter()
            .map(|at| f64::from(self.x[*at]))
            .collect()
    }
    pub(super) fn heads(&self) -> Heads {
        let (batch, token, head) = self.view;
        Heads {
            ptr: self.x.as_ptr(),
            batch,
            token,
            head,
        }
    }
    pub(super) fn heads_mut(&mut self) -> Heads<*mut f32> {
        let (batch, token, head) = self.view;
        Heads {
            ptr: self.x.as_mut_ptr(),
            batch,
            token,
            head,
        }
    }
    pub(super) fn gaps_untouched(&self) -> bool {
        let mut x = self.x.clone();
        for at in self.places() {
            x[at] = f32::NAN;
        }
        x.iter().all(|v| v.is_nan())
    }
}

/// Dense f64 inputs.
#[derive(Clone)]
pub(super) struct Reference {
    pub(super) shape: Shape,
    pub(super) pos: Vec<u32>,
    /// Empty: none.
    pub(super) starts: Vec<u32>,
    pub(super) q: Vec<f64>,
    pub(super) k: Vec<f64>,
    pub(super) v: Vec<f64>,
}

pub(super) struct Forwarded {
    pub(super) out: Vec<f64>,
    pub(super) lse: Vec<f64>,
    /// `sum p |v|` for each output.
    pub(super) size: Vec<f64>,
    /// The largest `sum |q| |k| scale`.
    pub(super) score: f64,
}

impl Reference {
    pub(super) fn queries(&self) -> Queries {
        Queries {
            pos: self.pos.as_ptr(),
            starts: match self.starts.is_empty() {
                true => std::ptr::null(),
                false => self.starts.as_ptr(),
            },
        }
    }
    pub(super) fn q_row(&self, b: usize, i: usize, h: usize) -> usize {
        ((b * self.shape.t + i) * self.shape.h + h) * self.shape.d
    }
    pub(super) fn k_row(&self, b: usize, j: usize, h: usize) -> usize {
        let s = &self.shape;
        ((b * s.s + j) * s.hk + h * s.hk / s.h) * s.d
    }
    fn bent(&self, score: f64) -> f64 {
        let cap = self.shape.cap.map(f64::from);
        cap.map_or(score, |c| c * (score / c).tanh())
    }
    /// The slope of [`Reference::bent`] where it gives `y`.
    fn slope(&self, y: f64) -> f64 {
        let cap = self.shape.cap.map(f64::from);
        cap.map_or(1.0, |c| 1.0 - (y / c).powi(2))
    }
    /// Visible keys and their probabilities, `lse`, and the largest sum of magnitudes.
    pub(super) fn row(&self, b: usize, i: usize, h: usize) -> (Vec<(usize, f64)>, f64, f64) {
        let s = &self.shape;
        let p = self.pos[b * s.t + i] as usize;
        let start = self.starts.get(b * s.t + i).map_or(0, |x| *x as usize);
        let sees = |j: &usize| match s.mask {
            Mask::Full => true,
            Mask::Causal { window } => {
                p < s.s && *j <= p && *j >= start && window.is_none_or(|w| j + w > p)
            }
        };
        let q = &self.q[self.q_row(b, i, h)..][..s.d];
        let mut most: f64 = 0.0;
        let scores: Vec<(usize, f64)> = (0..s.s)
            .filter(sees)
            .map(|j| {
                let k = &self.k[self.k_row(b, j, h)..][..s.d];
                let terms = q.iter().zip(k).map(|(q, k)| q * k * f64::from(s.scale));
                most = most.max(terms.clone().map(f64::abs).sum());
                (j, self.bent(terms.sum()))
            })
            .collect();
        let max = scores.iter().map(|x| x.1).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|x| (x.1 - max).exp()).sum();
        let lse = max + sum.ln();
        let p = scores.iter().map(|(j, x)| (*j, (x - lse).exp())).collect();
        (p, if sum == 0.0 { 0.0 } else { lse }, most)
    }
    pub(super) fn rows(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let Shape { b, t, h, .. } = self.shape;
        (0..b * t * h).map(move |r| (r / (t * h), r / h % t, r % h))
    }
    pub(super) fn forward(&self) -> Forwarded {
        let s = &self.shape;
        let n = s.b * s.t * s.h;
        let mut f = Forwarded {
            out: vec![0.0; n * s.d],
            lse: vec![0.0; n],
            size: vec![0.0; n * s.d],
            score: 0.0,
        };
        for (b, i, h) in self.rows() {
            let (p, lse, most) = self.row(b, i, h);
            f.lse[(b * s.h + h) * s.t + i] = lse;
            f.score = f.score.max(most);
            let at = self.q_row(b, i, h);
            for (j, p) in p {
                for x in 0..s.d {
                    let v = self.v[self.k_row(b, j, h) + x];
                    f.out[at + x] += p * v;
                    f.size[at + x] += p * v.abs();
                }
            }
        }
        f
    }
    /// `(dq, dk, dv)` and what the tolerance of each is a multiple of.
    pub(super) fn backward(&self, dout: &[f64]) -> ([Vec<f64>; 3], [Vec<f64>; 3]) {
        let s = &self.shape;
        let zeros = || [&self.q, &self.k, &self.v].map(|x| vec![0.0; x.len()]);
        let (mut grad, mut size) = (zeros(), zeros());
        let scale = f64::from(s.scale);
        for (b, i, h) in self.rows() {
            let at = self.q_row(b, i, h);
            let (p, lse, _) = self.row(b, i, h);
            let dot = |j: usize, f: fn(f64) -> f64| -> f64 {
                let v = self.k_row(b, j, h);
                (0..s.d).map(|x| f(dout[at + x] * self.v[v + x])).sum()
            };
            let delta: f64 = p.iter().map(|(j, p)| p * dot(*j, |x| x)).sum();
            let delta_size: f64 = p.iter().map(|(j, p)| p * dot(*j, f64::abs)).sum();
            for (j, p) in p {
                let bent = self.slope(p.ln() + lse);
                let ds = p * (dot(j, |x| x) - delta) * scale * bent;
                let ds_size = p * (dot(j, f64::abs) + delta_size) * scale.abs();
                let k = self.k_row(b, j, h);
                for x in 0..s.d {
                    grad[0][at + x] += ds * self.k[k + x];
                    grad[1][k + x] += ds * self.q[at + x];
                    grad[2][k + x] += p * dout[at + x];
                    size[0][at + x] += ds_size * self.k[k + x].abs();
                    size[1][k + x] += ds_size * self.q[at + x].abs();
                    size[2][k + x] += p * dout[at + x].abs();
                }
            }
        }
        (grad, size)
    }
}
