//! One step of a plan as launches: kernels with symbolic arguments, and library products.
//! Invariant: an argument names an operand, a result or scratch by number; addresses come from the plan when a
//! recording is made, so equal specs share all of this.
//! Absent on purpose: which kernel runs which spec; that is `glue`.
use crate::{
    driver::{Card, Function},
    error::{Error, Result},
    gemm,
};
use cudarc::driver::sys;
use std::{ffi::c_void, sync::Arc};
use tallow_core::kernel::Format;

/// The first capability on which a launch may begin early.
const EARLY: (u32, u32) = (9, 0);

/// An argument of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Arg {
    /// Address of operand.
    Read(usize),
    /// Address of a result; null where nobody wants it.
    Write(usize),
    /// Address inside the scratch memory, by byte.
    Scratch(usize),
    /// Address inside memory that belongs to the recording, by byte.
    Own(usize),
    /// A number.
    U32(u32),
    /// A number.
    U64(u64),
    /// A number.
    F32(f32),
}

/// A kernel with everything but its addresses.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) entry: &'static str,
    pub(crate) source: Arc<str>,
    pub(crate) grid: [u32; 3],
    pub(crate) block: u32,
    /// Dynamic shared memory in bytes.
    pub(crate) shared: u32,
    pub(crate) args: Vec<Arg>,
    /// Not needed where these two addresses are the same.
    pub(crate) unless_same: Option<(Arg, Arg)>,
    pub(crate) start: Start,
}

/// When a launch begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// When the launch before it is done.
    After,
    /// Before that: the kernel itself waits for it (`GRID_WAIT`) before it reads anything that changes while a plan
    /// runs, and before it writes.
    Early,
    /// When the launch before it is done, all blocks at once: they wait for each other.
    Together,
}

/// One launch.
#[derive(Clone, Debug)]
pub(crate) enum Job {
    Kernel(Kernel),
    Gemm(gemm::Product),
}

/// A way to run a spec, before it has a number.
#[derive(Clone, Debug)]
pub(crate) struct Offer {
    pub(crate) name: &'static str,
    /// Scratch in bytes.
    pub(crate) scratch: usize,
    pub(crate) prepare: Vec<(usize, Format)>,
    pub(crate) jobs: Vec<Job>,
    /// Added to the estimate, in seconds: what makes one offer for a spec dearer than another.
    pub(crate) extra: f64,
}

impl Offer {
    pub(crate) fn new(name: &'static str, jobs: Vec<Job>) -> Self {
        Offer {
            name,
            scratch: 0,
            prepare: vec![],
            jobs,
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

/// Addresses of one step.
pub(crate) struct Places<'a> {
    pub(crate) reads: &'a [u64],
    /// 0 where nobody wants the result.
    pub(crate) writes: &'a [u64],
    pub(crate) scratch: u64,
    /// Memory of the recording itself.
    pub(crate) own: u64,
}

impl Places<'_> {
    /// Is `job` needed with these addresses?
    pub(crate) fn need(&self, job: &Job) -> bool {
        let Job::Kernel(k) = job else { return true };
        k.unless_same
            .is_none_or(|(a, b)| self.resolve(a) != self.resolve(b))
    }
    pub(crate) fn resolve(&self, a: Arg) -> u64 {
        match a {
            Arg::Read(i) => self.reads[i],
            Arg::Write(i) => self.writes[i],
            Arg::Scratch(at) => self.scratch + at as u64,
            Arg::Own(at) => self.own + at as u64,
            Arg::U32(v) => u64::from(v),
            Arg::U64(v) => v,
            Arg::F32(v) => u64::from(v.to_bits()),
        }
    }
}

/// A launch with its addresses.
pub(crate) enum Bound {
    Kernel {
        f: Function,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        /// Each argument in a word of its own; the driver reads as many low bytes as it is wide.
        words: Vec<u64>,
        start: Start,
    },
    Gemm(gemm::Bound),
}

impl Bound {
    /// # Safety
    /// `places` are addresses that stay valid as long as the result is launched.
    pub(crate) unsafe fn new(
        card: &Arc<Card>,
        blas: &Arc<gemm::Blas>,
        job: &Job,
        places: &Places<'_>,
    ) -> Result<Self> {
        Ok(match job {
            Job::Kernel(k) => Bound::Kernel {
                f: card.function(k.entry, &k.source, k.shared)?,
                grid: k.grid,
                block: k.block,
                shared: k.shared,
                words: k.args.iter().map(|a| places.resolve(*a)).collect(),
                start: match k.start {
                    Start::Early if card.facts.capability < EARLY => Start::After,
                    other => other,
                },
            },
            // SAFETY: the caller's promise.
            Job::Gemm(p) => Bound::Gemm(unsafe { blas.bind(p, places)? }),
        })
    }
    /// Asks `stream` for the launch.
    ///
    /// # Safety
    /// The addresses given to `new` are still valid, and hold what the kernel expects.
    pub(crate) unsafe fn launch(&self, stream: sys::CUstream) -> Result<()> {
        match self {
            Bound::Kernel {
                f,
                grid,
                block,
                shared,
                words,
                start,
            } => {
                let address = |w: &u64| std::ptr::from_ref(w).cast_mut().cast::<c_void>();
                let mut args: Vec<*mut c_void> = words.iter().map(address).collect();
                let [x, y, z] = *grid;
                // SAFETY: plain words and an enum whose zero is a value.
                let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
                use sys::CUlaunchAttributeID as Id;
                match start {
                    Start::After => {}
                    Start::Early => {
                        attribute.id = Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
                        attribute.value.programmaticStreamSerializationAllowed = 1;
                    }
                    Start::Together => {
                        attribute.id = Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
                        attribute.value.cooperative = 1;
                    }
                }
                let config = sys::CUlaunchConfig {
                    gridDimX: x,
                    gridDimY: y,
                    gridDimZ: z,
                    blockDimX: *block,
                    blockDimY: 1,
                    blockDimZ: 1,
                    sharedMemBytes: *shared,
                    hStream: stream,
                    attrs: &raw mut attribute,
                    numAttrs: u32::from(*start != Start::After),
                };
                // SAFETY: the arguments are as many and as wide as the kernel's, which is what the tests of
                // every kernel show; the addresses are the caller's promise; the driver copies the attribute.
                let code = unsafe {
                    sys::cuLaunchKernelEx(
                        &raw const config,
                        f.0,
                        args.as_mut_ptr(),
                        std::ptr::null_mut(),
                    )
                };
                code.result()
                    .map_err(|e| Error::driver("launching a kernel", e))
            }
            // SAFETY: the caller's promise.
            Bound::Gemm(g) => unsafe { g.launch(stream) },
        }
    }
}
