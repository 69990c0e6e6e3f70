//! `tallow tune`: measures, ahead of time and for as long as it takes, the kernels that a model or a product has a choice of.
//! Invariant: what is measured is what `train` and `generate` would plan, with operands of its own; the table it fills is
//! the one that every verb reads.
//! Absent on purpose: how kernels are measured; that is `tallow-tune`.
use super::{demo::assets, explain};
use crate::{
    Outcome, interrupt,
    open::{self, Global, ModelArgs},
    out,
};
use anyhow::{Context as _, Result, anyhow};
use serde_json::json;
use std::{collections::BTreeMap, path::PathBuf, time::Duration};
use tallow::{
    Choose, DType, Plan, Role, Session,
    core::plan::Step,
    llm::{Adapter, ComputeDType, LoadOptions, Model, Targets},
    train::sweep::MOST_RUNS,
    tune,
};
use tallow_bench::suite::{candidates::parse, products::lora};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of a model [default: the built-in one].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// One product instead, as in "128x512 @ 512x8".
    #[arg(long, value_name = "SHAPE", conflicts_with_all = ["model", "adapter", "adapters", "tokens", "batch"])]
    shape: Option<String>,
    /// Type of the weight matrices while computing: f32 or bf16.
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = open::dtype)]
    dtype: ComputeDType,
    /// Adapter folder, in PEFT's format.
    #[arg(long, value_name = "DIR", conflicts_with = "rank")]
    adapter: Option<PathBuf>,
    /// Rank of a fresh adapter on all projections.
    #[arg(long, value_name = "N", default_value_t = 8)]
    rank: usize,
    /// Of training: this many adapters side by side.
    #[arg(long, value_name = "N", default_value_t = 1)]
    adapters: usize,
    /// Tokens of a row [default: 128].
    #[arg(long, value_name = "N", default_value_t = 128)]
    tokens: usize,
    /// Rows of a training step [default: 4].
    #[arg(long, value_name = "N", default_value_t = 4)]
    batch: usize,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// Specs with a choice, and specs without, of all plans.
#[derive(Default)]
struct Found {
    /// Spec, kernel, why.
    contested: BTreeMap<String, (String, String)>,
    alone: BTreeMap<String, ()>,
}

impl Found {
    fn add(&mut self, plan: &Plan) {
        for s in &plan.steps {
            let name = |s: &Step| format!("{} {}", s.spec.name(), s.spec.signature());
            match s.rejected.len() {
                0 => drop(self.alone.insert(s.spec.key(), ())),
                _ => drop(
                    self.contested
                        .insert(name(s), (s.kernel_name.to_owned(), s.why.clone())),
                ),
            }
        }
    }
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    if global.no_tune {
        return Err(anyhow!(
            "--no-tune: nothing is left to do without measuring"
        ));
    }
    if args.adapters == 0 || args.adapters > MOST_RUNS {
        let got = args.adapters;
        return Err(anyhow!("--adapters: want 1 to {MOST_RUNS}, got {got}"));
    }
    let how = tune::Options {
        budget: Duration::MAX,
        ..tune::Options::usual(|line| eprintln!("  {line}"))
    };
    let session = open::session_that(global, args.dtype, Choose::Measure(how))?;
    let mut found = Found::default();
    match &args.shape {
        Some(text) => product(args, text, &session, &mut found)?,
        None => model(args, session, &mut found)?,
    }
    match args.json {
        true => out::json(&document(&found))?,
        false => lines(&found)?,
    }
    Ok(Outcome::Fine)
}

fn product(args: &Args, text: &str, session: &Session, found: &mut Found) -> Result<()> {
    let dtype = match args.dtype {
        ComputeDType::F32 => DType::F32,
        ComputeDType::BF16 => DType::BF16,
    };
    for rank in [0, args.rank] {
        let shape = parse(text, rank)?;
        eprintln!("{shape}");
        found.add(lora(session, shape, dtype)?.plan());
    }
    Ok(())
}

fn model(args: &Args, session: Session, found: &mut Found) -> Result<()> {
    let scratch = tempfile::tempdir().context("cannot make a folder for the built-in model")?;
    let dir = match &args.model {
        Some(dir) => dir.clone(),
        None => assets::unpack(scratch.path())?.model,
    };
    let from = ModelArgs {
        model: dir,
        dtype: args.dtype,
    };
    let options = LoadOptions { dtype: args.dtype };
    let model = Model::load(&session, &from.model, &options)?;
    let most = model.config.max_positions;
    if args.tokens == 0 || args.tokens > most || args.batch == 0 {
        return Err(anyhow!(
            "--tokens, --batch: want 1 to {most} tokens, the model's positions, and 1 or more rows, got {} and {}",
            args.tokens,
            args.batch
        ));
    }
    let adapter = |role| -> Result<Adapter> {
        Ok(match &args.adapter {
            Some(dir) => Adapter::load(&model, dir, role)?.0,
            None => Adapter::new(
                &model,
                &open::fresh(args.rank, None, Targets::AllLinear)?,
                0,
            )?,
        })
    };
    let trained = adapter(Role::State)?;
    let fixed = adapter(Role::Frozen)?;
    let (model, tokens) = (&model, args.tokens);
    type Make<'a> = Box<dyn Fn() -> Result<explain::Subject> + 'a>;
    let mut all: Vec<(String, Make<'_>)> = vec![];
    for (with, adapter) in [("", None), (", with an adapter", Some(&fixed))] {
        let forward = move || explain::forward(model, adapter, [1, tokens]);
        all.push((
            format!("forward of {tokens} tokens{with}"),
            Box::new(forward),
        ));
        let decode = move || Ok(explain::decode(model, adapter, tokens)?.0);
        all.push((format!("decoded token{with}"), Box::new(decode)));
    }
    let shape = [args.batch, tokens];
    let step = || explain::train(model, Some(&trained), args.adapters, shape);
    all.push((
        format!("training step of {} x {tokens} tokens", args.batch),
        Box::new(step),
    ));
    let total = all.len();
    for (i, (name, make)) in all.into_iter().enumerate() {
        if interrupt::asked() {
            let done = format!("{i} of {total} plans are measured, and kept");
            return Err(interrupt::Interrupted(done).into());
        }
        eprintln!("{}/{total} {name}", i + 1);
        let subject = make()?;
        let outs: Vec<_> = subject.outs.iter().collect();
        found.add(&session.explain(&outs, &subject.updates)?.plan);
    }
    Ok(())
}

fn lines(found: &Found) -> Result<()> {
    for (spec, (kernel, why)) in &found.contested {
        out::line(spec)?;
        out::line(format!("  {kernel}: {why}"))?;
    }
    out::line(format!(
        "{} with a choice of kernels, {} with one kernel each, where there is nothing to measure",
        found.contested.len(),
        found.alone.len()
    ))
}

fn document(found: &Found) -> serde_json::Value {
    let one = |(spec, (kernel, why)): (&String, &(String, String))| json!({ "spec": spec, "kernel": kernel, "why": why });
    json!({
        "contested": found.contested.iter().map(one).collect::<Vec<_>>(),
        "alone": found.alone.len(),
    })
}
