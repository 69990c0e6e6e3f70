//! `tallow eval`: loss a token, weighted by token.
use crate::{
    Outcome,
    open::{self, Global, ModelArgs},
    out,
};
use anyhow::Result;
use serde_json::json;
use std::path::PathBuf;
use tallow::train::Evaluator;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Adapter folder, in PEFT's format.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// JSON lines, {"text": "..."}; each is evaluated as bos + text + eos.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    let model = args.model.load(global)?;
    let tokenizer = args.model.tokenizer()?;
    let adapter = open::adapter(&model, args.adapter.as_deref())?;
    let found = Evaluator::new(&model, adapter.as_ref()).run(&args.data, &tokenizer)?;
    let perplexity = found.perplexity();
    let tokens_per_s = found.tokens as f64 / found.seconds.max(1e-9);
    if args.json {
        out::json(&json!({
            "loss": found.loss,
            "perplexity": perplexity,
            "tokens": found.tokens,
            "lines": found.lines,
            "seconds": found.seconds,
            "tokens_per_s": tokens_per_s,
            "dtype": args.model.dtype.name(),
        }))?;
    } else {
        out::line(format!(
            "loss {:.4} nats a token, perplexity {perplexity:.2}",
            found.loss
        ))?;
        out::line(format!(
            "{} tokens in {} lines, {} ({tokens_per_s:.0} tokens/s), computed in {}",
            out::count(found.tokens),
            out::count(found.lines),
            out::seconds(found.seconds),
            args.model.dtype.name(),
        ))?;
    }
    Ok(Outcome::Fine)
}
