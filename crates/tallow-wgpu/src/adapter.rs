//! Which adapters there are, and which one is opened.
//! Invariant: an adapter that computes on the processor is used only if it is named by its number.
//! Absent on purpose: OpenGL, whose compute shaders lack what the kernels need.
use crate::{
    error::{Error, Result},
    shader::{Coop, Units},
};
use tallow_core::types::DType;
use wgpu::CooperativeScalarType;

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
    /// Units that multiply small matrices, as `8x8x8 f16 to f32`: extents, what is multiplied, what is added.
    pub units: Vec<String>,
    /// Those of them that products use, by what they multiply.
    pub used_units: Vec<DType>,
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
        units: adapter
            .cooperative_matrix_properties()
            .iter()
            .map(told)
            .collect(),
        used_units: coop(adapter).iter().flat_map(Coop::multiplied).collect(),
        name: info.name,
    }
}

fn told(p: &wgpu::CooperativeMatrixProperties) -> String {
    let name = |t: CooperativeScalarType| format!("{t:?}").to_lowercase();
    let (ab, sums) = (name(p.ab_type), name(p.cr_type));
    format!("{}x{}x{} {ab} to {sums}", p.m_size, p.n_size, p.k_size)
}

/// The units of `adapter` that products can use: squares, sums in f32, subgroups whose size is known.
pub(crate) fn coop(adapter: &wgpu::Adapter) -> Option<Coop> {
    let (info, features) = (adapter.get_info(), adapter.features());
    let all = adapter.cooperative_matrix_properties();
    let needs = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SUBGROUP;
    if !features.contains(needs) {
        return None;
    }
    let half = features.contains(wgpu::Features::SHADER_F16);
    chosen(&all, lanes(&info)?, half)
}

/// The largest squares among `all`.
fn chosen(all: &[wgpu::CooperativeMatrixProperties], lanes: u32, half: bool) -> Option<Coop> {
    let side = |of: CooperativeScalarType| {
        let fits = |p: &&wgpu::CooperativeMatrixProperties| {
            let square = p.m_size == p.n_size && p.n_size == p.k_size;
            square && (p.ab_type, p.cr_type) == (of, CooperativeScalarType::F32)
        };
        all.iter().filter(fits).map(|p| p.m_size).max()
    };
    let f32s = side(CooperativeScalarType::F32);
    let f16s = side(CooperativeScalarType::F16).filter(|_| half);
    (f32s.is_some() || f16s.is_some()).then_some(Coop {
        f32s,
        f16s,
        lanes,
        by: Units::Adapter,
    })
}

/// Threads of every subgroup; `None` where it depends. wgpu's Metal tells 4 to 64: Apple's own GPUs have 32, and others
/// in Macs have no units, though wgpu says so.
fn lanes(info: &wgpu::AdapterInfo) -> Option<u32> {
    let (least, most) = (info.subgroup_min_size, info.subgroup_max_size);
    match info.backend {
        wgpu::Backend::Metal => info.name.starts_with("Apple").then_some(32),
        _ => (least == most && (8..=64).contains(&least)).then_some(least),
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

#[cfg(test)]
mod tests {
    use super::*;
    use CooperativeScalarType::{F16, F32, I32};

    fn unit(
        [m_size, n_size, k_size]: [u32; 3],
        ab_type: CooperativeScalarType,
        cr_type: CooperativeScalarType,
    ) -> wgpu::CooperativeMatrixProperties {
        wgpu::CooperativeMatrixProperties {
            m_size,
            n_size,
            k_size,
            ab_type,
            cr_type,
            saturating_accumulation: false,
        }
    }

    #[test]
    fn only_units_that_lose_nothing_are_used() {
        let sides = |all: &[_], half| chosen(all, 32, half).map(|c| (c.f32s, c.f16s));
        let apple = [F32, F16].map(|t| unit([8; 3], t, F32));
        assert_eq!(sides(&apple, true), Some((Some(8), Some(8))));
        assert_eq!(sides(&apple, false), Some((Some(8), None)));
        let nvidia = [
            unit([16, 8, 16], F16, F32),
            unit([16; 3], F16, F16),
            unit([16; 3], F16, F32),
            unit([16; 3], I32, I32),
        ];
        assert_eq!(sides(&nvidia, true), Some((None, Some(16))));
        // Sums in f16, and what is no square.
        assert_eq!(sides(&nvidia[..2], true), None);
        assert_eq!(told(&nvidia[0]), "16x8x16 f16 to f32");
    }
}
