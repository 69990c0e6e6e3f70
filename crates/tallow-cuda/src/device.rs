//! The device as the core sees it: memory, candidates, recordings.
//! Invariant: uploads, downloads and replays happen on the card in the order the host asked for them.
//! Absent on purpose: arithmetic, and how the driver is spoken to.
use crate::{
    compile, driver,
    driver::{Card, Pinned},
    error::Error,
    fused,
    gemm::{self, Blas},
    glue,
    launch::{Bound, Job, Offer, Places},
    recording::CudaRecording,
    staging::Staging,
};
use std::sync::{Arc, Mutex, MutexGuard};
use tallow_core::{
    Result,
    backend::{ArenaRules, Backend, Bindings, Buffer, DeviceInfo, Half, Launched, Recording},
    kernel::{Candidate, Format, KernelId, KernelSpec, Offers, Operand},
    op::Composite,
    plan::Plan,
    types::DType,
};

/// Bytes of the memory that short downloads land in: the scores of a large vocabulary.
const LANDING_BYTES: usize = 2 << 20;

/// How a card is opened.
#[derive(Clone, Debug)]
pub struct CudaOptions {
    /// Number of the card.
    pub ordinal: usize,
    /// What frozen weights are multiplied as: f32 (exact), or bf16 (tensor cores, sums in f32).
    pub weights: DType,
}

/// A card as `doctor` shows it.
#[derive(Clone, Debug)]
pub struct Found {
    /// Name of the card.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub processors: u32,
    /// Bytes of memory.
    pub memory: usize,
}

/// The cards of this machine, or why none can be used. Opens none.
///
/// # Errors
/// No driver, or one that does not start.
pub fn found() -> Result<Vec<Found>, Error> {
    (0..driver::count()?)
        .map(|i| {
            let (_, f) = driver::facts(i)?;
            Ok(Found {
                name: f.name,
                capability: f.capability,
                processors: f.processors,
                memory: f.memory,
            })
        })
        .collect()
}

/// The libraries that this backend loads and that this machine lacks.
pub fn lacks() -> Vec<Error> {
    let all = [
        (driver::present(), driver::missing()),
        (compile::present(), compile::missing()),
        (gemm::present(), gemm::missing()),
    ];
    let missing = |(there, e): (bool, Error)| (!there).then_some(e);
    let mut lacks: Vec<Error> = all.into_iter().filter_map(missing).collect();
    lacks.extend(driver::fits().err());
    lacks
}

/// Versions of the driver and of the compiler found: "driver 13.0", "NVRTC 13.0".
pub fn versions() -> Vec<String> {
    let named = |name: &str, (major, minor): (i32, i32)| format!("{name} {major}.{minor}");
    let driver = driver::version().map(|v| named("driver", driver::split(v)));
    let compiler = compile::version().ok().map(|v| named("NVRTC", v));
    driver.into_iter().chain(compiler).collect()
}

/// A card of this machine.
pub struct Cuda {
    info: DeviceInfo,
    pub(crate) card: Arc<Card>,
    pub(crate) blas: Arc<Blas>,
    pub(crate) weights: DType,
    staging: Mutex<Staging>,
    /// Where short downloads land first: several times faster than memory that is not pinned.
    landing: Mutex<Pinned>,
    table: Mutex<Offers<Offer>>,
}

impl Cuda {
    /// Opens a card.
    ///
    /// # Errors
    /// No driver, compiler or product library; no such card; one too old; `weights` neither f32 nor bf16.
    pub fn open(options: &CudaOptions) -> Result<Self> {
        let name = format!("cuda:{}", options.ordinal);
        if !matches!(options.weights, DType::F32 | DType::BF16) {
            return Err(tallow_core::Error::Device {
                device: name,
                what: format!(
                    "weights are multiplied as f32 or bf16, not {}",
                    options.weights
                ),
            });
        }
        Self::start(options, &name).map_err(|e| e.on(&name))
    }
    fn start(options: &CudaOptions, name: &str) -> Result<Self, Error> {
        let card = Card::open(options.ordinal, compile::Cache::default_folder())?;
        Ok(Cuda {
            info: DeviceInfo {
                name: name.into(),
                arena: ArenaRules { align: 256 },
            },
            blas: Blas::open(&card)?,
            staging: Mutex::new(Staging::new(&card)?),
            landing: Mutex::new(card.pinned(LANDING_BYTES)?),
            weights: options.weights,
            table: Mutex::default(),
            card,
        })
    }
    pub(crate) fn name(&self) -> &str {
        &self.info.name
    }
    pub(crate) fn error(&self, e: Error) -> tallow_core::Error {
        e.on(&self.info.name)
    }
    fn table(&self) -> MutexGuard<'_, Offers<Offer>> {
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }
    pub(crate) fn offer(&self, id: KernelId) -> Offer {
        self.table().get(id).clone()
    }
    /// Compiles and loads the kernels of `jobs`.
    pub(crate) fn load<'a>(&self, jobs: impl Iterator<Item = &'a Job>) -> Result<()> {
        let source = |j: &Job| match j {
            Job::Kernel(k) => Some((k.entry, k.source.clone())),
            Job::Gemm(_) => None,
        };
        let all: Vec<_> = jobs.filter_map(source).collect();
        self.card.load(&all).map_err(|e| self.error(e))
    }
    pub(crate) fn buffer(&self, bytes: usize) -> Result<Buffer> {
        let memory = self.card.alloc(bytes).map_err(|e| self.error(e))?;
        Ok(Buffer {
            raw: memory.at,
            bytes,
            keep: Arc::new(memory),
        })
    }
    /// Runs `jobs` once, in stream order.
    fn run(&self, jobs: &[Job], places: &Places<'_>) -> Result<()> {
        self.load(jobs.iter())?;
        for job in jobs {
            // SAFETY: the caller's addresses are of live buffers; freeing them waits its turn in the stream.
            let bound = unsafe { Bound::new(&self.card, &self.blas, job, places) };
            // SAFETY: as above.
            let done = bound.and_then(|b| unsafe { b.launch(self.card.stream) });
            done.map_err(|e| self.error(e))?;
        }
        Ok(())
    }
}

