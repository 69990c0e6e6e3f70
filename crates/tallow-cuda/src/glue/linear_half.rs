//! Linears of many rows in bf16: tensor cores, sums in f32, the adapter as the tail of the product.
//! Invariant: a prepared weight's tail is written by the step that reads it, just before, so recordings with other
//! adapters may share the weight.
//! Absent on purpose: f32 weights that must stay exact; see `linear`.
use super::{
    Arg, Job, Offer, Target, blocks, c_type, early,
    elementwise::one_type,
    framed::{Front, Kind, framed as framed_rows},
    kernel,
    linear::{Call, ROWS_BF16, Share, add_up, exact, low_rank_grad},
    matmul::matrix,
    source, word,
};
use crate::gemm::{Added, Matrix, Product};
use tallow_core::{
    kernel::{Format, KernelSpec, Operand},
    op::{Bits, Block},
    types::DType,
};

const FILE: &str = include_str!("linear_half.cu");
/// Rows `[n, k]` with room for a tail behind each row, and in the last weight of a linear for as many rows behind all.
pub(super) const FRAMED: &str = "rows_bf16_framed";
/// Bytes that every part of the scratch is a multiple of.
const ALIGN: usize = 256;

/// A bf16 matrix.
pub(super) fn half(
    at: Arg,
    [rows, cols]: [usize; 2],
    row: usize,
    transposed: bool,
) -> Option<Matrix> {
    let strides = if transposed { [1, row] } else { [row, 1] };
    matrix(at, DType::BF16, [rows, cols], strides, 0)
}

/// Scratch handed out from the front.
struct Scratch(usize);
impl Scratch {
    fn take(&mut self, bytes: usize) -> Arg {
        let at = self.0.next_multiple_of(ALIGN);
        self.0 = at + bytes;
        Arg::Scratch(at)
    }
}

/// Rows of `from`, an operand of type `x`, as bf16.
pub(super) fn narrow(
    t: &Target,
    x: DType,
    [from, to]: [Arg; 2],
    [m, c, row, pitch]: [usize; 4],
) -> Option<Job> {
    let args = vec![from, to, word(m)?, word(c)?, word(row)?, word(pitch)?];
    let defines = [("NARROW", "1".to_owned()), ("X", c_type(x).to_owned())];
    Some(kernel(
        "narrow",
        source(FILE, &defines),
        blocks(t, m * c / 4),
        256,
        args,
    ))
}

/// Columns of `a` that are not zero, from and to, and the rows that they are not zero in.
type Piece = ([usize; 2], [usize; 2]);

/// Code that leaves out the tiles of rows that are zero in columns `c..c + 32`.
fn only(pieces: &[Piece]) -> String {
    if pieces.len() < 2 {
        return String::new();
    }
    let mut text = String::from("lo = NT; hi = 0; ");
    for ([c0, c1], [r0, r1]) in pieces {
        text += &format!(
            "if (k0 < {c1}u && k0 + 32 > {c0}u) {{ lo = min(lo, {}u); hi = max(hi, {}u); }} ",
            r0 / 8,
            r1.div_ceil(8)
        );
    }
    text
}

/// Adds where `h` of all shares but the first goes to `small`; code that makes `h` that of a block's `share`.
pub(super) fn hidden_of(shares: &[Share], small: &mut Small) -> String {
    let mut code = String::new();
    for (g, share) in shares.iter().enumerate().skip(1) {
        small.param(&format!("h{g}"), "float*", share.hidden.0);
        code += &format!("if (share == {g}u) h = h{g}; ");
    }
    code
}

