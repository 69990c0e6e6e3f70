//! Tests of cross entropy against loops in f64 and those against finite differences.
//! Invariant: both layouts of the weights, every instruction set, 1 to 3 threads, poisoned outputs.
//! Absent on purpose: speed.

use super::*;
use crate::linear::{Packed, pack_kn, pack_nk, packed_len};
use crate::pool::Pool;
use crate::testing::Rng;
use crate::tile::{Element, Pairs};

struct Case {
    rows: usize,
    c: usize,
    v: usize,
    ld: usize,
    x: Vec<f32>,
    w: Vec<f32>,
    targets: Vec<u32>,
}

/// How the weights are given.
#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Rows,
    Panels,
    Pairs,
}

impl Case {
    fn new(rows: usize, c: usize, v: usize, rng: &mut Rng) -> Self {
        let ld = c + 3;
        let target = |rng: &mut Rng| match rng.next_u64() % 4 {
            0 => u32::MAX,
            _ => (rng.next_u64() % v as u64) as u32,
        };
        Case {
            rows,
            c,
            v,
            ld,
            x: rng.vec(rows * ld).iter().map(|x| x * 3.0).collect(),
            w: rng.vec(v * c),
            targets: (0..rows).map(|_| target(rng)).collect(),
        }
    }
    fn logit(&self, x: &[f64], j: usize, f: fn(f64) -> f64) -> f64 {
        let w = &self.w[j * self.c..][..self.c];
        x.iter().zip(w).map(|(x, w)| f(x * f64::from(*w))).sum()
    }
    fn row(&self, i: usize) -> Vec<f64> {
        let row = &self.x[i * self.ld..][..self.c];
        row.iter().map(|x| f64::from(*x)).collect()
    }
    /// `(nll, probabilities)` of one row.
    fn reference(&self, x: &[f64], target: usize) -> (f64, Vec<f64>) {
        let logits: Vec<f64> = (0..self.v).map(|j| self.logit(x, j, |t| t)).collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
        let lse = max + sum.ln();
        let p = logits.iter().map(|l| (l - lse).exp()).collect();
        (lse - logits[target], p)
    }
    fn run(&self, exec: Exec<'_>, how: How, gradient: bool) -> (Vec<f32>, Vec<f32>) {
        let mut nll = vec![f32::NAN; self.rows];
        let mut dx = vec![f32::NAN; self.rows * self.ld];
        let threads = exec.pool.threads();
        let n = CrossEntropy::workspace_elems(self.rows, self.c, threads);
        let mut workspace = vec![f32::NAN; n];
        let mut packed = vec![0.0; packed_len(self.v, self.c)];
        pack_nk(exec.pool, &self.w, (self.v, self.c), &mut packed);
        let mut forward = vec![Pairs::narrow(0.0); packed_len(self.v, Pairs::rows(self.c))];
        let mut backward = vec![Pairs::narrow(0.0); packed_len(self.c, Pairs::rows(self.v))];
        pack_nk(exec.pool, &self.w, (self.v, self.c), &mut forward);
        pack_kn(exec.pool, &self.w, (self.v, self.c), &mut backward);
        let pairs = PairWeights {
            forward: forward.as_ptr(),
            backward: match gradient {
                true => backward.as_ptr(),
                false => std::ptr::null(),
            },
        };
        let (w, layout) = match how {
            How::Panels => (&packed, WeightLayout::Panels),
            How::Rows => (&self.w, WeightLayout::Rows(self.c)),
            How::Pairs => (&vec![], WeightLayout::Pairs(pairs)),
        };
        let args = CrossEntropy {
            rows: self.rows,
            c: self.c,
            v: self.v,
            x: Rows {
                ptr: self.x.as_ptr(),
                ld: self.ld,
            },
            w: w.as_ptr(),
            layout,
            targets: self.targets.as_ptr(),
            nll: nll.as_mut_ptr(),
            dx: Rows {
                ptr: match gradient {
                    true => dx.as_mut_ptr(),
                    false => std::ptr::null_mut(),
                },
                ld: self.ld,
            },
            workspace: workspace.as_mut_ptr(),
        };
        // SAFETY: all buffers are as long as the arguments say.
        unsafe { args.run(exec) };
        (nll, dx)
    }
    /// `more`: what probabilities are rounded by on their way into the gradient.
    fn check(&self, nll: &[f32], dx: &[f32], more: f64, what: &str) {
        let eps = f64::from(f32::EPSILON);
        for i in 0..self.rows {
            let row = &dx[i * self.ld..(i + 1) * self.ld];
            assert!(
                row[self.c..].iter().all(|x| x.is_nan()),
                "{what}: gap of row {i}"
            );
            let target = self.targets[i] as usize;
            if target >= self.v {
                assert_eq!(nll[i], 0.0, "{what}: row {i}");
                assert!(row[..self.c].iter().all(|x| *x == 0.0), "{what}: row {i}");
                continue;
            }
            let x = self.row(i);
            let (want, p) = self.reference(&x, target);
            // A logit is off by a few eps of its sum of magnitudes, a probability by that factor.
            let size = (0..self.v)
                .map(|j| self.logit(&x, j, f64::abs))
                .fold(0.0, f64::max);
            let bound = eps * (8.0 + 8.0 * size);
            let off = (f64::from(nll[i]) - want).abs();
            assert!(off <= bound, "{what}: nll {i}: want {want}, got {}", nll[i]);
            for (l, got) in row[..self.c].iter().enumerate() {
                let w = |j: usize| f64::from(self.w[j * self.c + l]);
                let want = (0..self.v).map(|j| p[j] * w(j)).sum::<f64>() - w(target);
                let terms = (0..self.v).map(|j| p[j] * w(j).abs()).sum::<f64>() + w(target).abs();
                let off = (f64::from(*got) - want).abs();
                let bound = (eps * (16.0 + 8.0 * size) + more) * terms;
                assert!(
                    off <= bound,
                    "{what}: dx {i},{l}: want {want}, got {}",
                    row[l]
                );
            }
        }
    }
}

