//! `tallow bench`: times that cannot be fooled, beside the floor of this machine.
//! Invariant: a task's rows are printed when it is done, so Ctrl-C leaves everything that was measured, on the screen and in
//! the files; a row that cannot be believed has no figure.
//! Absent on purpose: the clock; that is `tallow-bench`.
use crate::{
    Outcome, interrupt,
    open::{self, Global},
    out,
};
use anyhow::{Context as _, Result, anyhow};
use std::{
    ffi::OsString,
    io::IsTerminal as _,
    path::{Path, PathBuf},
};
use tallow::{
    DType,
    cpu::pool,
    llm::{ComputeDType, ModelConfig, files},
};
use tallow_bench::{
    compare::{compare, lines},
    load::spin,
    measure::Settings,
    peer::{self, Place},
    probe::Probe,
    report::{Report, html, table},
    run::{Event, Plan, run as bench},
    shapes::{ModelShape, SMALL},
    suite::{Context, Suite},
    work::Wall,
};

use super::demo::assets;

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: Option<What>,
    /// What to measure: seed (products, adapters, norms), layers, tax (with and without adapters), train, decode,
    /// sweep (adapters trained side by side), busy (alone and beside a program that keeps every core busy) [default: seed].
    #[arg(value_name = "SUITE", value_parser = suite)]
    suites: Vec<Suite>,
    /// Fewer shapes, fewer rounds.
    #[arg(long)]
    quick: bool,
    /// Only the tasks that have this in their name: "1x2048", "softmax".
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Type of the weight matrices: f32 or bf16.
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = open::dtype)]
    dtype: ComputeDType,
    /// Folder of a model for tax, train, decode and sweep; may be given several times [default: the built-in model and one
    /// of hidden size 256].
    #[arg(long, value_name = "DIR")]
    model: Vec<PathBuf>,
    /// A model of this size with random weights: small, 0.5b, 1b or 8b; may be given several times.
    #[arg(long, value_name = "SIZE", value_parser = shape)]
    shape: Vec<ModelShape>,
    /// Rows and tokens a row of a training step, as in 8x512; in sweep, of each adapter [default: 4x128 and several].
    #[arg(long, value_name = "ROWSxTOKENS", value_parser = batch)]
    batch: Option<[usize; 2]>,
    /// Other engines to measure beside tallow, separated by commas.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    against: Vec<String>,
    /// Write everything, every sample, as JSON: a file, or - for stdout.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write one page with drawings.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

#[derive(clap::Subcommand)]
enum What {
    /// Two reports that `--json` wrote: ratios with intervals.
    Compare {
        /// The run before.
        before: PathBuf,
        /// The run after.
        after: PathBuf,
    },
    /// Keeps every core busy while told to on stdin: the other program of the suite busy.
    #[command(hide = true)]
    Spin,
}

fn suite(text: &str) -> Result<Suite, String> {
    text.parse().map_err(|e: tallow_bench::Error| e.to_string())
}

fn batch(text: &str) -> Result<[usize; 2], String> {
    let two = text.split_once('x').map(|(b, t)| (b.parse(), t.parse()));
    match two {
        Some((Ok(b @ 1..=65_536), Ok(t @ 1..=65_536))) => Ok([b, t]),
        _ => Err("rows and tokens wanted, each from 1 to 65536, as in 8x512".to_owned()),
    }
}

fn shape(text: &str) -> Result<ModelShape, String> {
    ModelShape::named(text).map_err(|e| e.to_string())
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    match &args.what {
        Some(What::Compare { before, after }) => {
            let found = compare(&Report::read(before)?, &Report::read(after)?);
            for line in lines(&found) {
                out::line(line)?;
            }
            return Ok(Outcome::Fine);
        }
        Some(What::Spin) => {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            spin(cores, std::io::stdin().lock(), std::io::stdout())?;
            return Ok(Outcome::Fine);
        }
        None => {}
    }
    for (option, path) in [("--json", &args.json), ("--html", &args.html)] {
        if let Some(path) = path {
            writable(option, path)?;
        }
    }
    threads_of_peers(args, global)?;
    let polite = interrupt::polite();
    let suites = match &args.suites[..] {
        [] => &[Suite::Seed],
        some => some,
    };
    let scratch = tempfile::tempdir().context("cannot make a folder for models")?;
    let models = models(args, suites, scratch.path())?;
    let cx = context(args, global, models)?;
    let place = Place {
        threads: cx.threads,
        device: &cx.session.backend().info().name,
    };
    let plan = Plan {
        suites,
        only: args.only.as_deref(),
        settings: if args.quick {
            Settings::QUICK
        } else {
            Settings::FULL
        },
        probe: Probe::of(&Wall::new(), &cx.session, cx.dtype, cx.threads)?,
        command: command(),
        peers: peer::open(&args.against, &place)?,
    };
    let mut shown = Shown::new(args);
    let report = bench(&cx, plan, &interrupt::asked, &mut |e| shown.event(&e))?;
    shown.end()?;
    write(args, &report)?;
    drop(polite);
    if report.stopped {
        let done = format!("{} tasks were measured", report.groups.len());
        return Err(interrupt::Interrupted(done).into());
    }
    match report.invalid() {
        0 => Ok(Outcome::Fine),
        _ => Ok(Outcome::OutOfTolerance),
    }
}

