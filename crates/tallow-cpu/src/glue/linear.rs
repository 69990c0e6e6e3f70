//! Linears with adapters and their gradients.
//! Invariant: weights are read only in panels packed once from operands that never change; what has
//! no such weights is not offered here and falls to its decomposition.
use super::{Io, Offer, row_stride};
use crate::{
    device::Cpu,
    linear::{
        Adapter, Backward, Block, Forward, Packed, Rows, Source, backward_workspace,
        forward_workspace, head_len, pack_head, pack_kn, pack_nk, pack_tail, packed_len,
    },
    simd::Isa,
    tile::{Element, Pairs, head_limit},
};
use half::{bf16, f16};
use tallow_core::{
    kernel::{Format, KernelSpec, Operand},
    op::{Bits, Linear, LinearGrad, LinearIns},
    types::DType,
};

mod cross_entropy;
mod thin;
pub(super) use cross_entropy::cross_entropy;
pub(super) use thin::thin;

const NK_F32: &str = "panels32_f32";
const NK_BF16: &str = "panels32_bf16";
const KN_F32: &str = "panels32_grad_f32";
const KN_BF16: &str = "panels32_grad_bf16";
const NK_PAIRS: &str = "panels32_bf16_pairs";
const KN_PAIRS: &str = "panels32_grad_bf16_pairs";
const TAIL: &str = "tail32_f32";
const HEAD: &str = "turned_f32";

/// What panels are made of.
#[derive(Clone, Copy, PartialEq)]
enum Weights {
    F32,
    /// Widened in registers.
    Bf16,
    /// Multiplied as they are, with `x` rounded to bf16 too.
    Pairs,
}

impl Weights {
    fn of(cpu: &Cpu) -> Self {
        match (cpu.weights, cpu.isa()) {
            (DType::BF16, Isa::Avx512Bf16) => Self::Pairs,
            (DType::BF16, _) => Self::Bf16,
            _ => Self::F32,
        }
    }

    /// Rows of a panel of `k` terms, and the bytes of an element.
    fn rows(self, k: usize) -> (usize, usize) {
        match self {
            Self::F32 => (f32::rows(k), 4),
            Self::Bf16 => (bf16::rows(k), 2),
            Self::Pairs => (Pairs::rows(k), 2),
        }
    }
}

/// How an operand `[n, k]` lies in memory.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    RowMajor,
    Transposed,
}

fn order(o: &Operand) -> Option<Order> {
    let l = &o.layout;
    let &[n, k] = &l.shape.0[..] else { return None };
    if l.is_contiguous() {
        return Some(Order::RowMajor);
    }
    let transposed = (k == 1 || l.strides[1] == n) && (n == 1 || l.strides[0] == 1);
    transposed.then_some(Order::Transposed)
}

/// The format of a frozen weight, for the forward or the backward product.
fn panels(cpu: &Cpu, w: &Operand, backward: bool) -> Option<Format> {
    order(w).filter(|_| w.frozen && w.dtype.is_float())?;
    let (n, k) = (w.layout.shape.0[0], w.layout.shape.0[1]);
    let weights = Weights::of(cpu);
    let name = match (backward, weights) {
        (false, Weights::F32) => NK_F32,
        (false, Weights::Bf16) => NK_BF16,
        (false, Weights::Pairs) => NK_PAIRS,
        (true, Weights::F32) => KN_F32,
        (true, Weights::Bf16) => KN_BF16,
        (true, Weights::Pairs) => KN_PAIRS,
    };
    let (columns, terms) = if backward { (k, n) } else { (n, k) };
    let (rows, bytes) = weights.rows(terms);
    Some(Format {
        name,
        bytes: packed_len(columns, rows) * bytes,
        scale: Bits::from(1.0),
    })
}

