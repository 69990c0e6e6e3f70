//! What each fused op must provide, and the enum made from the list in `op.rs`.
//! Invariant: `decompose` is the meaning; kernels and `vjp` are optimisations of it and are tested against it.
//! Absent on purpose: kernels.
use super::*;
use crate::graph::{Builder, NodeId};

/// What a gradient rule sees.
pub struct VjpCx<'a> {
    /// Where new nodes go.
    pub b: &'a mut Builder,
    /// Operands.
    pub ins: &'a [NodeId],
    /// Results of the op itself, one for each output.
    pub outs: &'a [NodeId],
    /// Cotangent of each output; `None` is zero.
    pub cts: &'a [Option<NodeId>],
    /// Which operands need a cotangent.
    pub needs: &'a [bool],
}

/// One fused op. A new one is a file in `op/` and its row in `op.rs`.
pub trait CompositeOp: Clone + Into<Composite> {
    /// Lower-case name, the field's standard term.
    fn name(&self) -> &'static str;
    /// Result types, or why the operands do not fit.
    fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>>;
    /// The meaning, in structural ops: one node for each result.
    fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>>;
    /// Cotangents of the operands. `Ok(None)`: differentiate the decomposition instead.
    fn vjp(&self, cx: &mut VjpCx) -> Result<Option<Vec<Option<NodeId>>>> {
        let _ = cx;
        Ok(None)
    }
    /// Operand whose storage result `k` may take over, element for element.
    fn in_place(&self, k: usize) -> Option<usize> {
        let _ = k;
        None
    }
    /// Arithmetic of one run in which the results marked in `live` are wanted.
    fn flops(&self, ins: &[&TensorType], live: &[bool]) -> f64 {
        let _ = live;
        ins.iter().map(|t| t.shape.numel()).sum::<usize>() as f64
    }
    /// Awkward instances for the conformance suite: the op with its operand types.
    fn examples() -> Vec<(Self, Vec<TensorType>)>;
}

/// From rows `file: Op, Op;` the enum of all composites, and what each op forwards to its file.
macro_rules! composites {
    ($($file:ident: $($V:ident),+;)*) => {
        $(pub use $file::{$($V),+};)*
        /// A fused op, defined by its decomposition. A backend need not know them all: one it has no
        /// kernel for runs as its decomposition.
        #[non_exhaustive]
        #[derive(Clone, Debug, PartialEq, Eq, Hash)]
        pub enum Composite { $($(#[doc = concat!("See [`", stringify!($V), "`].")] $V($V),)+)* }
        $($(impl From<$V> for Composite { fn from(c: $V) -> Self { Composite::$V(c) } })+)*
        impl Composite {
            /// Lower-case name.
            pub fn name(&self) -> &'static str { match self { $($(Self::$V(c) => c.name(),)+)* } }
            /// Result types, or why the operands do not fit.
            pub fn infer(&self, ins: &[&TensorType]) -> Result<Vec<TensorType>> { match self { $($(Self::$V(c) => c.infer(ins),)+)* } }
            /// The meaning, in structural ops.
            pub fn decompose(&self, b: &mut Builder, ins: &[NodeId]) -> Result<Vec<NodeId>> { match self { $($(Self::$V(c) => c.decompose(b, ins),)+)* } }
            /// Cotangents of the operands; `None`: differentiate the decomposition.
            pub fn vjp(&self, cx: &mut VjpCx) -> Result<Option<Vec<Option<NodeId>>>> { match self { $($(Self::$V(c) => c.vjp(cx),)+)* } }
            /// Operand whose storage result `k` may take over.
            pub fn in_place(&self, k: usize) -> Option<usize> { match self { $($(Self::$V(c) => c.in_place(k),)+)* } }
            /// Arithmetic of one run.
            pub fn flops(&self, ins: &[&TensorType], live: &[bool]) -> f64 { match self { $($(Self::$V(c) => c.flops(ins, live),)+)* } }
            /// Awkward instances of every composite.
            pub fn examples() -> Vec<(Composite, Vec<TensorType>)> {
                let mut all = vec![];
                $($(all.extend($V::examples().into_iter().map(|(c, t)| (Composite::from(c), t)));)+)*
                all
            }
        }
    };
}
pub(super) use composites;

/// The error of a composite whose operands do not fit.
pub(super) fn misfit<T>(op: &'static str, want: &str, ins: &[&TensorType]) -> Result<T> {
    Err(Error::shape(op, want, ins))
}
