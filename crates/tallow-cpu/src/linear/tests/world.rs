//! The cases of the linear's tests and the numbers of a case.
//! Invariant: terms are listed from the row-major matrices, never from packed ones.
//! Absent on purpose: running a kernel.

use super::*;

#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) m: usize,
    pub(super) k: usize,
    /// Outputs and rank of each block; rank 0 is no adapter.
    pub(super) blocks: Vec<(usize, usize)>,
    pub(super) bias: bool,
    pub(super) residual: bool,
    pub(super) packed_tail: bool,
    /// `A` comes turned too, where its rank allows; for one row.
    pub(super) turned: bool,
}

impl Case {
    pub(super) fn n(&self) -> usize {
        self.blocks.iter().map(|b| b.0).sum()
    }
    pub(super) fn r(&self) -> usize {
        self.blocks.iter().map(|b| b.1).sum()
    }
    /// Block, row inside the block, and first rank of the block, of output `j`.
    pub(super) fn owner(&self, j: usize) -> (usize, usize, usize) {
        let (mut first, mut rank) = (0, 0);
        for (i, &(n, r)) in self.blocks.iter().enumerate() {
            if j < first + n {
                return (i, j - first, rank);
            }
            first += n;
            rank += r;
        }
        unreachable!("output {j} is beyond the blocks")
    }
}

/// The numbers of a case.
pub(super) struct World {
    pub(super) x: Matrix,
    pub(super) dy: Matrix,
    pub(super) residual: Matrix,
    pub(super) w: Vec<Vec<f32>>,
    pub(super) bias: Vec<Vec<f32>>,
    pub(super) a: Vec<Vec<f32>>,
    pub(super) b: Vec<Vec<f32>>,
    pub(super) scale: Vec<f32>,
}

impl World {
    pub(super) fn new(case: &Case, rng: &mut Rng) -> Self {
        let Case {
            m, k, ref blocks, ..
        } = *case;
        Self {
            x: Matrix::random(rng, m, k),
            dy: Matrix::random(rng, m, case.n()),
            residual: Matrix::random(rng, m, case.n().max(k)),
            w: blocks.iter().map(|b| rng.vec(b.0 * k)).collect(),
            bias: blocks.iter().map(|b| rng.vec(b.0)).collect(),
            a: blocks.iter().map(|b| rng.vec(b.1 * k)).collect(),
            b: blocks.iter().map(|b| rng.vec(b.0 * b.1)).collect(),
            scale: blocks.iter().map(|_| 0.5 + rng.f32().abs()).collect(),
        }
    }