/// # Safety
/// As [`super::prepare`].
pub(super) unsafe fn prepare(
    cpu: &Cpu,
    f: Format,
    from: *const u8,
    op: &Operand,
    to: *mut u8,
) -> bool {
    // SAFETY: the caller's promise; the format's size is that of the panels of this operand.
    unsafe {
        match f.name {
            TAIL => {
                let (n, r) = (op.layout.shape.0[0], op.layout.shape.0[1]);
                let b = std::slice::from_raw_parts(from.cast::<f32>(), n * r);
                let out = std::slice::from_raw_parts_mut(to.cast::<f32>(), f.bytes / 4);
                pack_tail(b, (n, r), f.scale.get(), out);
            }
            HEAD => {
                let (r, k) = (op.layout.shape.0[0], op.layout.shape.0[1]);
                let a = std::slice::from_raw_parts(from.cast::<f32>(), r * k);
                let out = std::slice::from_raw_parts_mut(to.cast::<f32>(), f.bytes / 4);
                pack_head(a, (r, k), out);
            }
            NK_F32 => pack_any::<f32>(cpu, from, op, false, to, f.bytes / 4),
            KN_F32 => pack_any::<f32>(cpu, from, op, true, to, f.bytes / 4),
            NK_BF16 => pack_any::<bf16>(cpu, from, op, false, to, f.bytes / 2),
            KN_BF16 => pack_any::<bf16>(cpu, from, op, true, to, f.bytes / 2),
            thin::ROWS_F32 => thin::widen(from, op, to.cast(), f.bytes / 4),
            NK_PAIRS => pack_any::<Pairs>(cpu, from, op, false, to, f.bytes / 2),
            KN_PAIRS => pack_any::<Pairs>(cpu, from, op, true, to, f.bytes / 2),
            cross_entropy::BOTH_PAIRS => {
                let (v, c) = (op.layout.shape.0[0], op.layout.shape.0[1]);
                let (forward, backward) = cross_entropy::both(v, c);
                let behind = to.add(forward * size_of::<Pairs>());
                pack_any::<Pairs>(cpu, from, op, false, to, forward);
                pack_any::<Pairs>(cpu, from, op, true, behind, backward);
            }
            _ => return false,
        }
    }
    true
}

/// # Safety
/// As [`super::prepare`], for `len` panel elements.
unsafe fn pack_any<E: Packed>(
    cpu: &Cpu,
    from: *const u8,
    op: &Operand,
    kn: bool,
    to: *mut u8,
    len: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let out = std::slice::from_raw_parts_mut(to.cast::<E>(), len);
        match op.dtype {
            DType::BF16 => pack::<bf16, E>(cpu, from.cast(), op, kn, out),
            DType::F16 => pack::<f16, E>(cpu, from.cast(), op, kn, out),
            _ => pack::<f32, E>(cpu, from.cast(), op, kn, out),
        }
    }
}

/// # Safety
/// `from` holds the operand.
unsafe fn pack<S: Source, E: Packed>(
    cpu: &Cpu,
    from: *const S,
    op: &Operand,
    kn: bool,
    out: &mut [E],
) {
    let (n, k) = (op.layout.shape.0[0], op.layout.shape.0[1]);
    // SAFETY: the caller's promise; both orders are dense.
    let w = unsafe { std::slice::from_raw_parts(from, n * k) };
    // A transposed [n, k] is a row-major [k, n]: the other packing of the other extents.
    match (order(op) == Some(Order::Transposed), kn) {
        (false, false) => pack_nk(&cpu.pool, w, (n, k), out),
        (false, true) => pack_kn(&cpu.pool, w, (n, k), out),
        (true, false) => pack_kn(&cpu.pool, w, (k, n), out),
        (true, true) => pack_nk(&cpu.pool, w, (k, n), out),
    }
}

/// One block's constants and where its operands are.
#[derive(Clone)]
struct Part {
    n: usize,
    at: LinearIns,
    /// Of each share.
    adapters: Vec<Option<(usize, f32)>>,
    /// `B` comes packed and scaled.
    packed_tail: bool,
    /// `A` comes turned.
    turned: bool,
}

impl Part {
    /// The block as share `g` sees it.
    ///
    /// # Safety
    /// `io` belongs to the spec this part was made from.
    unsafe fn block<E>(&self, io: &Io, g: usize) -> Block<E> {
        let adapter = self.adapters[g].zip(self.at.ab[g]);
        let adapter = adapter.map(|((rank, scale), (a, b))| {
            let (b, tail) = match self.packed_tail {
                true => (std::ptr::null(), io.read(b)),
                false => (io.read(b), std::ptr::null()),
            };
            let (a, turned) = match self.turned {
                true => (std::ptr::null(), io.read(a)),
                false => (io.read(a), std::ptr::null()),
            };
            Adapter {
                rank,
                scale,
                a,
                b,
                tail,
                turned,
            }
        });
        Block {
            n: self.n,
            weights: io.read(self.at.w),
            bias: self.at.bias.map_or(std::ptr::null(), |i| io.read(i)),
            adapter,
        }
    }
}

