//! `tallow eval`: loss a token, weighted by token, of each file and of all together.
//! Invariant: the tokens that count are those a training run with the same --loss-on would learn; no line is cut.
use crate::{
    Outcome,
    open::{self, Global, ModelArgs},
    out,
};
use anyhow::{Result, anyhow};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tallow::{
    llm::data::LossOn,
    train::{Evaluation, Evaluator},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Adapter folder, in PEFT's format.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// What to evaluate on, read line by line whatever its size: JSON lines with "text" (each as bos + text + eos),
    /// with "prompt" and "completion", or with "messages"; a folder, of which test.jsonl is taken, or else
    /// valid.jsonl; - for standard input. May be given several times: each file has a line of its own.
    #[arg(long, value_name = "FILE", required = true, action = clap::ArgAction::Append)]
    data: Vec<PathBuf>,
    /// Which tokens count: answers (completions, the assistant's words, whole texts) or everything.
    #[arg(long, value_name = "WHICH", default_value = "answers")]
    loss_on: LossOn,
    /// Put several lines into a row, none seeing another: the same loss, sooner where lines are short.
    #[arg(long)]
    packing: bool,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    let files: Vec<PathBuf> = args.data.iter().map(|d| file(d)).collect::<Result<_>>()?;
    let model = args.model.load_to_run(global)?;
    let tokenizer = args.model.tokenizer()?;
    let adapter = open::adapter(&model, args.adapter.as_deref())?;
    let mut evaluator = Evaluator::new(&model, adapter.as_ref()).counting(args.loss_on);
    if args.packing {
        evaluator = evaluator.packed();
    }
    let mut found = vec![];
    for file in &files {
        let one = evaluator.run(file, &tokenizer)?;
        if !one.loss.is_finite() {
            let (file, loss) = (file.display(), one.loss);
            return Err(anyhow!(
                "{file}: the loss is {loss}; the model or the adapter holds numbers that are not finite, or --dtype bf16 is too coarse for it"
            ));
        }
        if !args.json && files.len() > 1 {
            out::line(format!("{}: {}", file.display(), line(&one)))?;
        }
        found.push(one);
    }
    let all = Evaluation::together(&found);
    if args.json {
        let each = files.iter().zip(&found);
        let each =
            each.map(|(file, one)| figures(one, &[("file", json!(file.display().to_string()))]));
        let files: Vec<Value> = each.collect();
        return out::json(&figures(
            &all,
            &[
                ("dtype", json!(args.model.dtype.name())),
                ("loss_on", json!(args.loss_on.name())),
                ("packing", json!(args.packing)),
                ("files", json!(files)),
            ],
        ))
        .map(|()| Outcome::Fine);
    }
    out::line(line(&all))?;
    out::line(format!(
        "{} tokens in {} lines, {} ({:.0} tokens/s), computed in {}",
        out::count(all.tokens),
        out::count(all.lines),
        out::seconds(all.seconds),
        per_s(&all),
        args.model.dtype.name(),
    ))?;
    Ok(Outcome::Fine)
}

/// A file itself, or the one of a data folder that no run has learnt from.
fn file(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_path_buf());
    }
    let held_out = ["test.jsonl", "valid.jsonl"].map(|name| path.join(name));
    let found = held_out.into_iter().find(|p| p.is_file());
    found.ok_or_else(|| {
        anyhow!(
            "{}: neither test.jsonl nor valid.jsonl is in it; give the file to evaluate on",
            path.display()
        )
    })
}

fn per_s(e: &Evaluation) -> f64 {
    e.tokens as f64 / e.seconds.max(1e-9)
}

fn line(e: &Evaluation) -> String {
    let perplexity = e.perplexity();
    format!(
        "loss {:.4} nats a token, perplexity {perplexity:.2}",
        e.loss
    )
}

fn figures(e: &Evaluation, more: &[(&str, Value)]) -> Value {
    let mut all = json!({
        "loss": e.loss,
        "perplexity": e.perplexity(),
        "tokens": e.tokens,
        "lines": e.lines,
        "seconds": e.seconds,
        "tokens_per_s": per_s(e),
    });
    for (name, value) in more {
        all[*name] = value.clone();
    }
    all
}
