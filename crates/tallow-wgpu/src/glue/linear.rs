//! Linears with adapters and their gradients.
//! Invariant: `h` of a share is made once, then rides in the product of each block; rows of one share never meet the
//! adapter of another. No gradient of a weight is formed.
//! Absent on purpose: weights in a layout of their own. They are read as they lie, or as rows of bf16; one larger than
//! the adapter binds is bound in pieces.
use super::{
    Arg, Offer, Target,
    elementwise::generated,
    linear_few,
    matmul::{Product, SUMS, Side, Tail, Way},
    skinny,
};
use crate::{
    gpu::ALIGN,
    launch::{Kernel, Name, Ty, read, scratch, wide, write},
};
use tallow_core::{
    kernel::{Body, Format, KernelSpec, Operand},
    op::{Bits, Block, Linear, LinearGrad, LinearIns},
    types::{DType, Layout},
};

const ROWS_BF16: &str = "rows_bf16";

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

/// A block, or rows of one whose weight is too large to be bound whole.
pub(super) struct Piece {
    /// First output inside the block, and how many.
    pub(super) first: usize,
    pub(super) n: usize,
    /// Outputs of the whole block.
    whole: usize,
    /// Rank and scale in each share.
    pub(super) adapters: Vec<Option<(usize, Bits)>>,
    pub(super) at: LinearIns,
    /// How the weight `[n, k]` is read: its type and strides then.
    dtype: DType,
    pub(super) strides: [usize; 2],
    k: usize,
}

impl Piece {
    /// Its part of the weight.
    pub(super) fn weight(&self, name: impl Into<Name>) -> Arg {
        let (operand, ty) = (self.at.w, Ty::Wide(self.dtype));
        if self.n == self.whole {
            return wide(name, operand, self.dtype);
        }
        let size = self.dtype.bytes();
        Arg::Part {
            name: name.into(),
            operand,
            at: self.first * self.strides[0] * size,
            bytes: ((self.n - 1) * self.strides[0] + self.k) * size,
            ty,
        }
    }
    /// Where its block ends, so do the columns of `h` that belong to it.
    pub(super) fn ends(&self) -> bool {
        self.first + self.n == self.whole
    }
    fn begins(&self) -> bool {
        self.first == 0
    }
}

/// Rows with adapters of their own.
pub(super) struct Share {
    /// The first of them, and how many.
    pub(super) rows: [usize; 2],
    /// Sum of the ranks; 0 where there is no adapter.
    pub(super) rank: usize,
    /// Where `h` or `dh` goes, and its row stride.
    pub(super) hidden: (Arg, usize),
}

/// What of the steps around a linear its kernels do as well.
#[derive(Clone, Copy, Default)]
pub(crate) struct Around {
    pub(crate) norm: Option<Norm>,
    pub(crate) gate: Option<Gate>,
}

/// A norm in front: the operands that are its row and its weights, the row's stride, epsilon.
#[derive(Clone, Copy)]
pub(crate) struct Norm {
    pub(crate) x: usize,
    pub(crate) w: usize,
    pub(crate) row: usize,
    pub(crate) eps: f32,
}

/// A gate behind: the result that it makes, and the stride of its rows.
#[derive(Clone, Copy)]
pub(crate) struct Gate {
    pub(crate) y: usize,
    pub(crate) row: usize,
}

impl Around {
    /// Buffers and numbers of the norm.
    pub(super) fn norm_args(&self) -> Vec<Arg> {
        let eps = |v| Arg::F32("eps".into(), v);
        match self.norm {
            Some(n) => vec![wide("nw", n.w, SUMS), eps(n.eps)],
            None => vec![Arg::Absent("nw".into()), eps(0.0)],
        }
    }
}

/// What forward and backward have in common.
pub(super) struct Call {
    pub(super) pieces: Vec<Piece>,
    shares: Vec<Share>,
    /// Row strides of operand 0 and of result 0.
    rows: [usize; 2],
    /// The operand that is added, and its row stride.
    pub(super) past: Option<(usize, usize)>,
    prepare: Vec<(usize, Format)>,
    scratch: usize,
    pub(super) around: Around,
}

