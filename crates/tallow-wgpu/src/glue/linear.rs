//! Linears with adapters and their gradients.
//! Invariant: `h` of a share is made once, then rides in the product of each block; rows of one share never meet the
//! adapter of another. No gradient of a weight is formed.
//! Absent on purpose: weights in a layout of their own. They are read as they lie, or as rows of bf16.
use super::{
    Arg, Offer, Target,
    elementwise::generated,
    matmul::{Product, SUMS, Side, Tail},
    rows::part,
    word,
};
use crate::{
    launch::{Kernel, read, scratch, wide, write},
    shader::{Draft, kernel, line},
};
use tallow_core::{
    kernel::{Body, Format, KernelSpec, Operand},
    op::{Bits, Block, Linear, LinearGrad, LinearIns},
    types::{DType, Layout},
};

const FEW: &str = include_str!("few.wgsl");
const ROWS_BF16: &str = "rows_bf16";
/// Most rows of the kernel that reads a weight once for all of them.
const FEW_ROWS: usize = 8;

/// Writes a frozen weight as rows of bf16.
pub(super) fn prepare(t: &Target, format: Format, op: &Operand) -> Option<Vec<Kernel>> {
    if format.name != ROWS_BF16 {
        return None;
    }
    let to = Operand {
        dtype: DType::BF16,
        layout: Layout::contiguous(&op.layout.shape),
        frozen: false,
    };
    let spec = KernelSpec {
        body: Body::Copy,
        inputs: vec![op.clone()],
        outputs: vec![Some(to)],
    };
    Some(generated(t, &spec)?.jobs)
}

/// How a weight `[n, k]` is read: its type and strides then.
struct Weight {
    dtype: DType,
    strides: [usize; 2],
}

/// Rows with adapters of their own.
struct Share {
    /// The first of them, and how many.
    rows: [usize; 2],
    /// Sum of the ranks; 0 where there is no adapter.
    rank: usize,
    /// Where `h` or `dh` goes, and its row stride.
    hidden: (Arg, usize),
}

/// What forward and backward have in common.
struct Call<'a> {
    blocks: &'a [Block],
    at: Vec<LinearIns>,
    shares: Vec<Share>,
    /// Row strides of operand 0 and of result 0.
    rows: [usize; 2],
    /// The operand that is added, and its row stride.
    past: Option<(usize, usize)>,
    weights: Vec<Weight>,
    prepare: Vec<(usize, Format)>,
    scratch: usize,
}

/// Ranks of the shares, and which result is `h` or `dh` of each.
type Ranks = (Vec<usize>, Vec<Option<usize>>);

/// The weights as they are read, and the formats asked for.
fn weights(t: &Target, spec: &KernelSpec, at: &[LinearIns]) -> (Vec<Weight>, Vec<(usize, Format)>) {
    let (mut all, mut prepare) = (vec![], vec![]);
    for i in at {
        let o = &spec.inputs[i.w];
        let rounds = t.weights == DType::BF16 && o.dtype == DType::F32 && o.frozen;
        all.push(match rounds {
            true => Weight {
                dtype: DType::BF16,
                strides: [o.layout.shape.0[1], 1],
            },
            false => Weight {
                dtype: o.dtype,
                strides: [o.layout.strides[0], o.layout.strides[1]],
            },
        });
        if rounds {
            let format = Format {
                name: ROWS_BF16,
                bytes: o.layout.shape.numel() * 2,
                scale: Bits::from(1.0),
            };
            prepare.push((i.w, format));
        }
    }
    (all, prepare)
}

fn call<'a>(
    t: &Target,
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
    let counted = |o: &Operand| u32::try_from(o.layout.end()).is_ok();
    let mut all = spec.inputs.iter().chain(spec.outputs.iter().flatten());
    if !at.iter().all(small) || !all.all(counted) {
        return None;
    }
    let m = spec.inputs[0].layout.shape.rows() / ranks.len().max(1);
    let (mut shares, mut bytes) = (vec![], 0);
    for (g, (rank, number)) in ranks.into_iter().zip(numbers).enumerate() {
        let out = number.and_then(|n| Some((n, spec.outputs.get(n)?.as_ref()?)));
        let hidden = match out {
            Some((n, o)) => (write("h", n, SUMS), row(o)?),
            None => {
                let (at, need) = (bytes, m * rank * 4);
                bytes += need.next_multiple_of(256);
                (scratch("h", at, need, SUMS), rank)
            }
        };
        let rows = [g * m, m];
        shares.push(Share { rows, rank, hidden });
    }
    let last = spec.inputs.len() - 1;
    let (weights, prepare) = weights(t, spec, &at);
    Some(Call {
        blocks,
        at,
        shares,
        rows: [
            row(&spec.inputs[0])?,
            spec.outputs[0].as_ref().map_or(Some(0), row)?,
        ],
        past: match residual {
            true => Some((last, row(&spec.inputs[last])?)),
            false => None,
        },
        weights,
        prepare,
        scratch: bytes,
    })
}

