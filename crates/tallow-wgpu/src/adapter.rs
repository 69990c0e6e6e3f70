//! Which adapters there are, and which one is opened.
//! Invariant: an adapter that computes on the processor is used only if it is named by its number.
//! Absent on purpose: OpenGL, whose compute shaders lack what the kernels need.
use crate::error::{Error, Result};

/// Which adapter is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The first that is a real GPU.
    Gpu,
    /// By number, in the order of [`found`].
    Number(usize),
    /// The first that computes on the processor.
    Software,
}

/// An adapter as `doctor` shows it.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its name.
    pub name: String,
    /// `vulkan`, `metal` or `dx12`.
    pub api: String,
    /// Driver and its version.
    pub driver: String,
    /// Does it compute on the processor?
    pub software: bool,
    /// Smallest and largest size of a subgroup, in threads; `None` without subgroups.
    pub subgroups: Option<(u32, u32)>,
    /// Has it 16-bit floats in kernels?
    pub f16: bool,
    /// Most bytes of one operand.
    pub binding_bytes: u64,
    /// Most bytes of one buffer.
    pub buffer_bytes: u64,
    /// Bytes of memory that a workgroup shares.
    pub shared_bytes: u32,
}

/// The adapters of this machine, real GPUs first. Opens none.
pub fn found() -> Vec<Found> {
    adapters().iter().map(describe).collect()
}

fn describe(adapter: &wgpu::Adapter) -> Found {
    let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
    let subgroups = features.contains(wgpu::Features::SUBGROUP);
    Found {
        software: is_software(&info),
        api: info.backend.to_str().to_owned(),
        driver: format!("{} {}", info.driver, info.driver_info)
            .trim()
            .to_owned(),
        subgroups: subgroups.then_some((info.subgroup_min_size, info.subgroup_max_size)),
        f16: features.contains(wgpu::Features::SHADER_F16),
        binding_bytes: limits.max_storage_buffer_binding_size,
        buffer_bytes: limits.max_buffer_size,
        shared_bytes: limits.max_compute_workgroup_storage_size,
        name: info.name,
    }
}

pub(crate) fn is_software(info: &wgpu::AdapterInfo) -> bool {
    info.device_type == wgpu::DeviceType::Cpu
}

/// All adapters, real GPUs first, the fastest kind of them first.
fn adapters() -> Vec<wgpu::Adapter> {
    let mut how = wgpu::InstanceDescriptor::new_without_display_handle();
    how.backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    // No validation layers: they need files that few machines have.
    how.flags = wgpu::InstanceFlags::empty();
    let instance = wgpu::Instance::new(how);
    let mut all = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    all.sort_by_key(|a| match a.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    });
    all
}

/// The adapter wanted, and its number.
pub(crate) fn choose(choice: Choice) -> Result<(usize, wgpu::Adapter)> {
    let all = adapters();
    let count = all.len();
    let first_name = all.first().map(|a| a.get_info().name);
    let fits = |i: usize, a: &wgpu::Adapter| match choice {
        Choice::Gpu => !is_software(&a.get_info()),
        Choice::Number(n) => i == n,
        Choice::Software => is_software(&a.get_info()),
    };
    let found = all.into_iter().enumerate().find(|(i, a)| fits(*i, a));
    found.ok_or(match (choice, first_name) {
        (Choice::Number(number), Some(_)) => Error::NoSuchAdapter { number, count },
        (Choice::Gpu, Some(name)) => Error::OnlySoftware { name },
        _ => Error::NoAdapter,
    })
}