/// Ranks of the shares, and which result is `h` or `dh` of each.
type Ranks = (Vec<usize>, Vec<Option<usize>>);

/// The blocks as their weights are read, and the formats asked for.
fn pieces(
    t: &Target,
    spec: &KernelSpec,
    blocks: &[Block],
    at: Vec<LinearIns>,
) -> (Vec<Piece>, Vec<(usize, Format)>) {
    let (mut all, mut prepare) = (vec![], vec![]);
    for (b, i) in blocks.iter().zip(at) {
        let o = &spec.inputs[i.w];
        let k = o.layout.shape.0[1];
        let rounds = t.weights == DType::BF16 && o.dtype == DType::F32 && o.frozen;
        let (dtype, strides) = match rounds {
            true => (DType::BF16, [k, 1]),
            false => (o.dtype, [o.layout.strides[0], o.layout.strides[1]]),
        };
        if rounds {
            let format = Format {
                name: ROWS_BF16,
                bytes: o.layout.shape.numel() * 2,
                scale: Bits::from(1.0),
            };
            prepare.push((i.w, format));
        }
        // A window begins at a multiple of `ALIGN` bytes before its first element.
        let room = (t.binding as usize).saturating_sub(2 * ALIGN);
        let rows = room / (strides[0].max(k) * dtype.bytes()).max(1);
        let step = match strides[1] == 1 && rows > 0 {
            true => rows,
            false => b.n.max(1),
        };
        for first in (0..b.n).step_by(step) {
            all.push(Piece {
                first,
                n: step.min(b.n - first),
                whole: b.n,
                adapters: b.adapters.clone(),
                at: i.clone(),
                dtype,
                strides,
                k,
            });
        }
    }
    (all, prepare)
}

fn call(
    t: &Target,
    spec: &KernelSpec,
    blocks: &[Block],
    at: Vec<LinearIns>,
    (ranks, numbers): Ranks,
    residual: bool,
) -> Option<Call> {
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
    let (pieces, prepare) = pieces(t, spec, blocks, at);
    Some(Call {
        pieces,
        shares,
        rows: [
            row(&spec.inputs[0])?,
            spec.outputs[0].as_ref().map_or(Some(0), row)?,
        ],
        past: match residual {
            true => Some((last, row(&spec.inputs[last])?)),
            false => None,
        },
        prepare,
        scratch: bytes,
        around: Around::default(),
    })
}

