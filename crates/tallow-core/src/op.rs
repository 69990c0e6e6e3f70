//! The closed set of operations. Structural ops are few and permanent; anything a backend may
//! want to run as one kernel is a [`Composite`], which must say how it decomposes.
//! Invariant: `infer` is the only place that decides whether operands fit.
//! Absent on purpose: effects. An update of state is an entry of [`Graph::updates`](crate::graph::Graph),
//! so it is ordered and can never be merged with another.
use crate::{
    Error, Result,
    graph::{Builder, NodeId},
    scalar::ScalarOp,
    types::{DType, Shape, TensorType},
};

mod attention;
mod composite;
mod cross_entropy;
mod dropout;
mod kv_write;
mod layer_norm;
mod linear;
mod norm;
mod optim;
mod rope;
mod softmax;
mod swiglu;
mod top;
pub use attention::Mask;
pub use composite::{CompositeOp, VjpCx};
pub use linear::{Block, LinearIns};

// Every fused op, by the file that defines it. (Each file also has its `mod` line above, which
// rustfmt could not follow if it were made here.)
composite::composites! {
    attention: Attention, AttentionGrad;
    cross_entropy: CrossEntropy, LogitsCrossEntropy;
    dropout: Dropout, DropoutLinear;
    kv_write: KvWrite;
    layer_norm: LayerNorm;
    linear: Linear, LinearGrad;
    norm: RmsNorm, RmsNormGrad, AddRmsNorm;
    optim: AdamW;
    rope: Rope;
    softmax: Softmax, SoftmaxGrad;
    swiglu: SwiGlu, SwiGluGrad;
    top: Top;
}

/// An f32 inside an op, kept as bits so that ops are `Eq + Hash`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bits(u32);
impl Bits {
    /// The number.
    pub fn get(self) -> f32 {
        f32::from_bits(self.0)
    }
}
impl From<f32> for Bits {
    fn from(v: f32) -> Self {
        Bits(v.to_bits())
    }
}
impl std::fmt::Debug for Bits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.get())
    }
}

/// What may happen to an input between replays of one recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Never changes: base weights. A backend may keep it in a layout of its own.
    Frozen,
    /// Lives across replays and is written by them: adapters, moments, KV cache.
    State,
    /// Uploaded by the host between replays: token ids, positions, learning rate.
    Data,
}

/// Reduction of one axis to extent 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReduceOp {
    /// Sum.
    Sum,
    /// Maximum.
    Max,
}

/// One operation. Operands are the node's inputs, in the order given here.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Program input number `slot`.
    Input(u32, Role),
    /// f32 scalar constant.
    Const(Bits),
    /// Elementwise function of operands of equal type.
    Map(ScalarOp),
    /// Conversion of the element type; float to float rounds to nearest even.
    Cast(DType),
    /// Reduce `axis` to extent 1.
    Reduce(ReduceOp, usize),
    /// Stretch extents of 1 (and missing outer axes).
    Broadcast(Shape),
    /// Same elements in row-major order, other extents.
    Reshape(Shape),
    /// Axis `i` of the result is axis `axes[i]` of the operand.
    Permute(Vec<usize>),
    /// The window `start..start+len` of `axis`.
    Slice {
        /// Axis cut.
        axis: usize,
        /// First index kept.
        start: usize,
        /// Number of indices kept.
        len: usize,
    },
    /// Operands one after another along `axis`.
    Concat(usize),
    /// Zeros around the operand along `axis`.
    Pad {
        /// Axis extended.
        axis: usize,
        /// Zeros in front.
        before: usize,
        /// Zeros behind.
        after: usize,
    },
    /// `alpha * op(a) op(b)` over the two innermost axes; outer axes equal.
    /// `ta`/`tb` read the operand transposed.
    MatMul {
        /// Read the left operand transposed.
        ta: bool,
        /// Read the right operand transposed.
        tb: bool,
        /// Factor.
        alpha: Bits,
    },
    /// Rows of a table: `table [v, c], ids [..] u32 -> [.., c]` in the given dtype.
    /// An id at or past `v` reads zeros.
    Gather(DType),
    /// Gradient of a gather: `ids [n] u32, rows [n, c] -> [v, c]` with `v` given.
    ScatterAdd(usize),
    /// Index along `axis`, as f32.
    Iota(Shape, usize),
    /// Uniform numbers in `[0, 1)`, f32, from Philox4x32-10 keyed by `seed [2] u32` and `id`.
    /// Equal ids draw equal numbers on every device.
    Random {
        /// Identity of the draw: two ops with one id are one draw.
        id: u32,
        /// Result extents.
        shape: Shape,
    },
    /// The first operand, kept apart from equal values. Gradients compute again what lies between two barriers
    /// (see [`recompute`](crate::pass::recompute)); a second operand is only waited for.
    Barrier(u32),
    /// Result number `k` of a composite with several.
    Part(usize),
    /// A fused op defined by its decomposition.
    Composite(Composite),
}

