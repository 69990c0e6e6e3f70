//! `tallow logits`: the scores of every next token after each of the given ids.
use crate::{
    Outcome,
    open::{self, Global, ModelArgs},
    out,
};
use anyhow::{Result, anyhow};
use serde_json::json;
use std::path::PathBuf;
use tallow::{Role, llm::Model};

/// Tokens shown for each position, without `--json`.
const SHOWN: usize = 5;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Adapter folder, in PEFT's format.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Token ids, with commas between them.
    #[arg(long, value_name = "ID,ID,...", value_delimiter = ',', required = true)]
    ids: Vec<u32>,
    /// Print all scores as one JSON document: {"logits": [[...], ...]}, a list for each position.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    let model = args.model.load_to_run(global)?;
    check(&model, &args.ids)?;
    let adapter = open::adapter(&model, args.adapter.as_deref())?;
    let session = &model.session;
    let shape = [1, args.ids.len()];
    let pos: Vec<u32> = (0..).take(args.ids.len()).collect();
    let ids = session.tensor_u32(&args.ids, shape, Role::Data)?;
    let pos = session.tensor_u32(&pos, shape, Role::Data)?;
    let x = model.hidden(&ids, &pos, adapter.as_ref(), None)?.x;
    let all = session.read(&model.logits_with(&x, adapter.as_ref())?)?;
    let rows: Vec<&[f32]> = all.chunks(model.config.vocab).collect();
    if args.json {
        out::json(&json!({ "logits": rows, "dtype": args.model.dtype.name() }))?;
        return Ok(Outcome::Fine);
    }
    for (i, row) in rows.iter().enumerate() {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
        let best = order.iter().take(SHOWN);
        let best: Vec<String> = best.map(|id| format!("{id}: {:.4}", row[*id])).collect();
        out::line(format!(
            "after id {:>6} (position {i})  {}",
            args.ids[i],
            best.join("  ")
        ))?;
    }
    Ok(Outcome::Fine)
}

fn check(model: &Model, ids: &[u32]) -> Result<()> {
    let c = &model.config;
    if let Some(id) = ids.iter().find(|id| **id as usize >= c.vocab) {
        let last = c.vocab - 1;
        return Err(anyhow!(
            "--ids: token {id} is not in the vocabulary; use ids from 0 to {last}"
        ));
    }
    if ids.len() > c.max_positions {
        let (n, most) = (ids.len(), c.max_positions);
        return Err(anyhow!(
            "--ids: {n} tokens are more than the model's {most} positions; give fewer"
        ));
    }
    Ok(())
}