impl Call<'_> {
    /// Columns from `n0` on of the rows of `share` of operand 0.
    fn input(&self, spec: &KernelSpec, share: &Share, n0: usize) -> Side {
        Side {
            arg: wide("x", 0, spec.inputs[0].dtype),
            at: share.rows[0] * self.rows[0] + n0,
            strides: [self.rows[0], 1],
        }
    }
    fn output(&self, spec: &KernelSpec, share: &Share, n0: usize) -> Side {
        let dtype = spec.outputs[0].as_ref().map_or(SUMS, |o| o.dtype);
        Side {
            arg: write("y", 0, dtype),
            at: share.rows[0] * self.rows[1] + n0,
            strides: [self.rows[1], 1],
        }
    }
    fn past(&self, spec: &KernelSpec, share: &Share, n0: usize) -> Option<Side> {
        let (i, row) = self.past?;
        Some(Side {
            arg: read("past", i, spec.inputs[i].dtype),
            at: share.rows[0] * row + n0,
            strides: [row, 1],
        })
    }
    /// `h` or `dh` of a share, from column `r0` on, as a kernel reads it.
    fn hidden(&self, share: &Share, r0: usize) -> Side {
        Side {
            arg: share.hidden.0.clone(),
            at: r0,
            strides: [share.hidden.1, 1],
        }
    }
    fn adapted(&self) -> bool {
        self.shares.iter().any(|s| s.rank > 0)
    }
}

/// `h [m, r] = scale x wᵀ` over `k`, for few columns `r`.
fn down(
    t: &Target,
    spec: &KernelSpec,
    [m, r, k]: [usize; 3],
    scale: f32,
    [x, w, h]: [Side; 3],
) -> Option<Kernel> {
    // Fewer results: more threads for each.
    let each = match m * r {
        0..=256 => 256,
        257..=4096 => 32,
        _ => 8,
    };
    let args = vec![
        x.arg,
        w.arg,
        h.arg,
        word("m", m)?,
        word("k", k)?,
        word("x0", x.at)?,
        word("xr", x.strides[0])?,
        word("wc", w.strides[0])?,
        word("wi", w.strides[1])?,
        word("h0", h.at)?,
        word("hr", h.strides[0])?,
        Arg::F32("scale".into(), scale),
    ];
    let draft = Draft {
        entry: "down",
        body: part(FEW, "down"),
        consts: &[
            ("G", format!("{each}u")),
            ("RANK", format!("{r}u")),
            ("WK", (w.strides[1] == 1).to_string()),
        ],
        threads: 256,
        grid: line((m * r).div_ceil(256 / each))?,
        args,
    };
    kernel(t, spec, draft)
}

/// The kernel for at most [`FEW_ROWS`] rows, where it takes the product.
fn few(t: &Target, spec: &KernelSpec, p: &Product) -> Option<Kernel> {
    let [m, n, _] = p.sizes;
    if m > FEW_ROWS || p.w.strides[1] != 1 || p.add || p.alpha != 1.0 || p.y.strides[1] != 1 {
        return None;
    }
    let (mut args, mut consts) = p.common()?;
    args.extend([word("x0", p.x.at)?, word("y0", p.y.at)?]);
    consts.push(("ROWS", format!("{m}u")));
    let draft = Draft {
        entry: "few",
        body: part(FEW, "few"),
        consts: &consts,
        threads: 256,
        grid: line(n.div_ceil(8))?,
        args,
    };
    kernel(t, spec, draft)
}

pub(super) fn forward(t: &Target, l: &Linear, spec: &KernelSpec) -> Vec<Offer> {
    if spec.outputs[0].is_none() {
        return vec![];
    }
    let ranks = (l.ranks(), l.hidden());
    let Some(c) = call(t, spec, &l.blocks, l.ins(), ranks, l.residual) else {
        return vec![];
    };
    let tiled = forward_by(t, &c, spec, "tiled");
    let few = forward_by(t, &c, spec, "few");
    let many = c.shares.iter().all(|s| s.rows[1] > FEW_ROWS);
    let extra = |o: Offer, extra| Offer { extra, ..o };
    // A tile of 64 rows is mostly empty with few of them.
    let tiled = tiled.map(|o| extra(o, if many { 0.0 } else { 1e-3 }));
    few.into_iter().chain(tiled).collect()
}