impl Op {
    /// Lower-case name.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Input(..) => "input",
            Op::Const(_) => "const",
            Op::Map(s) => s.name(),
            Op::Cast(_) => "cast",
            Op::Reduce(ReduceOp::Sum, _) => "sum",
            Op::Reduce(ReduceOp::Max, _) => "max",
            Op::Broadcast(_) => "broadcast",
            Op::Reshape(_) => "reshape",
            Op::Permute(_) => "permute",
            Op::Slice { .. } => "slice",
            Op::Concat(_) => "concat",
            Op::Pad { .. } => "pad",
            Op::MatMul { .. } => "matmul",
            Op::Gather(_) => "gather",
            Op::ScatterAdd(_) => "scatter_add",
            Op::Iota(..) => "iota",
            Op::Random { .. } => "random",
            Op::Barrier(_) => "barrier",
            Op::Part(_) => "part",
            Op::Composite(c) => c.name(),
        }
    }

    /// Result types, or why the operands do not fit. More than one only for composites.
    /// [`Op::Input`] and [`Op::Part`] carry their types in the graph and are not asked.
    pub fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> {
        if let Op::Composite(c) = self {
            return c.infer(ins);
        }
        let arity = match self {
            Op::Const(_) | Op::Iota(..) => 0,
            Op::Map(s) => s.arity(),
            Op::MatMul { .. } | Op::Gather(_) | Op::ScatterAdd(_) => 2,
            Op::Concat(_) => ins.len().max(1),
            Op::Barrier(_) => ins.len().clamp(1, 2),
            _ => 1,
        };
        if ins.len() != arity {
            return Err(Error::shape(self.name(), format!("{arity} operands"), ins));
        }
        self.infer_structural(ins)
            .map(|t| vec![t])
            .map_err(|want| Error::shape(self.name(), want, ins))
    }

    /// Result type of a structural op with the right number of operands, or what it wants.
    fn infer_structural(&self, ins: &[&TensorType]) -> Result<TensorType, String> {
        let like = |shape: Shape| Ok(TensorType::new(shape, ins[0].dtype));
        let bad = |want: &str| Err(want.to_string());
        match self {
            Op::Const(_) => Ok(TensorType::f32([])),
            Op::Iota(s, axis) if *axis < s.rank() => Ok(TensorType::f32(s.clone())),
            Op::Iota(..) => bad("an axis inside the shape"),
            Op::Map(_) if ins.iter().all(|t| *t == ins[0]) => Ok(ins[0].clone()),
            Op::Map(_) => bad("operands of one shape and dtype"),
            Op::Cast(d) => Ok(TensorType::new(ins[0].shape.clone(), *d)),
            Op::Reduce(_, a) if *a < ins[0].shape.rank() && ins[0].shape.0[*a] > 0 => {
                like(ins[0].shape.with(*a, 1))
            }
            Op::Reduce(_, a) => Err(format!("an axis {a} of extent >= 1")),
            Op::Broadcast(to) if ins[0].shape.broadcast(to).as_ref() == Some(to) => {
                like(to.clone())
            }
            Op::Broadcast(to) => Err(format!("extents equal to {to} or 1")),
            Op::Reshape(to) if to.numel() == ins[0].shape.numel() => like(to.clone()),
            Op::Reshape(to) => Err(format!("{} elements for {to}", to.numel())),
            Op::Permute(axes) => {
                let mut sorted = axes.clone();
                sorted.sort_unstable();
                if sorted.iter().copied().eq(0..ins[0].shape.rank()) {
                    like(Shape(axes.iter().map(|a| ins[0].shape.0[*a]).collect()))
                } else {
                    bad("each axis once")
                }
            }
            Op::Slice { axis, start, len } => match ins[0].shape.0.get(*axis) {
                Some(n) if start + len <= *n => like(ins[0].shape.with(*axis, *len)),
                _ => Err(format!("axis {axis} to hold {start}..{}", start + len)),
            },
            Op::Concat(axis) => concat_type(*axis, ins),
            Op::Pad {
                axis,
                before,
                after,
            } => match ins[0].shape.0.get(*axis) {
                Some(n) => like(ins[0].shape.with(*axis, n + before + after)),
                None => Err(format!("an axis {axis}")),
            },
            Op::MatMul { ta, tb, .. } => matmul_type(*ta, *tb, ins),
            Op::Gather(d) => {
                if ins[0].shape.rank() != 2 || ins[1].dtype != DType::U32 {
                    return bad("table [v, c] and u32 ids");
                }
                let mut s = ins[1].shape.0.clone();
                s.push(ins[0].shape.last());
                Ok(TensorType::new(s, *d))
            }
            Op::ScatterAdd(v) => match (&ins[0].shape.0[..], &ins[1].shape.0[..]) {
                ([n], [m, c]) if n == m && ins[0].dtype == DType::U32 => {
                    Ok(TensorType::new([*v, *c], ins[1].dtype))
                }
                _ => bad("u32 ids [n] and rows [n, c]"),
            },
            Op::Random { shape, .. } if *ins[0] == TensorType::u32([2]) => {
                Ok(TensorType::f32(shape.clone()))
            }
            Op::Random { .. } => bad("a u32 seed [2]"),
            Op::Barrier(_) => Ok(ins[0].clone()),
            Op::Input(..) | Op::Part(_) | Op::Composite(_) => {
                bad("to be built by the graph (bug in tallow)")
            }
        }
    }
}