/// Operand 0 with its tail at `to`, or the tail alone, and `h` of all `shares`, which are alike; `a [rank, k]` of one behind
/// the other in bf16, written by the launch before. `pieces`: those of one share.
fn frame(
    x: &Operand,
    shares: &[Share],
    [to, a]: [Arg; 2],
    [k, row, pitch]: [usize; 3],
    pieces: &[Piece],
    apart: bool,
) -> Option<Job> {
    let share = shares.first()?;
    let mut args = vec![Arg::Read(0), to, share.hidden.0, a];
    for n in [share.m, row, pitch, share.hidden.1] {
        args.push(word(n)?);
    }
    let mut others = Small::default();
    let hidden = hidden_of(shares, &mut others);
    args.extend(others.args);
    let mut defines = vec![
        ("FRAME", "1".to_owned()),
        ("X", c_type(one_type([x])?).to_owned()),
        ("K", format!("{k}u")),
        ("R", format!("{}u", share.rank)),
        ("SHARES", format!("{}u", shares.len())),
    ];
    defines.extend(apart.then(|| ("APART", "1".to_owned())));
    let text = FILE
        .replace("ONLY\n", &(only(pieces) + "\n"))
        .replace("PARAMS", &others.params)
        .replace("HIDDEN_OF", &hidden);
    let grid = u32::try_from(shares.len() * share.m.div_ceil(16)).ok()?;
    Some(early(kernel(
        "frame",
        source(&text, &defines),
        grid,
        256,
        args,
    )))
}

/// A kernel of small pieces: for each, how many threads it has and what thread `e` of them does.
#[derive(Default)]
pub(super) struct Small {
    pub(super) params: String,
    pub(super) names: String,
    pub(super) args: Vec<Arg>,
    pub(super) body: String,
    pub(super) threads: usize,
}

impl Small {
    pub(super) fn param(&mut self, name: &str, kind: &str, arg: Arg) {
        self.params += &format!(", {kind} {name}");
        self.names += &format!(", {name}");
        self.args.push(arg);
    }
    fn piece(&mut self, threads: usize, body: &str) {
        self.body += &format!("if (e < {threads}u) {{ {body} return; }}\n  e -= {threads}u;\n  ");
        self.threads += threads;
    }
    /// A launch of its own, with `out` in front of its parameters.
    fn job(self, out: Arg) -> Option<Job> {
        let text = FILE
            .replace("PARAMS", &self.params)
            .replace("BODY", &self.body);
        let source = source(&text, &[("SMALL", "1".into())]);
        let grid = word(self.threads).map(|_| self.threads.div_ceil(256) as u32)?;
        let args = [vec![out], self.args].concat();
        Some(kernel("small", source, grid, 256, args))
    }
}

fn product(
    [m, n, k]: [usize; 3],
    alpha: f32,
    added: Added,
    bias: Option<Arg>,
    [a, b, out]: [Matrix; 3],
) -> Job {
    Job::Gemm(Product {
        count: 1,
        m,
        n,
        k,
        alpha,
        added,
        bias,
        a,
        b,
        out,
    })
}

fn format(name: &'static str, elems: usize) -> Format {
    Format {
        name,
        bytes: elems * 2,
        scale: Bits::from(1.0),
    }
}

/// Every weight is frozen, so it may be had in bf16.
fn all_frozen(c: &Call, spec: &KernelSpec) -> bool {
    c.at.iter()
        .all(|i| spec.inputs[i.w].frozen && spec.inputs[i.w].dtype.is_float())
}

/// The format of a weight as bf16 rows, unless it lies that way already.
pub(super) fn plain(spec: &KernelSpec, w: usize) -> Option<(usize, Format)> {
    let o = &spec.inputs[w];
    let lies_well = o.dtype == DType::BF16 && o.is_dense();
    (!lies_well).then(|| (w, format(ROWS_BF16, o.layout.shape.numel())))
}

/// Columns of the tail, and adapters, of several shares together.
const MOST_RANKS: usize = 256;
const MOST_ADAPTERS: usize = 64;

/// Have all shares adapters of the same ranks, few enough to be one tail side by side?
pub(super) fn alike(blocks: &[Block]) -> bool {
    let ranks = |b: &Block| -> Vec<usize> {
        let all = b.adapters.iter();
        all.map(|a| a.map_or(0, |a| a.0)).collect()
    };
    let all: Vec<Vec<usize>> = blocks.iter().map(ranks).collect();
    let same = all.iter().all(|r| r.iter().all(|n| *n == r[0]));
    let total: usize = all.iter().flatten().sum();
    let adapters = all.iter().flatten().filter(|r| **r > 0).count();
    let few = total <= MOST_RANKS && adapters <= MOST_ADAPTERS;
    let one = all.iter().all(|r| r.len() == 1);
    same && total > 0 && (one || few)
}

