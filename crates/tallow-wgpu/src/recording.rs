//! A plan frozen into resolved pipelines, bind groups and grids.
//! Invariant: every window bound lies inside a buffer that the recording keeps alive, at an offset that `Plan::verify`
//! checked; a replay allocates no memory on the GPU and waits for nothing.
//! Absent on purpose: arguments. What changes between replays is uploaded into a bound buffer.
use crate::{
    ahead::{Asker, Copy},
    device::Wgpu,
    error::{Error, Result},
    fused::{self, Group},
    glue::Gemm,
    gpu::{ALIGN, Gpu},
    launch::{Arg, Kernel, Offer},
    memory::Memory,
    transfer::{self, Landing},
};
use std::{ops::Range, sync::Arc};
use tallow_core::{
    backend::{Bindings, Buffer, Recording},
    plan::{Place, Plan, Span, Step},
};

/// Estimated seconds of work in one submission, so that no display or watchdog waits long.
const BUDGET_S: f64 = 0.05;
/// Dispatches in one submission.
const MOST: usize = 4096;

/// Where an operand, a result or scratch lies.
#[derive(Clone, Copy)]
pub(crate) struct Window<'a> {
    pub(crate) buffer: &'a Memory,
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
}

impl Window<'_> {
    /// `bytes` from byte `at` of it on.
    fn part(self, [at, bytes]: [usize; 2]) -> Self {
        Window {
            offset: self.offset + at,
            bytes,
            ..self
        }
    }
}

/// Where everything of one step lies.
pub(crate) struct Places<'a> {
    pub(crate) reads: Vec<Window<'a>>,
    pub(crate) writes: Vec<Option<Window<'a>>>,
    pub(crate) scratch: Option<Window<'a>>,
}

impl<'a> Places<'a> {
    /// Is `k` needed with these places?
    pub(crate) fn need(&self, k: &Kernel) -> bool {
        let Some((operand, result)) = k.unless_same else {
            return true;
        };
        let (r, w) = (self.reads.get(operand), self.writes.get(result));
        match (r, w) {
            (Some(r), Some(Some(w))) => **r.buffer != **w.buffer || r.offset != w.offset,
            _ => true,
        }
    }
    fn window(&self, a: &Arg) -> Option<Window<'a>> {
        match a {
            Arg::Read { operand, .. } => self.reads.get(*operand).copied(),
            Arg::Part {
                operand, at, bytes, ..
            } => self.reads.get(*operand).map(|r| r.part([*at, *bytes])),
            Arg::Write { result, part, .. } => {
                let whole = self.writes.get(*result).copied().flatten()?;
                Some(part.map_or(whole, |p| whole.part(p)))
            }
            Arg::Scratch { at, bytes, .. } => self.scratch.map(|s| s.part([*at, *bytes])),
            Arg::U32(..) | Arg::F32(..) | Arg::Absent(_) => None,
        }
    }
}

/// A dispatch with its buffers.
pub(crate) struct Bound {
    pipeline: wgpu::ComputePipeline,
    group: wgpu::BindGroup,
    /// Empty where they come in a uniform buffer.
    numbers: Vec<u8>,
    grid: [u32; 3],
}

impl Bound {
    pub(crate) fn new(gpu: &Gpu, k: &Kernel, places: &Places<'_>) -> Result<Self> {
        let (mut numbers, mut windows) = (vec![], vec![]);
        for a in &k.args {
            let word = match a {
                Arg::U32(_, v) => *v,
                Arg::F32(_, v) => v.to_bits(),
                Arg::Absent(_) => continue,
                Arg::Read { name, ty, .. }
                | Arg::Part { name, ty, .. }
                | Arg::Write { name, ty, .. }
                | Arg::Scratch { name, ty, .. } => {
                    let missing = || Error::Refused {
                        doing: "binding a kernel",
                        why: format!("nothing to bind as {name} of {} (bug in tallow)", k.entry),
                    };
                    let w = places.window(a).ok_or_else(missing)?;
                    let start = w.offset / ALIGN * ALIGN;
                    windows.push(bind(gpu, k, name, w, start)?);
                    ((w.offset - start) / ty.dtype().bytes()) as u32
                }
            };
            numbers.extend(word.to_le_bytes());
        }
        let uniform = k.uniform.then(|| uniform(gpu, &numbers)).transpose()?;
        if let Some(u) = &uniform {
            numbers.clear();
            windows.push(u.as_entire_buffer_binding());
        }
        let entry = |(i, w)| wgpu::BindGroupEntry {
            binding: i as u32,
            resource: wgpu::BindingResource::Buffer(w),
        };
        let entries: Vec<_> = windows.into_iter().enumerate().map(entry).collect();
        let layout = gpu.layout(k);
        let how = wgpu::BindGroupDescriptor {
            label: None,
            layout: &layout.group,
            entries: &entries,
        };
        Ok(Bound {
            pipeline: gpu.pipeline(k, &layout)?,
            group: gpu.device.create_bind_group(&how),
            numbers,
            grid: k.grid,
        })
    }
    pub(crate) fn encode(&self, pass: &mut wgpu::ComputePass<'_>) {
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.group, &[]);
        if !self.numbers.is_empty() {
            pass.set_immediates(0, &self.numbers);
        }
        let [x, y, z] = self.grid;
        pass.dispatch_workgroups(x, y, z);
    }
}

