//! The loop of a run, or of several side by side: steps, evaluations, checkpoints, and how they end.
//! Invariant: what is due after a step (evaluation, then checkpoint) is decided from counters that the checkpoint
//! holds, so a resumed run does what the first one would have done next.
//! Absent on purpose: how a run begins; see `run.rs` and `resume.rs`.
use super::*;
use crate::{
    batch::Batch,
    checkpoint::{About, Checkpoint},
    config::to_yaml,
    step::{StepResult, Turn},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

/// Batches without a target in a row, after which there is nothing to train on.
const MOST_EMPTY: u64 = 100_000;
/// Lines named in an error.
const LINES_NAMED: usize = 8;

/// One adapter's run.
pub(super) struct Lane<'a> {
    pub(super) job: &'a Job<'a>,
    pub(super) observer: &'a mut dyn Observer,
    /// Its number in the trainer.
    pub(super) member: usize,
    /// The settings as they were made to fit.
    pub(super) config: TrainConfig,
    pub(super) feed: Feed,
    pub(super) total: u64,
    pub(super) evaluator: Evaluator,
    pub(super) fingerprint: u32,
    pub(super) summary: Summary,
    pub(super) batches: Vec<Batch>,
    /// The pass over the data, and the lines of each batch.
    pub(super) epoch: u64,
    pub(super) lines: Vec<Vec<Line>>,
    pub(super) store: Option<(Store, Keep)>,
    /// The step after which the last evaluation was made.
    pub(super) evaluated: Option<u64>,
    /// The step of the newest checkpoint.
    pub(super) saved: Option<u64>,
    /// Evaluations since the best one.
    pub(super) stale: u64,
    pub(super) stopping: bool,
    /// How it ended, where it has.
    pub(super) ended: Option<Result<()>>,
}

/// Runs side by side.
pub(super) struct Run<'a> {
    pub(super) trainer: Trainer,
    pub(super) lanes: Vec<Lane<'a>>,
}

impl Run<'_> {
    /// Steps until every run has ended; one that fails ends alone.
    pub(super) fn steps(mut self) -> Result<Vec<Result<Summary>>> {
        loop {
            let stopping = self.lanes.iter().any(|l| l.stopping);
            for lane in self.lanes.iter_mut().filter(|l| l.ended.is_none()) {
                lane.between(&self.trainer, stopping)?;
            }
            let mut going = self.lanes.iter().filter(|l| l.ended.is_none());
            let Some(first) = going.next() else {
                break;
            };
            if stopping {
                return Err(Error::Stopped {
                    step: self.trainer.done(first.member),
                    total: first.total,
                    saved: first.last_checkpoint(),
                });
            }
            self.step()?;
        }
        let result = |l: Lane| l.ended.unwrap_or(Ok(())).map(|()| l.summary);
        Ok(self.lanes.into_iter().map(result).collect())
    }

    fn step(&mut self) -> Result<()> {
        let several = self.lanes.len() > 1;
        for lane in self.lanes.iter_mut().filter(|l| l.ended.is_none()) {
            let drawn = lane.draw();
            lane.alone(drawn, several)?;
        }
        if self.lanes.iter().all(|l| l.ended.is_some()) {
            return Ok(());
        }
        self.plan()?;
        let start = Instant::now();
        let turns: Vec<_> = self.lanes.iter().map(Lane::turn).collect();
        let got = self.trainer.step_all(&turns)?;
        let seconds = start.elapsed().as_secs_f64();
        for (lane, got) in self.lanes.iter_mut().zip(got) {
            if let Some(got) = got {
                let result = lane.after(&got, seconds);
                lane.alone(result, several)?;
            }
        }
        Ok(())
    }

    /// Recordings for the batches that were drawn.
    fn plan(&mut self) -> Result<()> {
        let turns: Vec<_> = self.lanes.iter().map(Lane::turn).collect();
        for shape in self.trainer.shapes(&turns)? {
            let start = Instant::now();
            let Some(memory) = self.trainer.prepare(shape)? else {
                continue;
            };
            let seconds = start.elapsed().as_secs_f64();
            for lane in self.lanes.iter_mut().filter(|l| l.ended.is_none()) {
                let memory_bytes = memory.total();
                lane.tell(Event::Planned {
                    shape,
                    memory_bytes,
                    seconds,
                });
            }
        }
        Ok(())
    }
}

