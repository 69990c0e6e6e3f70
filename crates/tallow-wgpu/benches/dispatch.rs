//! What a dispatch costs on this adapter, apart from its kernel: submissions, waits, reads, and dispatches in one pass.
//! Invariant: dispatches in a pass depend on each other, and a time ends where the host has seen the end.
//! Absent on purpose: a verdict. The table says where the time of a small product goes.
use std::{sync::Arc, time::Instant};
use tallow_core::{
    backend::Backend,
    op::Role,
    session::Session,
    tensor::Tensor,
    types::{DType, TensorType},
};
use tallow_wgpu::{Choice, Wgpu, WgpuOptions};

const COUNTS: [usize; 4] = [1, 4, 16, 64];
const TIMES: usize = 400;
const TINY: &str = "@group(0) @binding(0) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(32) fn tiny(@builtin(local_invocation_index) t: u32) { if (t == 32u) { y[0] += 1.0; } }";

fn main() {
    match raw() {
        Some(()) => {}
        None => return eprintln!("SKIP: no adapter"),
    }
    let options = WgpuOptions {
        adapter: Choice::Number(0),
        weights: DType::F32,
        plain: false,
        binding_bytes: None,
    };
    match Wgpu::open(&options) {
        Ok(gpu) => products(&Arc::new(gpu)),
        Err(e) => eprintln!("SKIP: {e}"),
    }
}

/// Median and least microseconds of what `run` does.
fn median(mut run: impl FnMut()) -> [f64; 2] {
    let mut all = vec![];
    let begin = Instant::now();
    // A GPU in software is slow.
    while all.len() < TIMES && (all.len() < 5 || begin.elapsed().as_secs_f64() < 3.0) {
        let start = Instant::now();
        run();
        all.push(start.elapsed().as_secs_f64() * 1e6);
    }
    all.sort_by(f64::total_cmp);
    [all[all.len() / 2], all[0]]
}

fn line(what: &str, [middle, least]: [f64; 2], each: Option<f64>) {
    let each = each.map_or(String::new(), |e| {
        format!("{e:9.2} µs for each one more than in the line before")
    });
    println!("{what:<58}{middle:9.1} µs (least {least:.1}){each}");
}

/// An adapter without tallow.
struct Raw {
    device: wgpu::Device,
    queue: wgpu::Queue,
    pipeline: wgpu::ComputePipeline,
    group: wgpu::BindGroup,
    memory: wgpu::Buffer,
    landing: wgpu::Buffer,
}

impl Raw {
    fn new() -> Option<Self> {
        let mut how = wgpu::InstanceDescriptor::new_without_display_handle();
        how.backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
        how.flags = wgpu::InstanceFlags::empty();
        let instance = wgpu::Instance::new(how);
        let mut all = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
        all.sort_by_key(|a| a.get_info().device_type == wgpu::DeviceType::Cpu);
        let adapter = all.into_iter().next()?;
        let info = adapter.get_info();
        println!(
            "{} ({}), {} {}",
            info.name, info.backend, info.driver, info.driver_info
        );
        let how = wgpu::DeviceDescriptor {
            required_limits: adapter.limits(),
            ..Default::default()
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&how)).ok()?;
        let text = wgpu::ShaderModuleDescriptor {
            label: None,
            source: wgpu::ShaderSource::Wgsl(TINY.into()),
        };
        let module = device.create_shader_module(text);
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: Some("tiny"),
            compilation_options: Default::default(),
            cache: None,
        });
        let buffer = |usage| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: 256,
                usage,
                mapped_at_creation: false,
            })
        };
        let memory = buffer(wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC);
        let landing = buffer(wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST);
        let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.get_bind_group_layout(0),
            entries: &[wgpu::BindGroupEntry {
                binding: 0,
                resource: memory.as_entire_binding(),
            }],
        });
        Some(Raw {
            device,
            queue,
            pipeline,
            group,
            memory,
            landing,
        })
    }
    fn submit(&self, dispatches: usize, read: bool) {
        let mut encoder = self.device.create_command_encoder(&Default::default());
        if dispatches > 0 {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            for _ in 0..dispatches {
                pass.set_pipeline(&self.pipeline);
                pass.set_bind_group(0, &self.group, &[]);
                pass.dispatch_workgroups(128, 1, 1);
            }
        }
        if read {
            encoder.copy_buffer_to_buffer(&self.memory, 0, &self.landing, 0, 4);
        }
        self.queue.submit([encoder.finish()]);
        if read {
            self.landing.map_async(wgpu::MapMode::Read, 0..4, |r| {
                r.expect("maps");
            });
        }
    }
    fn sleep(&self) {
        let how = wgpu::PollType::wait_indefinitely();
        self.device.poll(how).expect("waits");
    }
    fn spin(&self) {
        let poll = || self.device.poll(wgpu::PollType::Poll).expect("asks");
        while !poll().is_queue_empty() {
            std::hint::spin_loop();
        }
    }
}