/// `w` as a binding that begins at `start`. Sixteen bytes are read at once: its end is rounded up to that.
fn bind<'a>(
    gpu: &Gpu,
    k: &Kernel,
    name: &str,
    w: Window<'a>,
    start: usize,
) -> Result<wgpu::BufferBinding<'a>> {
    let end = (w.offset + w.bytes.max(1)).next_multiple_of(16);
    let bytes = (end - start) as u64;
    if bytes > gpu.limits.max_storage_buffer_binding_size {
        return Err(Error::Binding {
            what: format!("operand {name} of {}", k.entry),
            bytes,
            most: gpu.limits.max_storage_buffer_binding_size,
        });
    }
    Ok(wgpu::BufferBinding {
        buffer: w.buffer,
        offset: start as u64,
        size: std::num::NonZero::new(bytes),
    })
}

/// A buffer that holds the numbers of one dispatch.
fn uniform(gpu: &Gpu, numbers: &[u8]) -> Result<wgpu::Buffer> {
    let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
    let b = gpu.buffer(numbers.len(), usage)?;
    gpu.write(&b, 0, numbers);
    Ok(b)
}

/// Part of a step, with its buffers.
enum Work {
    Dispatch(Bound),
    #[cfg(target_os = "macos")]
    Gemm(crate::mps::BoundGemm),
}

impl Work {
    /// Is it encoded into a compute pass?
    fn is_dispatch(&self) -> bool {
        match self {
            Work::Dispatch(_) => true,
            #[cfg(target_os = "macos")]
            Work::Gemm(_) => false,
        }
    }
}

pub(crate) struct WgpuRecording {
    gpu: Arc<Gpu>,
    device: String,
    works: Vec<Work>,
    /// Which of them belong to each step.
    steps: Vec<Range<usize>>,
    /// Which of them are handed in together.
    submissions: Vec<Range<usize>>,
    asker: Asker,
    _keep: (Bindings, [Buffer; 2]),
}

/// Where each span of a step lies.
struct Spans<'a> {
    bind: &'a Bindings,
    arena: &'a Buffer,
}

impl<'a> Spans<'a> {
    fn at(&self, s: &Span) -> tallow_core::Result<Window<'a>> {
        let missing = || tallow_core::Error::size("binding", 1, 0, "buffers");
        let b = match s.place {
            Place::Input(i) => self.bind.inputs.get(i as usize).ok_or_else(missing)?,
            Place::Prepared(i) => self.bind.prepared.get(i as usize).ok_or_else(missing)?,
            Place::Output(i) => self.bind.outputs.get(i as usize).ok_or_else(missing)?,
            Place::Arena => self.arena,
        };
        crate::device::window(b, s.offset, s.bytes, "operand of a step")
    }
    fn step(&self, s: &Step) -> tallow_core::Result<Places<'a>> {
        let reads = s.reads.iter().map(|r| self.at(r));
        let write = |w: &Option<Span>| w.as_ref().map(|w| self.at(w)).transpose();
        Ok(Places {
            reads: reads.collect::<tallow_core::Result<_>>()?,
            writes: s
                .writes
                .iter()
                .map(write)
                .collect::<tallow_core::Result<_>>()?,
            scratch: s.workspace.as_ref().map(|w| self.at(w)).transpose()?,
        })
    }
}

