//! Plain products over the two innermost axes: cuBLASLt where it takes the strides, a kernel for any.
//! Invariant: a product of f32 matrices is exact f32 arithmetic whichever runs it.
//! Absent on purpose: products with weights that never change; those are linears.
use super::{
    Arg, Job, Offer, c_type,
    outer::{self, NARROW},
    source, word,
};
use crate::{
    gemm::{Added, Matrix, Product},
    launch::{Kernel, Start},
};
use tallow_core::{
    kernel::{KernelSpec, Operand},
    types::{DType, Walk},
};

const FILE: &str = include_str!("matmul.cu");
/// Axes of a batch, after merging.
const AXES: usize = 3;

pub(super) fn offers(ta: bool, tb: bool, alpha: f32, spec: &KernelSpec) -> Vec<Offer> {
    let mut all = vec![];
    all.extend(outer::offer(ta, tb, alpha, spec));
    all.extend(library(ta, tb, alpha, spec));
    all.extend(general(ta, tb, alpha, spec));
    all
}

/// Extents `m, n, k` and, for each side, the strides of its row and column as the product reads it.
struct Sides {
    sizes: [usize; 3],
    a: [usize; 2],
    b: [usize; 2],
    c: [usize; 2],
}

fn sides(ta: bool, tb: bool, spec: &KernelSpec) -> Option<Sides> {
    let inner = |o: &Operand, t: bool| {
        let rank = o.layout.shape.rank();
        let (s, n) = (&o.layout.strides[rank - 2..], &o.layout.shape.0[rank - 2..]);
        match t {
            false => ([n[0], n[1]], [s[0], s[1]]),
            true => ([n[1], n[0]], [s[1], s[0]]),
        }
    };
    let (a, b, c) = (
        inner(&spec.inputs[0], ta),
        inner(&spec.inputs[1], tb),
        inner(spec.outputs[0].as_ref()?, false),
    );
    Some(Sides {
        sizes: [a.0[0], b.0[1], a.0[1]],
        a: a.1,
        b: b.1,
        c: c.1,
    })
}

/// A matrix `[rows, cols]` with strides, as the library takes it: one of the strides is 1.
pub(super) fn matrix(
    at: Arg,
    dtype: DType,
    [rows, cols]: [usize; 2],
    [row, col]: [usize; 2],
    batch: usize,
) -> Option<Matrix> {
    let (transposed, row) = if col == 1 || cols == 1 {
        (false, if rows == 1 { cols.max(row) } else { row })
    } else if row == 1 || rows == 1 {
        (true, if cols == 1 { rows } else { col })
    } else {
        return None;
    };
    let dense = if transposed { rows } else { cols };
    (row >= dense).then_some(Matrix {
        at,
        offset: 0,
        dtype,
        row,
        batch,
        transposed,
    })
}

fn batch_axes(spec: &KernelSpec) -> Option<(Vec<usize>, Vec<Vec<usize>>)> {
    let out = spec.outputs[0].as_ref()?;
    let outer = |o: &Operand| o.layout.strides[..o.layout.shape.rank() - 2].to_vec();
    let all = [outer(&spec.inputs[0]), outer(&spec.inputs[1]), outer(out)];
    let shape = &out.layout.shape.0;
    let w = Walk::over(&shape[..shape.len() - 2], &[&all[0], &all[1], &all[2]]);
    Some((w.shape, w.strides))
}

fn library(ta: bool, tb: bool, alpha: f32, spec: &KernelSpec) -> Option<Offer> {
    let out = spec.outputs[0].as_ref()?;
    let kinds = [&spec.inputs[0], &spec.inputs[1], out].map(|o| o.dtype);
    if kinds.iter().any(|d| *d != kinds[0] || !d.is_float()) {
        return None;
    }
    let s = sides(ta, tb, spec)?;
    let [m, n, k] = s.sizes;
    let (shape, strides) = batch_axes(spec)?;
    if shape.len() > 1 || k == 0 {
        return None;
    }
    let count = shape.first().copied().unwrap_or(1);
    let step = |i: usize| strides[i].first().copied().unwrap_or(0);
    let c = matrix(Arg::Write(0), kinds[2], [m, n], s.c, step(2)).filter(|c| !c.transposed)?;
    let product = Product {
        count,
        m,
        n,
        k,
        alpha,
        added: Added::Nothing,
        bias: None,
        a: matrix(Arg::Read(0), kinds[0], [m, k], s.a, step(0))?,
        b: matrix(Arg::Read(1), kinds[1], [k, n], s.b, step(1))?,
        out: c,
    };
    // Below this much work its start costs more than it saves.
    let small = 2.0 * (count * m * n) as f64 * (k as f64) < 1e6;
    // It has no good algorithm for a few columns under a long sum: 5 to 8 times the time of reading the operands.
    let narrow = m.min(n) <= NARROW && k >= 256;
    let reading = spec.bytes() as f64 * 2e-12;
    Some(Offer {
        extra: if small { 4e-6 } else { 0.0 } + if narrow { 8e-6 + reading } else { 0.0 },
        ..Offer::new("matmul_cublaslt", vec![Job::Gemm(product)])
    })
}

fn general(ta: bool, tb: bool, alpha: f32, spec: &KernelSpec) -> Option<Offer> {
    let (a, b, c) = (&spec.inputs[0], &spec.inputs[1], spec.outputs[0].as_ref()?);
    let s = sides(ta, tb, spec)?;
    let (shape, strides) = batch_axes(spec)?;
    if shape.len() > AXES {
        return None;
    }
    let mut args = vec![Arg::Read(0), Arg::Read(1), Arg::Write(0)];
    for v in s.sizes.iter().chain(&s.a).chain(&s.b).chain(&s.c) {
        args.push(word(*v)?);
    }
    for v in [&shape, &strides[0], &strides[1], &strides[2]] {
        args.extend(vec![Arg::U32(1); AXES - shape.len()]);
        for n in v {
            args.push(word(*n)?);
        }
    }
    args.push(Arg::F32(alpha));
    let defines = [
        ("A", c_type(a.dtype)),
        ("B", c_type(b.dtype)),
        ("C", c_type(c.dtype)),
    ];
    let defines = defines.map(|(k, v)| (k, v.to_owned()));
    let [m, n, k] = s.sizes;
    let batches = shape.iter().product::<usize>();
    let grid = [n.div_ceil(64), m.div_ceil(64), batches];
    if grid[1] > 65_535 || grid[2] > 65_535 {
        return None;
    }
    let job = Job::Kernel(Kernel {
        entry: "matmul",
        source: source(FILE, &defines),
        grid: grid.map(|g| g as u32),
        block: 256,
        shared: 0,
        args,
        unless_same: None,
        start: Start::After,
    });
    // About a third of what the library reaches.
    let busy = (m.div_ceil(64) * n.div_ceil(64) * batches) as f64 / 132.0;
    let extra = 2.0 * (batches * m * n) as f64 * k as f64 / (1e13 * busy.clamp(0.01, 1.0));
    Some(Offer {
        extra,
        ..Offer::new("matmul_tiled_any", vec![job])
    })
}
