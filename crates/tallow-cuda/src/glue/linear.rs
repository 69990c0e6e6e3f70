//! Linears with adapters and their gradients.
//! Invariant: few rows go through `linear_few`, rounded weights through `linear_half`; many rows of exact f32
//! through `linear_thin` or the library's product and one pass that adds everything else. No gradient of a weight is formed.
//! Absent on purpose: weights that change. In bf16 they have no candidate and fall to their decomposition.
use super::{
    Arg, Job, Offer, Target, elementwise, framed::Front, linear_few, linear_half, linear_thin,
    matmul::matrix, source, word,
};
use crate::{
    gemm::{Added, Matrix, Product},
    launch::{Kernel, Start},
};
use tallow_core::{
    kernel::{Body, Format, KernelSpec, Operand},
    op::{Bits, Block, Linear, LinearGrad, LinearIns},
    types::{DType, Layout},
};

const LOW: &str = include_str!("linear_low.cu");
const ROWS_F32: &str = "rows_f32";
pub(super) const ROWS_BF16: &str = "rows_bf16";
/// Projections in one call.
const MAX_BLOCKS: usize = 8;

/// Writes a frozen weight as rows of another type, with room behind each row or behind all.
pub(super) fn prepare(t: &Target, format: Format, op: &Operand) -> Option<Vec<Job>> {
    let &[n, k] = &op.layout.shape.0[..] else {
        return None;
    };
    let (dtype, pitch) = match format.name {
        ROWS_F32 => (DType::F32, k),
        ROWS_BF16 => (DType::BF16, k),
        linear_half::FRAMED => (DType::BF16, linear_half::row_of(format, [n, k])?),
        _ => return None,
    };
    let mut layout = Layout::contiguous(&op.layout.shape);
    layout.strides[0] = pitch;
    let to = Operand {
        dtype,
        layout,
        frozen: false,
    };
    let spec = KernelSpec {
        body: Body::Copy,
        inputs: vec![op.clone()],
        outputs: vec![Some(to)],
    };
    Some(elementwise::generated(t, &spec)?.jobs)
}

/// How a weight is read: its type then, the formats asked for, and whether it lies with rows and columns exchanged.
pub(super) struct Weights {
    pub(super) dtype: DType,
    pub(super) prepare: Vec<(usize, Format)>,
    pub(super) strides: Vec<[usize; 2]>,
}

/// Weights `[n, k]` as one type: as they lie if that is how they are wanted, else in a format.
pub(super) fn weights(
    spec: &KernelSpec,
    at: &[LinearIns],
    want: DType,
    any_float: bool,
) -> Option<Weights> {
    let operands = || at.iter().map(|i| &spec.inputs[i.w]);
    let same = operands().all(|o| o.dtype == spec.inputs[at[0].w].dtype);
    let dtype = match same && any_float {
        true => spec.inputs[at[0].w].dtype,
        false => want,
    };
    let mut w = Weights {
        dtype,
        prepare: vec![],
        strides: vec![],
    };
    for (i, o) in at.iter().zip(operands()) {
        let s = &o.layout.strides;
        let lies_well = s[1] == 1 || s[0] == 1 || o.layout.shape.0.contains(&1);
        if o.dtype == dtype && lies_well {
            w.strides.push([s[0], s[1]]);
            continue;
        }
        if !o.frozen {
            return None;
        }
        let (name, size) = match dtype {
            DType::F32 => (ROWS_F32, 4),
            DType::BF16 => (ROWS_BF16, 2),
            _ => return None,
        };
        let format = Format {
            name,
            bytes: o.layout.shape.numel() * size,
            scale: Bits::from(1.0),
        };
        w.prepare.push((i.w, format));
        w.strides.push([o.layout.shape.0[1], 1]);
    }
    Some(w)
}

