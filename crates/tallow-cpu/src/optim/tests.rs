//! Tests of AdamW against PyTorch's sequence of operations in f64.
//! Invariant: several steps on every instruction set with 1 to 3 threads.
//! Absent on purpose: convergence.

use super::*;
use crate::pool::Pool;
use crate::simd::Isa;
use crate::testing::Rng;

#[test]
fn five_steps() {
    let mut rng = Rng::fresh();
    for n in [1, 2, 3, 5, 7, 13, 31, 32, 33, 127, 5000] {
        let start = rng.vec(n);
        let grads: Vec<Vec<f32>> = (0..5).map(|_| rng.vec(n)).collect();
        let (lr, beta1, beta2) = (1e-2f32, 0.9f32, 0.999f32);
        let (eps, decay, factor) = (1e-8f32, 0.1f32, 0.5f32);
        for isa in Isa::available() {
            let mut first = None;
            for threads in 1..=3 {
                let pool = Pool::new(threads);
                let (mut p, mut m, mut v) = (start.clone(), vec![0.0; n], vec![0.0; n]);
                let wide = |x: f32| f64::from(x);
                let mut want: Vec<[f64; 3]> = start.iter().map(|p| [wide(*p), 0.0, 0.0]).collect();
                for (step, g) in grads.iter().enumerate() {
                    let t = step as i32 + 1;
                    let bc1 = (1.0 - wide(beta1).powi(t)) as f32;
                    let sqrt_bc2 = (1.0 - wide(beta2).powi(t)).sqrt() as f32;
                    let numbers = [lr, beta1, beta2, eps, decay, bc1, sqrt_bc2, factor];
                    let args = AdamW {
                        n,
                        p: p.as_mut_ptr(),
                        g: g.as_ptr(),
                        m: m.as_mut_ptr(),
                        v: v.as_mut_ptr(),
                        numbers: &numbers,
                    };
                    // SAFETY: all arrays hold `n` elements.
                    unsafe { args.run(Exec { isa, pool: &pool }) };
                    let [lr, beta1, beta2, eps, decay, bc1, sqrt_bc2, factor] = numbers.map(wide);
                    for (w, g) in want.iter_mut().zip(g) {
                        let g = wide(*g) * factor;
                        w[0] *= 1.0 - lr * decay;
                        w[1] = beta1 * w[1] + (1.0 - beta1) * g;
                        w[2] = beta2 * w[2] + (1.0 - beta2) * g * g;
                        w[0] -= lr / bc1 * w[1] / (w[2].sqrt() / sqrt_bc2 + eps);
                    }
                }
                for i in 0..n {
                    let tiny = wide(f32::EPSILON);
                    let [wp, wm, wv] = want[i];
                    // Five roundings of a parameter near 1, five steps of at most about lr.
                    assert!(
                        (wide(p[i]) - wp).abs() <= tiny * (5.0 + 60.0 * wide(lr)),
                        "{} {wp}",
                        p[i]
                    );
                    assert!((wide(m[i]) - wm).abs() <= tiny * 4.0, "{} {wm}", m[i]);
                    assert!((wide(v[i]) - wv).abs() <= tiny * 16.0 * wv, "{} {wv}", v[i]);
                }
                let all: Vec<u32> = [&p, &m, &v]
                    .into_iter()
                    .flatten()
                    .map(|x| x.to_bits())
                    .collect();
                assert_eq!(*first.get_or_insert(all.clone()), all);
            }
        }
    }
}
