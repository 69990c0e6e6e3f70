//! `tallow doctor`: what this machine has, what tallow makes of it, and whether it computes right.
//! Invariant: the self-test compares with the f64 oracle; a device that is wrong is an error.
//! Absent on purpose: advice.
use crate::{
    Outcome,
    open::{self, Global},
    out,
};
use anyhow::{Result, anyhow};
use serde_json::{Value, json};
use std::path::Path;
use tallow::{
    cpu::{pool, simd::Isa},
    llm::{ComputeDType, Family},
};

mod selftest;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// A cache of the processor.
struct CacheLevel {
    level: String,
    kind: String,
    size: String,
    shared_by: String,
}

/// What is known without measuring.
struct Machine {
    processor: String,
    features: Vec<&'static str>,
    isa: Isa,
    threads: usize,
    logical: usize,
    caches: Vec<CacheLevel>,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    let session = open::session(global, ComputeDType::F32)?;
    let machine = Machine {
        processor: processor(),
        features: features(),
        isa: Isa::detect()?,
        threads: match global.threads {
            Some(n) => n,
            None => pool::threads_from_env()?,
        },
        logical: std::thread::available_parallelism().map_or(1, |n| n.get()),
        caches: caches(),
    };
    if !args.json {
        machine.show()?;
    }
    let (cards, adapters) = (cards(), adapters());
    if !args.json {
        cards.iter().chain(&adapters).try_for_each(out::line)?;
    }
    let rates = selftest::rates(&session, machine.threads)?;
    let checks = selftest::checks(&session)?;
    let pass = checks.iter().all(selftest::Check::pass);
    if args.json {
        let mut report = machine.json();
        report["cuda"] = json!(cards);
        report["wgpu"] = json!(adapters);
        report["read_bytes_per_s"] = json!(rates.read_bytes_per_s);
        report["product_flops"] = json!(rates.product_flops);
        report["self_test"] = checks.iter().map(selftest::Check::json).collect();
        report["pass"] = json!(pass);
        out::json(&report)?;
    } else {
        out::line(format!(
            "speed       reads memory at {:.1} GB/s ({} threads), multiplies 512 x 1024 x 1024 at {:.0} GFLOP/s (f32, {})",
            rates.read_bytes_per_s / 1e9,
            machine.threads,
            rates.product_flops / 1e9,
            session.backend().info().name,
        ))?;
        for c in &checks {
            out::line(c.line())?;
        }
    }
    match pass {
        true => Ok(Outcome::Fine),
        false => Err(anyhow!(
            "the self-test failed: results of this build on this machine cannot be trusted; try another TALLOW_ISA and report it"
        )),
    }
}

/// A line for each card that CUDA sees, and for each thing that keeps it from being used.
fn cards() -> Vec<String> {
    let mut lines = vec![];
    let lacks = tallow::cuda::lacks();
    let versions = tallow::cuda::versions();
    if !versions.is_empty() {
        lines.push(format!("cuda        {}", versions.join(", ")));
    }
    match tallow::cuda::found() {
        Ok(all) if all.is_empty() => lines.push("cuda        no device".to_owned()),
        Ok(all) => lines.extend(all.iter().enumerate().map(|(i, c)| {
            let (major, minor) = c.capability;
            let memory = out::bytes(c.memory);
            format!(
                "cuda:{i}      {}, compute capability {major}.{minor}, {} multiprocessors, {memory}",
                c.name, c.processors
            )
        })),
        // Said below.
        Err(_) if !lacks.is_empty() => {}
        Err(e) => lines.push(format!("cuda        {e}")),
    }
    lines.extend(lacks.iter().map(|e| format!("cuda        {e}")));
    lines
}

/// A line for each adapter of Metal, Vulkan or DX12, with its limits.
#[cfg(feature = "wgpu")]
fn adapters() -> Vec<String> {
    let one = |(i, f): (usize, &tallow::wgpu::Found)| {
        let subgroups = match f.subgroups {
            None => "no subgroups".to_owned(),
            Some((least, most)) if least == most => format!("subgroups of {least}"),
            Some((least, most)) => format!("subgroups of {least} to {most}"),
        };
        let kind = if f.software {
            " (computes on the processor: auto leaves it alone)"
        } else {
            ""
        };
        format!(
            "wgpu:{i}      {}{kind}, {} ({}), {subgroups}, {}f16, operands to {}, buffers to {}, {} shared by a workgroup, {}",
            f.name,
            f.api,
            f.driver,
            if f.f16 { "" } else { "no " },
            out::bytes(f.binding_bytes as usize),
            out::bytes(f.buffer_bytes as usize),
            out::bytes(f.shared_bytes as usize),
            units(f),
        )
    };
    let found = tallow::wgpu::found();
    match found.is_empty() {
        true => vec![format!("wgpu        {}", tallow::wgpu::Error::NoAdapter)],
        false => found.iter().enumerate().map(one).collect(),
    }
}