/// Are all weights dense rows of bf16, where the kernel for few rows reads them?
pub(super) fn row_weights(t: &Target, spec: &KernelSpec, l: &Linear) -> bool {
    let exact = t.weights == DType::F32;
    let dense = |(i, s): (&LinearIns, &[usize; 2])| {
        let k = spec.inputs[i.w].layout.shape.0[1];
        *s == [k, 1]
    };
    let ins = l.ins();
    weights(spec, &ins, t.weights, exact)
        .is_some_and(|w| w.dtype == DType::BF16 && ins.iter().zip(&w.strides).all(dense))
}

/// A single weight as f32, for products outside of linears.
pub(super) struct OneWeight {
    pub(super) prepare: Vec<(usize, Format)>,
    pub(super) stride: [usize; 2],
}

pub(super) fn one_weight(_: &Target, spec: &KernelSpec, at: usize) -> Option<OneWeight> {
    let ins = LinearIns {
        w: at,
        bias: None,
        ab: vec![],
    };
    let w = weights(spec, &[ins], DType::F32, false)?;
    Some(OneWeight {
        stride: w.strides[0],
        prepare: w.prepare,
    })
}

/// Row strides and extents of a call.
pub(super) struct Call<'a> {
    pub(super) blocks: &'a [Block],
    pub(super) at: Vec<LinearIns>,
    pub(super) m: usize,
    pub(super) in_row: usize,
    pub(super) out_row: usize,
    pub(super) shares: Vec<Share>,
    pub(super) hidden_scratch: usize,
    pub(super) residual: Option<(usize, usize)>,
}

/// Rows with adapters of their own.
pub(super) struct Share {
    /// The first of them.
    first: usize,
    /// How many.
    pub(super) m: usize,
    /// Sum of the ranks; 0 where there is no adapter.
    pub(super) rank: usize,
    /// Where `h` or `dh` goes, and its row stride.
    pub(super) hidden: (Arg, usize),
}

/// Are rows, result and what is added to it f32?
pub(super) fn exact(spec: &KernelSpec, residual: Option<(usize, usize)>) -> bool {
    let added = residual.map(|(i, _)| &spec.inputs[i]);
    let mut all = spec.outputs[0]
        .iter()
        .chain(added)
        .chain(spec.inputs.first());
    all.all(|o| o.dtype == DType::F32)
}

/// Ranks of the shares, and which result is `h` or `dh` of each.
type Ranks = (Vec<usize>, Vec<Option<usize>>);

fn call<'a>(
    spec: &KernelSpec,
    blocks: &'a [Block],
    at: Vec<LinearIns>,
    (ranks, numbers): Ranks,
    residual: bool,
) -> Option<Call<'a>> {
    let row = |o: &Operand| o.layout.row_stride();
    let small = |i: &LinearIns| {
        let mut all: Vec<usize> = i.bias.into_iter().collect();
        all.extend(i.ab.iter().flatten().flat_map(|(a, b)| [*a, *b]));
        all.iter().all(|i| spec.inputs[*i].is_dense())
    };
    if blocks.len() > MAX_BLOCKS || !at.iter().all(small) {
        return None;
    }
    let rows = spec.inputs[0].layout.shape.rows();
    let m = rows / ranks.len().max(1);
    let (mut shares, mut scratch) = (vec![], 0);
    for (g, (rank, number)) in ranks.into_iter().zip(numbers).enumerate() {
        let out = number.and_then(|n| Some((n, spec.outputs.get(n)?.as_ref()?)));
        let hidden = match out {
            Some((n, o)) => (Arg::Write(n), row(o)?),
            None => {
                let at = scratch;
                scratch += (m * rank * 4).next_multiple_of(256);
                (Arg::Scratch(at), rank)
            }
        };
        let first = g * m;
        shares.push(Share {
            first,
            m,
            rank,
            hidden,
        });
    }
    let last = spec.inputs.len() - 1;
    Some(Call {
        blocks,
        at,
        m: rows,
        in_row: row(&spec.inputs[0])?,
        out_row: spec.outputs[0].as_ref().map_or(Some(0), row)?,
        shares,
        hidden_scratch: scratch,
        residual: match residual {
            true => Some((last, row(&spec.inputs[last])?)),
            false => None,
        },
    })
}

