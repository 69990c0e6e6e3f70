//! The device contract. A backend answers four questions: where does memory live, what placement
//! rules does it impose, which kernels can run a spec, and how is a finished plan recorded for replay.
//! Invariant: a backend never sees a graph; the core never names a device. They meet in [`KernelSpec`].
use crate::{
    Result,
    kernel::{Candidate, Format, KernelSpec, Operand},
    op::Composite,
    plan::Plan,
};
use std::{
    any::Any,
    collections::HashMap,
    ops::{Range, RangeInclusive},
    sync::Arc,
};

/// Device memory. `raw` means something only to the backend that made it; dropping the last clone frees it.
#[derive(Clone)]
pub struct Buffer {
    /// Address or table index.
    pub raw: u64,
    /// Size in bytes.
    pub bytes: usize,
    /// Owner of the memory.
    pub keep: Arc<dyn Any + Send + Sync>,
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes)", self.bytes)
    }
}

/// Host memory that a device may read in place: a mapped file.
pub type HostBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Placement rules the planner must respect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArenaRules {
    /// Every offset is a multiple of this, in bytes (256 on WebGPU).
    pub align: usize,
}

/// What a device is.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// `cpu`, `cuda:0`.
    pub name: String,
    /// Placement rules.
    pub arena: ArenaRules,
}

/// What a device says of one operand or result that is f32: may it be stored as bf16?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// No.
    Never,
    /// Its kernel takes it so.
    May,
    /// Its kernel takes it so and is faster for it.
    Wanted,
}

/// What a recording starts on the device for some steps of its plan, for `explain`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launched {
    /// Steps of the plan, without a gap.
    pub steps: RangeInclusive<usize>,
    /// The launches that do them, in order; none where nothing is left to do.
    pub launches: Vec<String>,
}

/// A device. New ones implement this trait and nothing else.
pub trait Backend: Send + Sync {
    /// Name and rules.
    fn info(&self) -> &DeviceInfo;
    /// All that the speed of its kernels depends on: hardware, driver, threads. What was measured under one
    /// identity says nothing about another.
    fn identity(&self) -> String {
        self.info().name.clone()
    }
    /// Zeroed memory.
    fn alloc(&self, bytes: usize) -> Result<Buffer>;
    /// Memory with the contents of `host[range]`: shared where the device can read it in place
    /// and its start is a multiple of `align` bytes, else a copy.
    fn adopt(&self, host: HostBytes, range: Range<usize>, align: usize) -> Result<Buffer> {
        let _ = align;
        let bytes = &(*host).as_ref()[range];
        let b = self.alloc(bytes.len())?;
        self.upload(&b, 0, bytes)?;
        Ok(b)
    }
    /// Copies `src` to `dst` from byte `at` on, after all replays already started.
    fn upload(&self, dst: &Buffer, at: usize, src: &[u8]) -> Result<()>;
    /// Waits for all replays already started, then copies bytes from `at` on out of `src`.
    fn download(&self, src: &Buffer, at: usize, dst: &mut [u8]) -> Result<()>;
    /// Waits for all replays already started.
    fn wait(&self) -> Result<()> {
        Ok(())
    }
    /// Bytes of memory of its own that are free; `None`: it computes in the host's, or does not know.
    fn free_bytes(&self) -> Option<usize> {
        None
    }
    /// Does reading a value cost more than choosing from it on the device, as behind a bus?
    fn far(&self) -> bool {
        false
    }
    /// All ways to run `spec`, for exactly these shapes and layouts. Empty: the planner makes
    /// operands dense and asks again; a composite is decomposed.
    fn candidates(&self, spec: &KernelSpec) -> Result<Vec<Candidate>>;
    /// Which operands of `spec`, then which results, may lie between two kernels in bf16 instead of f32. Those past the
    /// end of the list may not. A device that was not asked to round says nothing.
    fn halves(&self, spec: &KernelSpec) -> Vec<Half> {
        let _ = spec;
        vec![]
    }
    /// Is `c` so cheap here, next to the memory its result takes, that gradients should compute it again?
    fn cheap(&self, c: &Composite) -> bool {
        let _ = c;
        false
    }
    /// Is `c` computed again where memory is short? At least what is [`cheap`](Self::cheap).
    fn spare(&self, c: &Composite) -> bool {
        self.cheap(c)
    }
    /// May one launch do `first` and, right behind it, `second`, which reads what it makes? What `first` reads then keeps its
    /// memory until both are done.
    fn joins(&self, first: &KernelSpec, second: &KernelSpec) -> bool {
        let _ = (first, second);
        false
    }
    /// Writes a frozen operand into `dst` in a format named by one of this backend's candidates.
    /// `src` holds the operand, strides as in `op`, from byte `at` on.
    fn prepare(
        &self,
        format: Format,
        src: &Buffer,
        at: usize,
        op: &Operand,
        dst: &Buffer,
    ) -> Result<()>;
    /// How a recording of `plan` would run its steps, which are all named once and in order: a device may do several
    /// steps in one launch, and one step in several.
    fn launched(&self, plan: &Plan) -> Vec<Launched> {
        let one = |(i, s): (usize, &crate::plan::Step)| Launched {
            steps: i..=i,
            launches: vec![s.kernel_name.to_owned()],
        };
        plan.steps.iter().enumerate().map(one).collect()
    }
    /// Freezes plan and buffers into the cheapest thing this device can run again and again.
    fn record(&self, plan: Arc<Plan>, bind: Bindings) -> Result<Box<dyn Recording>>;
}

