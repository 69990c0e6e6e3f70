//! Plain products over the two innermost axes: cuBLASLt where it takes the strides, a kernel for any.
//! Invariant: a product of f32 matrices is exact f32 arithmetic whichever runs it.
//! Absent on purpose: products with weights that never change; those are linears.
use super::{Arg, Job, Offer, c_type, source, word};
use crate::{
    gemm::{Added, Matrix, Product},
    launch::{Kernel, Start},
};
use tallow_core::{
    kernel::{Body, KernelSpec, Operand},
    types::{DType, Walk},
};

const FILE: &str = include_str!("matmul.cu");
const OUTER: &str = include_str!("outer.cu");
const OUTER_HALF: &str = include_str!("outer_half.cu");
/// Axes of a batch, after merging.
const AXES: usize = 3;
/// Columns of the narrow side of an outer product that its kernel takes.
const NARROW: usize = 64;

pub(super) fn offers(ta: bool, tb: bool, alpha: f32, spec: &KernelSpec) -> Vec<Offer> {
    let mut all = vec![];
    all.extend(outer(ta, tb, alpha, spec));
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

/// `dA = dhᵀ x`, `dB = s dyᵀ h`: few columns on one side, a long sum over rows, in two deterministic steps.
/// An outer product as its kernels see it: extents, operands, row strides of both and of the result.
#[derive(Clone, Copy)]
pub(crate) struct Outer {
    rows: usize,
    few: usize,
    many: usize,
    /// Which operand is narrow, and which is wide.
    pub(crate) at: [usize; 2],
    row: [usize; 3],
    turned: bool,
    alpha: f32,
    /// Type of the narrow operand.
    dtype: DType,
}

/// Name of the offer that `side_by_side` can join.
pub(crate) const OUTER_NAME: &str = "matmul_tn_outer_mma";
/// Products of one launch.
pub(crate) const MOST_OUTERS: usize = 8;

impl Outer {
    /// The outer product that `spec` is, if its kernel on tensor cores takes it.
    pub(crate) fn of(spec: &KernelSpec) -> Option<Outer> {
        let Body::MatMul { ta, tb, alpha } = &spec.body else {
            return None;
        };
        let o = outer_sides(*ta, *tb, alpha.get(), spec)?;
        let half = spec.inputs[o.at[1]].dtype == DType::BF16;
        (half && o.few <= 32 && o.many.div_ceil(64) <= 65_535).then_some(o)
    }
    /// May both be made by one launch?
    pub(crate) fn joins(&self, other: &Outer) -> bool {
        (self.rows, self.few, self.dtype) == (other.rows, other.few, other.dtype)
    }
    fn columns(&self) -> usize {
        self.many.div_ceil(64)
    }
}

/// One launch for products that join, each with its narrow operand, its wide one and its result; and the scratch it
/// needs at `parts`.
pub(crate) fn side_by_side(all: &[(Outer, [Arg; 3])], parts: Arg) -> Option<(Job, usize)> {
    let one = all.first()?.0;
    let columns: usize = all.iter().map(|(o, _)| o.columns()).sum();
    // Two blocks for each of many processors, each with at least 128 rows.
    let wanted = (264 / columns).max(1);
    let chunk = one.rows.div_ceil(wanted).next_multiple_of(128);
    let chunks = one.rows.div_ceil(chunk);
    let (mut params, mut names, mut args) = (String::new(), String::new(), vec![]);
    let (mut picks, mut offset) = (vec![], 0);
    args.extend([parts, word(one.rows)?, word(chunk)?]);
    for (i, (o, addresses)) in all.iter().enumerate() {
        params += &format!(", const F* f{i}, const bf16* m{i}, float* o{i}");
        names += &format!(", f{i}, m{i}, o{i}");
        args.extend(addresses);
        let [fr, mr, row] = o.row;
        let (n, alpha, turned) = (o.many, o.alpha, o.turned);
        picks.push((
            o.columns(),
            format!(
                "p = One{{f{i}, m{i}, part + {offset}u, o{i}, j, {n}u, {fr}u, {mr}u, {row}u, {alpha:?}f, {turned}}};"
            ),
        ));
        offset += chunks * o.few * o.many;
    }
    word(offset)?;
    let defines = [
        ("FEW", one.few.to_string()),
        ("F", c_type(one.dtype).to_owned()),
        ("COLUMNS", columns.to_string()),
    ];
    let text = OUTER_HALF
        .replace("PARAMS", &params)
        .replace("NAMES", &names)
        .replace("PICK", &super::linear::pick(picks.into_iter()));
    let job = Job::Kernel(Kernel {
        entry: "outer",
        source: source(&text, &defines),
        grid: [u32::try_from(columns).ok()?, chunks as u32, 1],
        block: 256,
        shared: 0,
        args,
        unless_same: None,
        start: Start::After,
    });
    Some((job, offset * 4))
}

/// On tensor cores, where the wide operand is bf16.
fn outer_half(spec: &KernelSpec) -> Option<Offer> {
    let o = Outer::of(spec)?;
    let args = [Arg::Read(o.at[0]), Arg::Read(o.at[1]), Arg::Write(0)];
    let (job, scratch) = side_by_side(&[(o, args)], Arg::Scratch(0))?;
    Some(Offer::new(OUTER_NAME, vec![job]).scratch(scratch))
}

fn outer_sides(ta: bool, tb: bool, alpha: f32, spec: &KernelSpec) -> Option<Outer> {
    let (a, b, c) = (&spec.inputs[0], &spec.inputs[1], spec.outputs[0].as_ref()?);
    let floats = [a, b]
        .iter()
        .all(|o| matches!(o.dtype, DType::F32 | DType::BF16));
    if !(ta && !tb && floats && c.dtype == DType::F32 && a.layout.shape.rank() == 2) {
        return None;
    }
    let (rows, p, q) = (
        a.layout.shape.0[0],
        a.layout.shape.0[1],
        b.layout.shape.0[1],
    );
    let (few, many) = (p.min(q), p.max(q));
    if few > NARROW || rows < 256 {
        return None;
    }
    let turned = p > q;
    let (ar, br, cr) = (
        a.layout.row_stride()?,
        b.layout.row_stride()?,
        c.layout.row_stride()?,
    );
    let (few_at, many_at, few_row, many_row) = match turned {
        false => (0, 1, ar, br),
        true => (1, 0, br, ar),
    };
    Some(Outer {
        rows,
        few,
        many,
        at: [few_at, many_at],
        row: [few_row, many_row, cr],
        turned,
        alpha,
        dtype: spec.inputs[few_at].dtype,
    })
}

/// `dA = dhᵀ x`, `dB = s dyᵀ h` in f32, or whichever types the two have.
pub(super) fn outer(ta: bool, tb: bool, alpha: f32, spec: &KernelSpec) -> Option<Offer> {
    if let Some(offer) = outer_half(spec) {
        return Some(offer);
    }
    let Outer {
        rows,
        few,
        many,
        at: [few_at, many_at],
        row: [few_row, many_row, cr],
        turned,
        ..
    } = outer_sides(ta, tb, alpha, spec)?;
    // Pairs of columns, where all of them lie on four bytes and few is small enough to keep their sums.
    let paired = spec.inputs[many_at].dtype == DType::BF16 && many % 2 == 0 && many_row % 2 == 0;
    let cols = if paired && few <= 16 { 2 } else { 1 };
    // About a thousand blocks, each with at least 32 rows.
    let wanted = (1024 / many.div_ceil(128 * cols)).max(1);
    let chunk = rows.div_ceil(wanted).next_multiple_of(32);
    let chunks = rows.div_ceil(chunk);
    let defines = [
        ("FEW", few.to_string()),
        ("TURNED", usize::from(turned).to_string()),
        ("COLS", cols.to_string()),
        ("F", c_type(spec.inputs[few_at].dtype).to_owned()),
        ("M", c_type(spec.inputs[many_at].dtype).to_owned()),
    ];
    let source = source(OUTER, &defines);
    let mut args = vec![Arg::Read(few_at), Arg::Read(many_at), Arg::Scratch(0)];
    for v in [rows, many, chunk, few_row, many_row] {
        args.push(word(v)?);
    }
    let first = Job::Kernel(Kernel {
        entry: "outer_parts",
        source: source.clone(),
        grid: [many.div_ceil(128 * cols) as u32, chunks as u32, 1],
        block: 128,
        shared: 0,
        args,
        unless_same: None,
        start: Start::After,
    });
    let args = vec![
        Arg::Scratch(0),
        Arg::Write(0),
        word(many)?,
        word(chunks)?,
        word(cr)?,
        Arg::F32(alpha),
    ];
    let second = super::kernel(
        "outer_join",
        source,
        (few * many).div_ceil(256) as u32,
        256,
        args,
    );
    Some(Offer::new("matmul_tn_outer", vec![first, second]).scratch(chunks * few * many * 4))
}
