//! The methods of [`Tensor`]: elementwise, shape, products, and the fused ops by name.
//! Invariant: each is one op or a composition written out here; nothing touches a device.
use super::Tensor;
use crate::{
    Error, Result,
    op::*,
    scalar::ScalarOp,
    types::{DType, Shape, TensorType},
};

/// One projection with its adapters, for [`Tensor::linears`].
#[derive(Clone)]
pub struct LoraWeights {
    /// Weight `[n, k]`.
    pub w: Tensor,
    /// Bias `[n]`.
    pub bias: Option<Tensor>,
    /// `A [r, k]`, `B [n, r]` and the scale of each share of the rows, where it has an adapter. All projections of
    /// a call have equally many shares, at least one; with several, they divide the input's first axis evenly.
    pub adapters: Vec<Option<(Tensor, Tensor, f32)>>,
}

macro_rules! binary {
    ($($(#[$doc:meta])* $name:ident $op:ident;)*) => { $(
        $(#[$doc])*
        #[track_caller]
        pub fn $name(&self, other: &Tensor) -> Result<Self> { Self::map(ScalarOp::$op, &[self, other]) }
    )* };
}
macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident $op:ident;)*) => { $(
        $(#[$doc])*
        #[track_caller]
        pub fn $name(&self) -> Result<Self> { Self::map(ScalarOp::$op, &[self]) }
    )* };
}

