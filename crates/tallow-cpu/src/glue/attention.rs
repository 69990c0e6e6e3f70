//! Attention, its gradient, and cache writes.
//! Invariant: heads may lie at any strides, but the elements of a head are dense.
use super::{Io, Offer};
use crate::{
    attention::{Backward, Forward, Heads, KvWrite, Mask as Rule, Queries, Shape},
    device::Cpu,
};
use tallow_core::{
    kernel::{KernelSpec, Operand},
    op::{Attention, Bits, Mask},
    types::DType,
};

/// Strides of `[b, n, h, d]` with dense `d`.
#[derive(Clone, Copy)]
struct Strides([usize; 3]);

impl Strides {
    fn of(o: &Operand) -> Option<Self> {
        let (s, n) = (&o.layout.strides, &o.layout.shape.0);
        let dense = o.dtype == DType::F32 && s.len() == 4 && (s[3] == 1 || n[3] == 1);
        dense.then(|| Strides([s[0], s[1], s[2]]))
    }
    fn read(self, io: &Io, i: usize) -> Heads {
        let [batch, token, head] = self.0;
        Heads {
            ptr: io.read(i),
            batch,
            token,
            head,
        }
    }
    fn write(self, io: &Io, i: usize) -> Heads<*mut f32> {
        let [batch, token, head] = self.0;
        Heads {
            ptr: io.write(i),
            batch,
            token,
            head,
        }
    }
}

/// The queries' positions, and their starts where operand `starts` is there.
fn queries(io: &Io, starts: usize) -> Queries {
    Queries {
        pos: io.read(3),
        starts: io.reads.get(starts).map_or(std::ptr::null(), |p| p.cast()),
    }
}

fn shape(a: &Attention, spec: &KernelSpec, starts: usize) -> Option<Shape> {
    let [b, t, h, d] = spec.inputs[0].layout.shape.0[..] else {
        return None;
    };
    let k = &spec.inputs[1].layout.shape.0;
    let mask = match a.mask {
        Mask::Full => Rule::Full,
        Mask::Causal { window } => Rule::Causal {
            window: window.map(|w| w as usize),
        },
    };
    let scale = a.scale.get();
    let (s, hk) = (k[1], k[2]);
    let dense = |o: &Operand| o.is_dense();
    let fits = d > 0
        && b * t * h * s > 0
        && spec.inputs[3].is_dense()
        && spec.inputs.get(starts).is_none_or(dense);
    fits.then_some(Shape {
        b,
        t,
        s,
        h,
        hk,
        d,
        scale,
        mask,
        cap: a.cap.map(Bits::get),
    })
}

pub(super) fn forward(cpu: &Cpu, a: &Attention, spec: &KernelSpec) -> Option<Offer> {
    let shape = shape(a, spec, 4)?;
    let out = Strides::of(spec.outputs[0].as_ref()?)?;
    if spec.outputs[1].as_ref().is_some_and(|o| !o.is_dense()) {
        return None;
    }
    let [q, k, v] = [0, 1, 2].map(|i| Strides::of(&spec.inputs[i]));
    let (q, k, v) = (q?, k?, v?);
    let scratch = Forward::workspace_elems(&shape, cpu.threads());
    let name = match shape.t {
        1 => "attention_decode_f32",
        _ => "attention_blocks_f32",
    };
    let run = move |io: &Io| {
        let job = Forward {
            shape,
            q: q.read(io, 0),
            k: k.read(io, 1),
            v: v.read(io, 2),
            queries: queries(io, 4),
            out: out.write(io, 0),
            lse: io.write(1),
            workspace: io.workspace.0.cast(),
        };
        // SAFETY: the plan's spans hold these views; results and workspace overlap nothing else.
        unsafe { job.run(io.exec) };
    };
    Some(Offer::new(name, run).scratch(scratch))
}

pub(super) fn backward(cpu: &Cpu, a: &Attention, spec: &KernelSpec) -> Option<Offer> {
    let shape = shape(a, spec, 7)?;
    let [q, k, v, out, dout] = [0, 1, 2, 4, 6].map(|i| Strides::of(&spec.inputs[i]));
    let (q, k, v, out, dout) = (q?, k?, v?, out?, dout?);
    let result = |i: usize| Strides::of(spec.outputs[i].as_ref()?);
    let (dq, dk, dv) = (result(0)?, result(1)?, result(2)?);
    if !spec.inputs[5].is_dense() {
        return None;
    }
    let scratch = Backward::workspace_elems(&shape, cpu.threads());
    let run = move |io: &Io| {
        let job = Backward {
            shape,
            q: q.read(io, 0),
            k: k.read(io, 1),
            v: v.read(io, 2),
            queries: queries(io, 7),
            out: out.read(io, 4),
            lse: io.read(5),
            dout: dout.read(io, 6),
            dq: dq.write(io, 0),
            dk: dk.write(io, 1),
            dv: dv.write(io, 2),
            workspace: io.workspace.0.cast(),
        };
        // SAFETY: as in `forward`.
        unsafe { job.run(io.exec) };
    };
    Some(Offer::new("attention_grad_blocks_f32", run).scratch(scratch))
}

pub(super) fn kv_write(spec: &KernelSpec) -> Option<Offer> {
    let [b, s, hk, d] = spec.inputs[0].layout.shape.0[..] else {
        return None;
    };
    let t = spec.inputs[1].layout.shape.0[1];
    let src = Strides::of(&spec.inputs[1])?;
    let out = spec.outputs[0].as_ref()?;
    let cache = Strides::of(out)?;
    let dense = [&spec.inputs[0], out, &spec.inputs[2]]
        .iter()
        .all(|o| o.is_dense());
    if !dense {
        return None;
    }
    Some(Offer::new("kv_write_f32", move |io| {
        let (from, to) = (io.read::<f32>(0), io.write::<f32>(0));
        if from != to.cast_const() {
            // SAFETY: both hold the whole cache; the planner lets them be equal or disjoint.
            unsafe { std::ptr::copy_nonoverlapping(from, to, b * s * hk * d) };
        }
        let job = KvWrite {
            b,
            t,
            s,
            hk,
            d,
            pos: io.read(2),
            src: src.read(io, 1),
            cache: cache.write(io, 0),
        };
        // SAFETY: the plan's spans hold these views; positions of a batch row differ by contract.
        unsafe { job.run(io.exec) };
    }))
}