impl Lane<'_> {
    pub(super) fn tell(&mut self, event: Event) {
        self.stopping |= self.observer.event(&event).is_break();
    }

    /// Steps done.
    pub(super) fn done(&self) -> u64 {
        self.summary.losses.len() as u64
    }

    /// What is due before the next step, or the end.
    fn between(&mut self, trainer: &Trainer, stopping: bool) -> Result<()> {
        self.stopping |= stopping;
        if self.evaluation_is_due() {
            self.evaluate()?;
        }
        let patience = self.config.patience.unwrap_or(u64::MAX);
        self.summary.early = self.stale >= patience;
        let over = self.done() >= self.total || self.summary.early;
        if self.checkpoint_is_due(over) {
            self.checkpoint(trainer)?;
        }
        if over {
            self.finish(trainer)?;
            self.ended = Some(Ok(()));
        }
        Ok(())
    }

    /// A failure of one of several runs ends that one.
    fn alone(&mut self, result: Result<()>, several: bool) -> Result<()> {
        let Err(e) = result else { return Ok(()) };
        if !several {
            return Err(e);
        }
        let (step, why) = (self.done() + 1, e.to_string());
        self.tell(Event::Failed { step, why });
        self.ended = Some(Err(e));
        Ok(())
    }

    /// What the trainer is given, unless the run has ended.
    fn turn(&self) -> Option<Turn<'_>> {
        let c = &self.config;
        let lr = c.lr * c.schedule.factor(self.done(), c.warmup, self.total);
        let batches = &self.batches;
        self.ended.is_none().then_some(Turn { batches, lr })
    }

    fn evaluation_is_due(&self) -> bool {
        let done = self.done();
        let every = self.config.eval_every;
        let regular = every.is_some_and(|n| done > 0 && done.is_multiple_of(n));
        self.job.valid.is_some()
            && !self.stopping
            && self.evaluated != Some(done)
            && (regular || done >= self.total)
    }

    fn checkpoint_is_due(&self, over: bool) -> bool {
        let done = self.done();
        let Some((_, keep)) = &self.store else {
            return false;
        };
        let best = self.evaluated == Some(done) && self.best_steps().contains(&done);
        let regular = done.is_multiple_of(keep.every);
        done > 0 && self.saved != Some(done) && (regular || best || over || self.stopping)
    }

    fn best_steps(&self) -> BTreeSet<u64> {
        self.summary.best.iter().map(|b| b.1).collect()
    }

    fn last_checkpoint(&self) -> Option<PathBuf> {
        let (store, _) = self.store.as_ref()?;
        self.saved.map(|step| store.path(step))
    }

    /// Draws the batches of a step; those without a target are left out and counted.
    fn draw(&mut self) -> Result<()> {
        let n = self.config.accumulate;
        self.batches.resize_with(n, Batch::default);
        self.lines.clear();
        let mut empty = 0;
        while self.lines.len() < n {
            let batch = &mut self.batches[self.lines.len()];
            let drawn = self.feed.next(batch)?;
            if batch.counted > 0 {
                self.epoch = drawn.epoch;
                self.lines.push(drawn.lines);
                empty = 0;
                continue;
            }
            (empty, self.summary.empty) = (empty + 1, self.summary.empty + 1);
            if empty == MOST_EMPTY {
                let path = self.job.data.paths.first().cloned().unwrap_or_default();
                return Err(Error::NothingToPredict { path });
            }
        }
        Ok(())
    }

    /// Takes note of a step.
    fn after(&mut self, got: &StepResult, seconds: f64) -> Result<()> {
        let step = self.done() + 1;
        let lr = self.turn().map_or(0.0, |t| t.lr);
        if !got.updated() && !self.config.skip_nonfinite {
            return Err(self.not_finite(step, got));
        }
        let tokens = self.batches.iter().map(|b| b.counted).sum();
        self.summary.train_seconds += seconds;
        self.summary.tokens += tokens as u64;
        self.summary.losses.push(got.loss);
        self.summary.skipped += u64::from(!got.updated());
        self.tell(Event::Step {
            step,
            total: self.total,
            epoch: self.epoch,
            loss: got.loss,
            grad_norm: got.grad_norm,
            lr,
            tokens,
            seconds,
            skipped: self.summary.skipped,
            empty: self.summary.empty,
        });
        if !got.updated() {
            let lines = blamed(got, &self.lines);
            self.tell(Event::Skipped { step, lines });
        }
        Ok(())
    }

    fn not_finite(&self, step: u64, got: &StepResult) -> Error {
        let (what, value) = match got.loss.is_finite() {
            false => ("loss", got.loss),
            true => ("gradient norm", got.grad_norm),
        };
        let blamed = blamed(got, &self.lines);
        let named = blamed.iter().take(LINES_NAMED);
        let mut names: Vec<String> = named.map(Line::to_string).collect();
        if blamed.len() > LINES_NAMED {
            names.push(format!("{} more", blamed.len() - LINES_NAMED));
        }
        Error::NotFinite {
            step,
            what,
            value,
            lines: names.join(", "),
            last: self.last_checkpoint(),
        }
    }

    fn evaluate(&mut self) -> Result<()> {
        let Some(valid) = self.job.valid else {
            return Ok(());
        };
        let result = self.evaluator.run(valid, self.job.tokenizer)?;
        let step = self.done();
        self.summary.valid = Some(result);
        self.evaluated = Some(step);
        let best = self.summary.best.first().is_none_or(|b| result.loss < b.0);
        self.stale = if best { 0 } else { self.stale + 1 };
        if result.loss.is_finite() {
            let all = &mut self.summary.best;
            all.push((result.loss, step));
            all.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            all.truncate(self.store.as_ref().map_or(1, |(_, k)| k.best.max(1)));
        }
        self.tell(Event::Eval { step, result, best });
        Ok(())
    }

    /// Every setting, as it is written beside the adapter and into checkpoints.
    pub(super) fn settings(&self) -> Vec<(&'static str, Value)> {
        let job = self.job;
        let mut all = job.notes.clone();
        let paths = job.data.paths.iter().enumerate().map(|(i, path)| {
            let path = path.display();
            match job.data.weights.get(i) {
                None => path.to_string(),
                Some(weight) => format!("{path}={weight}"),
            }
        });
        all.push(("base_model", json!(job.base_name)));
        all.push(("data", json!(paths.collect::<Vec<_>>())));
        all.push(("valid", json!(job.valid.map(|v| v.display().to_string()))));
        all.extend(self.config.entries());
        all
    }

    fn checkpoint(&mut self, trainer: &Trainer) -> Result<()> {
        let Some((store, keep)) = self.store.clone() else {
            return Ok(());
        };
        let start = Instant::now();
        let state = trainer.snapshot(self.member)?;
        let settings = self.settings().into_iter();
        let about = About {
            format: About::FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            step: state.done,
            updates: state.updates,
            total: self.total,
            config: settings.map(|(k, v)| (k.to_owned(), v)).collect(),
            model: self.fingerprint,
            feed: self.feed.state(),
            threads: self.job.threads,
            kernels: kernels(trainer),
            choices: choices(trainer),
            tokens: self.summary.tokens,
            train_seconds: self.summary.train_seconds,
            skipped: self.summary.skipped,
            empty: self.summary.empty,
            valid: self.evaluated.zip(self.summary.valid),
            best: self.summary.best.clone(),
            stale: self.stale,
        };
        let whole = Checkpoint {
            about,
            state,
            losses: self.summary.losses.clone(),
        };
        let job = self.job;
        let adapter =
            |dir: &std::path::Path| Ok(job.adapter.save(job.model, dir, job.base_name)?);
        let (dir, bytes) = store.save(&whole, adapter)?;
        let step = whole.about.step;
        self.saved = Some(step);
        store.prune(keep.last, &self.best_steps())?;
        self.tell(Event::Checkpoint {
            step,
            dir,
            bytes,
            seconds: start.elapsed().as_secs_f64(),
        });
        Ok(())
    }

    fn finish(&mut self, trainer: &Trainer) -> Result<()> {
        self.summary.steps = self.done();
        self.summary.recordings = trainer.recordings();
        self.summary.memory_bytes = trainer.memory_bytes();
        self.summary.data = self.feed.stats();
        if let (Some(_), Some((store, _)), Some((loss, step))) = (
            self.config.patience,
            &self.store,
            self.summary.best.first().copied(),
        ) {
            let best = store.load(step)?;
            let params = &self.job.adapter.params;
            self.job.model.session.write(params, &best.state.params)?;
            if self.summary.early {
                let step = self.summary.steps;
                let best = (best.about.step, loss);
                self.tell(Event::EarlyStop { step, best });
            }
        }
        let job = self.job;
        job.adapter.save(job.model, job.out, job.base_name)?;
        let last = self.summary.losses.last();
        let end = [
            ("steps_done", json!(self.summary.steps)),
            ("last_loss", json!(last)),
        ];
        self.write_settings(&end)?;
        let dir = job.out.to_path_buf();
        // The adapter is saved: what the observer says no longer matters.
        let _ = self.observer.event(&Event::Saved { dir });
        Ok(())
    }

    /// Writes the settings file, with more lines at its end.
    pub(super) fn write_settings(&self, more: &[(&'static str, Value)]) -> Result<()> {
        let mut entries = self.settings();
        entries.extend_from_slice(more);
        let text = to_yaml(&entries);
        files::write_atomic(&self.job.out.join(SETTINGS_FILE), |w| {
            w.write_all(text.as_bytes())
        })?;
        Ok(())
    }
}

/// Kernels of the plan of each batch shape.
fn kernels(trainer: &Trainer) -> BTreeMap<String, Vec<String>> {
    let plans = trainer.plans().into_iter();
    let names = plans.map(|([b, t], c)| {
        let all = c.plan.steps.iter().map(|s| s.kernel_name.to_owned());
        (format!("{b}x{t}"), all.collect())
    });
    names.collect()
}

/// Kernels of all plans that won over others.
fn choices(trainer: &Trainer) -> BTreeMap<String, String> {
    let plans = trainer.plans().into_iter();
    plans.flat_map(|(_, c)| c.plan.choices()).collect()
}

/// The lines a failed step is about: of its first batch with a loss that is not finite, else of all.
fn blamed(got: &StepResult, lines: &[Vec<Line>]) -> Vec<Line> {
    match got.bad_batch {
        Some(i) => lines[i].clone(),
        None => lines.concat(),
    }
}