impl<'a> Spans<'a> {
    /// Steps that run together, with scratch of the recording's own.
    fn group(&self, plan: &Plan, g: &Group, own: &'a Buffer) -> tallow_core::Result<Places<'a>> {
        let mut all = Places {
            reads: vec![],
            writes: vec![],
            scratch: match g.scratch {
                0 => None,
                n => Some(crate::device::window(own, 0, n, "scratch")?),
            },
        };
        for i in &g.order {
            let one = self.step(&plan.steps[*i])?;
            all.reads.extend(one.reads);
            all.writes.extend(one.writes);
        }
        Ok(all)
    }
}

/// What a step does: dispatches, or a product of Apple's.
fn bind_all(gpu: &Gpu, o: &Offer, jobs: &[Kernel], places: &Places<'_>) -> Result<Vec<Work>> {
    if let Some(g) = &o.gemm {
        return gemm(gpu, g, places).map(|w| vec![w]);
    }
    let needed = jobs.iter().filter(|k| places.need(k));
    let bound = needed.map(|k| Bound::new(gpu, k, places).map(Work::Dispatch));
    bound.collect()
}

#[cfg(target_os = "macos")]
fn gemm(gpu: &Gpu, g: &Gemm, places: &Places<'_>) -> Result<Work> {
    crate::mps::BoundGemm::new(gpu, g, places).map(Work::Gemm)
}

#[cfg(not(target_os = "macos"))]
fn gemm(_: &Gpu, _: &Gemm, _: &Places<'_>) -> Result<Work> {
    Err(Error::Refused {
        doing: "binding a product of MPS",
        why: "it was offered on a system without it (bug in tallow)".to_owned(),
    })
}

/// Encodes dispatches.
fn encode(works: &[Work], pass: &mut wgpu::ComputePass<'_>) {
    for w in works {
        match w {
            Work::Dispatch(b) => b.encode(pass),
            #[cfg(target_os = "macos")]
            Work::Gemm(_) => {}
        }
    }
}

/// Steps cut where a submission has taken enough of the estimated time, or of dispatches.
fn submissions<'a>(steps: impl Iterator<Item = (&'a Range<usize>, f64)>) -> Vec<Range<usize>> {
    let (mut all, mut cost): (Vec<Range<usize>>, f64) = (vec![], 0.0);
    for (step, seconds) in steps {
        match all.last_mut() {
            Some(last) if cost < BUDGET_S && last.len() < MOST => last.end = step.end,
            _ => {
                all.push(step.clone());
                cost = 0.0;
            }
        }
        cost += seconds;
    }
    all
}