impl Call<'_> {
    pub(super) fn adapted(&self) -> bool {
        self.shares.iter().any(|s| s.rank > 0)
    }
    /// `[rows, r]` of the hidden result of `share`, from column `r0` on.
    pub(super) fn hidden(&self, share: &Share, r0: usize, r: usize) -> Option<Matrix> {
        let (at, row) = share.hidden;
        let m = matrix(at, DType::F32, [share.m, r], [row.max(r), 1], 0)?;
        Some(Matrix { offset: r0, ..m })
    }
    /// Columns `n0..n0 + n` of the rows of `share` of operand 0.
    fn input(&self, share: &Share, n0: usize, n: usize) -> Option<Matrix> {
        let m = matrix(
            Arg::Read(0),
            DType::F32,
            [share.m, n],
            [self.in_row.max(n), 1],
            0,
        )?;
        let offset = share.first * self.in_row + n0;
        Some(Matrix { offset, ..m })
    }
}

/// `out [m, n] = alpha a [m, k] b [k, n]` and what is added.
fn product([m, n, k]: [usize; 3], alpha: f32, added: Added, [a, b, out]: [Matrix; 3]) -> Job {
    Job::Gemm(Product {
        count: 1,
        m,
        n,
        k,
        alpha,
        added,
        bias: None,
        a,
        b,
        out,
    })
}

pub(super) fn forward(t: &Target, l: &Linear, spec: &KernelSpec) -> Vec<Offer> {
    if spec.outputs[0].is_none() {
        return vec![];
    }
    let Some(c) = call(
        spec,
        &l.blocks,
        l.ins(),
        (l.ranks(), l.hidden()),
        l.residual,
    ) else {
        return vec![];
    };
    let mut all = vec![];
    all.extend(linear_few::forward(t, &c, spec));
    // Neighbours of one row become one launch, which a choice by the time of each step alone would take apart.
    if c.m == 1 && t.weights == DType::BF16 && !all.is_empty() {
        return all;
    }
    all.extend(linear_half::forward(t, &c, spec, None));
    // Exact products are only offered where nothing faster was asked for.
    if all.is_empty() || t.weights == DType::F32 {
        all.extend(many_rows(&c, spec));
        all.extend(linear_thin::forward(t, &c, spec));
    }
    all
}

/// The launches of a linear whose offer is [`linear_half::TAIL`], with what makes its rows taken in.
pub(super) fn behind(t: &Target, l: &Linear, spec: &KernelSpec, front: Front) -> Option<Vec<Job>> {
    let c = call(
        spec,
        &l.blocks,
        l.ins(),
        (l.ranks(), l.hidden()),
        l.residual,
    )?;
    let offer = linear_half::forward(t, &c, spec, Some(front))?;
    (offer.name == linear_half::TAIL).then_some(offer.jobs)
}

/// Code that finds, for row `o` of all outputs (or of all ranks), its block; one branch for each block.
pub(super) fn pick(ends: impl Iterator<Item = (usize, String)>) -> String {
    let (mut text, mut start) = (String::new(), 0);
    for (n, body) in ends {
        let end = start + n;
        text += &format!("if (o < {end}u) {{ const u32 j = o - {start}u; {body} }} else ");
        start = end;
    }
    text + "{}\n"
}

/// The library's product for each block, then one pass that adds bias, residual and adapter.
fn many_rows(c: &Call, spec: &KernelSpec) -> Option<Offer> {
    if !exact(spec, c.residual) {
        return None;
    }
    let w = weights(spec, &c.at, DType::F32, false)?;
    let k = spec.inputs[0].layout.shape.last();
    let mut jobs = vec![];
    let x = matrix(Arg::Read(0), DType::F32, [c.m, k], [c.in_row, 1], 0)?;
    let mut n0 = 0;
    for ((b, at), s) in c.blocks.iter().zip(&c.at).zip(&w.strides) {
        let mut out = matrix(
            Arg::Write(0),
            DType::F32,
            [c.m, b.n],
            [c.out_row.max(b.n), 1],
            0,
        )?;
        out.offset = n0;
        n0 += b.n;
        let weight = matrix(Arg::Read(at.w), DType::F32, [k, b.n], [s[1], s[0]], 0)?;
        jobs.push(product(
            [c.m, b.n, k],
            1.0,
            Added::Nothing,
            [x, weight, out],
        ));
    }
    for (g, share) in c.shares.iter().enumerate() {
        jobs.extend(down(c, g, share, k)?);
        jobs.extend(add_up(c, g, share)?);
    }
    let name = match c.adapted() {
        true => "lora_linear_cublaslt_f32",
        false => "linear_cublaslt_f32",
    };
    Some(Offer {
        prepare: w.prepare,
        ..Offer::new(name, jobs).scratch(c.hidden_scratch)
    })
}