/// All shares, if their adapters can be the tail: a row has its `h` in the columns of its share and zeros in the others.
fn tailed<'a>(c: &'a Call) -> Option<&'a [Share]> {
    let row = c.shares.first()?.hidden.1;
    let same = c.shares.iter().all(|s| s.hidden.1 == row);
    (same && alike(c.blocks)).then_some(&c.shares)
}

/// Sum of the ranks of all shares.
fn total(shares: &[Share]) -> usize {
    shares.iter().map(|s| s.rank).sum()
}

/// The type of the result, and of what is added to it, which must be the same.
fn result_type(c: &Call, spec: &KernelSpec) -> Option<DType> {
    let added = c.residual.map(|(i, _)| &spec.inputs[i]);
    one_type(spec.outputs[0].iter().chain(added))
}

/// Operand 0 as bf16 rows without a tail: as it lies where it lies so, else narrowed into scratch.
fn plain_rows(
    t: &Target,
    spec: &KernelSpec,
    scratch: &mut Scratch,
    [m, c, row]: [usize; 3],
    jobs: &mut Vec<Job>,
) -> Option<(Arg, usize)> {
    let x = one_type([&spec.inputs[0]])?;
    // The library wants rows that start at 16 bytes.
    if x == DType::BF16 && row % 8 == 0 {
        return Some((Arg::Read(0), row.max(c)));
    }
    let to = scratch.take(m * c * 2);
    jobs.push(narrow(t, x, [Arg::Read(0), to], [m, c, row, c])?);
    Some((to, c))
}

/// Name of the offer whose rows a step in front may make. Where adapters are products beside the others it has another.
pub(crate) const TAIL: &str = "lora_linear_tail_bf16";

/// `[x | h] · [W | s B]ᵀ` for each block; bias and residual go with the product. `front`: what makes the rows of operand 0
/// where nobody made them before.
pub(super) fn forward(
    t: &Target,
    c: &Call,
    spec: &KernelSpec,
    front: Option<Front>,
) -> Option<Offer> {
    if t.weights != DType::BF16 || !all_frozen(c, spec) {
        return None;
    }
    let k = spec.inputs[0].layout.shape.last();
    let result = result_type(c, spec)?;
    let shares = tailed(c);
    let own_adapters = shares.is_none() && c.adapted();
    if own_adapters && !exact(spec, c.residual) {
        return None;
    }
    let rank = shares.map_or(0, total);
    let mut scratch = Scratch(c.hidden_scratch);
    let mut jobs = vec![];
    let biases = biases(c, result, own_adapters, &mut scratch);
    let (x, pitch) = match shares {
        Some(shares) => {
            let pitch = (k + rank).next_multiple_of(8);
            let x = scratch.take(c.m * pitch * 2);
            let small = small_forward(c, &biases, [k, pitch - k, framed_row(k, rank)]);
            let lies = Front {
                kind: Kind::Rows,
                x: Arg::Read(0),
                row: c.in_row,
                dtype: spec.inputs[0].dtype,
                plain: None,
            };
            let front = front.unwrap_or(lies);
            front.fits(k).then_some(())?;
            jobs.push(framed_rows(t, c, shares, &front, (x, pitch, k), small)?);
            (x, pitch)
        }
        None => {
            if let Some(job) = small_biases(c, &biases) {
                jobs.push(job);
            }
            plain_rows(t, spec, &mut scratch, [c.m, k, c.in_row], &mut jobs)?
        }
    };
    let inner = if rank > 0 { pitch } else { k };
    let (mut prepare, mut n0) = (vec![], 0);
    let row = if rank > 0 { framed_row(k, rank) } else { k };
    for (i, (b, at)) in c.blocks.iter().zip(&c.at).enumerate() {
        let framed = (rank > 0).then(|| framed([b.n, k], rank, at.w));
        prepare.extend(framed.or_else(|| plain(spec, at.w)));
        let columns = |arg, row: usize| -> Option<Matrix> {
            let m = matrix(arg, result, [c.m, b.n], [row.max(b.n), 1], 0)?;
            Some(Matrix { offset: n0, ..m })
        };
        let added = match c.residual {
            Some((i, row)) if !own_adapters => Added::Matrix(columns(Arg::Read(i), row)?),
            _ => Added::Nothing,
        };
        let operands = [
            half(x, [c.m, inner], pitch, false)?,
            half(Arg::Read(at.w), [inner, b.n], row, true)?,
            columns(Arg::Write(0), c.out_row)?,
        ];
        jobs.push(product(
            [c.m, b.n, inner],
            1.0,
            added,
            biases[i].map(|(_, to)| to),
            operands,
        ));
        n0 += b.n;
    }
    if own_adapters {
        jobs.extend(shares_forward(c, k)?);
    }
    let name = match (c.adapted(), own_adapters) {
        (false, _) => "linear_bf16",
        (true, false) => TAIL,
        (true, true) => "lora_linear_beside_bf16",
    };
    Some(Offer {
        prepare,
        ..Offer::new(name, jobs).scratch(scratch.0)
    })
}