/// Engines of this process read how many threads they have when they start, so it is started again with the number that
/// tallow has.
#[cfg(unix)]
fn threads_of_peers(args: &Args, global: &Global) -> Result<()> {
    use std::os::unix::process::CommandExt as _;
    let threads = threads(global)?.to_string();
    let Some(variable) = peer::wants(&args.against) else {
        return Ok(());
    };
    if std::env::var(variable).is_ok_and(|n| n == threads) {
        return Ok(());
    }
    let program = std::env::current_exe().context("cannot tell where this program lies")?;
    let args = std::env::args_os().skip(1);
    let e = std::process::Command::new(program)
        .args(args)
        .env(variable, threads)
        .exec();
    Err(anyhow!("cannot start again with {variable} set: {e}"))
}

/// Where a program cannot start itself anew, it says which variable to set.
#[cfg(not(unix))]
fn threads_of_peers(_: &Args, _: &Global) -> Result<()> {
    Ok(())
}

fn threads(global: &Global) -> Result<usize> {
    Ok(match global.threads {
        Some(n) => n,
        None => pool::threads_from_env()?,
    })
}

fn command() -> String {
    let args = std::env::args().skip(1);
    std::iter::once("tallow".to_owned())
        .chain(args)
        .collect::<Vec<_>>()
        .join(" ")
}

/// This program again, as one that keeps every core busy.
fn spinner() -> Result<Option<Vec<OsString>>> {
    let program = std::env::current_exe().context("cannot tell where this program lies")?;
    let args = ["bench".into(), "spin".into()];
    Ok(Some(std::iter::once(program.into()).chain(args).collect()))
}

fn dtype(args: &Args) -> DType {
    match args.dtype {
        ComputeDType::F32 => DType::F32,
        ComputeDType::BF16 => DType::BF16,
    }
}

fn context(args: &Args, global: &Global, models: Vec<(String, PathBuf)>) -> Result<Context> {
    let session = open::session(global, args.dtype)?;
    let threads = threads(global)?;
    Ok(Context {
        session,
        threads,
        dtype: dtype(args),
        quick: args.quick,
        batch: args.batch,
        models,
        spinner: spinner()?,
    })
}

/// The models of the suites that need one: those asked for, or the built-in one and a random one.
fn models(args: &Args, suites: &[Suite], scratch: &Path) -> Result<Vec<(String, PathBuf)>> {
    let unwanted = |s: &Suite| matches!(s, Suite::Seed | Suite::Layers);
    if suites.iter().all(unwanted) {
        return Ok(vec![]);
    }
    let mut all = vec![];
    for dir in &args.model {
        ModelConfig::read(dir)?;
        all.push((dir.display().to_string(), dir.clone()));
    }
    let mut shapes = args.shape.clone();
    if args.model.is_empty() && args.shape.is_empty() {
        shapes.push(SMALL);
    }
    // All of them, before the first is written.
    for shape in &shapes {
        shape.fits(dtype(args))?;
    }
    for shape in &shapes {
        let dir = scratch.join(shape.name);
        files::prepare_output_dir(&dir)?;
        tracing::info!("writing random weights of shape {}", shape.name);
        shape.write(&dir)?;
        all.push((shape.name.to_owned(), dir));
    }
    if args.model.is_empty() && args.shape.is_empty() {
        let folder = assets::unpack(&scratch.join("built-in"))?;
        all.push(("built-in".to_owned(), folder.model));
    }
    Ok(all)
}

fn write(args: &Args, report: &Report) -> Result<()> {
    match &args.json {
        None => {}
        Some(path) if path == Path::new("-") => out::line(report.json()?)?,
        Some(path) => save(path, &report.json()?)?,
    }
    match &args.html {
        None => Ok(()),
        Some(path) => save(path, &html::page(report)?),
    }
}

/// Refuses a file that could not be written, before anything is measured for it.
fn writable(option: &str, path: &Path) -> Result<()> {
    if path == Path::new("-") && option == "--json" {
        return Ok(());
    }
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    if !parent.is_dir() || path.is_dir() {
        return Err(anyhow!(
            "{option}: want a file in a folder that exists, got {}",
            path.display()
        ));
    }
    let trial = tempfile::Builder::new()
        .prefix(".tallow-")
        .tempfile_in(parent);
    let trial = trial.map_err(|e| e.kind());
    trial.map(drop).map_err(|e| {
        anyhow!(
            "{option}: want a file in a folder that can be written to, got {}: {e}",
            path.display()
        )
    })
}

fn save(path: &Path, text: &str) -> Result<()> {
    files::write_atomic(path, |w| w.write_all(text.as_bytes()))
        .map_err(|e| anyhow!("cannot write the report: {e}"))
}

/// The run as the user sees it: tables on stdout, or nothing there where JSON will be; progress on stderr.
struct Shown {
    tables: bool,
    /// On a terminal the line of progress is written over.
    terminal: bool,
    failed: Result<()>,
}

impl Shown {
    fn new(args: &Args) -> Self {
        Shown {
            tables: args.json.as_deref() != Some(Path::new("-")),
            terminal: std::io::stderr().is_terminal(),
            failed: Ok(()),
        }
    }

    fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Begin(report) => self.lines(&table::head(report)),
            Event::Task { index, total, name } => {
                let line = format!("{}/{total} {name}", index + 1);
                match self.terminal {
                    true => eprint!("\r\x1b[2K{line}"),
                    false => eprintln!("{line}"),
                }
            }
            Event::Done(group) => {
                self.wipe();
                self.lines(&table::group(group));
            }
        }
    }

    fn wipe(&self) {
        if self.terminal {
            eprint!("\r\x1b[2K");
        }
    }

    fn lines(&mut self, lines: &[String]) {
        for line in lines.iter().filter(|_| self.tables) {
            if self.failed.is_ok() {
                self.failed = out::line(line);
            }
        }
    }

    fn end(self) -> Result<()> {
        self.wipe();
        self.failed
    }
}
