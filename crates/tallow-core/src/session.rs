//! Entry point: compiles lazy tensors, keeps plans and prepared weights, makes recordings.
//! Invariant: a hot loop holds a [`Program`] and calls only `write`, `replay` and `read`.
//! Absent on purpose: graph passes and device code.
use crate::{
    Error, Result,
    backend::*,
    graph::Graph,
    kernel::{Format, KernelSpec, Operand},
    op::Role,
    pass::{self, again, expand, fuse},
    plan::{self, Plan},
    tensor::{self, Tensor},
    types::{DType, Shape, TensorType},
};
use std::{
    any::Any,
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, Weak},
};

/// A plan with what the passes did, without buffers.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// Launches and memory.
    pub plan: Arc<Plan>,
    /// Types of the outputs.
    pub outputs: Vec<TensorType>,
    /// Rewrites made on the way, in order.
    pub notes: Vec<String>,
}

/// Compiles and runs on one device. Cheap to clone; clones share caches.
#[derive(Clone)]
pub struct Session {
    shared: Arc<Shared>,
    /// Are cheap values computed again rather than kept, wherever the device can?
    sparing: bool,
}

/// Operands in a backend's format, each with where it came from, which it does not keep alive.
type PreparedOperands = HashMap<PreparedKey, (Weak<dyn Any + Send + Sync>, Buffer)>;

struct Shared {
    backend: Arc<dyn Backend>,
    chooser: Box<dyn Chooser>,
    /// Of sessions that keep what they computed, and of those that are sparing.
    plans: Mutex<[PlanCache; 2]>,
    prepared: Mutex<PreparedOperands>,
    /// Kernels that are not chosen anew, by spec.
    pins: Mutex<HashMap<String, String>>,
}

/// Most recently used plans; older ones are dropped.
#[derive(Default)]
struct PlanCache {
    plans: HashMap<Graph, (u64, Compiled)>,
    clock: u64,
}

/// Plans kept by a session.
pub const MAX_PLANS: usize = 64;

#[derive(Clone, PartialEq, Eq, Hash)]
struct PreparedKey {
    raw: u64,
    offset: usize,
    operand: Operand,
    format: Format,
}

