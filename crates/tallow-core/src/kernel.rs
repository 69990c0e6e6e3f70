//! What one launch must compute, and the ways a device offers to compute it.
//! Invariant: a spec names no buffer and no offset, so two layers with equal specs share a kernel.
//! Absent on purpose: how. That is the backend's business.
use crate::{
    Result,
    op::{Bits, Composite, Op, ReduceOp},
    scalar::{Inst, ScalarProgram},
    types::{DType, Layout, TensorType},
};
use std::collections::HashMap;

/// One operand or result of a kernel: its type and how it lies in storage, from element 0 of the span given at run time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Operand {
    /// Element type.
    pub dtype: DType,
    /// Extents and strides; `offset` is 0.
    pub layout: Layout,
    /// Read from an input that never changes: a backend may ask for it in a format of its own.
    pub frozen: bool,
}

impl Operand {
    /// Row-major, not frozen.
    pub fn dense(ty: &TensorType) -> Self {
        Operand {
            dtype: ty.dtype,
            layout: Layout::contiguous(&ty.shape),
            frozen: false,
        }
    }
    /// Shape and dtype.
    pub fn ty(&self) -> TensorType {
        TensorType::new(self.layout.shape.clone(), self.dtype)
    }
    /// Bytes of the distinct elements touched.
    pub fn bytes(&self) -> usize {
        let l = &self.layout;
        let distinct = |(n, s): (&usize, &usize)| if *s == 0 { 1 } else { *n };
        let elems: usize = l.shape.0.iter().zip(&l.strides).map(distinct).product();
        elems * self.dtype.bytes()
    }
    /// Is it dense row-major?
    pub fn is_dense(&self) -> bool {
        self.layout.is_contiguous()
    }
}

/// What one launch computes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KernelSpec {
    /// The computation.
    pub body: Body,
    /// Operands.
    pub inputs: Vec<Operand>,
    /// Results; `None` where nobody wants one.
    pub outputs: Vec<Option<Operand>>,
}

/// The computation of a [`KernelSpec`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Body {
    /// A fused elementwise program; every operand has the result's shape (stride 0 repeats).
    Map(ScalarProgram),
    /// Element by element, converting the dtype if it differs.
    Copy,
    /// Every element the same number.
    Fill(Bits),
    /// Reduce one axis to extent 1.
    Reduce(ReduceOp, usize),
    /// Batched product; see [`Op::MatMul`].
    MatMul {
        /// Left operand transposed.
        ta: bool,
        /// Right operand transposed.
        tb: bool,
        /// Factor.
        alpha: Bits,
    },
    /// Rows of a table by id; see [`Op::Gather`].
    Gather,
    /// See [`Op::ScatterAdd`].
    ScatterAdd,
    /// Index along an axis.
    Iota(usize),
    /// Uniform numbers; see [`Op::Random`].
    Random(u32),
    /// A fused op.
    Composite(Composite),
}

