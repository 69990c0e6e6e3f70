//! One step of a plan as dispatches: kernels with symbolic arguments.
//! Invariant: an argument names an operand, a result or scratch by number; where they lie comes from the plan when a
//! recording is made, so equal specs share all of this.
//! Absent on purpose: which kernel runs which spec (`glue`), and how arguments look to a kernel (`shader`).
use crate::glue::Gemm;
use std::{borrow::Cow, sync::Arc};
use tallow_core::{kernel::Format, types::DType};

/// What an argument is called inside the kernel.
pub(crate) type Name = Cow<'static, str>;

/// How a kernel sees the elements of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ty {
    /// One number, or four of 16 bits to two words: every type of the core, an element at a time.
    Plain(DType),
    /// f32, or 16-bit floats, read sixteen bytes at a time where they lie so. Never written.
    Wide(DType),
}

impl Ty {
    /// The element type.
    pub(crate) fn dtype(self) -> DType {
        match self {
            Ty::Plain(d) | Ty::Wide(d) => d,
        }
    }
}

/// An argument of a kernel.
#[derive(Clone, Debug)]
pub(crate) enum Arg {
    /// An operand.
    Read { name: Name, operand: usize, ty: Ty },
    /// `bytes` of an operand, from byte `at` on.
    Part {
        name: Name,
        operand: usize,
        at: usize,
        bytes: usize,
        ty: Ty,
    },
    /// A result, or `bytes` of it from byte `at` on; nothing is bound where nobody wants it.
    Write {
        name: Name,
        result: usize,
        part: Option<[usize; 2]>,
        ty: Ty,
    },
    /// `bytes` of the scratch memory, from byte `at` on.
    Scratch {
        name: Name,
        at: usize,
        bytes: usize,
        ty: Ty,
    },
    /// An operand that this spec does not have: it reads as zeros.
    Absent(Name),
    /// A number.
    U32(Name, u32),
    /// A number.
    F32(Name, f32),
}

/// Operand `operand`, element by element.
pub(crate) fn read(name: impl Into<Name>, operand: usize, d: DType) -> Arg {
    let (name, ty) = (name.into(), Ty::Plain(d));
    Arg::Read { name, operand, ty }
}

/// Operand `operand`, read sixteen bytes at a time where it lies so.
pub(crate) fn wide(name: impl Into<Name>, operand: usize, d: DType) -> Arg {
    let (name, ty) = (name.into(), Ty::Wide(d));
    Arg::Read { name, operand, ty }
}

/// Result `result`.
pub(crate) fn write(name: impl Into<Name>, result: usize, d: DType) -> Arg {
    let (name, ty) = (name.into(), Ty::Plain(d));
    Arg::Write {
        name,
        result,
        part: None,
        ty,
    }
}

/// Scratch memory.
pub(crate) fn scratch(name: impl Into<Name>, at: usize, bytes: usize, d: DType) -> Arg {
    let (name, ty) = (name.into(), Ty::Plain(d));
    Arg::Scratch {
        name,
        at,
        bytes,
        ty,
    }
}

impl Arg {
    /// The same under another name.
    pub(crate) fn named(mut self, new: impl Into<Name>) -> Self {
        match &mut self {
            Arg::Read { name, .. }
            | Arg::Part { name, .. }
            | Arg::Write { name, .. }
            | Arg::Scratch { name, .. }
            | Arg::U32(name, _)
            | Arg::F32(name, _)
            | Arg::Absent(name) => *name = new.into(),
        }
        self
    }
    /// Has it elements of 16 bits?
    pub(crate) fn is_half(&self) -> bool {
        match self {
            Arg::Read { ty, .. }
            | Arg::Part { ty, .. }
            | Arg::Write { ty, .. }
            | Arg::Scratch { ty, .. } => ty.dtype().bytes() == 2,
            Arg::U32(..) | Arg::F32(..) | Arg::Absent(_) => false,
        }
    }
    /// Is it a buffer to be bound?
    pub(crate) fn is_buffer(&self) -> bool {
        !matches!(self, Arg::U32(..) | Arg::F32(..) | Arg::Absent(_))
    }
}

/// A kernel with everything but where its operands lie.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) entry: &'static str,
    /// The whole text, with the header made of the arguments.
    pub(crate) source: Arc<str>,
    /// Workgroups.
    pub(crate) grid: [u32; 3],
    /// Those that are bound or passed: results nobody wants are left out.
    pub(crate) args: Vec<Arg>,
    /// Numbers come through a uniform buffer: they are too many for immediates, or the adapter has none.
    pub(crate) uniform: bool,
    /// Not needed where this operand and this result lie in the same place.
    pub(crate) unless_same: Option<(usize, usize)>,
}

/// A way to run a spec, before it has a number.
#[derive(Clone, Debug)]
pub(crate) struct Offer {
    pub(crate) name: &'static str,
    /// Scratch in bytes.
    pub(crate) scratch: usize,
    pub(crate) prepare: Vec<(usize, Format)>,
    pub(crate) jobs: Vec<Kernel>,
    /// A product of Apple's in place of jobs.
    pub(crate) gemm: Option<Gemm>,
    /// Added to the estimate, in seconds: what makes one offer for a spec dearer than another.
    pub(crate) extra: f64,
}

impl Offer {
    pub(crate) fn new(name: &'static str, jobs: Vec<Kernel>) -> Self {
        Offer {
            name,
            scratch: 0,
            prepare: vec![],
            jobs,
            gemm: None,
            extra: 0.0,
        }
    }
    pub(crate) fn scratch(self, bytes: usize) -> Self {
        Offer {
            scratch: bytes,
            ..self
        }
    }
}