/// `h = x Aᵀ` of every block for the rows of a share.
pub(super) fn down(c: &Call, g: usize, share: &Share, k: usize) -> Option<Vec<Job>> {
    let (mut jobs, mut r0) = (vec![], 0);
    for (b, at) in c.blocks.iter().zip(&c.at) {
        if let (Some((r, _)), Some((a, _))) = (b.adapters[g], at.ab[g]) {
            let (x, h) = (c.input(share, 0, k)?, c.hidden(share, r0, r)?);
            let a = matrix(Arg::Read(a), DType::F32, [k, r], [1, k], 0)?;
            jobs.push(product([share.m, r, k], 1.0, Added::Nothing, [x, a, h]));
            r0 += r;
        }
    }
    Some(jobs)
}

/// `y += bias + residual + s h Bᵀ` for the rows of a share, if there is anything to add.
pub(super) fn add_up(c: &Call, g: usize, share: &Share) -> Option<Option<Job>> {
    let (mut params, mut args, mut blocks) = (String::new(), vec![], vec![]);
    let (mut r0, mut any) = (0, c.residual.is_some());
    for (i, (b, at)) in c.blocks.iter().zip(&c.at).enumerate() {
        let mut body = String::new();
        if let Some(bias) = at.bias {
            params += &format!(", const float* c{i}");
            args.push(Arg::Read(bias));
            body +=
                &format!("const float v = c{i}[j]; for (int e = 0; e < TILE; ++e) acc[e] += v; ");
            any = true;
        }
        if let (Some((r, scale)), Some((_, ib))) = (b.adapters[g], at.ab[g]) {
            params += &format!(", const float* b{i}");
            args.push(Arg::Read(ib));
            let s = scale.get();
            body += &format!(
                "_Pragma(\"unroll 2\") for (int r = 0; r < {r}; ++r) {{ const float v = {s:?}f * b{i}[(u64)j * {r}u + r]; \
                 for (int e = 0; e < TILE; ++e) acc[e] += v * h[e][{r0} + r]; }}"
            );
            r0 += r;
            any = true;
        }
        blocks.push((b.n, body));
    }
    if !any {
        return Some(None);
    }
    let outputs = c.blocks.iter().map(|b| b.n).sum();
    low_rank(
        c,
        share,
        outputs,
        (&params, args),
        &pick(blocks.into_iter()),
    )
    .map(Some)
}

/// One pass over a result of `outputs` columns that adds what `body` makes of the rows of `h`, and the residual.
/// `own`: the parameters that `body` names, as text and as arguments.
fn low_rank(
    c: &Call,
    share: &Share,
    outputs: usize,
    own: (&str, Vec<Arg>),
    body: &str,
) -> Option<Job> {
    let mut args = vec![Arg::Write(0), share.hidden.0, word(share.first)?];
    for n in [share.m, c.out_row, share.hidden.1] {
        args.push(word(n)?);
    }
    match c.residual {
        Some((i, row)) => args.extend([Arg::Read(i), word(row)?]),
        None => args.extend([Arg::U64(0), Arg::U32(0)]),
    }
    args.extend(own.1);
    let defines = [
        ("OUTPUTS", format!("{outputs}u")),
        ("RANK", share.rank.to_string()),
    ];
    let text = LOW.replace("PARAMS", own.0).replace("BODY", body);
    let tiles = share.m.div_ceil(16);
    Some(Job::Kernel(Kernel {
        entry: "low_rank",
        source: source(&text, &defines),
        grid: [
            outputs.div_ceil(128) as u32,
            u32::try_from(tiles).ok().filter(|n| *n <= 65_535)?,
            1,
        ],
        block: 128,
        shared: 0,
        args,
        unless_same: None,
        start: Start::After,
    }))
}

