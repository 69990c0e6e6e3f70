//! Linears of many rows in bf16: tensor cores, sums in f32, the adapter as the tail of the product.
//! Invariant: a prepared weight's tail is written by the step that reads it, just before, so recordings with other
//! adapters may share the weight.
//! Absent on purpose: f32 weights that must stay exact; see `linear`.
use super::{
    Arg, Job, Offer, Target, blocks, kernel,
    linear::{Call, ROWS_BF16, Share, add_up, low_rank_grad},
    matmul::matrix,
    source, word,
};
use crate::gemm::{Added, Matrix, Product};
use tallow_core::{
    kernel::{Format, KernelSpec},
    op::Bits,
    types::DType,
};

const FILE: &str = include_str!("linear_half.cu");
/// Rows `[n, k]` with room for a tail behind each row.
pub(super) const TAILED: &str = "rows_bf16_tailed";
/// Rows `[n, k]` with room for more rows.
pub(super) const HEADED: &str = "rows_bf16_headed";
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

pub(super) fn narrow(
    t: &Target,
    from: Arg,
    to: Arg,
    [m, c, row, pitch]: [usize; 4],
) -> Option<Job> {
    let args = vec![from, to, word(m)?, word(c)?, word(row)?, word(pitch)?];
    Some(kernel(
        "narrow",
        source(FILE, &[]),
        blocks(t, m * c / 4),
        256,
        args,
    ))
}

/// `h` behind the rows at `to`, from column `at` on.
fn tail(t: &Target, share: &Share, (to, at): (Arg, usize), pitch: usize) -> Option<Job> {
    let to = match to {
        Arg::Scratch(start) => Arg::Scratch(start + at * 2),
        other => other,
    };
    let width = pitch - at;
    let mut args = vec![share.hidden.0, to];
    for n in [share.m, share.rank, width, share.hidden.1, pitch] {
        args.push(word(n)?);
    }
    Some(kernel(
        "tail",
        source(FILE, &[]),
        blocks(t, share.m * width),
        256,
        args,
    ))
}

/// A kernel of small pieces: for each, how many threads it has and what thread `e` of them does.
struct Small {
    params: String,
    args: Vec<Arg>,
    body: String,
    threads: usize,
}

impl Small {
    fn new(out: Arg) -> Self {
        Small {
            params: String::new(),
            args: vec![out],
            body: String::new(),
            threads: 0,
        }
    }
    fn param(&mut self, name: &str, kind: &str, arg: Arg) {
        self.params += &format!(", {kind} {name}");
        self.args.push(arg);
    }
    fn piece(&mut self, threads: usize, body: &str) {
        self.body += &format!("if (e < {threads}u) {{ {body} return; }}\n  e -= {threads}u;\n  ");
        self.threads += threads;
    }
    fn job(self) -> Option<Job> {
        let text = FILE
            .replace("PARAMS", &self.params)
            .replace("BODY", &self.body);
        let source = source(&text, &[("SMALL", "1".into())]);
        let grid = word(self.threads).map(|_| self.threads.div_ceil(256) as u32)?;
        Some(kernel("small", source, grid, 256, self.args))
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

/// The only share, if its adapters can be the tail.
fn tailed<'a>(c: &'a Call) -> Option<&'a Share> {
    match &c.shares[..] {
        [one] if one.rank > 0 => Some(one),
        _ => None,
    }
}

