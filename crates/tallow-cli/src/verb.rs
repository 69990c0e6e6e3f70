//! The verbs of the command line, one file each.
//! Invariant: a verb's file holds its options, and `run`, which prints results to stdout; with `--json` it prints
//! one JSON document there and nothing else.
use crate::{Outcome, open::Global};
use anyhow::Result;
use clap::Subcommand;
use std::ffi::OsString;

mod bench;
mod convert;
mod data;
mod demo;
mod doctor;
mod eval;
mod explain;
mod generate;
mod inspect;
mod logits;
mod merge;
mod train;
mod tune;
mod verify;

/// What to do.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Fine-tune the built-in model in a minute: loss curve, text before and after, the price of the adapter.
    Demo(demo::Args),
    /// Fine-tune an adapter on lines of text, or several side by side.
    #[command(args_override_self = true)]
    Train(Box<train::Args>),
    /// Show data as a model will see it: tokens, what counts, lengths, duplicates, what would be cut.
    Data(data::Args),
    /// Loss a token over lines of text.
    Eval(eval::Args),
    /// Continue a prompt.
    Generate(generate::Args),
    /// Scores of every next token, for given token ids.
    Logits(logits::Args),
    /// Fold an adapter into its base model.
    Merge(merge::Args),
    /// Convert an adapter between PEFT's format and mlx-lm's.
    Convert(convert::Args),
    /// What a model, an adapter or a checkpoint holds, and what training and decoding it would take.
    Inspect(inspect::Args),
    /// Compare a model with reference outputs that lie beside it.
    Verify(verify::Args),
    /// Show the plan of a forward pass, a training step or a decoded token.
    Explain(explain::Args),
    /// Times that cannot be fooled, beside the floor of this machine.
    Bench(Box<bench::Args>),
    /// Measure ahead which kernels are the fastest for a model here, and keep it.
    Tune(tune::Args),
    /// Devices, CPU features, threads, caches, and a self-test of two seconds.
    Doctor(doctor::Args),
}

/// The command line with what a file of settings says written out.
pub(crate) fn expand(args: Vec<OsString>) -> Result<Vec<OsString>> {
    train::config::expand(args)
}

impl Verb {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        match self {
            Verb::Demo(a) => demo::run(a, global),
            Verb::Train(a) => train::run(a, global),
            Verb::Data(a) => data::run(a),
            Verb::Eval(a) => eval::run(a, global),
            Verb::Generate(a) => generate::run(a, global),
            Verb::Logits(a) => logits::run(a, global),
            Verb::Merge(a) => merge::run(a, global),
            Verb::Convert(a) => convert::run(a, global),
            Verb::Inspect(a) => inspect::run(a, global),
            Verb::Verify(a) => verify::run(a, global),
            Verb::Explain(a) => explain::run(a, global),
            Verb::Bench(a) => bench::run(a, global),
            Verb::Tune(a) => tune::run(a, global),
            Verb::Doctor(a) => doctor::run(a, global),
        }
    }
}
