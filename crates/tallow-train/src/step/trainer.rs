//! Trains one adapter, step by step, keeping one recording a batch length.
//! Invariant: [`Trainer::snapshot`] between two steps holds all that the next steps depend on, the data aside.
//! Absent on purpose: what to do about a loss that is not finite; the caller is told.
use super::*;
use crate::Error;
use std::collections::btree_map::Entry;

/// Parameters, moments and counters between two steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// Parameters `[P]`.
    pub params: Vec<f32>,
    /// First moments `[P]`.
    pub m: Vec<f32>,
    /// Second moments `[P]`, or none where the optimizer has none.
    pub v: Vec<f32>,
    /// Steps done.
    pub done: u64,
    /// Steps that changed the parameters.
    pub updates: u64,
}

/// The recordings of a step.
enum Recorded {
    /// One a shape.
    Whole(BTreeMap<[usize; 2], (Program, StepGraph)>),
    /// One a shape that adds, and one that applies.
    Split {
        sums: Sums,
        micro: BTreeMap<[usize; 2], (Program, MicroGraph)>,
        apply: Box<(Program, ApplyGraph)>,
    },
}

/// Trains one adapter.
pub struct Trainer {
    model: Model,
    adapter: Adapter,
    config: TrainConfig,
    optimizer: Optimizer,
    recorded: Recorded,
    done: u64,
    updates: u64,
}

impl Trainer {
    /// Starts with moments of 0. The adapter's parameters must be state.
    ///
    /// # Errors
    /// Settings that make no sense; no memory.
    pub fn new(model: &Model, adapter: &Adapter, config: &TrainConfig) -> Result<Self> {
        config.validate()?;
        let s = &model.session;
        let optimizer = Optimizer::new(s, adapter, config.optimizer)?;
        let recorded = match config.accumulate {
            1 => Recorded::Whole(BTreeMap::new()),
            _ => {
                let sums = Sums::new(s, adapter)?;
                let g = ApplyGraph::build(s, adapter, &optimizer, &sums, config.clip)?;
                let program = s.record(&[&g.loss, &g.norm], &g.updates)?;
                Recorded::Split {
                    sums,
                    micro: BTreeMap::new(),
                    apply: Box::new((program, g)),
                }
            }
        };
        let mut model = model.clone();
        model.recompute = config.checkpoint_layers;
        Ok(Trainer {
            model,
            adapter: adapter.clone(),
            config: config.clone(),
            optimizer,
            recorded,
            done: 0,
            updates: 0,
        })
    }

    /// The plan for a batch shape `[b, t]`, without allocating what it needs.
    ///
    /// # Errors
    /// A graph that cannot be planned.
    pub fn plan(&self, shape: [usize; 2]) -> Result<Compiled> {
        let (model, adapter) = (&self.model, &self.adapter);
        let shape = BatchShape {
            dims: shape,
            packed: self.config.packing,
        };
        match &self.recorded {
            Recorded::Whole(_) => {
                StepGraph::build(model, adapter, &self.optimizer, shape, self.config.clip)?
                    .plan(&model.session)
            }
            Recorded::Split { sums, .. } => {
                MicroGraph::build(model, adapter, sums, shape)?.plan(&model.session)
            }
        }
    }

    /// Makes the recording for a batch shape `[b, t]`; its memory, or `None` if it was there already.
    ///
    /// # Errors
    /// A graph that does not fit together; no memory.
    pub fn prepare(&mut self, shape: [usize; 2]) -> Result<Option<Memory>> {
        let (model, adapter, clip) = (&self.model, &self.adapter, self.config.clip);
        let s = &model.session;
        let full = BatchShape {
            dims: shape,
            packed: self.config.packing,
        };
        let program = match &mut self.recorded {
            Recorded::Whole(all) => match all.entry(shape) {
                Entry::Occupied(_) => return Ok(None),
                Entry::Vacant(place) => {
                    let g = StepGraph::build(model, adapter, &self.optimizer, full, clip)?;
                    let program = s.record(&[&g.loss, &g.norm], &g.updates)?;
                    &place.insert((program, g)).0
                }
            },
            Recorded::Split { sums, micro, .. } => match micro.entry(shape) {
                Entry::Occupied(_) => return Ok(None),
                Entry::Vacant(place) => {
                    let g = MicroGraph::build(model, adapter, sums, full)?;
                    let program = s.record(&[&g.loss], &g.updates)?;
                    &place.insert((program, g)).0
                }
            },
        };
        Ok(Some(program.compiled.plan.memory()))
    }