impl Session {
    /// A session on `backend`, choosing kernels by the backend's estimates.
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        Self::with_chooser(backend, Box::new(ByCost))
    }
    /// A session with another way to choose kernels.
    pub fn with_chooser(backend: Arc<dyn Backend>, chooser: Box<dyn Chooser>) -> Self {
        let shared = Shared {
            backend,
            chooser,
            plans: Mutex::default(),
            prepared: Mutex::default(),
            pins: Mutex::default(),
        };
        Session {
            shared: Arc::new(shared),
            sparing: false,
        }
    }
    /// The same session, whose plans compute again what [`Backend::spare`] names instead of keeping it for gradients:
    /// less memory, somewhat more time, the same results. It shares all caches.
    #[must_use]
    pub fn sparing(&self) -> Self {
        Session {
            sparing: true,
            ..self.clone()
        }
    }
    /// The device.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.shared.backend
    }
    /// From now on takes these kernels, by [`KernelSpec::key`] and name, where a plan has the choice: a run that goes
    /// on adds in the order it began with. Plans made before are dropped.
    pub fn pin(&self, choices: impl IntoIterator<Item = (String, String)>) {
        let mut pins = self.shared.pins.lock().unwrap_or_else(|e| e.into_inner());
        pins.extend(choices);
        self.lock_plans().iter_mut().for_each(|c| c.plans.clear());
    }
    /// Number of plans kept.
    pub fn cached_plans(&self) -> usize {
        self.lock_plans().iter().map(|c| c.plans.len()).sum()
    }
    fn cache(&self) -> usize {
        usize::from(self.sparing)
    }
    fn lock_plans(&self) -> MutexGuard<'_, [PlanCache; 2]> {
        self.shared.plans.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Zeroed memory as a leaf.
    pub fn zeros(&self, ty: TensorType, role: Role) -> Result<Tensor> {
        let buf = self.shared.backend.alloc(ty.bytes())?;
        Ok(Tensor::leaf(buf, ty, role))
    }
    /// A leaf with the given f32 values.
    pub fn tensor(&self, values: &[f32], shape: impl Into<Shape>, role: Role) -> Result<Tensor> {
        let t = self.zeros(TensorType::f32(shape), role)?;
        self.write(&t, values)?;
        Ok(t)
    }
    /// A leaf with the given u32 values.
    pub fn tensor_u32(
        &self,
        values: &[u32],
        shape: impl Into<Shape>,
        role: Role,
    ) -> Result<Tensor> {
        let t = self.zeros(TensorType::u32(shape), role)?;
        self.write_u32(&t, values)?;
        Ok(t)
    }
    /// A frozen leaf over host memory, read in place where the device can.
    pub fn adopt(&self, host: HostBytes, range: Range<usize>, ty: TensorType) -> Result<Tensor> {
        if range.len() != ty.bytes() {
            return Err(Error::size(
                "tensor in a file",
                ty.bytes(),
                range.len(),
                "bytes",
            ));
        }
        let buf = self.shared.backend.adopt(host, range, ty.dtype.bytes())?;
        Ok(Tensor::leaf(buf, ty, Role::Frozen))
    }
    /// Uploads f32 values into a leaf, without allocating.
    pub fn write(&self, t: &Tensor, values: &[f32]) -> Result<()> {
        self.upload(t, DType::F32, bytemuck::cast_slice(values))
    }
    /// Uploads u32 values into a leaf, without allocating.
    pub fn write_u32(&self, t: &Tensor, values: &[u32]) -> Result<()> {
        self.upload(t, DType::U32, bytemuck::cast_slice(values))
    }
    fn upload(&self, t: &Tensor, dtype: DType, bytes: &[u8]) -> Result<()> {
        let what = "write to a tensor";
        if t.dtype() != dtype {
            let (want, got) = (t.dtype(), dtype);
            return Err(Error::DType { what, want, got });
        }
        let buf = leaf(t)?;
        let (want, got) = (t.shape().numel(), bytes.len() / dtype.bytes());
        if want != got {
            return Err(Error::size(what, want, got, "elements"));
        }
        self.shared.backend.upload(buf, 0, bytes)
    }
    /// Waits for all replays already started.
    pub fn wait(&self) -> Result<()> {
        self.shared.backend.wait()
    }
    /// Reads an f32 tensor, computing it first if it is not a leaf. Waits.
    pub fn read(&self, t: &Tensor) -> Result<Vec<f32>> {
        let mut out = vec![0.0; t.shape().numel()];
        self.read_into(t, &mut out)?;
        Ok(out)
    }
    /// Reads an f32 leaf into `out` without allocating; computes anything else first. Waits.
    pub fn read_into(&self, t: &Tensor, out: &mut [f32]) -> Result<()> {
        if t.dtype() != DType::F32 {
            return Err(Error::DType {
                what: "read of a tensor",
                want: DType::F32,
                got: t.dtype(),
            });
        }
        if out.len() != t.shape().numel() {
            return Err(Error::size(
                "read of a tensor",
                t.shape().numel(),
                out.len(),
                "elements",
            ));
        }
        if t.buffer().is_none() {
            let done = self.eval(std::slice::from_ref(t))?.remove(0);
            return self.read_into(&done, out);
        }
        self.read_part(t, 0, out)
    }
    /// Reads elements of an f32 leaf, from element `at` of its memory on, into `out`. Waits.
    pub fn read_part(&self, t: &Tensor, at: usize, out: &mut [f32]) -> Result<()> {
        let what = "read of a tensor";
        if t.dtype() != DType::F32 {
            let (want, got) = (DType::F32, t.dtype());
            return Err(Error::DType { what, want, got });
        }
        let (end, all) = (at.saturating_add(out.len()), t.shape().numel());
        if end > all {
            return Err(Error::size(what, all, end, "elements"));
        }
        let bytes = bytemuck::cast_slice_mut(out);
        self.shared
            .backend
            .download(leaf(t)?, at * DType::F32.bytes(), bytes)
    }

    /// canonical → expand → again → fuse → plan: the whole compiler, in order.
    pub fn compile(&self, g: &Graph) -> Result<Compiled> {
        if let Some(c) = self.lock_plans()[self.cache()].get(g) {
            return Ok(c);
        }
        let be = &*self.shared.backend;
        let (canon, notes) = pass::canonical(g)?;
        let keep = |c: &expand::Asked<'_>| {
            let spec = KernelSpec::composite(c.op, c.ins, c.frozen, c.live)?;
            Ok(!be.candidates(&spec)?.is_empty())
        };
        let expanded = expand::expand(&canon, keep)?;
        let expanded = again::again(&expanded, |c| match self.sparing {
            true => be.spare(c),
            false => be.cheap(c),
        })?;
        let fused = fuse::fuse(&expanded)?;
        let plan = {
            let pins = self.shared.pins.lock().unwrap_or_else(|e| e.into_inner());
            let chooser = Pinned {
                choices: &pins,
                otherwise: &*self.shared.chooser,
            };
            Arc::new(plan::plan(fused, be, &chooser)?)
        };
        self.shared.chooser.planned();
        let outputs = g.outputs.iter().map(|o| g.ty(*o).clone()).collect();
        let c = Compiled {
            plan,
            outputs,
            notes,
        };
        self.lock_plans()[self.cache()].put(g.clone(), c.clone());
        Ok(c)
    }
    /// The plan of these tensors, without running anything.
    pub fn explain(&self, outs: &[&Tensor], updates: &[(Tensor, Tensor)]) -> Result<Compiled> {
        let outs: Vec<Tensor> = outs.iter().map(|t| (*t).clone()).collect();
        self.compile(&tensor::lower(&outs, updates)?.graph)
    }
    /// Computes tensors now; the results are leaves.
    pub fn eval(&self, outs: &[Tensor]) -> Result<Vec<Tensor>> {
        let refs: Vec<&Tensor> = outs.iter().collect();
        let mut p = self.record(&refs, &[])?;
        p.replay()?;
        Ok(p.outputs)
    }
    /// Plans, allocates, prepares weights and binds everything: after this, a replay does only arithmetic.
    /// `updates`: state leaves and the values they hold after each replay.
    pub fn record(&self, outs: &[&Tensor], updates: &[(Tensor, Tensor)]) -> Result<Program> {
        let outs: Vec<Tensor> = outs.iter().map(|t| (*t).clone()).collect();
        let low = tensor::lower(&outs, updates)?;
        let compiled = self.compile(&low.graph)?;
        let mut inputs = vec![];
        for t in &low.leaves {
            inputs.push(leaf(t)?.clone());
        }
        let mut outputs = vec![];
        for ty in &compiled.outputs {
            outputs.push(self.zeros(ty.clone(), Role::Data)?);
        }
        let mut prepared = vec![];
        for p in &compiled.plan.prepared {
            prepared.push(self.prepare(p, &inputs[p.slot as usize])?);
        }
        let mut bound = vec![];
        for t in &outputs {
            bound.push(leaf(t)?.clone());
        }
        let bind = Bindings {
            inputs,
            prepared,
            outputs: bound,
        };
        let recording = self.shared.backend.record(compiled.plan.clone(), bind)?;
        Ok(Program {
            compiled,
            outputs,
            recording,
            _leaves: low.leaves,
        })
    }
    /// A frozen operand in the backend's format, made once for all recordings of this session and given
    /// back with the last tensor over its source.
    fn prepare(&self, p: &plan::Prepared, src: &Buffer) -> Result<Buffer> {
        let key = PreparedKey {
            raw: src.raw,
            offset: p.offset,
            operand: p.operand.clone(),
            format: p.format,
        };
        let mut cache = self.prepared();
        if let Some((_, b)) = cache.get(&key) {
            return Ok(b.clone());
        }
        let b = self.shared.backend.alloc(p.format.bytes)?;
        self.shared
            .backend
            .prepare(p.format, src, p.offset, &p.operand, &b)?;
        cache.insert(key, (Arc::downgrade(&src.keep), b.clone()));
        Ok(b)
    }
    /// The prepared operands whose source is alive. An address may be used again, but only after its first
    /// owner is gone.
    fn prepared(&self) -> MutexGuard<'_, PreparedOperands> {
        let mut all = self
            .shared
            .prepared
            .lock()
            .unwrap_or_else(|e| e.into_inner());
        all.retain(|_, (source, _)| source.strong_count() > 0);
        all
    }
    /// Bytes of prepared weights that this session keeps.
    pub fn prepared_bytes(&self) -> usize {
        self.prepared().values().map(|(_, b)| b.bytes).sum()
    }
}