/// Elements between the rows of a framed weight with inner extent `k`.
fn framed_row(k: usize, rank: usize) -> usize {
    (k + rank.next_multiple_of(8)).next_multiple_of(8)
}

/// The format of a weight `[n, k]` of a linear whose ranks sum to `rank`: the same in both directions, so that they
/// share it.
fn framed([n, k]: [usize; 2], rank: usize, w: usize) -> (usize, Format) {
    let rows = n + rank.next_multiple_of(8) + 8;
    (w, format(FRAMED, rows * framed_row(k, rank)))
}

/// The row of a weight `[n, k]` in a framed format; `None` if this is no such format.
pub(super) fn row_of(f: Format, [n, k]: [usize; 2]) -> Option<usize> {
    let ranks = (1..).map(|i| i * 8);
    let fits = |r: &usize| framed([n, k], *r, 0).1.bytes >= f.bytes;
    let rank = ranks.into_iter().find(fits)?;
    (framed([n, k], rank, 0).1.bytes == f.bytes).then(|| framed_row(k, rank))
}

/// Where each block's bias is read from, and whether it has to be brought there: the library wants it in the type of
/// the result.
type Biases = Vec<Option<(Option<usize>, Arg)>>;

fn biases(c: &Call, result: DType, later: bool, scratch: &mut Scratch) -> Biases {
    let one = |(b, at): (&Block, &tallow_core::op::LinearIns)| {
        let i = at.bias.filter(|_| !later)?;
        Some(match result {
            DType::BF16 => (Some(i), scratch.take(b.n * 2)),
            _ => (None, Arg::Read(i)),
        })
    };
    c.blocks.iter().zip(&c.at).map(one).collect()
}

/// Adds to `small` what brings biases to where they are read.
fn bring_biases(c: &Call, biases: &Biases, small: &mut Small) {
    for (i, (b, bias)) in c.blocks.iter().zip(biases).enumerate() {
        if let Some((Some(from), to)) = bias {
            small.param(&format!("f{i}"), "const float*", Arg::Read(*from));
            small.param(&format!("t{i}"), "u16*", *to);
            small.piece(b.n, &format!("t{i}[e] = to_bf16(f{i}[e]);"));
        }
    }
}

fn small_biases(c: &Call, biases: &Biases) -> Option<Job> {
    let mut small = Small::default();
    bring_biases(c, biases, &mut small);
    (small.threads > 0).then(|| small.job(Arg::U64(0)))?
}

/// What rows of other shares multiply by zero has to be finite: an adapter that diverged spoils its own rows alone, with the
/// greatest number that bf16 has.
fn bounded(c: &Call, value: &str) -> String {
    match c.shares.len() {
        1 => value.to_owned(),
        _ => format!("fminf(fmaxf({value}, -3.3895313e38f), 3.3895313e38f)"),
    }
}