impl Tensor {
    /// An f32 constant `[]`.
    pub fn scalar(v: f32) -> Self {
        Self::apply(Op::Const(v.into()), &[]).expect("constants always type-check")
    }
    /// A scalar function of tensors of one dtype, with NumPy broadcasting.
    #[track_caller]
    pub fn map(s: ScalarOp, ins: &[&Tensor]) -> Result<Self> {
        let mut shape = Shape::default();
        for t in ins {
            shape = shape.broadcast(t.shape()).ok_or_else(|| {
                let tys: Vec<_> = ins.iter().map(|t| t.ty()).collect();
                Error::shape(s.name(), "extents equal or 1", &tys)
                    .located(std::panic::Location::caller())
            })?;
        }
        let mut wide = Vec::with_capacity(ins.len());
        for t in ins {
            wide.push(t.broadcast(shape.clone())?);
        }
        Self::apply(Op::Map(s), &wide.iter().collect::<Vec<_>>())
    }
    binary! {
        /// `self + other`.
        add Add;
        /// `self - other`.
        sub Sub;
        /// `self * other`, element by element.
        mul Mul;
        /// `self / other`.
        div Div;
        /// The larger element.
        maximum Max;
        /// The smaller element.
        minimum Min;
        /// 1 where `self < other`, else 0.
        less Less;
        /// 1 where `self == other`, else 0.
        equal Equal;
    }
    unary! {
        /// `-self`.
        neg Neg;
        /// `|self|`.
        abs Abs;
        /// `e^self`.
        exp Exp;
        /// Natural logarithm.
        log Log;
        /// Sine of radians.
        sin Sin;
        /// Cosine of radians.
        cos Cos;
        /// Hyperbolic tangent.
        tanh Tanh;
        /// `1 / (1 + e^-self)`.
        sigmoid Sigmoid;
        /// Square root.
        sqrt Sqrt;
        /// `1 / sqrt(self)`.
        rsqrt Rsqrt;
        /// `1 / self`.
        recip Recip;
        /// The largest whole number not above.
        floor Floor;
    }
    /// `self + v`.
    #[track_caller]
    pub fn add_scalar(&self, v: f32) -> Result<Self> {
        self.add(&Self::scalar(v))
    }
    /// `self * v`.
    #[track_caller]
    pub fn mul_scalar(&self, v: f32) -> Result<Self> {
        self.mul(&Self::scalar(v))
    }
    /// `self * sigmoid(self)`.
    #[track_caller]
    pub fn silu(&self) -> Result<Self> {
        self.mul(&self.sigmoid()?)
    }
    /// `yes` where `self` is not 0, else `no`.
    #[track_caller]
    pub fn select(&self, yes: &Tensor, no: &Tensor) -> Result<Self> {
        Self::map(ScalarOp::Select, &[self, yes, no])
    }
    /// Another element type.
    #[track_caller]
    pub fn cast(&self, to: DType) -> Result<Self> {
        if self.dtype() == to {
            return Ok(self.clone());
        }
        Self::apply(Op::Cast(to), &[self])
    }
    /// Sum along `axis`, kept with extent 1.
    #[track_caller]
    pub fn sum(&self, axis: usize) -> Result<Self> {
        Self::apply(Op::Reduce(ReduceOp::Sum, axis), &[self])
    }
    /// Maximum along `axis`, kept with extent 1.
    #[track_caller]
    pub fn max(&self, axis: usize) -> Result<Self> {
        Self::apply(Op::Reduce(ReduceOp::Max, axis), &[self])
    }
    /// Mean along `axis`, kept with extent 1.
    #[track_caller]
    pub fn mean(&self, axis: usize) -> Result<Self> {
        let n = self.dims().get(axis).copied().unwrap_or(1);
        self.sum(axis)?.mul_scalar(1.0 / n as f32)
    }
    /// Sum of all elements, `[]`.
    #[track_caller]
    pub fn sum_all(&self) -> Result<Self> {
        let n = self.shape().numel();
        self.reshape([n])?.sum(0)?.reshape(Shape::default())
    }
    /// Mean of all elements, `[]`.
    #[track_caller]
    pub fn mean_all(&self) -> Result<Self> {
        self.sum_all()?
            .mul_scalar(1.0 / self.shape().numel() as f32)
    }
    /// Repeats extents of 1 up to `to`.
    #[track_caller]
    pub fn broadcast(&self, to: impl Into<Shape>) -> Result<Self> {
        let to = to.into();
        if *self.shape() == to {
            return Ok(self.clone());
        }
        Self::apply(Op::Broadcast(to), &[self])
    }
    /// Same elements, other extents.
    #[track_caller]
    pub fn reshape(&self, to: impl Into<Shape>) -> Result<Self> {
        let to = to.into();
        if *self.shape() == to {
            return Ok(self.clone());
        }
        Self::apply(Op::Reshape(to), &[self])
    }
    /// Axis `i` of the result is axis `axes[i]`.
    #[track_caller]
    pub fn permute(&self, axes: &[usize]) -> Result<Self> {
        Self::apply(Op::Permute(axes.to_vec()), &[self])
    }
    /// The two innermost axes swapped.
    #[track_caller]
    pub fn t(&self) -> Result<Self> {
        let mut axes: Vec<usize> = (0..self.shape().rank()).collect();
        let r = axes.len();
        if r >= 2 {
            axes.swap(r - 1, r - 2);
        }
        self.permute(&axes)
    }
    /// The window `start..start + len` of `axis`.
    #[track_caller]
    pub fn slice(&self, axis: usize, start: usize, len: usize) -> Result<Self> {
        Self::apply(Op::Slice { axis, start, len }, &[self])
    }
    /// Tensors one after another along `axis`.
    #[track_caller]
    pub fn concat(axis: usize, xs: &[&Tensor]) -> Result<Self> {
        Self::apply(Op::Concat(axis), xs)
    }
    /// Matrix product over the two innermost axes.
    #[track_caller]
    pub fn matmul(&self, other: &Tensor) -> Result<Self> {
        self.matmul_t(false, other, false)
    }
    /// Matrix product with either operand read transposed.
    #[track_caller]
    pub fn matmul_t(&self, ta: bool, other: &Tensor, tb: bool) -> Result<Self> {
        let alpha = Bits::from(1.0);
        Self::apply(Op::MatMul { ta, tb, alpha }, &[self, other])
    }
    /// Linear layers that share this input `[.., k]`, in one product; their outputs side by side `[.., Σn]`,
    /// plus `residual` if given.
    #[track_caller]
    pub fn linears(&self, ws: &[LoraWeights], residual: Option<&Tensor>) -> Result<Self> {
        let mut ins = vec![self];
        let mut blocks = vec![];
        for p in ws {
            ins.push(&p.w);
            ins.extend(&p.bias);
            let rank = |a: &Tensor| a.dims().first().copied().unwrap_or(0);
            let adapters = p.adapters.iter().map(|adapter| {
                let (a, b, scale) = adapter.as_ref()?;
                ins.extend([a, b]);
                Some((rank(a), (*scale).into()))
            });
            let adapters = adapters.collect();
            blocks.push(Block {
                n: p.w.dims().first().copied().unwrap_or(0),
                bias: p.bias.is_some(),
                adapters,
            });
        }
        ins.extend(residual);
        let residual = residual.is_some();
        let mut out = Self::composite(Linear { blocks, residual }, &ins)?;
        Ok(out.remove(0))
    }
    /// A linear layer with weight `[n, k]`.
    #[track_caller]
    pub fn linear(&self, w: &Tensor) -> Result<Self> {
        let one = LoraWeights {
            w: w.clone(),
            bias: None,
            adapters: vec![None],
        };
        self.linears(&[one], None)
    }
    /// A linear layer with an adapter: `x Wᵀ + scale (x Aᵀ) Bᵀ`; `w [n, k]`, `a [r, k]`, `b [n, r]`.
    #[track_caller]
    pub fn lora_linear(&self, w: &Tensor, a: &Tensor, b: &Tensor, scale: f32) -> Result<Self> {
        let one = LoraWeights {
            w: w.clone(),
            bias: None,
            adapters: vec![Some((a.clone(), b.clone(), scale))],
        };
        self.linears(&[one], None)
    }
    /// Rows of this table `[v, c]` by `ids [..] u32`, as `dtype`.
    #[track_caller]
    pub fn gather(&self, ids: &Tensor, dtype: DType) -> Result<Self> {
        Self::apply(Op::Gather(dtype), &[self, ids])
    }
    /// Softmax over the innermost axis.
    #[track_caller]
    pub fn softmax(&self) -> Result<Self> {
        Ok(Self::composite(Softmax, &[self])?.remove(0))
    }
    /// Of each row `[n, v]` the index of its largest value and that value, `[n, 2]` f32; where one is NaN the index is `v`.
    #[track_caller]
    pub fn top(&self) -> Result<Self> {
        Ok(Self::composite(Top, &[self])?.remove(0))
    }
    /// Root mean square norm of `[.., c]` with weight `[c]`.
    #[track_caller]
    pub fn rms_norm(&self, w: &Tensor, eps: f32) -> Result<Self> {
        let eps = eps.into();
        Ok(Self::composite(RmsNorm { eps }, &[self, w])?.remove(0))
    }
    /// Layer norm of `[.., c]` with weight and bias `[c]`.
    #[track_caller]
    pub fn layer_norm(&self, w: &Tensor, b: &Tensor, eps: f32) -> Result<Self> {
        let eps = eps.into();
        Ok(Self::composite(LayerNorm { eps }, &[self, w, b])?.remove(0))
    }
    /// Rotary embedding of `[b, t, h, d]` at `pos [b, t]`, with `inv_freq [d/2]` radians a token.
    #[track_caller]
    pub fn rope(&self, pos: &Tensor, inv_freq: &Tensor) -> Result<Self> {
        let inverse = false;
        Ok(Self::composite(Rope { inverse }, &[self, pos, inv_freq])?.remove(0))
    }
    /// `silu(self) * up`.
    #[track_caller]
    pub fn swiglu(&self, up: &Tensor) -> Result<Self> {
        Ok(Self::composite(SwiGlu, &[self, up])?.remove(0))
    }
    /// Attention of queries `[b, t, h, d]` over keys and values `[b, s, hk, d]`; `pos [b, t]` are the queries' positions.
    #[track_caller]
    pub fn attention(
        &self,
        k: &Tensor,
        v: &Tensor,
        pos: &Tensor,
        scale: f32,
        mask: Mask,
    ) -> Result<Self> {
        self.attention_by(&attention(scale, mask), [k, v, pos], None)
    }
    /// As [`Tensor::attention`] in rows of several documents: a query sees no key before `starts [b, t]`, the
    /// index of its document's first token. The mask is causal.
    #[track_caller]
    pub fn attention_packed(
        &self,
        k: &Tensor,
        v: &Tensor,
        [pos, starts]: [&Tensor; 2],
        scale: f32,
        mask: Mask,
    ) -> Result<Self> {
        self.attention_by(&attention(scale, mask), [k, v, pos], Some(starts))
    }
    /// As [`Tensor::attention`], or with `starts` as [`Tensor::attention_packed`], by all the rules of `op`: the one way
    /// to a cap.
    #[track_caller]
    pub fn attention_by(
        &self,
        op: &Attention,
        [k, v, pos]: [&Tensor; 3],
        starts: Option<&Tensor>,
    ) -> Result<Self> {
        let ins: Vec<&Tensor> = [self, k, v, pos].into_iter().chain(starts).collect();
        Ok(Self::composite(op.clone(), &ins)?.remove(0))
    }
    /// This cache `[b, s, h, d]` with `new [b, t, h, d]` written at `pos [b, t]`.
    #[track_caller]
    pub fn kv_write(&self, new: &Tensor, pos: &Tensor) -> Result<Self> {
        Ok(Self::composite(KvWrite, &[self, new, pos])?.remove(0))
    }
    /// Cross entropy in nats of rows `[n, c]` projected by `w [v, c]` against `target [n]`, `[n]`.
    /// A target at or past `v` gives 0.
    #[track_caller]
    pub fn cross_entropy(&self, w: &Tensor, target: &Tensor) -> Result<Self> {
        Ok(Self::composite(CrossEntropy, &[self, w, target])?.remove(0))
    }
    /// Cross entropy in nats of these logits `[n, v]` against `target [n]`, `[n]`, where the logits are more than a
    /// product with frozen weights. A target at or past `v` gives 0.
    #[track_caller]
    pub fn logits_cross_entropy(&self, target: &Tensor) -> Result<Self> {
        Ok(Self::composite(LogitsCrossEntropy, &[self, target])?.remove(0))
    }
    /// The next parameters and moments of AdamW; `self` are the parameters. See [`AdamW`].
    #[track_caller]
    pub fn adamw(
        &self,
        grad: &Tensor,
        m: &Tensor,
        v: &Tensor,
        hyper: &Tensor,
    ) -> Result<[Self; 3]> {
        let out = Self::composite(AdamW, &[self, grad, m, v, hyper])?;
        out.try_into()
            .map_err(|_| Error::shape("adamw", "three results (bug in tallow)", &[]))
    }
    /// Index along `axis`, as f32.
    #[track_caller]
    pub fn iota(shape: impl Into<Shape>, axis: usize) -> Result<Self> {
        Self::apply(Op::Iota(shape.into(), axis), &[])
    }
    /// Uniform numbers in `[0, 1)`; `seed [2] u32`. Each call draws anew: two tensors are two draws.
    #[track_caller]
    pub fn uniform(shape: impl Into<Shape>, seed: &Tensor) -> Result<Self> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let shape = shape.into();
        Self::apply(Op::Random { id, shape }, &[seed])
    }
    /// `dropout(self) aᵀ` for `self [.., k]`, `a [r, k]`: an element of `self` stays with probability `keep`, scaled
    /// by `1 / keep`. Calls with one `id` under one `seed [2] u32` draw one mask; see [`Dropout`].
    #[track_caller]
    pub fn dropout_linear(&self, a: &Tensor, seed: &Tensor, id: u32, keep: f32) -> Result<Self> {
        let keep = keep.into();
        let op = DropoutLinear(Dropout { id, keep });
        Ok(Self::composite(op, &[self, a, seed])?.remove(0))
    }
    /// The same value. Gradients do not keep what lies between two barriers, but compute it again: gradient
    /// checkpointing. `id` counts the barriers of a graph.
    #[track_caller]
    pub fn barrier(&self, id: u32) -> Result<Self> {
        Self::apply(Op::Barrier(id), &[self])
    }
    /// An f32 type with this tensor's shape.
    pub fn like_f32(&self) -> TensorType {
        TensorType::f32(self.shape().clone())
    }
}

fn attention(scale: f32, mask: Mask) -> Attention {
    Attention {
        scale: scale.into(),
        mask,
        cap: None,
    }
}
