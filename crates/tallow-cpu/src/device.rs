//! The device: memory, prepared weights, and recordings that replay a plan.
//! Invariant: every pointer a kernel gets lies inside a buffer that the recording keeps alive, at an
//! offset that [`Plan::verify`] checked; a replay allocates nothing.
//! Absent on purpose: arithmetic.
use crate::{
    exec::Exec,
    glue,
    pool::Pool,
    simd::Isa,
    wave::{self, Reach},
};
use std::{
    any::Any,
    ops::Range,
    sync::{Arc, Mutex},
    time::Instant,
};
use tallow_core::{
    Error, Result,
    backend::{ArenaRules, Backend, Bindings, Buffer, DeviceInfo, HostBytes, Recording},
    kernel::{Candidate, Format, KernelSpec, Offers, Operand},
    op::Composite,
    plan::{Place, Plan, Span, Step},
    types::DType,
};

/// How a CPU device is opened.
#[derive(Clone, Debug)]
pub struct CpuOptions {
    /// Threads; `None`: `TALLOW_THREADS` or the physical cores.
    pub threads: Option<usize>,
    /// What packed weights are stored as: f32, or bf16 (half the bytes, sums still in f32).
    pub weights: DType,
    /// Instruction set; `None`: `TALLOW_ISA` or the best this machine has.
    pub isa: Option<Isa>,
}

/// The CPU of this machine.
pub struct Cpu {
    info: DeviceInfo,
    pub(crate) isa: Isa,
    pub(crate) pool: Arc<Pool>,
    pub(crate) weights: DType,
    pub(crate) table: Mutex<Offers<glue::Offer>>,
}

impl Cpu {
    /// Opens the device.
    ///
    /// # Errors
    /// If `TALLOW_ISA` or `TALLOW_THREADS` names something this machine lacks, or `weights` is
    /// neither f32 nor bf16.
    pub fn open(options: &CpuOptions) -> Result<Self> {
        let device = |e: crate::Error| Error::Device {
            device: "cpu".into(),
            what: e.to_string(),
        };
        let isa = match options.isa {
            Some(isa) => Isa::named(isa.name()).map_err(device)?,
            None => Isa::detect().map_err(device)?,
        };
        let pool = match options.threads {
            Some(n) => Pool::new(n),
            None => Pool::from_env().map_err(device)?,
        };
        if !matches!(options.weights, DType::F32 | DType::BF16) {
            return Err(Error::Device {
                device: "cpu".into(),
                what: format!("packed weights are f32 or bf16, not {}", options.weights),
            });
        }
        Ok(Cpu {
            info: DeviceInfo {
                name: "cpu".into(),
                arena: ArenaRules { align: 64 },
            },
            isa,
            pool: Arc::new(pool),
            weights: options.weights,
            table: Mutex::default(),
        })
    }
    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }
    /// Threads in use, the caller's included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }
}

/// One cache line: the unit of allocation, so that every buffer is aligned for vectors.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "only its bytes are used, through pointers")] [u8; 64]);

/// Owned memory. Its lines are only touched through raw pointers.
struct Memory {
    lines: *mut [Line],
}
// SAFETY: the memory is plain bytes; who reads and writes when is the recordings' business.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}
impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `lines` came from `Box::into_raw` in `alloc` and is dropped once.
        drop(unsafe { Box::from_raw(self.lines) });
    }
}

fn copy_range(b: &Buffer, at: usize, len: usize, what: &'static str) -> Result<*mut u8> {
    if at.checked_add(len).is_none_or(|end| end > b.bytes) {
        return Err(Error::size(what, b.bytes, at.saturating_add(len), "bytes"));
    }
    Ok((b.raw as *mut u8).wrapping_add(at))
}