/// Operands by number with the formats they are wanted in.
type Wanted = Vec<(usize, Format)>;

/// The parts of a linear and the formats it wants, if every operand lies as the kernels read it.
fn parts(
    cpu: &Cpu,
    blocks: &[tallow_core::op::Block],
    ins: &[LinearIns],
    spec: &KernelSpec,
    backward: bool,
) -> Option<(Vec<Part>, Wanted)> {
    let (mut parts, mut prepare) = (vec![], vec![]);
    for (b, at) in blocks.iter().zip(ins) {
        prepare.push((at.w, panels(cpu, &spec.inputs[at.w], backward)?));
        if at.bias.is_some_and(|i| !spec.inputs[i].is_dense()) {
            return None;
        }
        let (mut packed_tail, mut turned) = (false, false);
        for (ab, adapter) in at.ab.iter().zip(&b.adapters) {
            let (Some((ia, ib)), Some((r, scale))) = (*ab, *adapter) else {
                continue;
            };
            let (a, up) = (&spec.inputs[ia], &spec.inputs[ib]);
            if !a.is_dense() || !up.is_dense() || r == 0 {
                return None;
            }
            if up.frozen && !backward && b.adapters.len() == 1 {
                let format = Format {
                    name: TAIL,
                    bytes: packed_len(b.n, r) * 4,
                    scale,
                };
                prepare.push((ib, format));
                packed_tail = true;
                // One row: `A` is read in step with the weights.
                let one = spec.inputs[0].layout.shape.rows() == 1;
                if one && a.frozen && r <= head_limit(cpu.isa()) {
                    let format = Format {
                        name: HEAD,
                        bytes: head_len(r, a.layout.shape.last()) * 4,
                        scale: Bits::from(1.0),
                    };
                    prepare.push((ia, format));
                    turned = true;
                }
            }
        }
        let adapters = b.adapters.iter();
        parts.push(Part {
            n: b.n,
            at: at.clone(),
            adapters: adapters.map(|a| a.map(|(r, s)| (r, s.get()))).collect(),
            packed_tail,
            turned,
        });
    }
    Some((parts, prepare))
}

/// The blocks share after share, without their operands.
fn shapes<E>(parts: &[Part], shares: usize) -> Vec<Block<E>> {
    let adapter = |(rank, scale): (usize, f32)| Adapter {
        rank,
        scale,
        a: std::ptr::null(),
        b: std::ptr::null(),
        tail: std::ptr::null(),
        turned: std::ptr::null(),
    };
    let block = |p: &Part, g: usize| Block {
        n: p.n,
        weights: std::ptr::null(),
        bias: std::ptr::null(),
        adapter: p.adapters[g].map(adapter),
    };
    let each = (0..shares).flat_map(|g| parts.iter().map(move |p| block(p, g)));
    each.collect()
}

/// Most adapters side by side in one call, and most projections that share an input with one adapter, or with many.
const MAX_SHARES: usize = 32;
const MAX_BLOCKS: usize = 8;
const MAX_BANKED: usize = MAX_SHARES * 3;

/// The blocks of a call, share after share, without allocating.
///
/// # Safety
/// As [`Part::block`].
unsafe fn with_blocks<E: Copy, const N: usize>(job: &Job, io: &Io, f: impl FnOnce(&[Block<E>])) {
    // SAFETY: the caller's promise.
    let mut blocks = [unsafe { job.parts[0].block::<E>(io, 0) }; N];
    let mut to = blocks.iter_mut();
    for g in 0..job.shares {
        for (p, b) in job.parts.iter().zip(to.by_ref()) {
            // SAFETY: the caller's promise.
            *b = unsafe { p.block(io, g) };
        }
    }
    f(&blocks[..job.parts.len() * job.shares])
}

pub(super) fn rows_of(io: &Io, i: usize, row: usize) -> Rows<*const f32> {
    Rows {
        at: io.read(i),
        row,
    }
}

pub(super) fn out_rows(io: &Io, i: usize, row: usize) -> Rows<*mut f32> {
    Rows {
        at: io.write(i),
        row,
    }
}

/// Extents and strides of a product whose parts are known.
#[derive(Clone)]
struct Job {
    parts: Vec<Part>,
    /// Parts of the rows with adapters of their own.
    shares: usize,
    m: usize,
    k: usize,
    in_row: usize,
    out_row: usize,
    /// Of each share: its rank, and the result that takes `h` or `dh` with its row stride.
    hidden: Vec<(usize, Option<(usize, usize)>)>,
    residual: Option<(usize, usize)>,
    /// Floats at the end of the scratch that take the place of a `dh` nobody wants.
    spare_dh: usize,
}

