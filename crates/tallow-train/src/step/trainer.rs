//! Trains one adapter, or several side by side, step by step, keeping one recording a batch length.
//! Invariant: [`Trainer::snapshot`] between two steps holds all that an adapter's next steps depend on, the data
//! aside; no adapter's numbers depend on another's.
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

/// One of the adapters, with its optimizer and its counters.
struct Member {
    adapter: Adapter,
    config: TrainConfig,
    optimizer: Optimizer,
    done: u64,
    updates: u64,
}

/// What an adapter is given in a step.
#[derive(Clone, Copy, Debug)]
pub struct Turn<'a> {
    /// As many batches as a step accumulates.
    pub batches: &'a [Batch],
    /// Learning rate.
    pub lr: f64,
}

/// Trains adapters on one model.
pub struct Trainer {
    model: Model,
    members: Vec<Member>,
    recorded: Recorded,
    /// The batches of all, one after another, where there are several.
    stacked: Batch,
}

impl Trainer {
    /// Starts with moments of 0. The adapter's parameters must be state.
    ///
    /// # Errors
    /// Settings that make no sense; no memory.
    pub fn new(model: &Model, adapter: &Adapter, config: &TrainConfig) -> Result<Self> {
        Self::side_by_side(model, &[(adapter, config)])
    }

    /// Several adapters in the same passes over one model, each with an equal share of the rows.
    ///
    /// # Errors
    /// As [`Trainer::new`]; no adapter, or settings of the passes themselves that differ.
    pub fn side_by_side(model: &Model, all: &[(&Adapter, &TrainConfig)]) -> Result<Self> {
        let s = &model.session;
        let mut members = vec![];
        for (adapter, config) in all {
            config.validate()?;
            config.check_beside(all[0].1)?;
            members.push(Member {
                optimizer: Optimizer::new(s, adapter, config.optimizer)?,
                adapter: adapter.for_training(s)?,
                config: (*config).clone(),
                done: 0,
                updates: 0,
            });
        }
        let Some((_, first)) = all.first() else {
            return Err(Error::Setting {
                name: "adapters",
                want: "one or more to train".into(),
                got: "none".into(),
            });
        };
        let recorded = match first.accumulate {
            1 => Recorded::Whole(BTreeMap::new()),
            _ => {
                let sums = Sums::new(s, &trained(&members))?;
                let g = ApplyGraph::build(s, &trained(&members), &sums)?;
                let program = s.record(&[&g.losses, &g.norms], &g.updates)?;
                Recorded::Split {
                    sums,
                    micro: BTreeMap::new(),
                    apply: Box::new((program, g)),
                }
            }
        };
        let mut model = model.clone();
        model.recompute = first.checkpoint_layers;
        Ok(Trainer {
            model,
            members,
            recorded,
            stacked: Batch::default(),
        })
    }

    /// From now on plans compute cheap values again instead of keeping them. Results stay what they were.
    pub(crate) fn spare(&mut self) {
        self.model.session = self.model.session.sparing();
    }

    /// The settings of the passes, which all share.
    fn config(&self) -> &TrainConfig {
        &self.members[0].config
    }

    fn shape(&self, dims: [usize; 2]) -> BatchShape {
        let packed = self.config().packing;
        BatchShape { dims, packed }
    }

    /// Where it computes.
    pub fn session(&self) -> &Session {
        &self.model.session
    }

    /// The plan for batches of `[b, t]` of each adapter, without allocating what it needs.
    ///
    /// # Errors
    /// A graph that cannot be planned.
    pub fn plan(&self, shape: [usize; 2]) -> Result<Compiled> {
        let (model, all, shape) = (&self.model, trained(&self.members), self.shape(shape));
        match &self.recorded {
            Recorded::Whole(_) => StepGraph::build(model, &all, shape)?.plan(&model.session),
            Recorded::Split { sums, .. } => {
                MicroGraph::build(model, &all, sums, shape)?.plan(&model.session)
            }
        }
    }

