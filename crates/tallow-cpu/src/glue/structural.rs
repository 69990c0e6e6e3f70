//! Structural ops on any dtype and any strides, one element at a time in f64: what no faster kernel takes.
//! Invariant: exact for integers up to 2^53; floats are rounded once, when stored.
//! Absent on purpose: speed. `explain` shows these kernels by the name `…_any`.
use super::{Io, Offer};
use crate::device::Cpu;
use half::{bf16, f16};
use tallow_core::{
    element::{to_bf16, to_f16},
    kernel::{Body, KernelSpec, Operand},
    op::ReduceOp,
    philox,
    scalar::ScalarProgram,
    types::{DType, Layout},
};

mod fast;

/// Where the elements of an operand are and how to read or write one.
#[derive(Clone)]
struct Cells {
    dtype: DType,
    layout: Layout,
}

impl Cells {
    fn of(o: &Operand) -> Self {
        Cells {
            dtype: o.dtype,
            layout: o.layout.clone(),
        }
    }
    fn len(&self) -> usize {
        self.layout.shape.numel()
    }
    /// # Safety
    /// `p` holds the operand; `at` is an element of its storage.
    unsafe fn get(&self, p: *const u8, at: usize) -> f64 {
        // SAFETY: the caller's promise.
        unsafe {
            match self.dtype {
                DType::F32 => f64::from(*p.cast::<f32>().add(at)),
                DType::BF16 => f64::from((*p.cast::<bf16>().add(at)).to_f32()),
                DType::F16 => f64::from((*p.cast::<f16>().add(at)).to_f32()),
                DType::I32 => f64::from(*p.cast::<i32>().add(at)),
                DType::U32 => f64::from(*p.cast::<u32>().add(at)),
                DType::U8 => f64::from(*p.add(at)),
            }
        }
    }
    /// # Safety
    /// As [`Cells::get`], writable.
    unsafe fn put(&self, p: *mut u8, at: usize, v: f64) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.dtype {
                DType::F32 => *p.cast::<f32>().add(at) = v as f32,
                DType::BF16 => *p.cast::<bf16>().add(at) = to_bf16(v),
                DType::F16 => *p.cast::<f16>().add(at) = to_f16(v),
                DType::I32 => *p.cast::<i32>().add(at) = v as i32,
                DType::U32 => *p.cast::<u32>().add(at) = v as u32,
                DType::U8 => *p.add(at) = v as u8,
            }
        }
    }
}

/// A kernel of its own where one takes these layouts and dtypes, else the slow road.
pub(super) fn offer(cpu: &Cpu, spec: &KernelSpec) -> Option<Offer> {
    fast::offer(cpu, spec).or_else(|| any(spec))
}

fn any(spec: &KernelSpec) -> Option<Offer> {
    let ins: Vec<Cells> = spec.inputs.iter().map(Cells::of).collect();
    let out = Cells::of(spec.outputs[0].as_ref()?);
    Some(match &spec.body {
        Body::Map(p) => map(p.clone(), ins, out),
        Body::Copy => {
            let from = ins.into_iter().next()?;
            each("copy_any", out, move |io, i| {
                get(&from, io, 0, from.layout.index(i))
            })
        }
        Body::Fill(v) => {
            let v = f64::from(v.get());
            each("fill_any", out, move |_, _| v)
        }
        Body::Reduce(r, axis) => reduce(*r, *axis, ins.into_iter().next()?, out),
        Body::Gather => gather(ins, out),
        Body::ScatterAdd => scatter_add(ins, out),
        Body::Iota(axis) => {
            let (n, inner) = (out.layout.shape.0[*axis], out.layout.shape.strides()[*axis]);
            each("iota_any", out, move |_, i| (i / inner % n) as f64)
        }
        Body::Random(id) => {
            let id = *id;
            each("random_any", out, move |io, i| {
                // SAFETY: operand 0 is the seed `[2] u32`.
                let seed = unsafe { *io.read::<[u32; 2]>(0) };
                f64::from(philox::uniform(seed, id, i))
            })
        }
        Body::MatMul { .. } | Body::Composite(_) => return None,
    })
}

fn get(c: &Cells, io: &Io, operand: usize, at: usize) -> f64 {
    // SAFETY: the plan's span holds the operand, and `at` came from its layout.
    unsafe { c.get(io.read(operand), at) }
}

fn put(c: &Cells, io: &Io, at: usize, v: f64) {
    // SAFETY: the plan's span holds the result, and `at` came from its layout.
    unsafe { c.put(io.write(0), at, v) }
}

/// One value for each element of the result.
fn each(
    name: &'static str,
    out: Cells,
    value: impl Fn(&Io, usize) -> f64 + Send + Sync + 'static,
) -> Offer {
    Offer::new(name, move |io| {
        for i in 0..out.len() {
            put(&out, io, out.layout.index(i), value(io, i));
        }
    })
}

fn map(p: ScalarProgram, ins: Vec<Cells>, out: Cells) -> Offer {
    let registers = usize::from(p.n_inputs) + p.insts.len();
    let result = usize::from(p.outputs[0]);
    // The one kernel that allocates: a register file a run, for shapes of more axes than any other takes.
    each("map_any", out, move |io, i| {
        let mut regs: Vec<f64> = Vec::with_capacity(registers);
        regs.extend(
            ins.iter()
                .enumerate()
                .map(|(k, c)| get(c, io, k, c.layout.index(i))),
        );
        p.eval(&mut regs);
        regs[result]
    })
}

fn reduce(r: ReduceOp, axis: usize, from: Cells, out: Cells) -> Offer {
    let (n, stride) = (from.layout.shape.0[axis], from.layout.strides[axis]);
    let first = from.layout.slice(axis, 0, 1);
    each("reduce_any", out, move |io, i| {
        let start = first.index(i);
        let values = (0..n).map(|l| get(&from, io, 0, start + l * stride));
        match r {
            ReduceOp::Sum => values.sum(),
            ReduceOp::Max => values.fold(f64::NEG_INFINITY, f64::max),
        }
    })
}

fn gather(ins: Vec<Cells>, out: Cells) -> Offer {
    let c = out.layout.shape.last();
    let rows = ins[0].layout.shape.0[0];
    each("gather_any", out, move |io, i| {
        let id = get(&ins[1], io, 1, ins[1].layout.index(i / c)) as usize;
        match id < rows {
            true => get(&ins[0], io, 0, ins[0].layout.index(id * c + i % c)),
            false => 0.0,
        }
    })
}

fn scatter_add(ins: Vec<Cells>, out: Cells) -> Offer {
    let (v, c) = (out.layout.shape.0[0], out.layout.shape.last());
    let n = ins[0].len();
    each("scatter_add_any", out, move |io, i| {
        let (row, col) = (i / c, i % c);
        debug_assert!(row < v);
        let hit = |k: &usize| get(&ins[0], io, 0, ins[0].layout.index(*k)) as usize == row;
        (0..n)
            .filter(hit)
            .map(|k| get(&ins[1], io, 1, ins[1].layout.index(k * c + col)))
            .sum()
    })
}
