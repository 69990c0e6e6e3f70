//! The device as the core sees it: memory, candidates, recordings.
//! Invariant: uploads, downloads and replays happen on the GPU in the order the host asked for them.
//! Absent on purpose: arithmetic, and how the GPU is spoken to.
#[cfg(test)]
use crate::shader::Coop;
use crate::{
    adapter::{self, Choice},
    error::Error,
    fused, glue,
    gpu::{ALIGN, Gpu, lock},
    launch::{Kernel, Offer},
    memory::Memory,
    recording::{Bound, Places, WgpuRecording, Window},
    shader::Target,
    transfer::{self, Landing},
};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
};
use tallow_core::{
    Result,
    backend::{ArenaRules, Backend, Bindings, Buffer, DeviceInfo, Launched, Recording},
    kernel::{Candidate, Format, KernelId, KernelSpec, Offers, Operand},
    op::Composite,
    plan::Plan,
    types::DType,
};

/// How a GPU is opened.
#[derive(Clone, Debug)]
pub struct WgpuOptions {
    /// Which adapter.
    pub adapter: Choice,
    /// What frozen weights are multiplied as: f32, or bf16 (sums in f32).
    pub weights: DType,
    /// Use nothing that an adapter need not have (subgroups, immediates), though this one has it.
    pub plain: bool,
    /// Bind at most this many bytes of a weight at once; `None`: what the adapter can.
    pub binding_bytes: Option<u64>,
}

/// A GPU of this machine.
pub struct Wgpu {
    info: DeviceInfo,
    pub(crate) gpu: Arc<Gpu>,
    target: Target,
    landing: Landing,
    table: Mutex<Offers<Offer>>,
}

/// Numbers of buffers, never used again.
static NEXT: AtomicU64 = AtomicU64::new(1);

impl Wgpu {
    /// Opens a GPU.
    ///
    /// # Errors
    /// No adapter, or none like the one asked for; one that does not open; `weights` neither f32 nor bf16.
    pub fn open(options: &WgpuOptions) -> Result<Self> {
        let asked = match options.adapter {
            Choice::Number(n) => format!("wgpu:{n}"),
            Choice::Gpu | Choice::Software => "wgpu".to_owned(),
        };
        if !matches!(options.weights, DType::F32 | DType::BF16) {
            return Err(tallow_core::Error::Device {
                device: asked,
                what: format!(
                    "weights are multiplied as f32 or bf16, not {}",
                    options.weights
                ),
            });
        }
        Self::start(options).map_err(|e| e.on(&asked))
    }
    fn start(options: &WgpuOptions) -> Result<Self, Error> {
        let (number, adapter) = adapter::choose(options.adapter)?;
        let gpu = Arc::new(Gpu::open(&adapter)?);
        let mut target = gpu.target(options.weights, options.plain);
        target.binding = options.binding_bytes.unwrap_or(target.binding);
        let align = gpu.limits.min_storage_buffer_offset_alignment as usize;
        let lacks = |what: String| Error::Lacks {
            name: gpu.info.name.clone(),
            what,
        };
        if !ALIGN.is_multiple_of(align.max(1)) {
            return Err(lacks(format!(
                "operands at multiples of {ALIGN} bytes, not {align}"
            )));
        }
        if target.threads < 256 || target.buffers < 8 || target.shared < 16 << 10 {
            return Err(lacks(
                "256 threads, 8 buffers and 16 KiB of shared memory for a workgroup".to_owned(),
            ));
        }
        Ok(Wgpu {
            info: DeviceInfo {
                name: format!("wgpu:{number}"),
                arena: ArenaRules { align: ALIGN },
            },
            gpu,
            target,
            landing: Landing::default(),
            table: Mutex::default(),
        })
    }
    /// The same GPU with other units.
    #[cfg(test)]
    pub(crate) fn with_units(mut self, coop: Coop) -> Self {
        self.target.coop = Some(coop);
        self
    }
    pub(crate) fn target(&self) -> &Target {
        &self.target
    }
    pub(crate) fn name(&self) -> &str {
        &self.info.name
    }
    pub(crate) fn error(&self, e: Error) -> tallow_core::Error {
        e.on(&self.info.name)
    }
    pub(crate) fn offer(&self, id: KernelId) -> Offer {
        lock(&self.table).get(id).clone()
    }
    /// The offers that a plan made on this GPU chose, step by step.
    pub(crate) fn offers(&self, plan: &Plan) -> Vec<Offer> {
        plan.steps.iter().map(|s| self.offer(s.kernel)).collect()
    }
    pub(crate) fn buffer(&self, bytes: usize) -> Result<Buffer> {
        let made = self.gpu.slabs.memory(&self.gpu, bytes);
        let made = made.map_err(|e| self.error(e))?;
        Ok(Buffer {
            raw: NEXT.fetch_add(1, Ordering::Relaxed),
            bytes,
            keep: Arc::new(made),
        })
    }
    /// Runs `jobs` once, in order.
    fn run(&self, jobs: &[Kernel], places: &Places<'_>) -> Result<(), Error> {
        let bound = jobs.iter().map(|k| Bound::new(&self.gpu, k, places));
        let bound = bound.collect::<Result<Vec<_>, _>>()?;
        let mut encoder = self.gpu.encoder();
        {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            bound.iter().for_each(|b| b.encode(&mut pass));
        }
        self.gpu.submit([encoder.finish()]).map(|_| ())
    }
}