impl Backend for Cpu {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn identity(&self) -> String {
        let facts = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = facts.lines().find(|l| l.starts_with("model name"));
        let model = model.and_then(|l| l.split_once(": ")).map(|(_, name)| name);
        let model = model.unwrap_or(std::env::consts::ARCH);
        let (isa, threads) = (self.isa.name(), self.threads());
        let version = env!("CARGO_PKG_VERSION");
        format!("cpu {model}, {isa}, threads {threads}, tallow {version}")
    }
    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        let n = bytes.div_ceil(64).max(1);
        let mut v: Vec<Line> = Vec::new();
        v.try_reserve_exact(n).map_err(|_| Error::Device {
            device: "cpu".into(),
            what: format!(
                "no memory for {bytes} bytes; close other programs or use a smaller batch or model"
            ),
        })?;
        v.resize(n, Line([0; 64]));
        let lines = Box::into_raw(v.into_boxed_slice());
        Ok(Buffer {
            raw: lines.cast::<u8>() as u64,
            bytes,
            keep: Arc::new(Memory { lines }),
        })
    }
    fn adopt(&self, host: HostBytes, range: Range<usize>, align: usize) -> Result<Buffer> {
        let all = (*host).as_ref();
        let Some(bytes) = all.get(range.clone()) else {
            return Err(Error::size(
                "tensor in a file",
                range.end,
                all.len(),
                "bytes",
            ));
        };
        if (bytes.as_ptr() as usize).is_multiple_of(align.max(1)) {
            let keep: Arc<dyn Any + Send + Sync> = Arc::new(host.clone());
            return Ok(Buffer {
                raw: bytes.as_ptr() as u64,
                bytes: bytes.len(),
                keep,
            });
        }
        let b = self.alloc(bytes.len())?;
        self.upload(&b, 0, bytes)?;
        Ok(b)
    }
    fn upload(&self, dst: &Buffer, at: usize, src: &[u8]) -> Result<()> {
        let p = copy_range(dst, at, src.len(), "upload")?;
        // SAFETY: the range was checked, `keep` holds the memory, and no replay runs: `replay`
        // returns only when its work is done and callers hold the recording by `&mut`. Only leaves
        // made by `alloc` are uploaded to; adopted ones are frozen.
        unsafe { std::ptr::copy_nonoverlapping(src.as_ptr(), p, src.len()) };
        Ok(())
    }
    fn download(&self, src: &Buffer, at: usize, dst: &mut [u8]) -> Result<()> {
        let p = copy_range(src, at, dst.len(), "download")?;
        // SAFETY: as in `upload`.
        unsafe { std::ptr::copy_nonoverlapping(p, dst.as_mut_ptr(), dst.len()) };
        Ok(())
    }
    /// Two passes over what is kept anyway: up to 4 % of a step, for a quarter of its memory.
    fn spare(&self, c: &Composite) -> bool {
        matches!(c, Composite::RmsNorm(_) | Composite::SwiGlu(_))
    }
    fn candidates(&self, spec: &KernelSpec) -> Result<Vec<Candidate>> {
        Ok(glue::candidates(self, spec))
    }
    fn prepare(
        &self,
        format: Format,
        src: &Buffer,
        at: usize,
        op: &Operand,
        dst: &Buffer,
    ) -> Result<()> {
        let bytes = op.layout.end() * op.dtype.bytes();
        let from = copy_range(src, at, bytes, "weights to pack")?;
        let to = copy_range(dst, 0, format.bytes, "packed weights")?;
        // SAFETY: both ranges were checked; `dst` is fresh memory nobody else has.
        unsafe { glue::prepare(self, format, from, op, to) }
    }
    fn record(&self, plan: Arc<Plan>, bind: Bindings) -> Result<Box<dyn Recording>> {
        let arena = self.alloc(plan.arena_bytes)?;
        let at = |s: &Span| -> Result<*mut u8> {
            let missing = || Error::size("binding", 1, 0, "buffers");
            let b = match s.place {
                Place::Input(i) => bind.inputs.get(i as usize).ok_or_else(missing)?,
                Place::Prepared(i) => bind.prepared.get(i as usize).ok_or_else(missing)?,
                Place::Output(i) => bind.outputs.get(i as usize).ok_or_else(missing)?,
                Place::Arena => &arena,
            };
            copy_range(b, s.offset, s.bytes, "operand of a step")
        };
        let table = self.table.lock().unwrap_or_else(|e| e.into_inner());
        let mut calls = Vec::with_capacity(plan.steps.len());
        for s in &plan.steps {
            let reads = s.reads.iter().map(|r| Ok(at(r)?.cast_const()));
            let writes = s.writes.iter().map(|w| match w {
                Some(w) => at(w),
                None => Ok(std::ptr::null_mut()),
            });
            let workspace = match &s.workspace {
                Some(w) => (at(w)?, w.bytes),
                None => (std::ptr::null_mut(), 0),
            };
            calls.push(Call {
                kernel: table.get(s.kernel).run.clone(),
                reads: reads.collect::<Result<_>>()?,
                writes: writes.collect::<Result<_>>()?,
                workspace,
            });
        }
        let waves = wave::waves(&reach(&plan, &calls, self.threads()));
        Ok(Box::new(CpuRecording {
            isa: self.isa,
            pool: self.pool.clone(),
            calls,
            waves,
            _keep: (bind, arena),
        }))
    }
}