    pub(super) fn blocks<'a, E>(
        &'a self,
        case: &Case,
        panels: &'a [Vec<E>],
        tails: &'a [Vec<f32>],
        heads: &'a [Vec<f32>],
    ) -> Vec<Block<E>> {
        let block = |i: usize| Block {
            n: case.blocks[i].0,
            weights: panels[i].as_ptr(),
            bias: if case.bias {
                self.bias[i].as_ptr()
            } else {
                std::ptr::null()
            },
            adapter: (case.blocks[i].1 > 0).then(|| Adapter {
                rank: case.blocks[i].1,
                scale: self.scale[i],
                a: self.a[i].as_ptr(),
                b: if case.packed_tail && !tails.is_empty() {
                    std::ptr::null()
                } else {
                    self.b[i].as_ptr()
                },
                tail: if case.packed_tail && !tails.is_empty() {
                    tails[i].as_ptr()
                } else {
                    std::ptr::null()
                },
                turned: match heads.get(i) {
                    Some(head) if case.turned && case.blocks[i].1 <= 16 => head.as_ptr(),
                    _ => std::ptr::null(),
                },
            }),
        };
        (0..case.blocks.len()).map(block).collect()
    }

    pub(super) fn tails(&self, case: &Case) -> Vec<Vec<f32>> {
        let tail = |i: usize| {
            let (n, r) = case.blocks[i];
            let mut out = vec![POISON; packed_len(n, r)];
            pack_tail(&self.b[i][..n * r], (n, r), self.scale[i], &mut out);
            out
        };
        (0..case.blocks.len()).map(tail).collect()
    }

    pub(super) fn heads(&self, case: &Case) -> Vec<Vec<f32>> {
        let head = |i: usize| {
            let (r, k) = (case.blocks[i].1, case.k);
            let mut out = vec![POISON; head_len(r, k)];
            pack_head(&self.a[i][..r * k], (r, k), &mut out);
            out
        };
        (0..case.blocks.len()).map(head).collect()
    }

    pub(super) fn panels<E: Packed>(&self, case: &Case, forward: bool) -> Vec<Vec<E>> {
        let pool = Pool::new(1);
        let pack = |i: usize| {
            let (n, k) = (case.blocks[i].0, case.k);
            let len = if forward {
                packed_len(n, E::rows(k))
            } else {
                packed_len(k, E::rows(n))
            };
            let mut out = vec![E::narrow(POISON); len];
            match forward {
                true => pack_nk(&pool, &self.w[i], (n, k), &mut out),
                false => pack_kn(&pool, &self.w[i], (n, k), &mut out),
            }
            out
        };
        (0..case.blocks.len()).map(pack).collect()
    }

    /// Terms of `x A` for rank `c` of block `i`.
    pub(super) fn hidden(&self, case: &Case, row: usize, i: usize, c: usize) -> Vec<f64> {
        (0..case.k)
            .map(|l| product(self.x.at(row, l), self.a[i][c * case.k + l]))
            .collect()
    }

    /// Terms of `dy B` for rank `c` of block `i`, not scaled.
    pub(super) fn down(&self, case: &Case, row: usize, i: usize, c: usize) -> Vec<f64> {
        let (n, r) = case.blocks[i];
        let first: usize = case.blocks[..i].iter().map(|b| b.0).sum();
        (0..n)
            .map(|j| product(self.dy.at(row, first + j), self.b[i][j * r + c]))
            .collect()
    }
}

/// Every pair of awkward sizes, and some larger cases.
pub(super) fn cases(rng: &mut Rng) -> Vec<Case> {
    const SIZES: [usize; 11] = [1, 2, 3, 5, 7, 13, 31, 32, 33, 64, 127];
    let mut cases = Vec::new();
    // Each pair of sizes once for (m, k), the others drawn.
    for m in SIZES {
        for k in SIZES {
            let mut pick = |from: &[usize]| from[rng.next_u64() as usize % from.len()];
            let ranks = [0, 0, 1, 2, 3, 5, 7, 8, 13, 31, 32, 33, 64];
            let count = pick(&[1, 1, 2, 3]);
            let blocks = (0..count).map(|_| (pick(&SIZES), pick(&ranks))).collect();
            let mut flip = || pick(&[0, 1]) == 1;
            let (bias, residual, packed_tail, turned) = (flip(), flip(), flip(), flip());
            cases.push(Case {
                m,
                k,
                blocks,
                bias,
                residual,
                packed_tail,
                turned,
            });
        }
    }
    let blocks = vec![(96, 8), (40, 0), (33, 16)];
    cases.push(Case {
        m: 217,
        k: 300,
        blocks,
        bias: true,
        residual: true,
        packed_tail: false,
        turned: false,
    });
    // Rows (with the gap) that fall on the same cache lines.
    let blocks = vec![(100, 3), (921, 0)];
    cases.push(Case {
        m: 13,
        k: 1021,
        blocks,
        bias: true,
        residual: false,
        packed_tail: true,
        turned: true,
    });
    let blocks = vec![(70, 4)];
    cases.push(Case {
        m: 14,
        k: 4500,
        blocks,
        bias: false,
        residual: false,
        packed_tail: true,
        turned: true,
    });
    let blocks = vec![(4500, 9)];
    cases.push(Case {
        m: 3,
        k: 40,
        blocks,
        bias: false,
        residual: false,
        packed_tail: true,
        turned: true,
    });
    cases
}
