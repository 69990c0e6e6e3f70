//! `tallow merge`: the base model with an adapter folded in, as a Hugging Face folder.
use crate::{
    Outcome,
    open::{self, Global, ModelArgs},
    out,
};
use anyhow::{Result, anyhow};
use serde_json::json;
use std::path::{Path, PathBuf};
use tallow::{
    Role,
    llm::{
        Adapter, Model,
        merge::{Drift, drift, merge},
    },
};

/// Tokens over which the drift is measured.
const TOKENS: usize = 32;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Adapter folder, in PEFT's format.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Folder for the merged model; must not exist yet.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Do not compare the merged model with base and adapter afterwards (which loads both, one after the other).
    #[arg(long)]
    no_check: bool,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    let start = std::time::Instant::now();
    let done = merge(&args.model.model, &args.adapter, &args.out, &mut |shard| {
        tracing::info!("writing {shard}");
    })?;
    let seconds = start.elapsed().as_secs_f64();
    done.warnings.iter().for_each(out::warn);
    let drift = match args.no_check {
        true => None,
        false => Some(measure(args, global)?),
    };
    if args.json {
        out::json(&json!({
            "out": args.out.display().to_string(),
            "modules": done.modules,
            "shards": done.shards,
            "copied": done.copied,
            "untied": done.untied,
            "tensor_bytes": done.tensor_bytes,
            "seconds": seconds,
            "drift": drift.map(|d| json!({
                "max_logit": d.max_logit,
                "mean_kl": d.mean_kl,
                "tokens": d.positions,
            })),
        }))?;
        return Ok(Outcome::Fine);
    }
    out::line(format!(
        "{} modules folded in, {} in {} file(s), {}",
        done.modules,
        out::bytes(done.tensor_bytes),
        done.shards.len(),
        out::seconds(seconds),
    ))?;
    if done.untied {
        out::line("embedding and output projection were one weight and are two now")?;
    }
    if let Some(d) = drift {
        out::line(format!(
            "against base and adapter over {} tokens: logits differ by at most {:.1e}, KL {:.1e} nats a token",
            d.positions, d.max_logit, d.mean_kl,
        ))?;
    }
    out::line(format!("merged model saved in {}", args.out.display()))?;
    Ok(Outcome::Fine)
}

/// The merged model against base and adapter.
fn measure(args: &Args, global: &Global) -> Result<Drift> {
    let with = |dir: &Path, adapter: Option<&Path>| -> Result<(Vec<f32>, usize)> {
        let session = open::session(global, args.model.dtype)?;
        let options = tallow::llm::LoadOptions {
            dtype: args.model.dtype,
        };
        let model = Model::load(&session, dir, &options)?;
        let adapter = match adapter {
            Some(dir) => Some(Adapter::load(&model, dir, Role::Frozen)?.0),
            None => None,
        };
        Ok((scores(&model, adapter.as_ref())?, model.config.vocab))
    };
    let (want, vocab) = with(&args.model.model, Some(&args.adapter))?;
    let (got, _) = with(&args.out, None)?;
    let found = drift(&want, &got, vocab);
    match found.max_logit.is_finite() && found.mean_kl.is_finite() {
        true => Ok(found),
        false => Err(anyhow!(
            "the merged model or its base gives scores that are not numbers; check the base, then delete {}",
            args.out.display()
        )),
    }
}

/// Logits of a row of ids that look random, `[t, vocab]`.
fn scores(model: &Model, adapter: Option<&Adapter>) -> Result<Vec<f32>> {
    let t = TOKENS.min(model.config.max_positions);
    let vocab = model.config.vocab as u64;
    let ids: Vec<u32> = (0..t as u64)
        .map(|i| ((i * 7919 + 13) * 104_729 % 1_000_003 % vocab) as u32)
        .collect();
    let pos: Vec<u32> = (0..t as u32).collect();
    let s = &model.session;
    let ids = s.tensor_u32(&ids, [1, t], Role::Data)?;
    let pos = s.tensor_u32(&pos, [1, t], Role::Data)?;
    let x = model.hidden(&ids, &pos, adapter, None)?.x;
    Ok(s.read(&model.logits_with(&x, adapter)?)?)
}
