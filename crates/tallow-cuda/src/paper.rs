//! A card on paper: plans as a card would, on a machine that has none.
//! Invariant: kernels, formats and memory of a plan are those of a card of the same kind. Nothing is kept and
//! nothing runs: what is uploaded goes nowhere, and a recording or a download is an error.
//! Absent on purpose: every library of CUDA.
use crate::{fused, glue, launch::Offer};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering::Relaxed},
};
use tallow_core::{
    Error, Result,
    backend::{
        ArenaRules, Backend, Bindings, Buffer, DeviceInfo, Half, HostBytes, Launched, Recording,
    },
    kernel::{Candidate, Format, KernelSpec, Offers, Operand},
    op::Composite,
    plan::Plan,
    types::DType,
};

/// Memory of a card on paper begins at multiples of this.
const ALIGN: u64 = 256;

/// A card that is not there.
pub struct Paper {
    info: DeviceInfo,
    target: glue::Target,
    table: Mutex<Offers<Offer>>,
    /// Where the next buffer would lie.
    next: AtomicU64,
}

impl Paper {
    /// One like an H100 or H200, that multiplies frozen weights as `weights`: f32 or bf16.
    pub fn hopper(weights: DType) -> Self {
        Paper {
            info: DeviceInfo {
                name: "cuda:paper".into(),
                arena: ArenaRules {
                    align: ALIGN as usize,
                },
            },
            target: glue::Target::hopper(weights),
            table: Mutex::default(),
            next: AtomicU64::new(ALIGN),
        }
    }
    fn refused<T>(&self, what: &str) -> Result<T> {
        Err(Error::Device {
            device: self.info.name.clone(),
            what: format!(
                "it makes plans and {what}; name a device that is there, as cuda:0 or cpu"
            ),
        })
    }
}

impl Backend for Paper {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        let room = (bytes as u64).next_multiple_of(ALIGN).max(ALIGN);
        Ok(Buffer {
            raw: self.next.fetch_add(room, Relaxed),
            bytes,
            keep: Arc::new(()),
        })
    }
    fn adopt(&self, _: HostBytes, range: std::ops::Range<usize>, _: usize) -> Result<Buffer> {
        self.alloc(range.len())
    }
    fn upload(&self, _: &Buffer, _: usize, _: &[u8]) -> Result<()> {
        Ok(())
    }
    fn download(&self, _: &Buffer, _: usize, _: &mut [u8]) -> Result<()> {
        self.refused("has no memory to read")
    }
    fn far(&self) -> bool {
        true
    }
    fn candidates(&self, spec: &KernelSpec) -> Result<Vec<Candidate>> {
        let mut table = self.table.lock().unwrap_or_else(|e| e.into_inner());
        Ok(glue::candidates(&mut table, &self.target, spec))
    }
    fn cheap(&self, c: &Composite) -> bool {
        glue::cheap(c)
    }
    fn halves(&self, spec: &KernelSpec) -> Vec<Half> {
        glue::halves(&self.target, spec)
    }
    fn joins(&self, first: &KernelSpec, second: &KernelSpec) -> bool {
        fused::joins(first, second)
    }
    fn prepare(&self, _: Format, _: &Buffer, _: usize, _: &Operand, _: &Buffer) -> Result<()> {
        Ok(())
    }
    fn launched(&self, plan: &Plan) -> Vec<Launched> {
        let table = self.table.lock().unwrap_or_else(|e| e.into_inner());
        let offers = plan.steps.iter().map(|s| table.get(s.kernel).clone());
        fused::launched(&self.target, plan, &offers.collect::<Vec<_>>())
    }
    fn record(&self, _: Arc<Plan>, _: Bindings) -> Result<Box<dyn Recording>> {
        self.refused("runs none")
    }
}