fn concat_type(axis: usize, ins: &[&TensorType]) -> Result<TensorType, String> {
    let Some(first) = ins.first() else {
        return Err("at least one operand".into());
    };
    let fits = |t: &&&TensorType| {
        t.dtype == first.dtype
            && t.shape.rank() == first.shape.rank()
            && axis < t.shape.rank()
            && t.shape.with(axis, 0) == first.shape.with(axis, 0)
    };
    if !ins.iter().all(|t| fits(&t)) {
        return Err(format!("operands equal but for axis {axis}"));
    }
    let total = ins.iter().map(|t| t.shape.0[axis]).sum();
    Ok(TensorType::new(first.shape.with(axis, total), first.dtype))
}

fn matmul_type(ta: bool, tb: bool, ins: &[&TensorType]) -> Result<TensorType, String> {
    let split = |t: &TensorType| -> Option<(Vec<usize>, usize, usize)> {
        let (outer, inner) = t.shape.0.split_at(t.shape.rank().checked_sub(2)?);
        Some((outer.to_vec(), inner[0], inner[1]))
    };
    let (Some((ba, a0, a1)), Some((bb, b0, b1))) = (split(ins[0]), split(ins[1])) else {
        return Err("operands of rank >= 2".into());
    };
    let (m, k) = if ta { (a1, a0) } else { (a0, a1) };
    let (k2, n) = if tb { (b1, b0) } else { (b0, b1) };
    if k != k2 {
        return Err(format!("inner extents equal, not {k} and {k2}"));
    }
    if ba != bb || ins[0].dtype != ins[1].dtype {
        return Err("equal outer extents and dtypes".into());
    }
    let mut s = ba;
    s.extend([m, n]);
    Ok(TensorType::new(s, ins[0].dtype))
}