/// `[x | h] · [W | s B]ᵀ` for each block; bias and residual go with the product.
pub(super) fn forward(t: &Target, c: &Call, spec: &KernelSpec) -> Option<Offer> {
    if t.weights != DType::BF16 || !all_frozen(c, spec) {
        return None;
    }
    let k = spec.inputs[0].layout.shape.last();
    let share = tailed(c);
    let rank = share.map_or(0, |s| s.rank);
    let pitch = if rank > 0 {
        (k + rank).next_multiple_of(8)
    } else {
        k
    };
    let mut scratch = Scratch(c.hidden_scratch);
    let x = scratch.take(c.m * pitch * 2);
    let down = scratch.take(rank * k * 2);
    let mut jobs = vec![narrow(t, Arg::Read(0), x, [c.m, k, c.in_row, pitch])?];
    if let Some(share) = share {
        jobs.push(small_forward(c, down, [k, pitch])?);
        let (rows, a) = (
            half(x, [c.m, k], pitch, false)?,
            half(down, [k, rank], k, true)?,
        );
        let h = c.hidden(share, 0, rank)?;
        jobs.push(product(
            [c.m, rank, k],
            1.0,
            Added::Nothing,
            None,
            [rows, a, h],
        ));
        jobs.push(tail(t, share, (x, k), pitch)?);
    }
    let own_adapters = share.is_none() && c.adapted();
    let (mut prepare, mut n0) = (vec![], 0);
    for (b, at) in c.blocks.iter().zip(&c.at) {
        prepare.extend(match rank > 0 {
            true => Some((at.w, format(TAILED, b.n * pitch))),
            false => plain(spec, at.w),
        });
        let columns = |arg, row: usize| -> Option<Matrix> {
            let m = matrix(arg, DType::F32, [c.m, b.n], [row.max(b.n), 1], 0)?;
            Some(Matrix { offset: n0, ..m })
        };
        let added = match c.residual {
            Some((i, row)) if !own_adapters => Added::Matrix(columns(Arg::Read(i), row)?),
            _ => Added::Nothing,
        };
        let bias = at.bias.filter(|_| !own_adapters).map(Arg::Read);
        let operands = [
            half(x, [c.m, pitch], pitch, false)?,
            half(Arg::Read(at.w), [pitch, b.n], pitch, true)?,
            columns(Arg::Write(0), c.out_row)?,
        ];
        jobs.push(product([c.m, b.n, pitch], 1.0, added, bias, operands));
        n0 += b.n;
    }
    if own_adapters {
        jobs.extend(shares_forward(c, k)?);
    }
    let name = if c.adapted() {
        "lora_linear_tail_bf16"
    } else {
        "linear_bf16"
    };
    Some(Offer {
        prepare,
        ..Offer::new(name, jobs).scratch(scratch.0)
    })
}