/// What an op says of its blocks: ranks by share, and which result is `h` of each.
struct Hidden {
    ranks: Vec<usize>,
    numbers: Vec<Option<usize>>,
}

fn job(
    spec: &KernelSpec,
    parts: Vec<Part>,
    hidden: &Hidden,
    k: usize,
    residual: bool,
) -> Option<Job> {
    let shares = hidden.ranks.len();
    let room = match shares {
        1 => MAX_BLOCKS,
        _ => MAX_BANKED,
    };
    if parts.len() * shares > room || shares > MAX_SHARES {
        return None;
    }
    let last = spec.inputs.len() - 1;
    let wanted = |i: usize| spec.outputs.get(i).and_then(Option::as_ref);
    let mut all = vec![];
    for (rank, number) in hidden.ranks.iter().zip(&hidden.numbers) {
        let to = number.and_then(|i| Some((i, wanted(i)?)));
        let to = match to {
            Some((i, o)) => Some((i, row_stride(o)?)),
            None => None,
        };
        all.push((*rank, to));
    }
    Some(Job {
        parts,
        shares,
        m: spec.inputs[0].layout.shape.rows(),
        k,
        in_row: row_stride(&spec.inputs[0])?,
        out_row: match wanted(0) {
            Some(o) => row_stride(o)?,
            None => 0,
        },
        hidden: all,
        residual: match residual {
            true => Some((last, row_stride(&spec.inputs[last])?)),
            false => None,
        },
        spare_dh: 0,
    })
}

impl Job {
    fn forward<E: Element>(&self, io: &Io) {
        // SAFETY: the plan's spans hold the operands of the spec this job was made from.
        unsafe {
            match self.shares {
                1 => with_blocks::<E, MAX_BLOCKS>(self, io, |b| self.forward_with(io, b)),
                _ => with_blocks::<E, MAX_BANKED>(self, io, |b| self.forward_with(io, b)),
            }
        }
    }
    fn backward<E: Element>(&self, io: &Io) {
        // SAFETY: as in `forward`.
        unsafe {
            match self.shares {
                1 => with_blocks::<E, MAX_BLOCKS>(self, io, |b| self.backward_with(io, b)),
                _ => with_blocks::<E, MAX_BANKED>(self, io, |b| self.backward_with(io, b)),
            }
        }
    }

    /// Where `h` or `dh` of each share goes; what nobody wants, to `spare`, where that is given.
    fn hidden(&self, io: &Io, mut spare: *mut f32) -> [Rows<*mut f32>; MAX_SHARES] {
        let mut all = [Rows::<*mut f32>::NONE; MAX_SHARES];
        for (to, (rank, result)) in all.iter_mut().zip(&self.hidden) {
            *to = match *result {
                Some((i, row)) if !io.writes[i].is_null() => out_rows(io, i, row),
                _ if spare.is_null() => continue,
                _ => {
                    let at = spare;
                    spare = spare.wrapping_add(self.m / self.shares * rank);
                    Rows { at, row: *rank }
                }
            };
        }
        all
    }

    fn residual(&self, io: &Io) -> Rows<*const f32> {
        let at = |(i, row)| rows_of(io, i, row);
        self.residual.map_or(Rows::<*const f32>::NONE, at)
    }

    /// # Safety
    /// `blocks` are this job's, from `io`.
    unsafe fn forward_with<E: Element>(&self, io: &Io, blocks: &[Block<E>]) {
        let job = Forward {
            m: self.m,
            k: self.k,
            x: rows_of(io, 0, self.in_row),
            shares: self.shares,
            blocks,
            y: out_rows(io, 0, self.out_row),
            residual: self.residual(io),
            h: &self.hidden(io, std::ptr::null_mut())[..self.shares],
        };
        // SAFETY: the caller's promise; the plan's spans are as large as the spec says.
        unsafe { crate::linear::forward(io.exec, &job, io.scratch()) };
    }

