//! `tallow train --sweep`: several adapters in the same passes over one base, compared as they learn.
//! Invariant: each run's folder is what `tallow train` would have left for it alone, so that it can be resumed,
//! repeated and read alone; one that fails ends alone.
//! Absent on purpose: searching. What is compared stands in the file.
use super::{Args, Ready, board::Board, config, facts, seen::REPORT_FILE, stopped};
use crate::{
    Outcome,
    dashboard::{self, Page, Shared},
    interrupt,
    open::Global,
    out,
    verb::Verb,
};
use anyhow::{Context as _, Result, anyhow};
use clap::Parser as _;
use serde_json::{Value, json};
use std::{
    ffi::OsString,
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};
use tallow::{
    llm::files,
    train::{
        Event, Observer, Summary, checkpoint, sweep,
        sweep::SweepRun,
        train_all,
        watch::{Record, Watch, best, html},
    },
};

/// The page that compares the runs, and the same in figures.
const PAGE_FILE: &str = "sweep.html";
const TABLE_FILE: &str = "sweep.json";

/// What stays of the runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Kept {
    /// All of them.
    All,
    /// Of all but the best, only settings and figures.
    Best,
}

/// Tells a run's own files and the table.
struct Lane {
    number: usize,
    watch: Watch,
    record: Shared,
    board: Arc<Mutex<Board>>,
}

impl Observer for Lane {
    fn event(&mut self, event: &Event) -> ControlFlow<()> {
        let _ = self.watch.event(event);
        if matches!(event, Event::Saved { .. }) {
            lock(&self.record).done = true;
        }
        let standing = lock(&self.record).standing();
        lock(&self.board).event(self.number, event, &standing);
        match interrupt::asked() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

fn lock<T>(shared: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn run(args: &Args, file: &Path, global: &Global) -> Result<Outcome> {
    let runs = sweep::read(file)?.runs;
    let all = each(&runs, args)?;
    for own in &all {
        own.config().validate()?;
    }
    let threads = args.threads(&all[0].out, global)?;
    let global = &Global {
        threads: Some(threads),
        ..global.clone()
    };
    let model = args.model.load(global)?;
    let tokenizer = args.model.tokenizer()?;
    let ready = all.iter().map(|a| Ready::new(a, &model, threads));
    let ready = ready.collect::<Result<Vec<_>>>()?;
    if ready[0].data.reads_stdin() {
        return Err(anyhow!(
            "--data -: standard input can be read only once; give a sweep a file"
        ));
    }
    let jobs: Vec<_> = ready.iter().map(|r| r.job(&model, &tokenizer)).collect();
    let names: Vec<String> = runs.iter().map(|r| r.name.clone()).collect();
    let board = Arc::new(Mutex::new(Board::new(names.clone(), !args.json)));
    let mut lanes: Vec<Lane> = (jobs.iter().zip(&names).enumerate())
        .map(|(number, (job, name))| {
            let record = Shared::default();
            lock(&record).title.clone_from(name);
            lock(&record).facts = facts(job);
            Lane {
                number,
                watch: Watch::new(job.out.to_path_buf(), Arc::clone(&record)),
                record,
                board: Arc::clone(&board),
            }
        })
        .collect();
    let shared = lanes.iter().map(|l| Arc::clone(&l.record));
    let page = Page::Sweep {
        title: args.out.display().to_string(),
        runs: names.iter().cloned().zip(shared).collect(),
    };
    files::prepare_output_dir(&args.out)?;
    if let Some(port) = args.dashboard {
        let address = dashboard::serve(page.clone(), port)?;
        eprintln!("dashboard: http://{address}/");
    }
    let results = {
        let _polite = interrupt::polite();
        let each = jobs.iter().zip(&mut lanes);
        let both = each.map(|(job, lane)| (job, lane as &mut dyn Observer));
        train_all(both.collect()).map_err(stopped)?
    };
    let done = Done {
        args,
        runs: &runs,
        results: &results,
        records: lanes.iter().map(|l| lock(&l.record).clone()).collect(),
        outs: jobs.iter().map(|j| j.out).collect(),
    };
    for problem in lanes.iter().filter_map(|l| l.watch.problem()) {
        out::warn(problem);
    }
    write_atomic(&args.out.join(PAGE_FILE), &page.html(false))?;
    done.finish()
}

/// The command line of each run: what all share, what it sets itself, and a folder of its own.
fn each(runs: &[SweepRun], args: &Args) -> Result<Vec<Args>> {
    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        _global: Global,
        #[command(subcommand)]
        verb: Verb,
    }
    let typed = config::expand(std::env::args_os().collect())?;
    let one = |run: &SweepRun| {
        for (key, value) in &run.settings {
            let flag = OsString::from(config::flag(key));
            if *value == Value::Bool(false) && typed.contains(&flag) {
                let name = &run.name;
                let flag = flag.display();
                return Err(anyhow!("run `{name}`: {flag} is on for all runs"));
            }
        }
        let mut line = typed.clone();
        line.extend(config::options(&run.settings, &[]));
        let parsed = Line::try_parse_from(line).map_err(|e| {
            let text = e.render().to_string();
            let first = text.lines().next().unwrap_or_default();
            let first = first.strip_prefix("error: ").unwrap_or(first);
            anyhow!("run `{}`: {first}", run.name)
        })?;
        let Verb::Train(mut own) = parsed.verb else {
            return Err(anyhow!("a sweep is an option of `tallow train`"));
        };
        own.out = args.out.join(&run.name);
        Ok(*own)
    };
    runs.iter().map(one).collect()
}

fn write_atomic(path: &Path, text: &str) -> Result<()> {
    Ok(files::write_atomic(path, |w| w.write_all(text.as_bytes()))?)
}

/// Runs that have ended.
struct Done<'a> {
    args: &'a Args,
    runs: &'a [SweepRun],
    results: &'a [tallow::train::Result<Summary>],
    records: Vec<Record>,
    outs: Vec<&'a Path>,
}

impl Done<'_> {
    fn finish(&self) -> Result<Outcome> {
        for (record, out) in self.records.iter().zip(&self.outs) {
            write_atomic(&out.join(REPORT_FILE), &html(record, false))?;
        }
        let named = self.runs.iter().map(|r| r.name.clone());
        let named: Vec<_> = named.zip(self.records.iter().cloned()).collect();
        let best = best(&named);
        let table = self.table(best);
        let text = serde_json::to_string_pretty(&table)?;
        write_atomic(&self.args.out.join(TABLE_FILE), &text)?;
        let Some(best) = best else {
            let why = self.results.iter().find_map(|r| r.as_ref().err());
            let why = why.map_or_else(|| "no step was made".to_owned(), ToString::to_string);
            return Err(anyhow!("every run failed; the first: {why}"));
        };
        if self.args.keep == Kept::Best {
            self.keep_only(best)?;
        }
        match self.args.json {
            true => out::json(&table)?,
            false => self.print(best, &table)?,
        }
        Ok(Outcome::Fine)
    }

