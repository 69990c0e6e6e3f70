//! The binary `tallow`. Parses the command line, runs one verb, turns the result into an exit code.
//! Invariant: a mistake or a failure is one line on stderr that begins with "error:", with exit code 2; 1 means
//! that `verify` measured something out of tolerance; 130 that Ctrl-C was pressed, 143 that SIGTERM came.
//! Absent on purpose: anything a library crate could do.
#![forbid(unsafe_code)]

mod chart;
mod interrupt;
mod open;
mod out;
mod progress;
mod verb;

use clap::{Parser, error::ErrorKind};
use std::process::ExitCode;

/// Trains, runs and inspects low-rank adapters (LoRA).
#[derive(Parser)]
#[command(name = "tallow", version, about, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: open::Global,
    #[command(subcommand)]
    verb: verb::Verb,
}

/// What a verb found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// All is well.
    Fine,
    /// It ran, and something measured is out of tolerance.
    OutOfTolerance,
}

const FAILED: u8 = 2;

fn main() -> ExitCode {
    let args = match verb::expand(std::env::args_os().collect()) {
        Ok(args) => args,
        Err(e) => return fail(&e.to_string()),
    };
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    log_to_stderr(cli.global.verbose);
    interrupt::install();
    match cli.verb.run(&cli.global) {
        Ok(Outcome::Fine) => ExitCode::SUCCESS,
        Ok(Outcome::OutOfTolerance) => ExitCode::from(1),
        Err(e) if e.is::<interrupt::Interrupted>() => {
            eprintln!("{}", one_line(&e.to_string()));
            ExitCode::from(interrupt::exit_code())
        }
        // The reader of our output has gone (`tallow … | head`): nobody is left to tell.
        Err(e) if out::is_closed(&e) => ExitCode::SUCCESS,
        Err(e) => fail(&e.to_string()),
    }
}

fn fail(message: &str) -> ExitCode {
    eprintln!("error: {}", one_line(message));
    ExitCode::from(FAILED)
}

/// Messages quote file names and files; none of that may break the line or steer the terminal.
fn one_line(message: &str) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    message.chars().map(clean).collect()
}

/// clap's several paragraphs as one line; help and version as they are.
fn usage(e: &clap::Error) -> ExitCode {
    if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        // A closed pipe is no reason to fail.
        let _ = e.print();
        return ExitCode::SUCCESS;
    }
    if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = e.print();
        return ExitCode::from(FAILED);
    }
    let text = e.render().to_string();
    let first: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|l| !l.is_empty())
        .collect();
    let first = first.join(" ");
    let what = first.strip_prefix("error: ").unwrap_or(&first);
    fail(&format!("{what}; `tallow help` lists what there is"))
}

fn log_to_stderr(verbose: u8) {
    let level = match verbose {
        0 => tracing::Level::WARN,
        1 => tracing::Level::INFO,
        2 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_target(verbose > 1)
        .without_time()
        .init();
}
