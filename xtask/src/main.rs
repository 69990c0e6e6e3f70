//! Everything CI runs, one command: `cargo xtask ci`. Each stage also runs alone: `cargo xtask tidy`.
//! Invariant: CI runs this and nothing else, so a green run here is a green run there.
//! Absent on purpose: installing tools. `.ci/run` does that.

mod stage;
mod tidy;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use stage::{BESIDE, STAGES, Stage};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match args.as_slice() {
        [name] if name == "ci" => ci(),
        [name] => alone(name),
        _ => Err(anyhow::anyhow!("{}", usage())),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs every stage in order and stops at the first that fails.
fn ci() -> Result<()> {
    enter_root()?;
    let start = Instant::now();
    for stage in STAGES {
        run(stage).with_context(|| format!("to run it alone: cargo xtask {}", stage.name))?;
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "xtask: all {} stages passed in {seconds:.1} s",
        STAGES.len()
    );
    Ok(())
}

fn alone(name: &str) -> Result<()> {
    enter_root()?;
    match STAGES.iter().chain(BESIDE).find(|stage| stage.name == name) {
        Some(stage) => run(stage),
        None => bail!("unknown stage `{name}`\n{}", usage()),
    }
}

/// Runs one stage and prints a line with its outcome and its seconds.
fn run(stage: &Stage) -> Result<()> {
    println!("xtask: {} ...", stage.name);
    let start = Instant::now();
    let outcome = (stage.run)();
    let seconds = start.elapsed().as_secs_f64();
    match &outcome {
        Ok(note) if note.is_empty() => println!("xtask: {} passed, {seconds:.1} s", stage.name),
        Ok(note) => println!("xtask: {} passed, {seconds:.1} s ({note})", stage.name),
        Err(_) => println!("xtask: {} FAILED, {seconds:.1} s", stage.name),
    }
    outcome.map(drop)
}

/// Stages work from the repository's root, wherever the command was typed.
fn enter_root() -> Result<()> {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    std::env::set_current_dir(root).with_context(|| format!("cannot enter {root}"))
}

fn usage() -> String {
    let mut text = "usage: cargo xtask STAGE\n  ci       all of these, in this order".to_owned();
    for stage in STAGES {
        text += &format!("\n  {:<8} {}", stage.name, stage.what);
    }
    text += "\nbeside CI:";
    for stage in BESIDE {
        text += &format!("\n  {:<8} {}", stage.name, stage.what);
    }
    text
}