fn check(b: &Buffer, at: usize, len: usize, what: &'static str) -> Result<u64> {
    if at.checked_add(len).is_none_or(|end| end > b.bytes) {
        let got = at.saturating_add(len);
        return Err(tallow_core::Error::size(what, b.bytes, got, "bytes"));
    }
    Ok(b.raw + at as u64)
}

impl Backend for Cuda {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn identity(&self) -> String {
        let ordinal = self
            .info
            .name
            .rsplit(':')
            .next()
            .and_then(|n| n.parse().ok());
        let card = ordinal.and_then(|n| driver::facts(n).ok());
        let card = card.map_or(String::new(), |(_, f)| {
            format!(
                " {} sm_{}{}, {} processors",
                f.name, f.capability.0, f.capability.1, f.processors
            )
        });
        let driver = driver::version().unwrap_or_default();
        format!(
            "cuda{card}, driver {driver}, tallow {}",
            env!("CARGO_PKG_VERSION")
        )
    }
    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        self.buffer(bytes)
    }
    fn upload(&self, dst: &Buffer, at: usize, src: &[u8]) -> Result<()> {
        let to = check(dst, at, src.len(), "upload")?;
        let mut staging = self.staging.lock().unwrap_or_else(|e| e.into_inner());
        // SAFETY: the range was checked, and `dst` keeps the memory; freeing it waits its turn in the stream.
        unsafe { staging.upload(to, src) }.map_err(|e| self.error(e))
    }
    fn download(&self, src: &Buffer, at: usize, dst: &mut [u8]) -> Result<()> {
        let from = check(src, at, dst.len(), "download")?;
        let landing = self.landing.lock().unwrap_or_else(|e| e.into_inner());
        let done = match dst.len() <= landing.bytes {
            true => self.card.download_through(&landing, from, dst),
            false => self.card.download(from, dst),
        };
        done.map_err(|e| self.error(e))
    }
    fn wait(&self) -> Result<()> {
        self.card.wait().map_err(|e| self.error(e))
    }
    fn candidates(&self, spec: &KernelSpec) -> Result<Vec<Candidate>> {
        Ok(glue::candidates(&mut self.table(), &self.target(), spec))
    }
    fn free_bytes(&self) -> Option<usize> {
        self.card.free().ok()
    }
    fn far(&self) -> bool {
        true
    }
    fn cheap(&self, c: &Composite) -> bool {
        glue::cheap(c)
    }
    fn halves(&self, spec: &KernelSpec) -> Vec<Half> {
        glue::halves(&self.target(), spec)
    }
    fn joins(&self, first: &KernelSpec, second: &KernelSpec) -> bool {
        fused::joins(first, second)
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
        let from = check(src, at, bytes, "weights to convert")?;
        let to = check(dst, 0, format.bytes, "converted weights")?;
        let jobs = glue::prepare(&self.target(), format, op).ok_or_else(|| {
            tallow_core::Error::Device {
                device: self.info.name.clone(),
                what: format!("unknown weight format {} (bug in tallow)", format.name),
            }
        })?;
        let places = Places {
            reads: &[from],
            writes: &[to],
            scratch: 0,
            own: 0,
        };
        self.run(&jobs, &places)
    }
    fn launched(&self, plan: &Plan) -> Vec<Launched> {
        let offers = plan.steps.iter().map(|s| self.offer(s.kernel));
        fused::launched(&self.target(), plan, &offers.collect::<Vec<_>>())
    }
    fn record(&self, plan: Arc<Plan>, bind: Bindings) -> Result<Box<dyn Recording>> {
        Ok(Box::new(CudaRecording::new(self, &plan, bind)?))
    }
}

impl Cuda {
    pub(crate) fn target(&self) -> glue::Target {
        glue::Target {
            processors: self.card.facts.processors,
            shared: self.card.facts.shared,
            weights: self.weights,
            bulk: self.card.facts.capability >= (9, 0),
        }
    }
}
