//! A plan frozen into one CUDA graph.
//! Invariant: every address a node holds lies inside a buffer that the recording keeps alive, at an offset that
//! `Plan::verify` checked; a replay allocates nothing and waits for nothing.
//! Absent on purpose: arguments. What changes between replays is uploaded into a bound buffer.
use crate::{
    device::Cuda,
    driver::Card,
    error, fused,
    graph::Graph,
    launch::{Bound, Job, Offer, Places},
};
use std::sync::Arc;
use tallow_core::{
    Error, Result,
    backend::{Backend, Bindings, Buffer, Recording},
    plan::{Place, Plan, Span, Step},
};

pub(crate) struct CudaRecording {
    card: Arc<Card>,
    device: String,
    /// The launches of each step.
    steps: Vec<Vec<Bound>>,
    graph: Graph,
    _keep: (Bindings, Buffer, Buffer),
}

/// Address of each span of a step.
struct Addresses<'a> {
    bind: &'a Bindings,
    arena: &'a Buffer,
}

impl Addresses<'_> {
    fn at(&self, s: &Span) -> Result<u64> {
        let missing = || Error::size("binding", 1, 0, "buffers");
        let b = match s.place {
            Place::Input(i) => self.bind.inputs.get(i as usize).ok_or_else(missing)?,
            Place::Prepared(i) => self.bind.prepared.get(i as usize).ok_or_else(missing)?,
            Place::Output(i) => self.bind.outputs.get(i as usize).ok_or_else(missing)?,
            Place::Arena => self.arena,
        };
        if s.offset
            .checked_add(s.bytes)
            .is_none_or(|end| end > b.bytes)
        {
            return Err(Error::size(
                "operand of a step",
                b.bytes,
                s.offset.saturating_add(s.bytes),
                "bytes",
            ));
        }
        Ok(b.raw + s.offset as u64)
    }
    fn step(&self, cuda: &Cuda, s: &Step, jobs: &[Job], own: u64) -> Result<Vec<Bound>> {
        let reads = s
            .reads
            .iter()
            .map(|r| self.at(r))
            .collect::<Result<Vec<_>>>()?;
        let write = |w: &Option<Span>| w.as_ref().map_or(Ok(0), |w| self.at(w));
        let writes = s.writes.iter().map(write).collect::<Result<Vec<_>>>()?;
        let scratch = s.workspace.as_ref().map_or(Ok(0), |w| self.at(w))?;
        let places = Places {
            reads: &reads,
            writes: &writes,
            scratch,
            own,
        };
        let needed = jobs.iter().filter(|j| places.need(j));
        let bound = needed.map(|job| {
            // SAFETY: the spans were checked against their buffers, which the recording keeps.
            unsafe { Bound::new(&cuda.card, &cuda.blas, job, &places) }.map_err(|e| cuda.error(e))
        });
        bound.collect()
    }
}

impl CudaRecording {
    pub(crate) fn new(cuda: &Cuda, plan: &Plan, bind: Bindings) -> Result<Self> {
        let arena = cuda.buffer(plan.arena_bytes)?;
        let offers: Vec<Offer> = plan.steps.iter().map(|s| cuda.offer(s.kernel)).collect();
        let places = Addresses {
            bind: &bind,
            arena: &arena,
        };
        let fused = fused::fuse(&cuda.target(), plan, &offers, &|s| places.at(s).ok());
        let own = cuda.buffer(fused.own_bytes)?;
        for table in &fused.tables {
            cuda.upload(&own, table.at, &table.bytes(own.raw))?;
        }
        let offered = offers.iter().enumerate();
        let jobs: Vec<&[Job]> = offered
            .map(|(i, o)| fused.jobs.get(&i).unwrap_or(&o.jobs).as_slice())
            .collect();
        cuda.load(jobs.iter().copied().flatten())?;
        let steps = plan.steps.iter().zip(jobs);
        let steps = steps
            .map(|(s, jobs)| places.step(cuda, s, jobs, own.raw))
            .collect::<Result<Vec<_>>>()?;
        let launches = steps.iter().map(Vec::len).sum();
        let graph = Graph::record(&cuda.card, launches, |stream| {
            steps.iter().flatten().try_for_each(|b| {
                // SAFETY: addresses checked above; buffers kept below.
                unsafe { b.launch(stream) }
            })
        });
        Ok(CudaRecording {
            card: cuda.card.clone(),
            device: cuda.name().to_owned(),
            steps,
            graph: graph.map_err(|e| cuda.error(e))?,
            _keep: (bind, arena, own),
        })
    }
    fn timed(&self) -> error::Result<Vec<f64>> {
        let events = (0..=self.steps.len()).map(|_| self.card.event(true));
        let events = events.collect::<error::Result<Vec<_>>>()?;
        events[0].record()?;
        for (launches, after) in self.steps.iter().zip(&events[1..]) {
            for b in launches {
                // SAFETY: as in `new`; `self` keeps the buffers.
                unsafe { b.launch(self.card.stream)? };
            }
            after.record()?;
        }
        self.card.wait()?;
        events.windows(2).map(|w| w[0].seconds_to(&w[1])).collect()
    }
}

impl Recording for CudaRecording {
    fn replay(&mut self) -> Result<()> {
        self.graph.launch().map_err(|e| e.on(&self.device))
    }
    fn replay_timed(&mut self) -> Result<Vec<f64>> {
        self.timed().map_err(|e| e.on(&self.device))
    }
}