/// `len` bytes of `b` from `at` on.
pub(crate) fn window<'a>(
    b: &'a Buffer,
    at: usize,
    len: usize,
    what: &'static str,
) -> Result<Window<'a>> {
    if at.checked_add(len).is_none_or(|end| end > b.bytes) {
        let got = at.saturating_add(len);
        return Err(tallow_core::Error::size(what, b.bytes, got, "bytes"));
    }
    let buffer = b.keep.downcast_ref::<Memory>();
    let buffer = buffer.ok_or_else(|| tallow_core::Error::Device {
        device: "wgpu".to_owned(),
        what: format!("{what}: this memory belongs to another device"),
    })?;
    Ok(Window {
        buffer,
        offset: buffer.at + at,
        bytes: len,
    })
}

impl Backend for Wgpu {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn identity(&self) -> String {
        let i = &self.gpu.info;
        format!(
            "wgpu {} {}, {} {}, {:?}, tallow {}",
            i.backend.to_str(),
            i.name,
            i.driver,
            i.driver_info,
            self.target,
            env!("CARGO_PKG_VERSION")
        )
    }
    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        self.buffer(bytes)
    }
    fn upload(&self, dst: &Buffer, at: usize, src: &[u8]) -> Result<()> {
        let w = window(dst, at, src.len(), "upload")?;
        let to = (&**w.buffer, w.offset - at + dst.bytes);
        transfer::upload(&self.gpu, &self.landing, to, w.offset, src).map_err(|e| self.error(e))
    }
    fn download(&self, src: &Buffer, at: usize, dst: &mut [u8]) -> Result<()> {
        let w = window(src, at, dst.len(), "download")?;
        transfer::download(&self.gpu, &self.landing, w.buffer, w.offset, dst)
            .map_err(|e| self.error(e))
    }
    fn wait(&self) -> Result<()> {
        self.gpu.wait().map_err(|e| self.error(e))
    }
    fn far(&self) -> bool {
        true
    }
    fn candidates(&self, spec: &KernelSpec) -> Result<Vec<Candidate>> {
        Ok(glue::candidates(&mut lock(&self.table), &self.target, spec))
    }
    fn cheap(&self, c: &Composite) -> bool {
        matches!(c, Composite::RmsNorm(_) | Composite::SwiGlu(_))
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
        let from = window(src, at, bytes, "weights to convert")?;
        let to = window(dst, 0, format.bytes, "converted weights")?;
        let jobs =
            glue::prepare(&self.target, format, op).ok_or_else(|| tallow_core::Error::Device {
                device: self.info.name.clone(),
                what: format!("unknown weight format {} (bug in tallow)", format.name),
            })?;
        let places = Places {
            reads: vec![from],
            writes: vec![Some(to)],
            scratch: None,
        };
        self.run(&jobs, &places).map_err(|e| self.error(e))
    }
    fn launched(&self, plan: &Plan) -> Vec<Launched> {
        fused::launched(&self.target, plan, &self.offers(plan))
    }
    fn record(&self, plan: Arc<Plan>, bind: Bindings) -> Result<Box<dyn Recording>> {
        Ok(Box::new(WgpuRecording::new(self, &plan, bind)?))
    }
}