/// `s B` of all shares side by side into the tail of every weight.
fn small_forward(c: &Call, biases: &Biases, [k, width, row]: [usize; 3]) -> Small {
    let mut small = Small::default();
    bring_biases(c, biases, &mut small);
    let mut r0 = 0;
    for (i, (b, at)) in c.blocks.iter().zip(&c.at).enumerate() {
        small.param(&format!("w{i}"), "u16*", Arg::Read(at.w));
        let mut value = "0".to_owned();
        for (g, share) in c.shares.iter().enumerate() {
            let (Some((r, scale)), Some((_, ib))) = (b.adapters[g], at.ab[g]) else {
                continue;
            };
            small.param(&format!("b{i}_{g}"), "const float*", Arg::Read(ib));
            let (s, from) = (scale.get(), g * share.rank + r0);
            let end = from + r;
            value = format!(
                "(int)q >= {from} && q < {end}u ? to_bf16({}) : {value}",
                bounded(c, &format!("{s:?}f * b{i}_{g}[j * {r}u + q - {from}u]"))
            );
        }
        r0 += b.adapters[0].map_or(0, |a| a.0);
        let body = format!(
            "const u32 j = e / {width}u, q = e - j * {width}u; w{i}[(u64)j * {row}u + {k}u + q] = {value};"
        );
        small.piece(b.n * width, &body);
    }
    small
}

/// Adapters of several shares, each over its own rows of f32.
fn shares_forward(c: &Call, k: usize) -> Option<Vec<Job>> {
    let mut jobs = vec![];
    for (g, share) in c.shares.iter().enumerate() {
        jobs.extend(super::linear::down(c, g, share, k)?);
        jobs.extend(add_up(c, g, share)?);
    }
    Some(jobs)
}

/// Columns of `dy` for each of `dx` from which copying `dy` costs more than adding `dh A` to `dx`.
const APART: usize = 4;

/// `[dy | dh] · [W ; A]`: the last block's weight carries `A` of all blocks as rows of its own. Where `dy` is many times
/// as wide as `dx` it is read where it lies, and `dh A` is a product of its own.
pub(super) fn backward(t: &Target, c: &Call, spec: &KernelSpec) -> Option<Offer> {
    if t.weights != DType::BF16 || !all_frozen(c, spec) || spec.outputs[0].is_none() {
        return None;
    }
    let k = spec.inputs[1].layout.shape.last();
    let n: usize = c.blocks.iter().map(|b| b.n).sum();
    let result = result_type(c, spec)?;
    let shares = tailed(c);
    let own_adapters = shares.is_none() && c.adapted();
    if own_adapters && !exact(spec, c.residual) {
        return None;
    }
    let rank = shares.map_or(0, total);
    let mut scratch = Scratch(c.hidden_scratch);
    let mut jobs = vec![];
    let aligned = n.is_multiple_of(8) && c.in_row.is_multiple_of(8);
    let lies = aligned && spec.inputs[0].dtype == DType::BF16;
    let apart = rank > 0 && lies && n >= APART * k;
    let width = (n + rank).next_multiple_of(8) - n;
    let (tail, (dy, pitch)) = match shares {
        Some(shares) => {
            let pitch = if apart { width } else { n + width };
            let (to, up) = (scratch.take(c.m * pitch * 2), scratch.take(rank * n * 2));
            let (small, pieces) = small_backward(c, up, [n, k, rank, width])?;
            let sizes = [n, c.in_row, pitch];
            jobs.push(small);
            jobs.push(frame(
                &spec.inputs[0],
                shares,
                [to, up],
                sizes,
                &pieces,
                apart,
            )?);
            let left = match apart {
                true => (Arg::Read(0), c.in_row.max(n)),
                false => (to, pitch),
            };
            (Some(to), left)
        }
        None => {
            let rows = plain_rows(t, spec, &mut scratch, [c.m, n, c.in_row], &mut jobs)?;
            (None, rows)
        }
    };
    let (mut prepare, mut n0) = (vec![], 0);
    let row = if rank > 0 { framed_row(k, rank) } else { k };
    for (i, (b, at)) in c.blocks.iter().zip(&c.at).enumerate() {
        let last = rank > 0 && i + 1 == c.blocks.len();
        let rows = b.n + if last && !apart { width } else { 0 };
        let framed = (rank > 0).then(|| framed([b.n, k], rank, at.w));
        prepare.extend(framed.or_else(|| plain(spec, at.w)));
        let rows_of = |arg, row: usize| matrix(arg, result, [c.m, k], [row.max(k), 1], 0);
        let added = match c.residual {
            _ if i > 0 => Added::Result,
            Some((r, row)) if !own_adapters => Added::Matrix(rows_of(Arg::Read(r), row)?),
            _ => Added::Nothing,
        };
        let left = half(dy, [c.m, rows], pitch, false)?;
        let operands = [
            Matrix { offset: n0, ..left },
            half(Arg::Read(at.w), [rows, k], row, false)?,
            rows_of(Arg::Write(0), c.out_row)?,
        ];
        jobs.push(product([c.m, k, rows], 1.0, added, None, operands));
        if let (true, true, Some(tail)) = (last, apart, tail) {
            let below = half(Arg::Read(at.w), [width, k], row, false)?;
            let offset = b.n * row;
            let operands = [
                half(tail, [c.m, width], width, false)?,
                Matrix { offset, ..below },
                rows_of(Arg::Write(0), c.out_row)?,
            ];
            jobs.push(product([c.m, k, width], 1.0, Added::Result, None, operands));
        }
        n0 += b.n;
    }
    if own_adapters {
        for (g, share) in c.shares.iter().enumerate() {
            jobs.extend(low_rank_grad(c, g, share, (k, true))?);
        }
    }
    let name = match (c.adapted(), own_adapters) {
        (false, _) => "linear_grad_bf16",
        (true, false) => "lora_linear_grad_tail_bf16",
        (true, true) => "lora_linear_grad_beside_bf16",
    };
    Some(Offer {
        prepare,
        ..Offer::new(name, jobs).scratch(scratch.0)
    })
}