impl WgpuRecording {
    pub(crate) fn new(wgpu: &Wgpu, plan: &Plan, bind: Bindings) -> tallow_core::Result<Self> {
        let arena = wgpu.buffer(plan.arena_bytes)?;
        let spans = Spans {
            bind: &bind,
            arena: &arena,
        };
        let offers = wgpu.offers(plan);
        let groups = fused::groups(wgpu.target(), plan, &offers);
        let bytes = groups.iter().map(|g| g.scratch).max().unwrap_or(0);
        let own = wgpu.buffer(bytes)?;
        let (mut works, mut steps) = (vec![], vec![]);
        for (i, (s, offer)) in plan.steps.iter().zip(&offers).enumerate() {
            let group = groups.iter().find(|g| (g.first..=g.last).contains(&i));
            let first = works.len();
            let made = match group {
                None => bind_all(&wgpu.gpu, offer, &offer.jobs, &spans.step(s)?),
                Some(g) if g.last == i => {
                    bind_all(&wgpu.gpu, offer, &g.jobs, &spans.group(plan, g, &own)?)
                }
                Some(_) => Ok(vec![]),
            };
            works.extend(made.map_err(|e| wgpu.error(e))?);
            steps.push(first..works.len());
        }
        wgpu.gpu.check().map_err(|e| wgpu.error(e))?;
        wgpu.gpu.keep_kernels();
        let costs = plan.steps.iter().map(|s| s.cost);
        Ok(WgpuRecording {
            asker: Asker::new(&wgpu.gpu),
            gpu: wgpu.gpu.clone(),
            device: wgpu.name().to_owned(),
            works,
            submissions: submissions(steps.iter().zip(costs)),
            steps,
            _keep: (bind, [arena, own]),
        })
    }
    /// What hands in these works, in order, and copies `behind` them.
    fn commands(
        &self,
        range: Range<usize>,
        behind: Option<&Copy>,
    ) -> Result<Vec<wgpu::CommandBuffer>> {
        let mut all = vec![];
        let runs = self.works[range].chunk_by(|a, b| a.is_dispatch() && b.is_dispatch());
        let mut behind = behind;
        let mut left = runs.clone().count();
        for run in runs {
            left -= 1;
            all.push(match &run[0] {
                Work::Dispatch(_) => {
                    let mut encoder = self.gpu.encoder();
                    encode(run, &mut encoder.begin_compute_pass(&Default::default()));
                    if let Some(c) = behind.take_if(|_| left == 0) {
                        c.encode(&mut encoder);
                    }
                    encoder.finish()
                }
                #[cfg(target_os = "macos")]
                Work::Gemm(g) => g.encode(&self.gpu)?,
            });
        }
        if let Some(c) = behind {
            let mut encoder = self.gpu.encoder();
            c.encode(&mut encoder);
            all.push(encoder.finish());
        }
        Ok(all)
    }
    /// Asks for all steps, in as few submissions as the budget allows.
    fn ask(&self) -> Result<()> {
        let start = std::time::Instant::now();
        let copy = self.asker.copy()?;
        if let Some((last, first)) = self.submissions.split_last() {
            for range in first {
                self.gpu.submit(self.commands(range.clone(), None)?)?;
            }
            let commands = self.commands(last.clone(), copy.as_ref())?;
            let before = self.gpu.changes();
            self.gpu.submit(commands)?;
            self.asker.asked(before, copy.is_some());
        }
        tracing::trace!(
            "{} dispatches in {} submissions, asked for in {} µs",
            self.works.len(),
            self.submissions.len(),
            start.elapsed().as_micros()
        );
        Ok(())
    }
    /// Seconds of each step by the GPU's own clock.
    fn by_clock(&self) -> Result<Vec<f64>> {
        let mut all = vec![];
        for steps in self.steps.chunks(wgpu::QUERY_SET_MAX_QUERIES as usize / 2) {
            let (count, bytes) = (steps.len() as u32 * 2, steps.len() * 16);
            let set = self.gpu.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: None,
                ty: wgpu::QueryType::Timestamp,
                count,
            });
            let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
            let ticks = self.gpu.buffer(bytes, usage)?;
            let mut encoder = self.gpu.encoder();
            for (i, range) in steps.iter().enumerate() {
                let writes = wgpu::ComputePassTimestampWrites {
                    query_set: &set,
                    beginning_of_pass_write_index: Some(i as u32 * 2),
                    end_of_pass_write_index: Some(i as u32 * 2 + 1),
                };
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                    label: None,
                    timestamp_writes: Some(writes),
                });
                encode(&self.works[range.clone()], &mut pass);
            }
            encoder.resolve_query_set(&set, 0..count, &ticks, 0);
            self.gpu.submit([encoder.finish()])?;
            let mut words = vec![0; bytes];
            transfer::download(&self.gpu, &Landing::default(), &ticks, 0, &mut words)?;
            let tick = |c: &[u8]| c.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
            let period = f64::from(self.gpu.queue.get_timestamp_period()) * 1e-9;
            let one = |c: &[u8]| tick(&c[8..]).saturating_sub(tick(&c[..8])) as f64 * period;
            all.extend(words.chunks_exact(16).map(one));
        }
        Ok(all)
    }
    /// Seconds of each step, each waited for. Includes what a submission costs.
    fn waited(&self) -> Result<Vec<f64>> {
        self.gpu.wait()?;
        let one = |range: &Range<usize>| {
            let start = std::time::Instant::now();
            self.gpu.submit(self.commands(range.clone(), None)?)?;
            self.gpu.wait()?;
            Ok(start.elapsed().as_secs_f64())
        };
        self.steps.iter().map(one).collect()
    }
}

impl Recording for WgpuRecording {
    fn replay(&mut self) -> tallow_core::Result<()> {
        self.ask().map_err(|e| e.on(&self.device))
    }
    fn replay_timed(&mut self) -> tallow_core::Result<Vec<f64>> {
        let clock = self.gpu.features.contains(wgpu::Features::TIMESTAMP_QUERY);
        // In software the GPU's clock counts compiling too; and a product of Apple's is in no pass.
        let software = crate::adapter::is_software(&self.gpu.info);
        let all = self.works.iter().all(Work::is_dispatch);
        let timed = match clock && !software && all {
            true => self.by_clock(),
            false => self.waited(),
        };
        timed.map_err(|e| e.on(&self.device))
    }
}

/// What Apple's products still read or write is no business of wgpu's, so it must not go before they are done.
#[cfg(target_os = "macos")]
impl Drop for WgpuRecording {
    fn drop(&mut self) {
        if !self.works.iter().all(Work::is_dispatch)
            && let Err(e) = self.gpu.wait()
        {
            tracing::warn!("{}: {e}", self.device);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_work_is_handed_in_piece_by_piece() {
        let steps = [0..2, 2..2, 2..5, 5..6];
        let ends = |costs: [f64; 4]| -> Vec<usize> {
            let all = submissions(steps.iter().zip(costs));
            assert!(all.windows(2).all(|w| w[0].end == w[1].start) && all[0].start == 0);
            all.iter().map(|r| r.end).collect()
        };
        assert_eq!(ends([0.0; 4]), [6]);
        assert_eq!(ends([0.06, 0.0, 0.06, 0.0]), [2, 5, 6]);
        assert_eq!(ends([0.03; 4]), [2, 6]);
    }
}
