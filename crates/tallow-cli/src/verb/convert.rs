//! `tallow convert`: adapters between PEFT's format and mlx-lm's.
use crate::{Outcome, open::Global, out};
use anyhow::{Result, anyhow};
use serde_json::json;
use std::path::PathBuf;
use tallow::llm::{ModelConfig, mlx, peft};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Format of IN.
    #[arg(long, value_enum)]
    from: Format,
    /// Format of OUT.
    #[arg(long, value_enum)]
    to: Format,
    /// Adapter folder to read.
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// Folder for the converted adapter.
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Folder of the base model: the adapter must fit it whole, and mlx-lm's file names layers as mlx-lm does.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// A format of adapter folders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// adapter_model.safetensors, as Hugging Face PEFT writes it.
    Peft,
    /// adapters.safetensors, as mlx-lm writes it.
    MlxLm,
}

pub(crate) fn run(args: &Args, _: &Global) -> Result<Outcome> {
    let base = match &args.model {
        Some(dir) => Some(ModelConfig::read(dir)?.adaptable()),
        None => None,
    };
    if args.input == args.output {
        return Err(anyhow!("IN and OUT are one folder; give another for OUT"));
    }
    let adapter = match (args.from, &base) {
        (Format::MlxLm, base) => mlx::read(&args.input, base.as_ref())?,
        (Format::Peft, Some(base)) => peft::Adapter::read(&args.input, base)?,
        (Format::Peft, None) => peft::Adapter::read(&args.input, &peft::shapes(&args.input)?)?,
    };
    adapter.warnings.iter().for_each(out::warn);
    match args.to {
        Format::Peft => adapter.write(&args.output)?,
        Format::MlxLm => mlx::write(&adapter, &args.output, base.as_ref())?,
    }
    let ranks = || adapter.modules.iter().map(|m| m.rank);
    if args.json {
        out::json(&json!({
            "out": args.output.display().to_string(),
            "modules": adapter.modules.len(),
            "max_rank": ranks().max(),
            "dora": adapter.config.use_dora,
        }))?;
    } else {
        let most = ranks().max().unwrap_or(0);
        if args.to == Format::MlxLm && ranks().any(|r| r != most) {
            out::line(format!(
                "mlx-lm knows one rank: all modules now have {most}, padded with zeros"
            ))?;
        }
        out::line(format!(
            "{} modules written to {}",
            adapter.modules.len(),
            args.output.display()
        ))?;
    }
    Ok(Outcome::Fine)
}