    fn table(&self, best: Option<usize>) -> Value {
        let run = |i: usize| {
            let (run, result, now) = (&self.runs[i], &self.results[i], self.records[i].standing());
            let summary = result.as_ref().ok();
            json!({
                "name": run.name,
                "settings": run.settings,
                "out": self.outs[i].display().to_string(),
                "steps": now.step,
                "loss": now.loss,
                "last_loss": summary.and_then(|s| s.losses.last()),
                "losses": summary.map(|s| &s.losses),
                "valid_loss": now.valid,
                "resumed_from": summary.and_then(|s| s.resumed_from),
                "skipped": summary.map(|s| s.skipped),
                "failed": result.as_ref().err().map(ToString::to_string),
            })
        };
        let fine = || self.results.iter().filter_map(|r| r.as_ref().ok());
        let seconds = fine().map(|s| s.train_seconds).fold(0.0, f64::max);
        let tokens: u64 = fine().map(|s| s.tokens).sum();
        json!({
            "runs": (0..self.runs.len()).map(run).collect::<Vec<_>>(),
            "best": best.map(|i| &self.runs[i].name),
            "train_seconds": seconds,
            "tokens": tokens,
            "tokens_per_s": tokens as f64 / seconds.max(1e-9),
            "memory_bytes": fine().map(|s| s.memory_bytes).max(),
            "plans": fine().map(|s| s.recordings).max(),
            "out": self.args.out.display().to_string(),
        })
    }

    /// Removes adapters and checkpoints of all runs but one.
    fn keep_only(&self, best: usize) -> Result<()> {
        for (i, out) in self.outs.iter().enumerate().filter(|(i, _)| *i != best) {
            let all = self.records[i].failed.is_none();
            for name in ["adapter_model.safetensors", "adapter_config.json"] {
                let path = out.join(name);
                if all && path.exists() {
                    fs::remove_file(&path)
                        .with_context(|| format!("cannot remove {}", path.display()))?;
                }
            }
            let checkpoints = out.join(checkpoint::FOLDER);
            if checkpoints.exists() {
                files::remove_folder(&checkpoints)?;
            }
        }
        Ok(())
    }

    fn print(&self, best: usize, table: &Value) -> Result<()> {
        let mut order: Vec<usize> = (0..self.runs.len()).collect();
        let score = |i: &usize| {
            let now = self.records[*i].standing();
            let fine = self.records[*i].failed.is_none();
            let loss = now.valid.or(now.loss).filter(|_| fine);
            loss.unwrap_or(f64::INFINITY)
        };
        order.sort_by(|a, b| score(a).total_cmp(&score(b)));
        let width = self
            .runs
            .iter()
            .map(|r| r.name.len())
            .max()
            .unwrap_or(0)
            .max(3);
        out::line(format!(
            "{:width$}  {:>6}  {:>8}  {:>10}",
            "run", "steps", "loss", "validation"
        ))?;
        for i in order {
            let now = self.records[i].standing();
            let figure = |x: Option<f64>| x.map_or("-".to_owned(), |x| format!("{x:.4}"));
            let end = match &self.results[i] {
                Err(e) => format!("  failed: {e}"),
                Ok(_) if i == best => "  best".to_owned(),
                Ok(_) => String::new(),
            };
            out::line(format!(
                "{:width$}  {:>6}  {:>8}  {:>10}{end}",
                self.runs[i].name,
                now.step,
                figure(now.loss),
                figure(now.valid),
            ))?;
        }
        let number = |key: &str| table[key].as_f64().unwrap_or(0.0);
        out::line(format!(
            "{:.0} tokens/s over all runs in {}, {} of memory",
            number("tokens_per_s"),
            out::seconds(number("train_seconds")),
            out::bytes(number("memory_bytes") as usize),
        ))?;
        let by = match self.records[best].standing().valid {
            Some(_) => "the validation text",
            None => "the training loss (there is no validation text)",
        };
        let dir: PathBuf = self.args.out.join(&self.runs[best].name);
        out::line(format!(
            "best by {by}: {}; the runs are compared in {}",
            dir.display(),
            self.args.out.join(PAGE_FILE).display(),
        ))
    }
}