fn leaf(t: &Tensor) -> Result<&Buffer> {
    t.buffer().ok_or_else(|| Error::Size {
        what: "tensor with memory",
        want: "a leaf".into(),
        got: format!("{t:?}, which is still to be computed"),
    })
}

impl PlanCache {
    fn get(&mut self, g: &Graph) -> Option<Compiled> {
        self.clock += 1;
        let clock = self.clock;
        let (used, c) = self.plans.get_mut(g)?;
        *used = clock;
        Some(c.clone())
    }
    fn put(&mut self, g: Graph, c: Compiled) {
        self.clock += 1;
        if self.plans.len() >= MAX_PLANS {
            let oldest = self.plans.iter().min_by_key(|(_, (used, _))| *used);
            if let Some(g) = oldest.map(|(g, _)| g.clone()) {
                self.plans.remove(&g);
            }
        }
        self.plans.insert(g, (self.clock, c));
    }
}

/// A recording with its outputs: what a hot loop holds.
pub struct Program {
    /// The plan and what the passes did.
    pub compiled: Compiled,
    /// Leaves that each replay overwrites.
    pub outputs: Vec<Tensor>,
    recording: Box<dyn Recording>,
    /// Keeps bound buffers alive.
    _leaves: Vec<Tensor>,
}

impl Program {
    /// Runs the plan once. May return before the device is done; reading waits.
    pub fn replay(&mut self) -> Result<()> {
        self.recording.replay()
    }
    /// Runs step by step; seconds of each.
    pub fn replay_timed(&mut self) -> Result<Vec<f64>> {
        self.recording.replay_timed()
    }
}