    /// Makes the recording for batches of `[b, t]` of each adapter; its memory, or `None` if it was there already.
    ///
    /// # Errors
    /// A graph that does not fit together; no memory.
    pub fn prepare(&mut self, shape: [usize; 2]) -> Result<Option<Memory>> {
        let full = self.shape(shape);
        let (model, s) = (&self.model, &self.model.session);
        let program = match &mut self.recorded {
            Recorded::Whole(all) => match all.entry(shape) {
                Entry::Occupied(_) => return Ok(None),
                Entry::Vacant(place) => {
                    let g = StepGraph::build(model, &trained(&self.members), full)?;
                    let program = s.record(&[&g.losses, &g.norms], &g.updates)?;
                    &place.insert((program, g)).0
                }
            },
            Recorded::Split { sums, micro, .. } => match micro.entry(shape) {
                Entry::Occupied(_) => return Ok(None),
                Entry::Vacant(place) => {
                    let g = MicroGraph::build(model, &trained(&self.members), sums, full)?;
                    let program = s.record(&[&g.losses], &g.updates)?;
                    &place.insert((program, g)).0
                }
            },
        };
        Ok(Some(program.compiled.plan.memory()))
    }

    /// One step of the only adapter at learning rate `lr` over `accumulate` batches, weighted by their targets. Where
    /// the result was not [`StepResult::updated`], parameters and moments are what they were.
    ///
    /// # Errors
    /// Several adapters, another number of batches; a device that fails.
    pub fn step(&mut self, batches: &[Batch], lr: f64) -> Result<StepResult> {
        let all = self.step_all(&[Some(Turn { batches, lr })])?;
        Ok(all[0].expect("an adapter with a turn has a result (bug in tallow)"))
    }