/// Buffers for a plan's slots, fixed for the life of a recording.
#[derive(Clone, Debug, Default)]
pub struct Bindings {
    /// By input slot.
    pub inputs: Vec<Buffer>,
    /// By entry of [`Plan::prepared`].
    pub prepared: Vec<Buffer>,
    /// By output.
    pub outputs: Vec<Buffer>,
}

/// Takes no arguments on purpose: what changes between replays is uploaded into a bound buffer.
pub trait Recording: Send {
    /// Runs the plan once. May return before the device is done; downloads wait.
    fn replay(&mut self) -> Result<()>;
    /// Runs step by step and reports seconds for each; for `explain --time`.
    fn replay_timed(&mut self) -> Result<Vec<f64>>;
}

/// Picks among candidates: by model cost, or by timing them once and remembering.
pub trait Chooser: Send + Sync {
    /// Index of the winner and why it won.
    ///
    /// # Errors
    /// All of `c` were found to be wrong.
    fn choose(&self, spec: &KernelSpec, c: &[Candidate]) -> Result<(usize, String)>;
    /// A plan is complete: the time to write down and to tell what was found for it.
    fn planned(&self) {}
}

/// The cheapest by the backend's own estimate.
pub struct ByCost;
impl Chooser for ByCost {
    fn choose(&self, _: &KernelSpec, c: &[Candidate]) -> Result<(usize, String)> {
        let best = (0..c.len())
            .min_by(|a, b| c[*a].cost.total_cmp(&c[*b].cost))
            .unwrap_or(0);
        let why = match c.len() {
            0 | 1 => "only candidate".into(),
            n => format!("lowest estimate of {n}"),
        };
        Ok((best, why))
    }
}

/// Takes the kernels that were chosen before, by [`KernelSpec::key`] and name; asks another chooser where there was none.
pub(crate) struct Pinned<'a> {
    pub(crate) choices: &'a HashMap<String, String>,
    pub(crate) otherwise: &'a dyn Chooser,
}
impl Chooser for Pinned<'_> {
    fn choose(&self, spec: &KernelSpec, c: &[Candidate]) -> Result<(usize, String)> {
        if c.len() > 1
            && let Some(name) = self.choices.get(&spec.key())
            && let Some(i) = c.iter().position(|c| c.name == name)
        {
            return Ok((i, "as before".into()));
        }
        self.otherwise.choose(spec, c)
    }
}
