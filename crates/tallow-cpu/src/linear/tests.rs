//! Tests of the linear and its gradients against f64 sums: awkward shapes, every instruction set,
//! one to three threads.
//! Invariant: outputs and workspace are poisoned beforehand, inputs are fresh random numbers, and
//! the gaps between rows must survive.
//! Absent on purpose: speed (see `benches/linear.rs`).

mod general;
mod linear;
mod packing;
mod world;

use super::*;
use crate::exec::Exec;
use crate::pool::Pool;
use crate::simd::Isa;
use crate::testing::{Rng, close};

const POISON: f32 = f32::from_bits(0x7fc0_4321);
/// Floats between the rows of every matrix.
const GAP: usize = 3;

/// A random matrix whose rows lie apart.
struct Matrix {
    rows: usize,
    cols: usize,
    data: Vec<f32>,
}

impl Matrix {
    fn random(rng: &mut Rng, rows: usize, cols: usize) -> Self {
        Self {
            rows,
            cols,
            data: rng.vec(rows * (cols + GAP)),
        }
    }

    fn poisoned(rows: usize, cols: usize) -> Self {
        Self {
            rows,
            cols,
            data: vec![POISON; rows * (cols + GAP)],
        }
    }

    fn at(&self, i: usize, j: usize) -> f32 {
        assert!(i < self.rows && j < self.cols);
        self.data[i * (self.cols + GAP) + j]
    }

    fn input(&self) -> Rows<*const f32> {
        Rows {
            at: self.data.as_ptr(),
            row: self.cols + GAP,
        }
    }

    fn output(&mut self) -> Rows<*mut f32> {
        Rows {
            at: self.data.as_mut_ptr(),
            row: self.cols + GAP,
        }
    }

    /// Each element against the terms it is a sum of; the gaps against the poison.
    fn check(&self, what: &str, terms: &dyn Fn(usize, usize) -> Vec<f64>) {
        for (i, row) in self.data.chunks_exact(self.cols + GAP).enumerate() {
            for (j, &got) in row[..self.cols].iter().enumerate() {
                if let Err(e) = close(got, &terms(i, j)) {
                    panic!("{what} [{i},{j}]: {e}");
                }
            }
            let gap = &row[self.cols..];
            assert!(
                gap.iter().all(|g| g.to_bits() == POISON.to_bits()),
                "{what}: gap of row {i}"
            );
        }
    }

    fn bits(&self) -> Vec<u32> {
        self.data.iter().map(|v| v.to_bits()).collect()
    }
}

fn product(a: f32, b: f32) -> f64 {
    f64::from(a) * f64::from(b)
}

/// Calls `body` for every instruction set of this machine.
fn each_isa(body: &mut dyn FnMut(Isa, &str)) {
    for isa in Isa::available() {
        body(isa, isa.name());
    }
}

/// Pools of one, two and three threads.
fn pools() -> [Pool; 3] {
    [1, 2, 3].map(Pool::new)
}