impl KernelSpec {
    /// A composite on dense operands, those marked never changing, with the results marked in `live`.
    pub fn composite(
        c: &Composite,
        ins: &[&TensorType],
        frozen: &[bool],
        live: &[bool],
    ) -> Result<Self> {
        let outs = c.infer(ins)?;
        let operand = |(t, frozen): (&&TensorType, &bool)| Operand {
            frozen: *frozen,
            ..Operand::dense(t)
        };
        let wanted = |(t, live): (&TensorType, &bool)| live.then(|| Operand::dense(t));
        Ok(KernelSpec {
            body: Body::Composite(c.clone()),
            inputs: ins.iter().zip(frozen).map(operand).collect(),
            outputs: outs.iter().zip(live).map(wanted).collect(),
        })
    }
    /// Name for people: `mul_add`, `matmul`, `rms_norm`.
    pub fn name(&self) -> String {
        match &self.body {
            Body::Map(p) => {
                let ops: Vec<_> = p
                    .insts
                    .iter()
                    .filter_map(|i| match i {
                        Inst::Apply(o, _) => Some(o.name()),
                        Inst::Const(_) => None,
                    })
                    .collect();
                match ops.len() {
                    0 => "map".into(),
                    1..=6 => ops.join("_"),
                    n => format!("{}_and_{}_more", ops[..4].join("_"), n - 4),
                }
            }
            Body::Copy => "copy".into(),
            Body::Fill(_) => "fill".into(),
            Body::Reduce(r, axis) => Op::Reduce(*r, *axis).name().into(),
            Body::MatMul { .. } => "matmul".into(),
            Body::Gather => "gather".into(),
            Body::ScatterAdd => "scatter_add".into(),
            Body::Iota(_) => "iota".into(),
            Body::Random(_) => "random".into(),
            Body::Composite(c) => c.name().into(),
        }
    }
    /// Bytes read and written once each. Of a table or a cache only the rows that are touched count.
    pub fn bytes(&self) -> usize {
        let rows = match &self.body {
            Body::Gather => self.outputs[0]
                .as_ref()
                .map(|o| (1, o.bytes() + self.gathered(o))),
            Body::Composite(Composite::KvWrite(_)) => Some((2, 2 * self.inputs[1].bytes())),
            _ => None,
        };
        if let Some((index, bytes)) = rows {
            return bytes + self.inputs[index].bytes();
        }
        let ins: usize = self.inputs.iter().map(Operand::bytes).sum();
        let outs: usize = self.outputs.iter().flatten().map(Operand::bytes).sum();
        ins + outs
    }
    /// Bytes of the table's rows that a gather reads.
    fn gathered(&self, out: &Operand) -> usize {
        out.layout.shape.numel() * self.inputs[0].dtype.bytes()
    }
    /// Arithmetic of one run.
    pub fn flops(&self) -> f64 {
        let out = self.outputs.iter().flatten().next();
        let n = out.map_or(0, |o| o.layout.shape.numel()) as f64;
        match &self.body {
            Body::Map(p) => n * p.flops() as f64,
            Body::Reduce(..) => self.inputs[0].layout.shape.numel() as f64,
            Body::MatMul { ta, .. } => {
                let s = &self.inputs[0].layout.shape.0;
                2.0 * n * s[s.len() - if *ta { 2 } else { 1 }] as f64
            }
            Body::Composite(c) => {
                let tys: Vec<_> = self.inputs.iter().map(Operand::ty).collect();
                let live: Vec<_> = self.outputs.iter().map(Option::is_some).collect();
                c.flops(&tys.iter().collect::<Vec<_>>(), &live)
            }
            Body::ScatterAdd => self.inputs[1].layout.shape.numel() as f64,
            Body::Copy | Body::Fill(_) | Body::Gather | Body::Iota(_) | Body::Random(_) => 0.0,
        }
    }
    /// What tells this spec from every other, on one line, the same in every process: name, operand types, and a number
    /// made of all the rest (strides, factors, what never changes).
    pub fn key(&self) -> String {
        // FNV-1a: the standard library's hashes may change with its version.
        let all = format!("{self:?}");
        let step = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
        let number = all.bytes().fold(0xcbf2_9ce4_8422_2325, step);
        format!("{} {} #{number:016x}", self.name(), self.signature())
    }
    /// Operand types for messages: `f32[4, 8], bf16[8, 8] -> f32[4, 8]`; in front, of attention, a cap of its scores: `cap 50, `.
    pub fn signature(&self) -> String {
        let show = |o: &Operand| {
            let strided = if o.is_dense() { "" } else { "~" };
            format!("{}{strided}", o.ty())
        };
        let ins: Vec<_> = self.inputs.iter().map(show).collect();
        let outs: Vec<_> = self
            .outputs
            .iter()
            .map(|o| o.as_ref().map_or("-".into(), show))
            .collect();
        let cap = match &self.body {
            Body::Composite(Composite::Attention(a)) => a.cap,
            Body::Composite(Composite::AttentionGrad(g)) => g.0.cap,
            _ => None,
        };
        let cap = cap.map_or(String::new(), |c| format!("cap {c:?}, "));
        format!("{cap}{} -> {}", ins.join(", "), outs.join(", "))
    }
}

/// Index into the issuing backend's kernel table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KernelId(pub u32);

/// A storage format of a frozen operand that only its backend understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Format {
    /// Name for `explain`: `panels32_f32`.
    pub name: &'static str,
    /// Size of the operand in this format, in bytes.
    pub bytes: usize,
    /// A factor that goes into it; 1 for most.
    pub scale: Bits,
}

/// One way to run a spec: a hand-written kernel, a generated one, or a library call.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Handle for the recording.
    pub kernel: KernelId,
    /// Name: `<op>_<algorithm>_<dtype>`.
    pub name: &'static str,
    /// Scratch memory of one run, in bytes.
    pub workspace: usize,
    /// Model estimate of one run, in seconds; lower wins.
    pub cost: f64,
    /// Frozen operands wanted in a format of the backend: operand index and format.
    pub prepare: Vec<(usize, Format)>,
}

/// What a backend has offered so far, by number; `O` is one offer, whatever it takes there to run it.
#[derive(Debug)]
pub struct Offers<O> {
    by_spec: HashMap<KernelSpec, Vec<Candidate>>,
    all: Vec<O>,
}

impl<O> Default for Offers<O> {
    fn default() -> Self {
        Offers {
            by_spec: HashMap::new(),
            all: vec![],
        }
    }
}

impl<O> Offers<O> {
    /// The offer behind a candidate of this table.
    pub fn get(&self, id: KernelId) -> &O {
        &self.all[id.0 as usize]
    }
    /// All ways to run `spec`: `offers` makes them, once for each spec, and `candidate` says what the planner sees of one.
    pub fn candidates(
        &mut self,
        spec: &KernelSpec,
        offers: impl FnOnce() -> Vec<O>,
        candidate: impl Fn(KernelId, &O) -> Candidate,
    ) -> Vec<Candidate> {
        if let Some(known) = self.by_spec.get(spec) {
            return known.clone();
        }
        let mut out = vec![];
        for offer in offers() {
            out.push(candidate(KernelId(self.all.len() as u32), &offer));
            self.all.push(offer);
        }
        self.by_spec.insert(spec.clone(), out.clone());
        out
    }
}