/// `h` of every share and block, then the product of each with its tail.
fn forward_by(t: &Target, c: &Call, spec: &KernelSpec, how: &str) -> Option<Offer> {
    let k = spec.inputs[0].layout.shape.last();
    let mut jobs = vec![];
    for (g, share) in c.shares.iter().enumerate() {
        let (m, mut n0, mut r0) = (share.rows[1], 0, 0);
        for ((b, at), w) in c.blocks.iter().zip(&c.at).zip(&c.weights) {
            let mut tail = None;
            if let (Some((rank, scale)), Some((ia, ib))) = (b.adapters[g], at.ab[g]) {
                let h = c.hidden(share, r0);
                let down_by = Side {
                    arg: wide("w", ia, SUMS),
                    at: 0,
                    strides: [k, 1],
                };
                let sides = [c.input(spec, share, 0), down_by, h.clone()];
                jobs.push(down(t, spec, [m, rank, k], 1.0, sides)?);
                let up_by = Side {
                    arg: read("b", ib, SUMS),
                    at: 0,
                    strides: [rank, 1],
                };
                tail = Some(Tail {
                    h,
                    b: up_by,
                    rank,
                    scale: scale.get(),
                });
                r0 += rank;
            }
            let product = Product {
                sizes: [m, b.n, k],
                x: c.input(spec, share, 0),
                w: Side {
                    arg: wide("w", at.w, w.dtype),
                    at: 0,
                    strides: w.strides,
                },
                y: c.output(spec, share, n0),
                alpha: 1.0,
                tail,
                bias: at.bias.map(|i| read("bias", i, SUMS)),
                past: c.past(spec, share, n0),
                add: false,
            };
            jobs.push(match how {
                "few" => few(t, spec, &product)?,
                _ => product.alone(t, spec)?,
            });
            n0 += b.n;
        }
    }
    let name = match (how, c.adapted()) {
        ("few", true) => "lora_linear_few",
        ("few", false) => "linear_few",
        (_, true) => "lora_linear_tiled",
        (_, false) => "linear_tiled",
    };
    Some(Offer {
        prepare: c.prepare.clone(),
        ..Offer::new(name, jobs).scratch(c.scratch)
    })
}

/// `dh_i = s dy_i B_i`, then `dx = Σ dy_i W_i + Σ dh_i A_i` and what is added, block by block.
pub(super) fn backward(t: &Target, l: &LinearGrad, spec: &KernelSpec) -> Option<Offer> {
    let ranks = (l.ranks(), l.hidden());
    let c = call(t, spec, &l.blocks, l.ins(), ranks, l.residual)?;
    let wants_dx = spec.outputs[0].is_some();
    let k = spec.inputs[1].layout.shape.last();
    let mut jobs = vec![];
    for (g, share) in c.shares.iter().enumerate() {
        let (m, mut n0, mut r0) = (share.rows[1], 0, 0);
        for (i, ((b, at), w)) in c.blocks.iter().zip(&c.at).zip(&c.weights).enumerate() {
            let mut tail = None;
            if let (Some((rank, scale)), Some((ia, ib))) = (b.adapters[g], at.ab[g]) {
                let dh = c.hidden(share, r0);
                let by = Side {
                    arg: wide("w", ib, SUMS),
                    at: 0,
                    strides: [1, rank],
                };
                let sides = [c.input(spec, share, n0), by, dh.clone()];
                jobs.push(down(t, spec, [m, rank, b.n], scale.get(), sides)?);
                let by = Side {
                    arg: read("b", ia, SUMS),
                    at: 0,
                    strides: [1, k],
                };
                tail = Some(Tail {
                    h: dh,
                    b: by,
                    rank,
                    scale: 1.0,
                });
                r0 += rank;
            }
            if wants_dx {
                let product = Product {
                    sizes: [m, k, b.n],
                    x: c.input(spec, share, n0),
                    w: Side {
                        arg: wide("w", at.w, w.dtype),
                        at: 0,
                        strides: [w.strides[1], w.strides[0]],
                    },
                    y: c.output(spec, share, 0),
                    alpha: 1.0,
                    tail,
                    bias: None,
                    past: if i == 0 { c.past(spec, share, 0) } else { None },
                    add: i > 0,
                };
                jobs.push(product.alone(t, spec)?);
            }
            n0 += b.n;
        }
    }
    if jobs.is_empty() {
        return None;
    }
    let name = match c.adapted() {
        true => "lora_linear_grad_tiled",
        false => "linear_grad_tiled",
    };
    Some(Offer {
        prepare: if wants_dx { c.prepare } else { vec![] },
        ..Offer::new(name, jobs).scratch(c.scratch)
    })
}