/// One step with its pointers resolved.
struct Call {
    kernel: Arc<glue::KernelFn>,
    reads: Vec<*const u8>,
    writes: Vec<*mut u8>,
    workspace: (*mut u8, usize),
}

/// What each call costs and touches.
fn reach(plan: &Plan, calls: &[Call], threads: usize) -> Vec<Reach> {
    let one = |(s, c): (&Step, &Call)| {
        let at = |p: usize, span: &Span| p..p + span.bytes;
        let reads = c.reads.iter().zip(&s.reads);
        let writes = c.writes.iter().zip(&s.writes);
        Reach {
            cost: s.cost * threads as f64,
            has_workspace: s.workspace.is_some(),
            reads: reads.map(|(p, span)| at(p.addr(), span)).collect(),
            writes: writes
                .filter_map(|(p, span)| Some(at(p.addr(), span.as_ref()?)))
                .collect(),
        }
    };
    plan.steps.iter().zip(calls).map(one).collect()
}

struct CpuRecording {
    isa: Isa,
    pool: Arc<Pool>,
    calls: Vec<Call>,
    /// Calls that run one after another, or side by side.
    waves: Vec<Range<usize>>,
    _keep: (Bindings, Buffer),
}
// SAFETY: the pointers lie in buffers that `_keep` holds; a recording is used by one thread at a time.
unsafe impl Send for CpuRecording {}

impl CpuRecording {
    fn run(&self, c: &Call) {
        let io = glue::Io {
            exec: Exec {
                isa: self.isa,
                pool: &self.pool,
            },
            reads: &c.reads,
            writes: &c.writes,
            workspace: c.workspace,
        };
        (*c.kernel)(&io);
    }
}

/// Calls that may run at the same time.
struct Side<'a>(&'a CpuRecording, &'a [Call]);
// SAFETY: calls of a wave write nothing that another reads or writes, and use no workspace (`wave`).
unsafe impl Sync for Side<'_> {}

impl Side<'_> {
    fn run(&self, i: usize) {
        self.0.run(&self.1[i]);
    }
}

impl Recording for CpuRecording {
    fn replay(&mut self) -> Result<()> {
        for wave in &self.waves {
            let calls = Side(self, &self.calls[wave.clone()]);
            // A kernel that runs inside of a task stays on its thread.
            self.pool.run(wave.len(), &|i, _| calls.run(i));
        }
        Ok(())
    }
    fn replay_timed(&mut self) -> Result<Vec<f64>> {
        let mut seconds = Vec::with_capacity(self.calls.len());
        for c in &self.calls {
            let start = Instant::now();
            self.run(c);
            seconds.push(start.elapsed().as_secs_f64());
        }
        Ok(seconds)
    }
}