/// `A` of every block below each other at `down`, and `s B` into the tail of every weight.
fn small_forward(c: &Call, down: Arg, [k, pitch]: [usize; 2]) -> Option<Job> {
    let mut small = Small::new(down);
    let width = pitch - k;
    let mut r0 = 0;
    for (i, (b, at)) in c.blocks.iter().zip(&c.at).enumerate() {
        small.param(&format!("w{i}"), "u16*", Arg::Read(at.w));
        let mut value = "0".to_owned();
        if let (Some((r, scale)), Some((ia, ib))) = (b.adapters[0], at.ab[0]) {
            small.param(&format!("a{i}"), "const float*", Arg::Read(ia));
            small.param(&format!("b{i}"), "const float*", Arg::Read(ib));
            small.piece(r * k, &format!("out[{}u + e] = to_bf16(a{i}[e]);", r0 * k));
            let s = scale.get();
            let end = r0 + r;
            value = format!(
                "(int)q >= {r0} && q < {end}u ? to_bf16({s:?}f * b{i}[j * {r}u + q - {r0}u]) : 0"
            );
            r0 = end;
        }
        let body = format!(
            "const u32 j = e / {width}u, q = e - j * {width}u; w{i}[(u64)j * {pitch}u + {k}u + q] = {value};"
        );
        small.piece(b.n * width, &body);
    }
    small.job()
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

/// `[dy | dh] · [W ; A]`: the last block's weight carries `A` of all blocks as rows of its own.
pub(super) fn backward(t: &Target, c: &Call, spec: &KernelSpec) -> Option<Offer> {
    if t.weights != DType::BF16 || !all_frozen(c, spec) || spec.outputs[0].is_none() {
        return None;
    }
    let k = spec.inputs[1].layout.shape.last();
    let n: usize = c.blocks.iter().map(|b| b.n).sum();
    let share = tailed(c);
    let rank = share.map_or(0, |s| s.rank);
    let pitch = if rank > 0 {
        (n + rank).next_multiple_of(8)
    } else {
        n
    };
    let mut scratch = Scratch(c.hidden_scratch);
    let dy = scratch.take(c.m * pitch * 2);
    let up_elems: usize = c
        .blocks
        .iter()
        .map(|b| b.n * b.adapters[0].map_or(0, |a| a.0))
        .sum();
    let up = scratch.take(if rank > 0 { up_elems * 2 } else { 0 });
    let mut jobs = vec![narrow(t, Arg::Read(0), dy, [c.m, n, c.in_row, pitch])?];
    if let Some(share) = share {
        jobs.push(small_backward(c, up, [k, pitch - n])?);
        jobs.extend(hidden_grads(c, share, (dy, pitch), up)?);
        jobs.push(tail(t, share, (dy, n), pitch)?);
    }
    let own_adapters = share.is_none() && c.adapted();
    let (mut prepare, mut n0) = (vec![], 0);
    for (i, (b, at)) in c.blocks.iter().zip(&c.at).enumerate() {
        let last = i + 1 == c.blocks.len();
        let rows = if last { b.n + pitch - n } else { b.n };
        prepare.extend(match rows > b.n {
            true => Some((at.w, format(HEADED, rows * k))),
            false => plain(spec, at.w),
        });
        let rows_of = |arg, row: usize| matrix(arg, DType::F32, [c.m, k], [row.max(k), 1], 0);
        let added = match c.residual {
            _ if i > 0 => Added::Result,
            Some((r, row)) if !own_adapters => Added::Matrix(rows_of(Arg::Read(r), row)?),
            _ => Added::Nothing,
        };
        let left = half(dy, [c.m, rows], pitch, false)?;
        let operands = [
            Matrix { offset: n0, ..left },
            half(Arg::Read(at.w), [rows, k], k, false)?,
            rows_of(Arg::Write(0), c.out_row)?,
        ];
        jobs.push(product([c.m, k, rows], 1.0, added, None, operands));
        n0 += b.n;
    }
    if own_adapters {
        for (g, share) in c.shares.iter().enumerate() {
            jobs.extend(low_rank_grad(c, g, share, (k, true))?);
        }
    }
    let name = if c.adapted() {
        "lora_linear_grad_tail_bf16"
    } else {
        "linear_grad_bf16"
    };
    Some(Offer {
        prepare,
        ..Offer::new(name, jobs).scratch(scratch.0)
    })
}

/// `B` of every block at `up`, and `A` of all into the rows behind the last weight.
fn small_backward(c: &Call, up: Arg, [k, extra]: [usize; 2]) -> Option<Job> {
    let mut small = Small::new(up);
    let (last_n, last_w) = c
        .blocks
        .iter()
        .zip(&c.at)
        .map(|(b, at)| (b.n, at.w))
        .next_back()?;
    small.param("w", "u16*", Arg::Read(last_w));
    let (mut r0, mut e0) = (0, 0);
    for (i, (b, at)) in c.blocks.iter().zip(&c.at).enumerate() {
        if let (Some((r, _)), Some((ia, ib))) = (b.adapters[0], at.ab[0]) {
            small.param(&format!("a{i}"), "const float*", Arg::Read(ia));
            small.param(&format!("b{i}"), "const float*", Arg::Read(ib));
            small.piece(b.n * r, &format!("out[{e0}u + e] = to_bf16(b{i}[e]);"));
            small.piece(
                r * k,
                &format!("w[(u64){}u + e] = to_bf16(a{i}[e]);", (last_n + r0) * k),
            );
            e0 += b.n * r;
            r0 += r;
        }
    }
    if extra > r0 {
        small.piece(
            (extra - r0) * k,
            &format!("w[(u64){}u + e] = 0;", (last_n + r0) * k),
        );
    }
    small.job()
}

/// `dh_i = s dy_i B_i`.
fn hidden_grads(c: &Call, share: &Share, (dy, pitch): (Arg, usize), up: Arg) -> Option<Vec<Job>> {
    let (mut jobs, mut n0, mut r0, mut e0) = (vec![], 0, 0, 0);
    for b in c.blocks {
        if let Some((r, scale)) = b.adapters[0] {
            let left = half(dy, [c.m, b.n], pitch, false)?;
            let right = half(up, [b.n, r], r, false)?;
            let operands = [
                Matrix { offset: n0, ..left },
                Matrix {
                    offset: e0,
                    ..right
                },
                c.hidden(share, r0, r)?,
            ];
            jobs.push(product(
                [c.m, r, b.n],
                scale.get(),
                Added::Nothing,
                None,
                operands,
            ));
            r0 += r;
            e0 += b.n * r;
        }
        n0 += b.n;
    }
    Some(jobs)
}
