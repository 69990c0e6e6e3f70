//! An open GPU: its queue, its memory, its compiled kernels, and what went wrong on it.
//! Invariant: all work goes through one queue, in the order asked; a failure is kept and told by every later call.
//! Absent on purpose: specs and plans.
use crate::{
    adapter,
    ahead::Ahead,
    cache::Cache,
    error::{Error, Result},
    launch::Kernel,
    memory::Slabs,
    shader::{Coop, Target},
};
use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tallow_core::types::DType;

/// Submissions that may be under way before the host waits for the oldest.
const IN_FLIGHT: usize = 64;
/// How long the host asks again and again before it sleeps: to wake up takes longer than a small work.
const AWAKE: Duration = Duration::from_millis(1);
/// Where a buffer's size and a binding's start are rounded to, in bytes.
pub(crate) const ALIGN: usize = 256;

/// Text and entry point of a kernel.
type Key = (Arc<str>, &'static str);

/// A GPU.
pub(crate) struct Gpu {
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    pub(crate) info: wgpu::AdapterInfo,
    pub(crate) limits: wgpu::Limits,
    pub(crate) features: wgpu::Features,
    /// Units for small matrices.
    coop: Option<Coop>,
    pipelines: Mutex<HashMap<Key, wgpu::ComputePipeline>>,
    /// Layouts by number of storage buffers, bytes of immediates, and whether numbers come in a uniform buffer.
    layouts: Mutex<HashMap<(usize, u32, bool), Layout>>,
    cache: Option<Cache>,
    under_way: Mutex<VecDeque<wgpu::SubmissionIndex>>,
    /// Submissions and writes so far that may have changed memory.
    changes: AtomicU64,
    /// Were bytes written that no submission has taken along?
    written: AtomicBool,
    /// What replays copy for the host.
    pub(crate) ahead: Ahead,
    failure: Arc<Mutex<Option<Error>>>,
    /// Where small memory lies.
    pub(crate) slabs: Slabs,
}

/// How the arguments of a kernel are bound.
#[derive(Clone)]
pub(crate) struct Layout {
    pub(crate) group: wgpu::BindGroupLayout,
    pipeline: wgpu::PipelineLayout,
}

pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

/// Threads of a workgroup at most. Under Metal a kernel of many registers takes fewer than the device names, and says so
/// only when it runs.
fn most_threads(backend: wgpu::Backend) -> u32 {
    match backend {
        wgpu::Backend::Metal => 256,
        _ => u32::MAX,
    }
}

/// Features that are used where an adapter has them.
fn wanted() -> wgpu::Features {
    wgpu::Features::SUBGROUP
        | wgpu::Features::IMMEDIATES
        | wgpu::Features::SHADER_F16
        | wgpu::Features::TIMESTAMP_QUERY
        | wgpu::Features::PIPELINE_CACHE
}

impl Gpu {
    /// Opens `adapter` with all that it has of what is wanted.
    pub(crate) fn open(adapter: &wgpu::Adapter) -> Result<Self> {
        let (info, limits) = (adapter.get_info(), adapter.limits());
        let coop = adapter::coop(adapter);
        let (units, experimental) = match coop {
            // SAFETY: experimental is nothing but the units, which one kernel uses (`product_coop`). Its texts are this
            // crate's own, and are checked against the oracle wherever an adapter has units.
            Some(_) => (wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX, unsafe {
                wgpu::ExperimentalFeatures::enabled()
            }),
            None => (
                wgpu::Features::empty(),
                wgpu::ExperimentalFeatures::disabled(),
            ),
        };
        let features = adapter.features() & (wanted() | units);
        let how = wgpu::DeviceDescriptor {
            label: None,
            required_features: features,
            required_limits: limits.clone(),
            experimental_features: experimental,
            memory_hints: wgpu::MemoryHints::Performance,
            trace: wgpu::Trace::Off,
        };
        let opened = pollster::block_on(adapter.request_device(&how));
        let (device, queue) = opened.map_err(|e| Error::Open {
            name: info.name.clone(),
            why: e.to_string(),
        })?;
        let failure = Arc::new(Mutex::new(None));
        watch(&device, &failure);
        Ok(Gpu {
            cache: Cache::open(&device, &info),
            device,
            queue,
            info,
            limits,
            features,
            coop,
            pipelines: Mutex::default(),
            layouts: Mutex::default(),
            under_way: Mutex::default(),
            changes: AtomicU64::new(0),
            written: AtomicBool::new(false),
            ahead: Ahead::default(),
            failure,
            slabs: Slabs::default(),
        })
    }
    /// What of this GPU decides which kernels it gets. `plain`: use nothing that an adapter
    /// need not have.
    pub(crate) fn target(&self, weights: DType, plain: bool) -> Target {
        let subgroups = self.features.contains(wgpu::Features::SUBGROUP) && !plain;
        let immediates = match self.features.contains(wgpu::Features::IMMEDIATES) && !plain {
            true => self.limits.max_immediate_size as usize,
            false => 0,
        };
        Target {
            subgroups: subgroups.then_some(self.info.subgroup_min_size.max(1)),
            buffers: self.limits.max_storage_buffers_per_shader_stage as usize,
            immediates,
            shared: self.limits.max_compute_workgroup_storage_size as usize,
            threads: self
                .limits
                .max_compute_invocations_per_workgroup
                .min(self.limits.max_compute_workgroup_size_x)
                .min(most_threads(self.info.backend)),
            binding: self.limits.max_storage_buffer_binding_size,
            weights,
            #[cfg(target_os = "macos")]
            mps: crate::mps::has(&self.info) && !plain,
            #[cfg(not(target_os = "macos"))]
            mps: false,
            coop: self.coop.filter(|_| !plain),
        }
    }
    /// What went wrong since the GPU was opened, if anything did.
    pub(crate) fn check(&self) -> Result<()> {
        lock(&self.failure).clone().map_or(Ok(()), Err)
    }
    /// Zeroed memory of at least `bytes`.
    pub(crate) fn buffer(&self, bytes: usize, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        self.check()?;
        let size = self.size(bytes)?;
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let made = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size,
            usage,
            mapped_at_creation: false,
        });
        match pollster::block_on(scope.pop()) {
            None => Ok(made),
            Some(_) => Err(Error::OutOfMemory { bytes: size }),
        }
    }
    /// Bytes of a buffer for `bytes`, if one may be that large.
    pub(crate) fn size(&self, bytes: usize) -> Result<u64> {
        let (bytes, most) = (
            bytes.max(1).next_multiple_of(ALIGN) as u64,
            self.limits.max_buffer_size,
        );
        match bytes > most {
            true => Err(Error::TooLarge { bytes, most }),
            false => Ok(bytes),
        }
    }
    /// Changes of memory asked for so far. Two equal numbers: none in between.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }
    /// Writes `src` after all work asked before, and before all asked later.
    pub(crate) fn write(&self, dst: &wgpu::Buffer, at: u64, src: &[u8]) {
        self.queue.write_buffer(dst, at, src);
        self.written.store(true, Ordering::Release);
        self.changes.fetch_add(1, Ordering::AcqRel);
    }
    /// Asks for what `commands` hold, in order. Waits for the oldest submission if very many are under way.
    pub(crate) fn submit(
        &self,
        commands: impl IntoIterator<Item = wgpu::CommandBuffer>,
    ) -> Result<wgpu::SubmissionIndex> {
        let index = self.submit_reads(commands)?;
        self.changes.fetch_add(1, Ordering::AcqRel);
        Ok(index)
    }
    /// The same where `commands` change nothing that kernels see.
    pub(crate) fn submit_reads(
        &self,
        commands: impl IntoIterator<Item = wgpu::CommandBuffer>,
    ) -> Result<wgpu::SubmissionIndex> {
        self.written.store(false, Ordering::Release);
        let index = self.queue.submit(commands);
        let mut under_way = lock(&self.under_way);
        under_way.push_back(index.clone());
        if under_way.len() > IN_FLIGHT {
            let oldest = under_way.pop_front();
            drop(under_way);
            self.poll(oldest)?;
        }
        self.check()?;
        Ok(index)
    }
    /// Waits for all that was asked.
    pub(crate) fn wait(&self) -> Result<()> {
        if self.written.load(Ordering::Acquire) {
            self.submit_reads([])?;
        }
        if self.awake(|status| status.is_queue_empty())? {
            return Ok(());
        }
        self.poll(None)
    }
    /// Waits until `told`, which the GPU's callbacks make true.
    pub(crate) fn wait_until(&self, mut told: impl FnMut() -> bool) -> Result<()> {
        match self.awake(|_| told())? {
            true => Ok(()),
            false => self.poll(None),
        }
    }
    /// Asks for a while whether it is `done`. A GPU in software needs the processor more.
    fn awake(&self, mut done: impl FnMut(wgpu::PollStatus) -> bool) -> Result<bool> {
        if adapter::is_software(&self.info) {
            return Ok(false);
        }
        let start = Instant::now();
        while start.elapsed() < AWAKE {
            let status = self.device.poll(wgpu::PollType::Poll);
            self.check()?;
            if done(status.map_err(unpolled)?) {
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        Ok(false)
    }
    /// Sleeps until a submission is done, or all.
    pub(crate) fn poll(&self, submission_index: Option<wgpu::SubmissionIndex>) -> Result<()> {
        let how = wgpu::PollType::Wait {
            submission_index,
            timeout: None,
        };
        let waited = self.device.poll(how);
        self.check()?;
        waited.map(|_| ()).map_err(unpolled)
    }
    pub(crate) fn encoder(&self) -> wgpu::CommandEncoder {
        let plain = wgpu::CommandEncoderDescriptor { label: None };
        self.device.create_command_encoder(&plain)
    }
    /// How `k`'s arguments are bound.
    pub(crate) fn layout(&self, k: &Kernel) -> Layout {
        let buffers = k.args.iter().filter(|a| a.is_buffer()).count();
        let immediate = if k.uniform {
            0
        } else {
            k.args.len() as u32 * 4
        };
        let make = || self.new_layout(buffers, immediate, k.uniform);
        lock(&self.layouts)
            .entry((buffers, immediate, k.uniform))
            .or_insert_with(make)
            .clone()
    }
    fn new_layout(&self, buffers: usize, immediate_size: u32, uniform: bool) -> Layout {
        let storage = wgpu::BufferBindingType::Storage { read_only: false };
        let kinds = std::iter::repeat_n(storage, buffers)
            .chain(uniform.then_some(wgpu::BufferBindingType::Uniform));
        let entry = |(i, ty)| wgpu::BindGroupLayoutEntry {
            binding: i as u32,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty,
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        };
        let entries: Vec<_> = kinds.enumerate().map(entry).collect();
        let how = wgpu::BindGroupLayoutDescriptor {
            label: None,
            entries: &entries,
        };
        let group = self.device.create_bind_group_layout(&how);
        let how = wgpu::PipelineLayoutDescriptor {
            label: None,
            bind_group_layouts: &[Some(&group)],
            immediate_size,
        };
        let pipeline = self.device.create_pipeline_layout(&how);
        Layout { group, pipeline }
    }
    /// The compiled kernel; compiled now if it is new.
    pub(crate) fn pipeline(&self, k: &Kernel, layout: &Layout) -> Result<wgpu::ComputePipeline> {
        let key = (k.source.clone(), k.entry);
        if let Some(p) = lock(&self.pipelines).get(&key) {
            return Ok(p.clone());
        }
        let made = self.compile(k, layout)?;
        lock(&self.pipelines).insert(key, made.clone());
        Ok(made)
    }
    /// Keeps what was compiled for the next process.
    pub(crate) fn keep_kernels(&self) {
        if let Some(c) = &self.cache {
            c.keep();
        }
    }
    fn compile(&self, k: &Kernel, layout: &Layout) -> Result<wgpu::ComputePipeline> {
        self.check()?;
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let text = wgpu::ShaderModuleDescriptor {
            label: Some(k.entry),
            source: wgpu::ShaderSource::Wgsl(k.source.as_ref().into()),
        };
        let checks = match cfg!(debug_assertions) {
            true => wgpu::ShaderRuntimeChecks::checked(),
            false => wgpu::ShaderRuntimeChecks::unchecked(),
        };
        // SAFETY: the kernels are this crate's own. They reach elements inside the extents and strides of their spec
        // alone, which `Plan::verify` and the recording checked against the bound windows; their loops end, and no
        // divisor is zero. The conformance suite runs every one of them with all checks on.
        let module = unsafe { self.device.create_shader_module_trusted(text, checks) };
        let how = wgpu::ComputePipelineDescriptor {
            label: Some(k.entry),
            layout: Some(&layout.pipeline),
            module: &module,
            entry_point: Some(k.entry),
            compilation_options: wgpu::PipelineCompilationOptions {
                // A kernel writes what it reads there.
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: self.cache.as_ref().map(|c| &c.driver),
        };
        let made = self.device.create_compute_pipeline(&how);
        let failed = pollster::block_on(scope.pop());
        self.check()?;
        if let Some(c) = &self.cache {
            c.compiled();
        }
        match failed {
            None => Ok(made),
            Some(e) => Err(Error::Compile {
                name: k.entry.to_owned(),
                log: format!("{e}"),
            }),
        }
    }
}

fn unpolled(e: wgpu::PollError) -> Error {
    Error::Refused {
        doing: "waiting for the GPU",
        why: e.to_string(),
    }
}

/// Keeps the first failure that `device` tells of.
fn watch(device: &wgpu::Device, failure: &Arc<Mutex<Option<Error>>>) {
    let keep = failure.clone();
    device.set_device_lost_callback(move |_, why| {
        lock(&keep).get_or_insert(Error::Lost { why });
    });
    let keep = failure.clone();
    device.on_uncaptured_error(Arc::new(move |e: wgpu::Error| {
        let told = match e {
            wgpu::Error::OutOfMemory { .. } => Error::OutOfMemory { bytes: 0 },
            other => Error::Refused {
                doing: "asking the GPU",
                why: other.to_string(),
            },
        };
        lock(&keep).get_or_insert(told);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::Choice;

    #[test]
    fn a_lost_gpu_is_told_by_every_later_call() {
        let Ok((_, adapter)) = adapter::choose(Choice::Number(0)) else {
            eprintln!("SKIP: no adapter");
            return;
        };
        let gpu = Gpu::open(&adapter).expect("opens");
        let usage = wgpu::BufferUsages::STORAGE;
        gpu.buffer(16, usage).expect("memory");
        let most = gpu.limits.max_buffer_size;
        let too_large = gpu.buffer(most as usize + 1, usage);
        assert!(matches!(too_large, Err(Error::TooLarge { .. })));
        gpu.check().expect("refusing is no failure");
        gpu.device.destroy();
        gpu.wait().expect_err("lost");
        for _ in 0..2 {
            let told = gpu.buffer(16, usage).expect_err("lost").to_string();
            assert!(told.starts_with("the GPU was lost ("), "{told}");
            assert!(told.ends_with("; start the program again"), "{told}");
        }
    }
}