/// `s Bᵀ` of every block at `up [rank, n]`, share behind share, zeros around them, and `A` of all into the rows behind the last
/// weight. Also where the rows of one share are not zero.
fn small_backward(c: &Call, up: Arg, [n, k, rank, extra]: [usize; 4]) -> Option<(Job, Vec<Piece>)> {
    let mut small = Small::default();
    let (last_n, last_w) = c
        .blocks
        .iter()
        .zip(&c.at)
        .map(|(b, at)| (b.n, at.w))
        .next_back()?;
    let row = framed_row(k, rank);
    small.param("w", "u16*", Arg::Read(last_w));
    let (mut r0, mut n0, mut pieces) = (0, 0, vec![]);
    for (i, (b, at)) in c.blocks.iter().zip(&c.at).enumerate() {
        let n1 = n0 + b.n;
        for (g, share) in c.shares.iter().enumerate() {
            let (Some((r, scale)), Some((ia, ib))) = (b.adapters[g], at.ab[g]) else {
                continue;
            };
            small.param(&format!("a{i}_{g}"), "const float*", Arg::Read(ia));
            small.param(&format!("b{i}_{g}"), "const float*", Arg::Read(ib));
            let (s, from) = (scale.get(), g * share.rank + r0);
            let body = format!(
                "const u32 q = e / {n}u, j = e - q * {n}u; out[(u64)({from}u + q) * {n}u + j] = \
                 (int)j >= {n0} && j < {n1}u ? to_bf16({s:?}f * b{i}_{g}[(j - {n0}u) * {r}u + q]) : 0;"
            );
            small.piece(n * r, &body);
            let body = format!(
                "const u32 q = e / {k}u, j = e - q * {k}u; w[(u64)({}u + q) * {row}u + j] = to_bf16({});",
                last_n + from,
                bounded(c, &format!("a{i}_{g}[e]"))
            );
            small.piece(r * k, &body);
        }
        if let Some((r, _)) = b.adapters[0] {
            pieces.push(([n0, n1], [r0, r0 + r]));
            r0 += r;
        }
        n0 = n1;
    }
    if extra > rank {
        let body = format!(
            "const u32 q = e / {k}u, j = e - q * {k}u; w[(u64)({}u + q) * {row}u + j] = 0;",
            last_n + rank
        );
        small.piece((extra - rank) * k, &body);
    }
    Some((small.job(up)?, pieces))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_row_of_a_framed_weight_is_found_again() {
        for (n, k) in [(1, 1), (7, 33), (128, 896), (4864, 896), (896, 4864)] {
            for rank in 1..100 {
                let (_, f) = framed([n, k], rank, 0);
                assert_eq!(row_of(f, [n, k]), Some(framed_row(k, rank)));
            }
            assert_eq!(row_of(format(FRAMED, n * k + 1), [n, k]), None);
        }
    }
}