#[test]
fn right_on_every_isa_layout_and_thread_count() {
    let mut rng = Rng::fresh();
    let sizes = [
        (1, 1, 1),
        (2, 3, 5),
        (7, 13, 31),
        (33, 31, 32),
        (127, 5, 33),
        (64, 32, 127),
        (13, 33, 2100),
    ];
    for (rows, c, v) in sizes {
        let case = Case::new(rows, c, v, &mut rng);
        for isa in Isa::available() {
            for how in [How::Rows, How::Panels] {
                let mut first = None;
                for threads in 1..=3 {
                    let pool = Pool::new(threads);
                    let exec = Exec { isa, pool: &pool };
                    let (nll, dx) = case.run(exec, how, true);
                    let what = format!("{} {rows}x{c}x{v} {how:?}", isa.name());
                    case.check(&nll, &dx, 0.0, &what);
                    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    let all = (bits(&nll), bits(&dx));
                    assert_eq!(bits(&case.run(exec, how, false).0), all.0, "{what}");
                    assert_eq!(*first.get_or_insert(all.clone()), all, "{what}");
                }
            }
        }
    }
}

/// Rows and weights that are bf16 already are multiplied as they are; only probabilities are rounded on the way into the
/// gradient, by half a unit of the last of eight digits.
#[test]
fn pairs_of_bf16_are_right_up_to_rounded_probabilities() {
    if !Isa::available().any(|isa| isa == Isa::Avx512Bf16) {
        println!("SKIP: this machine does not multiply bf16");
        return;
    }
    let mut rng = Rng::fresh();
    let round = |v: &mut f32| *v = half::bf16::from_f32(*v).to_f32();
    for (rows, c, v) in [
        (1, 1, 1),
        (2, 3, 5),
        (7, 13, 31),
        (33, 31, 32),
        (127, 5, 33),
        (64, 32, 127),
        (13, 33, 2101),
        (50, 70, 257),
    ] {
        let mut case = Case::new(rows, c, v, &mut rng);
        case.x.iter_mut().chain(&mut case.w).for_each(round);
        let mut first = None;
        for threads in 1..=3 {
            let pool = Pool::new(threads);
            let isa = Isa::Avx512Bf16;
            let exec = Exec { isa, pool: &pool };
            let (nll, dx) = case.run(exec, How::Pairs, true);
            let what = format!("{rows}x{c}x{v} on {threads}");
            case.check(&nll, &dx, 2f64.powi(-8), &what);
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let all = (bits(&nll), bits(&dx));
            assert_eq!(bits(&case.run(exec, How::Pairs, false).0), all.0, "{what}");
            assert_eq!(*first.get_or_insert(all.clone()), all, "{what}");
        }
    }
}

#[test]
fn a_confident_row_has_a_small_loss_and_no_nan() {
    // Logits of hundreds: the exponentials of all others vanish.
    let case = Case {
        rows: 2,
        c: 1,
        v: 3,
        ld: 1,
        x: vec![400.0, -400.0],
        w: vec![1.0, 0.0, -1.0],
        targets: vec![0, 0],
    };
    let pool = Pool::new(1);
    for isa in Isa::available() {
        let (nll, dx) = case.run(Exec { isa, pool: &pool }, How::Rows, true);
        assert_eq!((nll[0], dx[0]), (0.0, 0.0));
        assert_eq!((nll[1], dx[1]), (800.0, -2.0));
    }
}

#[test]
fn the_reference_gradient_agrees_with_finite_differences() {
    let mut rng = Rng::fresh();
    let case = Case::new(3, 4, 6, &mut rng);
    for i in 0..3 {
        let (x, target) = (case.row(i), i);
        let (_, p) = case.reference(&x, target);
        for l in 0..4 {
            let moved = |by: f64| {
                let mut x = x.clone();
                x[l] += by;
                case.reference(&x, target).0
            };
            let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            let w = |j: usize| f64::from(case.w[j * 4 + l]);
            let want = (0..6).map(|j| p[j] * w(j)).sum::<f64>() - w(target);
            assert!((slope - want).abs() < 1e-8, "{slope} {want}");
        }
    }
}
