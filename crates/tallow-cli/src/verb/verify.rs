//! `tallow verify`: a model against reference outputs; a line a quantity.
use crate::{
    Outcome,
    open::{self, Global},
    out,
};
use anyhow::Result;
use serde_json::json;
use std::path::PathBuf;
use tallow::llm::{Check, ComputeDType, ModelConfig, verify};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder with the model, adapter/ and reference.safetensors (tests/goldens/README.md says what they hold).
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    let session = open::session(global, ComputeDType::F32)?;
    // Read first, so that an architecture nobody knows is named whatever else is missing.
    ModelConfig::read(&args.dir)?;
    let checks = verify(&session, &args.dir)?;
    let pass = checks.iter().all(|c| c.pass);
    if args.json {
        let each = |c: &Check| {
            json!({
                "quantity": c.quantity,
                "measured": c.measured,
                "tolerance": c.tolerance,
                "pass": c.pass,
                "note": c.note,
            })
        };
        let checks: Vec<_> = checks.iter().map(each).collect();
        out::json(&json!({ "pass": pass, "checks": checks }))?;
    } else {
        for c in &checks {
            out::line(line(c))?;
        }
    }
    Ok(match pass {
        true => Outcome::Fine,
        false => Outcome::OutOfTolerance,
    })
}

fn line(c: &Check) -> String {
    let verdict = match (c.pass, c.measured) {
        (true, Some(_)) => "ok  ",
        (true, None) => "-   ",
        (false, _) => "FAIL",
    };
    let measured = c.measured.map_or("-".to_owned(), |m| format!("{m:.2e}"));
    format!(
        "{verdict} {:<18} {measured:>9}  (at most {:.0e})  {}",
        c.quantity, c.tolerance, c.note
    )
}