    /// # Safety
    /// As [`Job::forward_with`].
    unsafe fn backward_with<E: Element>(&self, io: &Io, blocks: &[Block<E>]) {
        // The scratch ends with `dh`, for when nobody else wants it.
        let all = io.scratch();
        let (scratch, dh) = all.split_at_mut(all.len() - self.spare_dh);
        let job = Backward {
            m: self.m,
            k: self.k,
            dy: rows_of(io, 0, self.in_row),
            shares: self.shares,
            blocks,
            dx: out_rows(io, 0, self.out_row),
            residual: self.residual(io),
            dh: &self.hidden(io, dh.as_mut_ptr())[..self.shares],
        };
        // SAFETY: as in `forward_with`.
        unsafe { crate::linear::backward(io.exec, &job, scratch) };
    }
}

pub(super) fn forward(cpu: &Cpu, l: &Linear, spec: &KernelSpec) -> Option<Offer> {
    spec.outputs[0].as_ref()?;
    let (parts, prepare) = parts(cpu, &l.blocks, &l.ins(), spec, false)?;
    let k = spec.inputs[0].layout.shape.last();
    let shares = l.shares();
    let scratch = forward_workspace(&shapes::<f32>(&parts, shares), shares, k, cpu.threads());
    let hidden = Hidden {
        ranks: l.ranks(),
        numbers: l.hidden(),
    };
    let job = job(spec, parts, &hidden, k, l.residual)?;
    let weights = Weights::of(cpu);
    let name = match (l.is_adapted(), weights) {
        (true, Weights::F32) if shares > 1 => "lora_linear_tails_f32",
        (true, Weights::Bf16) if shares > 1 => "lora_linear_tails_bf16",
        (true, Weights::Pairs) if shares > 1 => "lora_linear_tails_bf16_pairs",
        (true, Weights::F32) => "lora_linear_tail_f32",
        (true, Weights::Bf16) => "lora_linear_tail_bf16",
        (true, Weights::Pairs) => "lora_linear_tail_bf16_pairs",
        (false, Weights::F32) => "linear_panels_f32",
        (false, Weights::Bf16) => "linear_panels_bf16",
        (false, Weights::Pairs) => "linear_panels_bf16_pairs",
    };
    let offer = match weights {
        Weights::F32 => Offer::new(name, move |io| job.forward::<f32>(io)),
        Weights::Bf16 => Offer::new(name, move |io| job.forward::<bf16>(io)),
        Weights::Pairs => Offer::new(name, move |io| job.forward::<Pairs>(io)),
    };
    Some(Offer {
        prepare,
        ..offer.scratch(scratch)
    })
}

pub(super) fn backward(cpu: &Cpu, l: &LinearGrad, spec: &KernelSpec) -> Option<Offer> {
    let (parts, prepare) = parts(cpu, &l.blocks, &l.ins(), spec, true)?;
    let hidden = Hidden {
        ranks: l.ranks(),
        numbers: l.hidden(),
    };
    let shares = hidden.ranks.len();
    let scratch = backward_workspace(&shapes::<f32>(&parts, shares), shares, cpu.threads());
    let k = spec.inputs[1].layout.shape.last();
    let mut job = job(spec, parts, &hidden, k, l.residual)?;
    let unwanted = job.hidden.iter().filter(|(_, to)| to.is_none());
    let spare: usize = unwanted.map(|(rank, _)| rank).sum();
    job.spare_dh = job.m / shares * spare;
    let scratch = scratch + job.spare_dh;
    let weights = Weights::of(cpu);
    let name = match (weights, shares > 1) {
        (Weights::F32, false) => "lora_linear_grad_tail_f32",
        (Weights::Bf16, false) => "lora_linear_grad_tail_bf16",
        (Weights::Pairs, false) => "lora_linear_grad_tail_bf16_pairs",
        (Weights::F32, true) => "lora_linear_grad_tails_f32",
        (Weights::Bf16, true) => "lora_linear_grad_tails_bf16",
        (Weights::Pairs, true) => "lora_linear_grad_tails_bf16_pairs",
    };
    let offer = match weights {
        Weights::F32 => Offer::new(name, move |io| job.backward::<f32>(io)),
        Weights::Bf16 => Offer::new(name, move |io| job.backward::<bf16>(io)),
        Weights::Pairs => Offer::new(name, move |io| job.backward::<Pairs>(io)),
    };
    // Without `dx` no weight is read: nothing to pack.
    let prepare = if spec.outputs[0].is_some() {
        prepare
    } else {
        vec![]
    };
    Some(Offer {
        prepare,
        ..offer.scratch(scratch)
    })
}