    /// The shape `[b, t]` that batch `i` of every turn is padded to.
    fn common(turns: &[Option<Turn<'_>>], i: usize) -> [usize; 2] {
        let all = turns.iter().flatten().map(|t| &t.batches[i]);
        all.fold([0, 0], |[b, t], x| [b.max(x.b), t.max(x.t)])
    }

    /// The shapes of the batches of a step, as [`Trainer::prepare`] takes them.
    ///
    /// # Errors
    /// Another number of turns or batches.
    pub fn shapes(&self, turns: &[Option<Turn<'_>>]) -> Result<Vec<[usize; 2]>> {
        let n = self.config().accumulate;
        let setting = |name, want: usize, got: usize| {
            let (want, got) = (want.to_string(), got.to_string());
            Err(Error::Setting { name, want, got })
        };
        if turns.len() != self.members.len() {
            return setting("turns of a step", self.members.len(), turns.len());
        }
        match turns.iter().flatten().find(|t| t.batches.len() != n) {
            Some(t) => setting("batches of a step", n, t.batches.len()),
            None => Ok((0..n).map(|i| Self::common(turns, i)).collect()),
        }
    }

    /// One step of every adapter that has a turn; the others stay as they are.
    ///
    /// # Errors
    /// Another number of turns or batches; a device that fails.
    pub fn step_all(&mut self, turns: &[Option<Turn<'_>>]) -> Result<Vec<Option<StepResult>>> {
        let shapes = self.shapes(turns)?;
        for shape in &shapes {
            self.prepare(*shape)?;
        }
        let s = self.model.session.clone();
        let mut inv = vec![0.0; turns.len()];
        for ((m, turn), inv) in self.members.iter().zip(turns).zip(&mut inv) {
            match turn {
                None => m.optimizer.idle(&s)?,
                Some(Turn { batches, lr }) => {
                    m.optimizer.upload(&s, &m.config, *lr, m.updates + 1)?;
                    let counted: usize = batches.iter().map(|b| b.counted).sum();
                    *inv = (1.0 / counted.max(1) as f64) as f32;
                }
            }
        }
        let mut bad = vec![None; turns.len()];
        let mut losses = vec![0.0; turns.len()];
        let (stacked, members) = (&mut self.stacked, &self.members);
        let (program, inv_counts) = match &mut self.recorded {
            Recorded::Whole(all) => {
                let (program, g) = found(all, shapes[0]);
                g.inputs
                    .upload(&s, together(stacked, turns, 0, shapes[0])?)?;
                draw(&s, members, 0)?;
                (program, &g.inv_counts)
            }
            Recorded::Split { micro, apply, .. } => {
                for (i, shape) in shapes.iter().enumerate() {
                    let (program, g) = found(micro, *shape);
                    g.inputs.upload(&s, together(stacked, turns, i, *shape)?)?;
                    draw(&s, members, i)?;
                    program.replay()?;
                    s.read_into(&program.outputs[0], &mut losses)?;
                    for (bad, loss) in bad.iter_mut().zip(&losses) {
                        *bad = bad.or((!loss.is_finite()).then_some(i));
                    }
                }
                (&mut apply.0, &apply.1.inv_counts)
            }
        };
        s.write(inv_counts, &inv)?;
        program.replay()?;
        let mut norms = vec![0.0; turns.len()];
        s.read_into(&program.outputs[0], &mut losses)?;
        s.read_into(&program.outputs[1], &mut norms)?;
        let mut results = vec![];
        for (i, m) in self.members.iter_mut().enumerate() {
            let got = turns[i].map(|_| StepResult {
                loss: losses[i],
                grad_norm: norms[i],
                bad_batch: bad[i],
            });
            m.done += u64::from(got.is_some());
            m.updates += u64::from(got.is_some_and(|g| g.updated()));
            results.push(got);
        }
        Ok(results)
    }

    /// Adapters trained.
    pub fn members(&self) -> usize {
        self.members.len()
    }

    /// Steps that adapter `member` has done.
    pub fn done(&self, member: usize) -> u64 {
        self.members[member].done
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

    /// Everything for adapter `member` to go on from here. Waits for the device.
    ///
    /// # Errors
    /// A device that fails.
    pub fn snapshot(&self, member: usize) -> Result<Snapshot> {
        let (m, s) = (&self.members[member], &self.model.session);
        let read = |t: &Tensor| s.read(t);
        Ok(Snapshot {
            params: read(&m.adapter.params)?,
            m: read(&m.optimizer.m)?,
            v: match &m.optimizer.v {
                Some(v) => read(v)?,
                None => vec![],
            },
            done: m.done,
            updates: m.updates,
        })
    }

    /// Adapter `member` goes on from a snapshot.
    ///
    /// # Errors
    /// A snapshot of another adapter or optimizer.
    pub fn restore(&mut self, member: usize, from: &Snapshot) -> Result<()> {
        let (m, s) = (&mut self.members[member], &self.model.session);
        s.write(&m.adapter.params, &from.params)?;
        s.write(&m.optimizer.m, &from.m)?;
        if let Some(v) = &m.optimizer.v {
            s.write(v, &from.v)?;
        }
        (m.done, m.updates) = (from.done, from.updates);
        Ok(())
    }
}

fn trained(members: &[Member]) -> Vec<Trained<'_>> {
    let all = members.iter();
    all.map(|m| Trained {
        adapter: &m.adapter,
        optimizer: &m.optimizer,
        clip: m.config.clip,
    })
    .collect()
}

/// Batch `i` of a step: the only one, or those of all turns, one after another.
fn together<'a>(
    stacked: &'a mut Batch,
    turns: &[Option<Turn<'a>>],
    i: usize,
    shape: [usize; 2],
) -> Result<&'a Batch> {
    if let [Some(only)] = turns {
        return Ok(&only.batches[i]);
    }
    stacked.stack(shape, turns.iter().map(|t| Some(&t.as_ref()?.batches[i])))?;
    Ok(stacked)
}

/// Chooses what is dropped in batch `i`: every batch drops other inputs, the same ones whenever it is computed.
fn draw(s: &Session, members: &[Member], i: usize) -> Result<()> {
    for m in members {
        let drawn = m.done * m.config.accumulate as u64 + i as u64 + 1;
        m.adapter.draw(s, m.config.seed, drawn)?;
    }
    Ok(())
}

/// The recording of a shape that was prepared.
fn found<G>(all: &mut BTreeMap<[usize; 2], (Program, G)>, shape: [usize; 2]) -> &mut (Program, G) {
    all.get_mut(&shape)
        .expect("a step prepares its batches first: bug in tallow")
}
