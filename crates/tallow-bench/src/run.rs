//! A run: the probe, then suite by suite, task by task.
//! Invariant: what is done is in the report, whenever it is stopped; a task that cannot be made is a row that says why.
//! Absent on purpose: where it is shown.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::calm::{Calm, Canary};
use crate::floors::Floors;
use crate::measure::{Contender, Reason, Row, Settings, Verdict, measure};
use crate::peer::Peer;
use crate::probe::{Bound, Floor, Probe};
use crate::report::{FORMAT, Group, Machine, Report};
use crate::suite::{Context, Suite, Task, tasks};
use crate::work::Wall;
use crate::{Error, Result};

/// What is told while it runs.
pub enum Event<'a> {
    /// The machine was probed; nothing is measured yet.
    Begin(&'a Report),
    /// Task `index` of `total` begins.
    Task {
        /// From 0.
        index: usize,
        /// How many there are.
        total: usize,
        /// "seed: softmax 4x16x1024".
        name: &'a str,
    },
    /// A task is done.
    Done(&'a Group),
}

/// What to run.
pub struct Plan<'a> {
    /// Suites, in order.
    pub suites: &'a [Suite],
    /// Of these only tasks that have this in their name.
    pub only: Option<&'a str>,
    /// How much is measured.
    pub settings: Settings,
    /// What the machine reaches.
    pub probe: Probe,
    /// What was typed, for the report.
    pub command: String,
    /// Who else takes part.
    pub peers: Vec<Box<dyn Peer>>,
}

/// Runs it. `stop` is asked often; `tell` hears of every task.
///
/// # Errors
/// A suite whose tasks cannot be listed. What fails later is a row.
pub fn run(
    cx: &Context,
    mut plan: Plan<'_>,
    stop: &dyn Fn() -> bool,
    tell: &mut dyn FnMut(Event<'_>),
) -> Result<Report> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let mut report = Report {
        format: FORMAT,
        tallow: env!("CARGO_PKG_VERSION").to_owned(),
        peers: peers(&plan, true),
        missing: peers(&plan, false),
        command: plan.command.clone(),
        unix_s: since.map_or(0, |d| d.as_secs()),
        machine: Machine::here(&cx.session)?,
        threads: cx.threads,
        dtype: cx.dtype.name().to_owned(),
        settings: plan.settings,
        probe: plan.probe.clone(),
        groups: vec![],
        stopped: false,
    };
    let mut all = vec![];
    for suite in plan.suites {
        all.extend(tasks(*suite, cx)?);
    }
    if let Some(part) = plan.only {
        all.retain(|task| task.name.contains(part));
        if all.is_empty() {
            return Err(Error::Setting {
                name: "--only",
                want: "a part of the name of a task of these suites",
                got: part.to_owned(),
            });
        }
    }
    tell(Event::Begin(&report));
    let again = || Probe::of(&Wall::new(), &cx.session, cx.dtype, cx.threads);
    let mut floors = Floors::new(plan.probe.clone(), again);
    let mut calm = Canary::of(&cx.session, &plan.probe, cx.threads)?;
    let total = all.len();
    for (index, task) in all.into_iter().enumerate() {
        let name = format!("{}: {}", task.suite.name(), task.name);
        tell(Event::Task {
            index,
            total,
            name: &name,
        });
        let Some(group) = one(cx, task, &mut plan, (&mut floors, &mut *calm), stop) else {
            report.stopped = true;
            break;
        };
        tell(Event::Done(&group));
        report.groups.push(group);
    }
    report.probe = floors.probe;
    Ok(report)
}

/// Names and versions of the peers that are there, or names of the others and why they are not.
fn peers(plan: &Plan<'_>, there: bool) -> Vec<(String, String)> {
    let some = plan.peers.iter().filter(|p| p.is_there() == there);
    some.map(|p| (p.name().to_owned(), p.version())).collect()
}

/// One task; `None` if it was stopped.
fn one(
    cx: &Context,
    task: Task,
    plan: &mut Plan<'_>,
    (floors, calm): (&mut Floors<'_>, &mut dyn Calm),
    stop: &dyn Fn() -> bool,
) -> Option<Group> {
    let settings = task.suite.settings(plan.settings).on(&cx.session);
    let mut missing = vec![];
    let mut contenders = match (task.make)(cx) {
        Ok(all) => all,
        Err(e) => {
            missing.push(absent("tallow", e.to_string()));
            vec![]
        }
    };
    for peer in &mut plan.peers {
        for (label, job) in &task.peers {
            let named = |engine: &str| match &**label {
                "" => engine.to_owned(),
                label => format!("{engine}, {label}"),
            };
            match peer.contenders(job, cx) {
                Ok(all) => contenders.extend(all.into_iter().map(|c| Contender {
                    engine: named(&c.engine),
                    ..c
                })),
                Err(e) => missing.push(absent(&named(peer.name()), e.to_string())),
            }
        }
    }
    let (measured, rounds) = measure(&Wall::new(), &settings, &mut contenders, calm, stop)?;
    drop(contenders);
    let (mut rows, revised) =
        floors.rows(&format!("{}: {}", task.suite.name(), task.name), &measured);
    rows.extend(missing);
    Some(Group {
        suite: task.suite.name().to_owned(),
        name: task.name,
        tokens: task.tokens,
        rows,
        revised,
        rounds,
    })
}

fn absent(engine: &str, what: String) -> Row {
    Row {
        engine: engine.to_owned(),
        floor: Floor {
            seconds: 0.0,
            bytes: 0,
            flops: 0.0,
            bound: Bound::Bandwidth,
        },
        verdict: Verdict::Invalid(Reason::Failed { what }),
        memory: None,
    }
}