    /// One step at learning rate `lr` over `accumulate` batches, weighted by their targets. Where the result
    /// was not [`StepResult::updated`], parameters and moments are what they were.
    ///
    /// # Errors
    /// Another number of batches; a device that fails.
    pub fn step(&mut self, batches: &[Batch], lr: f64) -> Result<StepResult> {
        if batches.len() != self.config.accumulate {
            return Err(Error::Setting {
                name: "batches of a step",
                want: self.config.accumulate.to_string(),
                got: batches.len().to_string(),
            });
        }
        for b in batches {
            self.prepare([b.b, b.t])?;
        }
        let s = self.model.session.clone();
        self.optimizer
            .upload(&s, &self.config, lr, self.updates + 1)?;
        let counted: usize = batches.iter().map(|b| b.counted).sum();
        let inv = [(1.0 / counted.max(1) as f64) as f32];
        let mut bad_batch = None;
        let (program, inv_count) = match &mut self.recorded {
            Recorded::Whole(all) => {
                let b = &batches[0];
                let (program, g) = found(all, b);
                g.inputs.upload(&s, b)?;
                (program, &g.inv_count)
            }
            Recorded::Split { micro, apply, .. } => {
                for (i, b) in batches.iter().enumerate() {
                    let (program, g) = found(micro, b);
                    g.inputs.upload(&s, b)?;
                    program.replay()?;
                    let loss = one(&s, &program.outputs[0])?;
                    bad_batch = bad_batch.or((!loss.is_finite()).then_some(i));
                }
                (&mut apply.0, &apply.1.inv_count)
            }
        };
        s.write(inv_count, &inv)?;
        program.replay()?;
        let got = StepResult {
            loss: one(&s, &program.outputs[0])?,
            grad_norm: one(&s, &program.outputs[1])?,
            bad_batch,
        };
        self.done += 1;
        self.updates += u64::from(got.updated());
        Ok(got)
    }

    /// Steps done.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Recordings made, one a batch shape.
    pub fn recordings(&self) -> usize {
        self.plans().len()
    }

    /// The plan of each batch shape that has come up, the largest last.
    pub fn plans(&self) -> Vec<([usize; 2], &Compiled)> {
        match &self.recorded {
            Recorded::Whole(all) => all.iter().map(|(k, p)| (*k, &p.0.compiled)).collect(),
            Recorded::Split { micro, .. } => {
                micro.iter().map(|(k, p)| (*k, &p.0.compiled)).collect()
            }
        }
    }

    /// Predicted memory of the largest recording, in bytes; all share weights, parameters and moments.
    pub fn memory_bytes(&self) -> usize {
        let plans = self.plans().into_iter();
        plans
            .map(|(_, c)| c.plan.memory().total())
            .max()
            .unwrap_or(0)
    }

    /// Everything to go on from here. Waits for the device.
    ///
    /// # Errors
    /// A device that fails.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let s = &self.model.session;
        let read = |t: &Tensor| s.read(t);
        Ok(Snapshot {
            params: read(&self.adapter.params)?,
            m: read(&self.optimizer.m)?,
            v: match &self.optimizer.v {
                Some(v) => read(v)?,
                None => vec![],
            },
            done: self.done,
            updates: self.updates,
        })
    }

    /// Goes on from a snapshot.
    ///
    /// # Errors
    /// A snapshot of another adapter or optimizer.
    pub fn restore(&mut self, from: &Snapshot) -> Result<()> {
        let s = &self.model.session;
        s.write(&self.adapter.params, &from.params)?;
        s.write(&self.optimizer.m, &from.m)?;
        if let Some(v) = &self.optimizer.v {
            s.write(v, &from.v)?;
        }
        (self.done, self.updates) = (from.done, from.updates);
        Ok(())
    }
}

/// The recording of a batch that was prepared.
fn found<'a, G>(
    all: &'a mut BTreeMap<[usize; 2], (Program, G)>,
    b: &Batch,
) -> &'a mut (Program, G) {
    all.get_mut(&[b.b, b.t])
        .expect("`step` prepares its batches first: bug in tallow")
}

fn one(s: &Session, t: &Tensor) -> Result<f32> {
    let mut value = [0.0];
    s.read_into(t, &mut value)?;
    Ok(value[0])
}