pub(super) fn backward(t: &Target, l: &LinearGrad, spec: &KernelSpec) -> Option<Offer> {
    let c = call(
        spec,
        &l.blocks,
        l.ins(),
        (l.ranks(), l.hidden()),
        l.residual,
    )?;
    if let Some(offer) = linear_half::backward(t, &c, spec) {
        return Some(offer);
    }
    if !exact(spec, c.residual) {
        return None;
    }
    let wants_dx = spec.outputs[0].is_some();
    let k = spec.inputs[1].layout.shape.last();
    let (mut jobs, mut prepare) = (vec![], vec![]);
    if wants_dx {
        let w = weights(spec, &c.at, DType::F32, false)?;
        let mut n0 = 0;
        for (i, ((b, at), s)) in c.blocks.iter().zip(&c.at).zip(&w.strides).enumerate() {
            let dy = matrix(
                Arg::Read(0),
                DType::F32,
                [c.m, b.n],
                [c.in_row.max(b.n), 1],
                0,
            )?;
            let dy = Matrix { offset: n0, ..dy };
            n0 += b.n;
            let weight = matrix(Arg::Read(at.w), DType::F32, [b.n, k], *s, 0)?;
            let out = matrix(
                Arg::Write(0),
                DType::F32,
                [c.m, k],
                [c.out_row.max(k), 1],
                0,
            )?;
            let added = if i == 0 {
                Added::Nothing
            } else {
                Added::Result
            };
            jobs.push(product([c.m, k, b.n], 1.0, added, [dy, weight, out]));
        }
        prepare = w.prepare;
    }
    for (g, share) in c.shares.iter().enumerate() {
        jobs.extend(low_rank_grad(&c, g, share, (k, wants_dx))?);
    }
    let name = match c.adapted() {
        true => "lora_linear_grad_cublaslt_f32",
        false => "linear_grad_cublaslt_f32",
    };
    Some(Offer {
        prepare,
        ..Offer::new(name, jobs).scratch(c.hidden_scratch)
    })
}

/// `dh_i = s dy_i B_i` and, if `dx` is wanted, `dx += Σ dh_i A_i + residual`, for the rows of a share.
pub(super) fn low_rank_grad(
    c: &Call,
    g: usize,
    share: &Share,
    (k, wants_dx): (usize, bool),
) -> Option<Vec<Job>> {
    let (mut jobs, mut params, mut own, mut body) = (vec![], String::new(), vec![], String::new());
    let (mut n0, mut r0) = (0, 0);
    for (i, (b, at)) in c.blocks.iter().zip(&c.at).enumerate() {
        if let (Some((r, scale)), Some((ia, ib))) = (b.adapters[g], at.ab[g]) {
            let (dy, dh) = (c.input(share, n0, b.n)?, c.hidden(share, r0, r)?);
            let up = matrix(Arg::Read(ib), DType::F32, [b.n, r], [r, 1], 0)?;
            jobs.push(product(
                [share.m, r, b.n],
                scale.get(),
                Added::Nothing,
                [dy, up, dh],
            ));
            params += &format!(", const float* a{i}");
            own.push(Arg::Read(ia));
            body += &format!(
                "_Pragma(\"unroll 2\") for (int r = 0; r < {r}; ++r) {{ const float v = a{i}[(u64)r * {k}u + o]; \
                 for (int e = 0; e < TILE; ++e) acc[e] += v * h[e][{r0} + r]; }}\n"
            );
            r0 += r;
        }
        n0 += b.n;
    }
    if wants_dx && (share.rank > 0 || c.residual.is_some()) {
        jobs.push(low_rank(c, share, k, (&params, own), &body)?);
    }
    Some(jobs)
}
