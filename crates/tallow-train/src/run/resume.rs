//! How a run begins where another left off.
//! Invariant: a run goes on only with the settings, the model and the data of its checkpoint; what may differ is
//! listed here. Absent on purpose: reading files; see `checkpoint.rs`.
use super::{steps::Lane, *};
use crate::checkpoint::{Checkpoint, Damaged};
use std::{path::Path, time::Instant};

/// Settings that may change between a run and its continuation.
const MAY_CHANGE: [&str; 15] = [
    "tallow_version",
    "base_model",
    "data",
    "valid",
    "steps",
    "epochs",
    "eval_every",
    "patience",
    "skip_nonfinite",
    "threads",
    "out",
    "memory",
    "save_every",
    "keep_last",
    "keep_best",
];

/// What there is to know about a run before its model is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Past {
    /// Steps done.
    pub step: u64,
    /// CPU threads it ran on.
    pub threads: Option<usize>,
}

/// The newest whole checkpoint in a run's folder, if there is one.
pub fn past(out: &Path) -> Option<Past> {
    let found = Store::new(out).newest().0?;
    Some(Past {
        step: found.about.step,
        threads: found.about.threads,
    })
}

/// Refuses to begin where that would lose a run.
pub(super) fn check_start(job: &Job, store: &Store, start: Start) -> Result<()> {
    match (start, store.steps().first()) {
        (Start::New, Some(step)) => Err(Error::HoldsARun {
            dir: job.out.to_path_buf(),
            step: *step,
        }),
        _ => Ok(()),
    }
}

impl Lane<'_> {
    /// Goes on from the newest whole checkpoint up to the step `limit`, if asked to and there is one.
    pub(super) fn resume(&mut self, trainer: &mut Trainer, limit: Option<u64>) -> Result<()> {
        let Some((store, keep)) = self.store.clone() else {
            return Ok(());
        };
        if keep.start != Start::Resume {
            return Ok(());
        }
        let start = Instant::now();
        let (found, damaged) = store.newest_up_to(limit.unwrap_or(u64::MAX));
        let Some(found) = found else {
            return match damaged.into_iter().next() {
                None => Ok(()),
                Some(Damaged { dir, why }) => Err(Error::NoWholeCheckpoint {
                    dir: dir.parent().unwrap_or(&dir).to_path_buf(),
                    count: store.steps().len(),
                    why,
                }),
            };
        };
        let step = found.about.step;
        let dir = store.path(step);
        let mut remarks: Vec<String> = damaged.iter().map(damage).collect();
        remarks.extend(self.differences(trainer, &found, &dir)?);
        trainer.restore(self.member, &found.state)?;
        self.feed.restore(&found.about.feed)?;
        self.take_over(found);
        self.saved = Some(step);
        let losses = self.summary.losses.clone();
        self.tell(Event::Resumed {
            step,
            dir,
            remarks,
            losses,
            seconds: start.elapsed().as_secs_f64(),
        });
        Ok(())
    }

    fn take_over(&mut self, found: Checkpoint) {
        let about = found.about;
        (self.evaluated, self.summary.valid) = about.valid.unzip();
        self.stale = about.stale;
        self.summary = Summary {
            resumed_from: Some(about.step),
            losses: found.losses,
            tokens: about.tokens,
            train_seconds: about.train_seconds,
            skipped: about.skipped,
            empty: about.empty,
            best: about.best,
            ..std::mem::take(&mut self.summary)
        };
    }

    /// Refuses a checkpoint of another run; what is worth a word.
    fn differences(
        &self,
        trainer: &Trainer,
        found: &Checkpoint,
        dir: &Path,
    ) -> Result<Vec<String>> {
        let about = &found.about;
        let other = |what: String| Error::OtherRun {
            dir: dir.to_path_buf(),
            what,
        };
        let (mut differ, mut remarks) = (vec![], vec![]);
        for (name, now) in self.settings() {
            let was = about.config.get(name).unwrap_or(&Value::Null);
            if *was != now && !MAY_CHANGE.contains(&name) {
                differ.push(format!("{name} was {was}, is {now}"));
            }
        }
        if !differ.is_empty() {
            return Err(other(differ.join(", ")));
        }
        if about.model != self.fingerprint {
            return Err(other("the base model's weights are others".into()));
        }
        let want = self.job.adapter.elems();
        if found.state.params.len() != want {
            let was = found.state.params.len();
            return Err(other(format!(
                "the adapter had {was} parameters, has {want}"
            )));
        }
        if about.total != self.total {
            remarks.push(format!(
                "{} steps were planned, now {}: the schedule follows the new number",
                about.total, self.total
            ));
        }
        if about.version != env!("CARGO_PKG_VERSION") {
            let (was, now) = (&about.version, env!("CARGO_PKG_VERSION"));
            remarks.push(format!(
                "begun by tallow {was}, this is {now}: last digits may differ"
            ));
        }
        if about.threads != self.job.threads {
            let show = |n: Option<usize>| n.map_or("unknown".to_owned(), |n| n.to_string());
            let (was, now) = (show(about.threads), show(self.job.threads));
            remarks.push(format!(
                "begun on {was} threads, going on with {now}: last digits may differ"
            ));
        }
        let chosen = about.choices.clone();
        trainer.session().pin(chosen);
        remarks.extend(self.other_kernels(trainer, found)?);
        Ok(remarks)
    }

    /// A word where this machine would run other kernels than the checkpoint's.
    fn other_kernels(&self, trainer: &Trainer, found: &Checkpoint) -> Result<Option<String>> {
        for [b, t] in self.feed.shapes() {
            let Some(was) = found.about.kernels.get(&format!("{b}x{t}")) else {
                continue;
            };
            let plan = trainer.plan([b, t])?.plan;
            let now = plan.steps.iter().map(|s| s.kernel_name);
            if !now.eq(was.iter().map(String::as_str)) {
                return Ok(Some(
                    "other kernels are chosen than when it was begun: last digits may differ"
                        .into(),
                ));
            }
            // One shape tells: kernels are chosen by one rule for all of them.
            break;
        }
        Ok(None)
    }
}

/// The newest step that every run has a checkpoint of, so that runs side by side go on in step.
pub(super) fn common_step(lanes: &[Lane<'_>]) -> Option<u64> {
    let steps = |l: &Lane<'_>| Some(l.store.as_ref()?.0.steps());
    let mut all = lanes.iter().map(|l| steps(l).unwrap_or_default());
    let first = all.next()?;
    let rest: Vec<Vec<u64>> = all.collect();
    let everywhere = |step: &u64| rest.iter().all(|s| s.contains(step));
    first.into_iter().filter(everywhere).max()
}

fn damage(d: &Damaged) -> String {
    format!("{}: not whole ({}), passed over", d.dir.display(), d.why)
}