impl Call {
    /// Columns from `n0` on of the rows of `share` of operand 0.
    pub(super) fn input(&self, spec: &KernelSpec, share: &Share, n0: usize) -> Side {
        let (x, row) = self.around.norm.map_or((0, self.rows[0]), |n| (n.x, n.row));
        Side {
            arg: wide("x", x, spec.inputs[x].dtype),
            at: share.rows[0] * row + n0,
            strides: [row, 1],
        }
    }
    pub(super) fn output(&self, spec: &KernelSpec, share: &Share, n0: usize) -> Side {
        let (y, row) = self.around.gate.map_or((0, self.rows[1]), |g| (g.y, g.row));
        let dtype = spec.outputs[y].as_ref().map_or(SUMS, |o| o.dtype);
        Side {
            arg: write("y", y, dtype),
            at: share.rows[0] * row + n0,
            strides: [row, 1],
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

impl Call {
    /// `h [m, Σr]` of `share` `g`, in one dispatch.
    fn down_to_adapters(
        &self,
        t: &Target,
        spec: &KernelSpec,
        g: usize,
        k: usize,
    ) -> Option<Vec<Kernel>> {
        let share = &self.shares[g];
        let one = |p: &Piece| {
            let ((rank, _), (a, _)) = (p.adapters[g]?, p.at.ab[g]?);
            p.begins().then(|| skinny::Way {
                n: rank,
                w: wide("w", a, SUMS),
                strides: [k, 1],
                columns: [0, k],
                scale: 1.0,
            })
        };
        let ways: Vec<skinny::Way> = self.pieces.iter().filter_map(one).collect();
        self.way(t, spec, share, &ways)
    }
    fn way(
        &self,
        t: &Target,
        spec: &KernelSpec,
        share: &Share,
        ways: &[skinny::Way],
    ) -> Option<Vec<Kernel>> {
        if ways.is_empty() {
            return Some(vec![]);
        }
        let sides = (self.input(spec, share, 0), self.hidden(share, 0));
        let ways = (ways, self.around.norm_args());
        let job = skinny::ways(t, spec, share.rows[1], sides, ways)?;
        Some(vec![job])
    }
    /// `dh [m, Σr]` of `share` `g`, in one dispatch.
    fn back_to_adapters(&self, t: &Target, spec: &KernelSpec, g: usize) -> Option<Vec<Kernel>> {
        let share = &self.shares[g];
        let (mut ways, mut n0) = (vec![], 0);
        for p in self.pieces.iter().filter(|p| p.begins()) {
            if let (Some((rank, scale)), Some((_, up))) = (p.adapters[g], p.at.ab[g]) {
                ways.push(skinny::Way {
                    n: rank,
                    w: wide("w", up, SUMS),
                    strides: [1, rank],
                    columns: [n0, p.whole],
                    scale: scale.get(),
                });
            }
            n0 += p.whole;
        }
        self.way(t, spec, share, &ways)
    }
}

pub(super) fn forward(t: &Target, l: &Linear, spec: &KernelSpec) -> Vec<Offer> {
    if spec.outputs[0].is_none() {
        return vec![];
    }
    let ranks = (l.ranks(), l.hidden());
    let Some(c) = call(t, spec, &l.blocks, l.ins(), ranks, l.residual) else {
        return vec![];
    };
    let few = by_few(t, &c, spec);
    // Neighbours of one row share dispatches, which a choice by the time of each step alone would take apart.
    if few.is_some() && spec.inputs[0].layout.shape.rows() == 1 {
        return few.into_iter().collect();
    }
    let ways = Way::ALL.map(|way| by_products(t, &c, spec, way));
    few.into_iter().chain(ways.into_iter().flatten()).collect()
}

fn offer(c: &Call, name: [&'static str; 2], jobs: Vec<Kernel>) -> Offer {
    Offer {
        prepare: c.prepare.clone(),
        ..Offer::new(name[usize::from(c.adapted())], jobs).scratch(c.scratch)
    }
}

/// The kernels of a linear over few rows with what stands around it, and their scratch. `spec`: of the linear alone;
/// `all`: its operands and results, then those of the steps that `around` numbers.
pub(crate) fn with_neighbours(
    t: &Target,
    l: &Linear,
    (spec, all): (&KernelSpec, &KernelSpec),
    around: Around,
) -> Option<(Vec<Kernel>, usize)> {
    let ranks = (l.ranks(), l.hidden());
    let c = call(t, spec, &l.blocks, l.ins(), ranks, l.residual)?;
    let made = by_few(t, &Call { around, ..c }, all)?;
    Some((made.jobs, made.scratch))
}

/// `h` of every share, unless its kernel makes it, then one dispatch for all blocks.
fn by_few(t: &Target, c: &Call, spec: &KernelSpec) -> Option<Offer> {
    let k = spec.inputs[0].layout.shape.last();
    let mut jobs = vec![];
    for (g, share) in c.shares.iter().enumerate() {
        if !linear_few::makes_hidden(c, spec, g, share) {
            jobs.extend(c.down_to_adapters(t, spec, g, k)?);
        }
        jobs.push(linear_few::forward(t, c, spec, g, share)?);
    }
    Some(offer(c, ["linear_few", "lora_linear_few"], jobs))
}

/// `h` of every share, then the product of each block with its tail. `None` if no product is made that `way`.
fn by_products(t: &Target, c: &Call, spec: &KernelSpec, way: Way) -> Option<Offer> {
    let k = spec.inputs[0].layout.shape.last();
    let (mut jobs, mut extra, mut any) = (vec![], 0.0, way == Way::Tiled);
    for (g, share) in c.shares.iter().enumerate() {
        jobs.extend(c.down_to_adapters(t, spec, g, k)?);
        let (m, mut n0, mut r0) = (share.rows[1], 0, 0);
        for p in &c.pieces {
            let mut tail = None;
            if let (Some((rank, scale)), Some((_, up))) = (p.adapters[g], p.at.ab[g]) {
                tail = Some(Tail {
                    h: c.hidden(share, r0),
                    b: Side {
                        arg: read("b", up, SUMS),
                        at: p.first * rank,
                        strides: [rank, 1],
                    },
                    rank,
                    scale: scale.get(),
                });
                r0 += if p.ends() { rank } else { 0 };
            }
            let product = Product {
                sizes: [m, p.n, k],
                x: c.input(spec, share, 0),
                w: Side {
                    arg: p.weight("w"),
                    at: 0,
                    strides: p.strides,
                },
                y: c.output(spec, share, n0),
                alpha: 1.0,
                tail,
                bias: p.at.bias.map(|i| (read("bias", i, SUMS), p.first)),
                past: c.past(spec, share, n0),
                add: false,
            };
            any |= product.suits(t, way);
            let (job, seconds) = product.by(t, spec, way)?;
            jobs.push(job);
            extra += seconds;
            n0 += p.n;
        }
    }
    let names = match way {
        Way::Skinny => ["linear_skinny", "lora_linear_skinny"],
        Way::Coop => ["linear_coop", "lora_linear_coop"],
        Way::Tiled => ["linear_tiled", "lora_linear_tiled"],
    };
    any.then(|| Offer {
        extra,
        ..offer(c, names, jobs)
    })
}

/// `dh_i = s dy_i B_i`, then `dx = Σ dy_i W_i + Σ dh_i A_i` and what is added, block by block.
pub(super) fn backward(t: &Target, l: &LinearGrad, spec: &KernelSpec) -> Vec<Offer> {
    let ranks = (l.ranks(), l.hidden());
    let Some(c) = call(t, spec, &l.blocks, l.ins(), ranks, l.residual) else {
        return vec![];
    };
    let ways = Way::ALL.map(|way| back_by(t, &c, spec, way));
    ways.into_iter().flatten().collect()
}

fn back_by(t: &Target, c: &Call, spec: &KernelSpec, way: Way) -> Option<Offer> {
    let wants_dx = spec.outputs[0].is_some();
    let k = spec.inputs[1].layout.shape.last();
    let (mut jobs, mut extra) = (vec![], 0.0);
    let mut any = way == Way::Tiled;
    for (g, share) in c.shares.iter().enumerate() {
        jobs.extend(c.back_to_adapters(t, spec, g)?);
        let (m, mut n0, mut r0) = (share.rows[1], 0, 0);
        for (i, p) in c.pieces.iter().enumerate() {
            if !wants_dx {
                break;
            }
            let mut tail = None;
            if let (Some((rank, _)), Some((a, _)), true) = (p.adapters[g], p.at.ab[g], p.ends()) {
                tail = Some(Tail {
                    h: c.hidden(share, r0),
                    b: Side {
                        arg: read("b", a, SUMS),
                        at: 0,
                        strides: [1, k],
                    },
                    rank,
                    scale: 1.0,
                });
                r0 += rank;
            }
            let product = Product {
                sizes: [m, k, p.n],
                x: c.input(spec, share, n0),
                w: Side {
                    arg: p.weight("w"),
                    at: 0,
                    strides: [p.strides[1], p.strides[0]],
                },
                y: c.output(spec, share, 0),
                alpha: 1.0,
                tail,
                bias: None,
                past: if i == 0 { c.past(spec, share, 0) } else { None },
                add: i > 0,
            };
            any |= product.suits(t, way);
            let (job, seconds) = product.by(t, spec, way)?;
            jobs.push(job);
            extra += seconds;
            n0 += p.n;
        }
    }
    if jobs.is_empty() || !any {
        return None;
    }
    let prepare = if wants_dx { c.prepare.clone() } else { vec![] };
    let names = match way {
        Way::Skinny => ["linear_grad_skinny", "lora_linear_grad_skinny"],
        Way::Coop => ["linear_grad_coop", "lora_linear_grad_coop"],
        Way::Tiled => ["linear_grad_tiled", "lora_linear_grad_tiled"],
    };
    Some(Offer {
        prepare,
        extra,
        ..offer(c, names, jobs)
    })
}
