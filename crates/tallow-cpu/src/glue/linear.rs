//! Linears with adapters, their gradients, cross entropy over a projection.
//! Invariant: weights are read only in panels packed once from operands that never change; what has
//! no such weights is not offered here and falls to its decomposition.
use super::{Io, Offer, row_stride};
use crate::{
    device::Cpu,
    linear::{
        Adapter, Backward, Block, Forward, Packed, Rows, Source, backward_workspace,
        forward_workspace, head_len, pack_head, pack_kn, pack_nk, pack_tail, packed_len,
    },
    loss,
    tile::{Element, head_limit},
};
use half::{bf16, f16};
use tallow_core::{
    kernel::{Format, KernelSpec, Operand},
    op::{Bits, Linear, LinearGrad, LinearIns},
    types::DType,
};

const NK_F32: &str = "panels32_f32";
const NK_BF16: &str = "panels32_bf16";
const KN_F32: &str = "panels32_grad_f32";
const KN_BF16: &str = "panels32_grad_bf16";
const TAIL: &str = "tail32_f32";
const HEAD: &str = "turned_f32";

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
    let half = cpu.weights == DType::BF16;
    let name = match (backward, half) {
        (false, false) => NK_F32,
        (false, true) => NK_BF16,
        (true, false) => KN_F32,
        (true, true) => KN_BF16,
    };
    let elems = if backward {
        packed_len(k, n)
    } else {
        packed_len(n, k)
    };
    Some(Format {
        name,
        bytes: elems * if half { 2 } else { 4 },
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
    adapter: Option<(usize, f32)>,
    /// `B` comes packed and scaled.
    packed_tail: bool,
    /// `A` comes turned.
    turned: bool,
}

impl Part {
    /// # Safety
    /// `io` belongs to the spec this part was made from.
    unsafe fn block<E>(&self, io: &Io) -> Block<E> {
        let adapter = self.adapter.zip(self.at.ab).map(|((rank, scale), (a, b))| {
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
        if let (Some((ia, ib)), Some((r, scale))) = (at.ab, b.adapter) {
            let (a, up) = (&spec.inputs[ia], &spec.inputs[ib]);
            if !a.is_dense() || !up.is_dense() || r == 0 {
                return None;
            }
            if up.frozen && !backward {
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
        parts.push(Part {
            n: b.n,
            at: *at,
            adapter: b.adapter.map(|(r, s)| (r, s.get())),
            packed_tail,
            turned,
        });
    }
    Some((parts, prepare))
}

fn shapes<E>(parts: &[Part]) -> Vec<Block<E>> {
    let adapter = |p: &Part| {
        p.adapter.map(|(rank, scale)| Adapter {
            rank,
            scale,
            a: std::ptr::null(),
            b: std::ptr::null(),
            tail: std::ptr::null(),
            turned: std::ptr::null(),
        })
    };
    let block = |p: &Part| Block {
        n: p.n,
        weights: std::ptr::null(),
        bias: std::ptr::null(),
        adapter: adapter(p),
    };
    parts.iter().map(block).collect()
}

/// Most projections that share an input in one call.
const MAX_BLOCKS: usize = 8;

/// The blocks of a call, without allocating.
///
/// # Safety
/// As [`Part::block`].
unsafe fn with_blocks<E: Copy, R>(parts: &[Part], io: &Io, f: impl FnOnce(&[Block<E>]) -> R) -> R {
    // SAFETY: the caller's promise.
    let mut blocks = [unsafe { parts[0].block::<E>(io) }; MAX_BLOCKS];
    for (b, p) in blocks.iter_mut().zip(parts) {
        // SAFETY: the caller's promise.
        *b = unsafe { p.block(io) };
    }
    f(&blocks[..parts.len()])
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
    m: usize,
    k: usize,
    in_row: usize,
    out_row: usize,
    hidden_row: usize,
    residual: Option<(usize, usize)>,
    /// Floats at the end of the scratch that take the place of a `dh` nobody wants.
    spare_dh: usize,
}

/// Sum of the ranks.
fn rank(parts: &[Part]) -> usize {
    parts.iter().filter_map(|p| p.adapter).map(|a| a.0).sum()
}

fn job(spec: &KernelSpec, parts: Vec<Part>, k: usize, residual: bool) -> Option<Job> {
    if parts.len() > MAX_BLOCKS {
        return None;
    }
    let last = spec.inputs.len() - 1;
    let stride = |i: usize| match spec.outputs.get(i).and_then(Option::as_ref) {
        Some(o) => row_stride(o),
        None => Some(0),
    };
    Some(Job {
        parts,
        m: spec.inputs[0].layout.shape.rows(),
        k,
        in_row: row_stride(&spec.inputs[0])?,
        out_row: stride(0)?,
        hidden_row: stride(1)?,
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
            with_blocks::<E, _>(&self.parts, io, |blocks| {
                let job = Forward {
                    m: self.m,
                    k: self.k,
                    x: rows_of(io, 0, self.in_row),
                    blocks,
                    y: out_rows(io, 0, self.out_row),
                    residual: self
                        .residual
                        .map_or(Rows::<*const f32>::NONE, |(i, row)| rows_of(io, i, row)),
                    h: match io.writes.get(1) {
                        Some(p) if !p.is_null() => out_rows(io, 1, self.hidden_row),
                        _ => Rows::<*mut f32>::NONE,
                    },
                };
                crate::linear::forward(io.exec, &job, io.scratch());
            });
        }
    }
    fn backward<E: Element>(&self, io: &Io) {
        // The scratch ends with `dh`, for when nobody else wants it.
        let all = io.scratch();
        let rank = rank(&self.parts);
        let (scratch, dh) = all.split_at_mut(all.len() - self.spare_dh);
        // SAFETY: as in `forward`.
        unsafe {
            with_blocks::<E, _>(&self.parts, io, |blocks| {
                let job = Backward {
                    m: self.m,
                    k: self.k,
                    dy: rows_of(io, 0, self.in_row),
                    blocks,
                    dx: out_rows(io, 0, self.out_row),
                    residual: self
                        .residual
                        .map_or(Rows::<*const f32>::NONE, |(i, row)| rows_of(io, i, row)),
                    dh: match io.writes.get(1) {
                        Some(p) if !p.is_null() => out_rows(io, 1, self.hidden_row),
                        _ => Rows {
                            at: dh.as_mut_ptr(),
                            row: rank,
                        },
                    },
                };
                crate::linear::backward(io.exec, &job, scratch);
            });
        }
    }
}

pub(super) fn forward(cpu: &Cpu, l: &Linear, spec: &KernelSpec) -> Option<Offer> {
    spec.outputs[0].as_ref()?;
    let (parts, prepare) = parts(cpu, &l.blocks, &l.ins(), spec, false)?;
    let k = spec.inputs[0].layout.shape.last();
    let scratch = forward_workspace(&shapes::<f32>(&parts), k, cpu.threads());
    let adapted = l.rank() > 0;
    let job = job(spec, parts, k, l.residual)?;
    let half = cpu.weights == DType::BF16;
    let name = match (adapted, half) {
        (true, false) => "lora_linear_tail_f32",
        (true, true) => "lora_linear_tail_bf16",
        (false, false) => "linear_panels_f32",
        (false, true) => "linear_panels_bf16",
    };
    let offer = match half {
        false => Offer::new(name, move |io| job.forward::<f32>(io)),
        true => Offer::new(name, move |io| job.forward::<bf16>(io)),
    };
    Some(Offer {
        prepare,
        ..offer.scratch(scratch)
    })
}

pub(super) fn backward(cpu: &Cpu, l: &LinearGrad, spec: &KernelSpec) -> Option<Offer> {
    let (parts, prepare) = parts(cpu, &l.blocks, &l.ins(), spec, true)?;
    let scratch = backward_workspace(&shapes::<f32>(&parts), cpu.threads());
    let k = spec.inputs[1].layout.shape.last();
    let mut job = job(spec, parts, k, l.residual)?;
    if spec.outputs.get(1).is_some_and(Option::is_none) {
        job.spare_dh = job.m * rank(&job.parts);
    }
    let scratch = scratch + job.spare_dh;
    let half = cpu.weights == DType::BF16;
    let name = match half {
        false => "lora_linear_grad_tail_f32",
        true => "lora_linear_grad_tail_bf16",
    };
    let offer = match half {
        false => Offer::new(name, move |io| job.backward::<f32>(io)),
        true => Offer::new(name, move |io| job.backward::<bf16>(io)),
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

/// Cross entropy of rows under a projection: f32 weights are read where they lie, others from panels.
pub(super) fn cross_entropy(cpu: &Cpu, spec: &KernelSpec) -> Option<Offer> {
    let (x, w) = (&spec.inputs[0], &spec.inputs[1]);
    let in_place = w.dtype == DType::F32 && w.is_dense();
    if !in_place {
        order(w).filter(|_| w.frozen && w.dtype.is_float())?;
    }
    let (rows, c, v) = (
        x.layout.shape.0[0],
        x.layout.shape.0[1],
        w.layout.shape.0[0],
    );
    let x_row = row_stride(x)?;
    let dx_row = match &spec.outputs[1] {
        Some(o) => row_stride(o)?,
        None => 0,
    };
    spec.outputs[0].as_ref().filter(|o| o.is_dense())?;
    let format = Format {
        name: NK_F32,
        bytes: packed_len(v, c) * 4,
        scale: Bits::from(1.0),
    };
    let scratch = loss::CrossEntropy::workspace_elems(rows, c, cpu.threads());
    let run = move |io: &Io| {
        let job = loss::CrossEntropy {
            rows,
            c,
            v,
            x: crate::norm::Rows {
                ptr: io.read(0),
                ld: x_row,
            },
            w: io.read(1),
            layout: match in_place {
                true => loss::WeightLayout::Rows(c),
                false => loss::WeightLayout::Panels,
            },
            targets: io.read(2),
            nll: io.write(0),
            dx: crate::norm::Rows {
                ptr: io.write(1),
                ld: dx_row,
            },
            workspace: io.workspace.0.cast(),
        };
        // SAFETY: the plan's spans hold these arrays; results and workspace overlap nothing.
        unsafe { job.run(io.exec) };
    };
    let name = match in_place {
        true => "cross_entropy_rows_f32",
        false => "cross_entropy_panels_f32",
    };
    let offer = Offer::new(name, run);
    Some(Offer {
        prepare: if in_place { vec![] } else { vec![(1, format)] },
        ..offer.scratch(scratch)
    })
}