/// Without tallow: submissions and an empty kernel.
fn raw() -> Option<()> {
    let r = Raw::new()?;
    for (how, wait) in [("asleep", Raw::sleep as fn(&Raw)), ("awake", Raw::spin)] {
        let both = |n: usize, read: bool| {
            median(|| {
                r.submit(n, read);
                wait(&r);
                if read {
                    r.landing.unmap();
                }
            })
        };
        line(&format!("nothing, waited for {how}"), both(0, false), None);
        line(
            &format!("an empty kernel, waited for {how}"),
            both(1, false),
            None,
        );
        line(
            &format!("an empty kernel and its result, {how}"),
            both(1, true),
            None,
        );
    }
    let apart = median(|| {
        r.submit(1, false);
        r.submit(0, true);
        r.sleep();
        r.landing.unmap();
    });
    line(
        "an empty kernel, its result by a second submission, asleep",
        apart,
        None,
    );
    let submit = median(|| {
        r.submit(1, false);
    });
    r.sleep();
    line("to ask for an empty kernel (the host)", submit, None);
    let many = |n: usize| {
        median(|| {
            r.submit(n, false);
            r.spin();
        })
    };
    chain("empty kernels, each on the one before", many);
    Some(())
}

/// `many(n)` for all counts.
fn chain(what: &str, mut many: impl FnMut(usize) -> [f64; 2]) {
    let mut before: Option<(usize, f64)> = None;
    for n in COUNTS {
        let t = many(n);
        let each = before.map(|(m, b)| (t[0] - b) / (n - m) as f64);
        line(&format!("{n} {what}"), t, each);
        before = Some((n, t[0]));
    }
}

/// The product this project began with, in tallow.
fn products(gpu: &Arc<Wgpu>) {
    let session = Session::new(gpu.clone());
    let values = |n: usize| -> Vec<f32> { (0..n).map(|i| (i % 17) as f32 / 17.0 - 0.5).collect() };
    let bytes = Arc::new(
        values(8 * 512)
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<u8>>(),
    );
    let w = session
        .adopt(bytes.clone(), 0..bytes.len(), TensorType::f32([8, 512]))
        .expect("memory");
    let product = |seed: f32| -> Tensor {
        let x = session
            .zeros(TensorType::f32([128, 512]), Role::Data)
            .expect("memory");
        let shifted: Vec<f32> = values(128 * 512).iter().map(|v| v + seed).collect();
        session.write(&x, &shifted).expect("uploads");
        x.linear(&w).expect("a product")
    };
    let mut kernel = String::new();
    let mut many = |n: usize| {
        let all: Vec<Tensor> = (0..n).map(|i| product(i as f32)).collect();
        let outs: Vec<&Tensor> = all.iter().collect();
        let mut made = session.record(&outs, &[]).expect("records");
        let launched = gpu.launched(&made.compiled.plan);
        let dispatches: usize = launched.iter().map(|l| l.launches.len()).sum();
        kernel = format!(
            "{dispatches} dispatches, {}",
            made.compiled.plan.steps[0].kernel_name
        );
        median(|| {
            made.replay().expect("runs");
            session.wait().expect("waits");
        })
    };
    // A weight is bound for writing too, so wgpu puts a barrier between two products that share it.
    chain(
        "products 128x512 @ 512x8 in a plan, one after another",
        &mut many,
    );
    println!("(the last line: {kernel})");
    let out = product(0.5);
    let mut made = session.record(&[&out], &[]).expect("records");
    let mut bytes = [0; 4];
    let buffer = made.outputs[0].buffer().expect("is there").clone();
    let read = median(|| {
        made.replay().expect("runs");
        session
            .backend()
            .download(&buffer, 4 * 1023, &mut bytes)
            .expect("reads");
    });
    line(
        "a product and one element of its result (\"waited\")",
        read,
        None,
    );
    let x = session
        .zeros(TensorType::f32([128, 512]), Role::Data)
        .expect("memory");
    let fed = median(|| {
        session.write(&x, &[1.0; 512 * 128]).expect("uploads");
        session.wait().expect("waits");
    });
    line("256 KiB written, and waited for", fed, None);
}