/// The units for small matrices of an adapter, and which of them are used.
#[cfg(feature = "wgpu")]
fn units(f: &tallow::wgpu::Found) -> String {
    if f.units.is_empty() {
        return "no cooperative matrices".to_owned();
    }
    let used: Vec<String> = f.used_units.iter().map(ToString::to_string).collect();
    let used = match used.is_empty() {
        true => "none used".to_owned(),
        false => format!("used for {}", used.join(" and ")),
    };
    format!("cooperative matrices {} ({used})", f.units.join(", "))
}

#[cfg(not(feature = "wgpu"))]
fn adapters() -> Vec<String> {
    vec!["wgpu        not in this build (feature wgpu)".to_owned()]
}

impl Machine {
    fn isa_names() -> Vec<&'static str> {
        Isa::available().map(Isa::name).collect()
    }

    fn show(&self) -> Result<()> {
        out::line(format!(
            "tallow {} for {}-{}; devices: {}; models: {}",
            env!("CARGO_PKG_VERSION"),
            std::env::consts::ARCH,
            std::env::consts::OS,
            tallow::BACKENDS.join(", "),
            Family::ALL.map(Family::architecture).join(", "),
        ))?;
        out::line(format!("processor   {}", self.processor))?;
        out::line(format!("features    {}", self.features.join(" ")))?;
        out::line(format!(
            "kernels     {} (this machine could run {}; TALLOW_ISA chooses)",
            self.isa.name(),
            Self::isa_names().join(", "),
        ))?;
        out::line(format!(
            "threads     {} of {} logical processors (--threads or TALLOW_THREADS chooses)",
            self.threads, self.logical
        ))?;
        for c in &self.caches {
            out::line(format!(
                "cache       L{} {} {}, shared by processors {}",
                c.level, c.kind, c.size, c.shared_by
            ))?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        let cache = |c: &CacheLevel| json!({ "level": c.level, "kind": c.kind, "size": c.size, "shared_by": c.shared_by });
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "devices": tallow::BACKENDS,
            "architectures": Family::ALL.map(Family::architecture),
            "arch": std::env::consts::ARCH,
            "os": std::env::consts::OS,
            "processor": self.processor,
            "features": self.features,
            "isa": self.isa.name(),
            "isa_available": Self::isa_names(),
            "threads": self.threads,
            "logical_processors": self.logical,
            "caches": self.caches.iter().map(cache).collect::<Vec<_>>(),
        })
    }
}

/// Instruction sets that matter to kernels, as far as this processor has them.
fn features() -> Vec<&'static str> {
    let mut found = vec![];
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! ask {
            ($($name:tt),*) => { $( if std::arch::is_x86_feature_detected!($name) { found.push($name); } )* };
        }
        ask!(
            "avx2",
            "fma",
            "f16c",
            "avx512f",
            "avx512vl",
            "avx512dq",
            "avx512bw",
            "avx512cd",
            "avx512bf16",
            "avx512vnni",
            "avx512fp16"
        );
    }
    #[cfg(target_arch = "aarch64")]
    {
        macro_rules! ask {
            ($($name:tt),*) => { $( if std::arch::is_aarch64_feature_detected!($name) { found.push($name); } )* };
        }
        ask!("neon", "fp16", "bf16", "dotprod", "i8mm", "sve");
    }
    found
}

/// The processor's name, where the operating system tells.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with("model name"));
    let name = line.and_then(|l| l.split_once(':')).map(|(_, n)| n.trim());
    name.unwrap_or(std::env::consts::ARCH).to_owned()
}

/// Caches of processor 0, from sysfs; none elsewhere than on Linux.
fn caches() -> Vec<CacheLevel> {
    let dir = Path::new("/sys/devices/system/cpu/cpu0/cache");
    let read = |index: usize, what: &str| {
        let text = std::fs::read_to_string(dir.join(format!("index{index}")).join(what));
        text.ok().map(|t| t.trim().to_owned())
    };
    let one = |i| {
        Some(CacheLevel {
            level: read(i, "level")?,
            kind: read(i, "type")?.to_lowercase(),
            size: read(i, "size")?,
            shared_by: read(i, "shared_cpu_list")?,
        })
    };
    (0..8).map_while(one).collect()
}
