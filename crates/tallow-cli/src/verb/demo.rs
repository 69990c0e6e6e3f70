//! `tallow demo`: the whole job in a minute, on the built-in model: evaluate, fine-tune, evaluate, generate,
//! measure the price of the adapter.
//! Invariant: the built-in model goes through the same loader as any other; the text it is judged on is never
//! trained on. Absent on purpose: anything the other verbs cannot do.
use crate::{
    Outcome, chart,
    open::{self, Global, ModelArgs},
    out,
    progress::{Progress, Show},
    verb::train::{notes, run_job},
};
use anyhow::Result;
use serde_json::{Value, json};
use std::{path::PathBuf, time::Instant};
use tallow::{
    llm::{
        Adapter, ComputeDType, GenerateOptions, Generator, Model, Sampling, Targets, Tokenizer,
        data::{Lines, LossOn},
        files,
    },
    train::{
        Evaluation, Evaluator, FeedSettings, Job, OptimizerKind, Schedule, Summary, TrainConfig,
    },
};

pub(super) mod assets;
mod tax;

use tax::Tax;

/// Lines of the test text whose questions are asked.
const ASKED: [usize; 3] = [0, 35, 70];
/// Most tokens of an answer.
const ANSWER_TOKENS: usize = 48;
/// Where a line's question ends and its answer begins.
const ANSWER: &str = "\nA:";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder for everything the demo makes.
    #[arg(long, value_name = "DIR", default_value = "demo-out")]
    out: PathBuf,
    /// Decides the adapter's start and the order of the rows.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Print one JSON document at the end, and nothing else.
    #[arg(long)]
    json: bool,
}

/// Two passes at batch 4, rows of up to 128 tokens.
fn config(seed: u64) -> TrainConfig {
    TrainConfig {
        steps: None,
        epochs: 2.0,
        batch: 4,
        accumulate: 1,
        seq_len: 128,
        packing: false,
        loss_on: LossOn::Answers,
        optimizer: OptimizerKind::AdamW,
        lr: 5e-3,
        schedule: Schedule::Cosine,
        warmup: 10,
        weight_decay: 0.01,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        clip: Some(1.0),
        seed,
        eval_every: Some(125),
        patience: None,
        checkpoint_layers: false,
        skip_nonfinite: false,
    }
}

/// Everything the demo found.
struct Report {
    before: Evaluation,
    after: Evaluation,
    summary: Summary,
    samples: Vec<Sample>,
    tax: Tax,
    seconds: f64,
}

/// One prompt with three answers.
struct Sample {
    question: String,
    wanted: String,
    bare: String,
    tuned: String,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    let start = Instant::now();
    files::prepare_output_dir(&args.out)?;
    let folder = assets::unpack(&args.out)?;
    let from = ModelArgs {
        model: folder.model.clone(),
        dtype: ComputeDType::F32,
    };
    let demo = Demo {
        args,
        model: from.load(global)?,
        tokenizer: from.tokenizer()?,
        folder,
    };
    let c = &demo.model.config;
    demo.say(format!(
        "A small Llama ({} layers, hidden {}) that knows English prose and no SQL learns WikiSQL.",
        c.layers, c.hidden
    ))?;
    let before = demo.evaluate(None)?;
    demo.say(format!(
        "before: loss {:.3} a token on {} lines it never trains on\n",
        before.loss, before.lines
    ))?;
    let summary = demo.fine_tune()?;
    // From here on the adapter that was saved, read back as anyone would.
    let adapter = open::adapter(&demo.model, Some(&demo.adapter_dir()))?;
    let after = demo.evaluate(adapter.as_ref())?;
    demo.say(format!(
        "\nafter: loss {:.3} (was {:.3}); {:.0} tokens/s over {} steps",
        after.loss,
        before.loss,
        summary.tokens_per_s(),
        summary.steps
    ))?;
    let samples = demo.samples(adapter.as_ref())?;
    for s in &samples {
        demo.say(s.show())?;
    }
    let tax = tax::measure(&demo.model, adapter.as_ref())?;
    demo.say(format!("\n{}", tax.show()))?;
    let report = Report {
        before,
        after,
        summary,
        samples,
        tax,
        seconds: start.elapsed().as_secs_f64(),
    };
    match args.json {
        true => out::json(&report.json(args))?,
        false => out::line(ending(args, report.seconds))?,
    }
    Ok(Outcome::Fine)
}

/// What every part of the demo works with.
struct Demo<'a> {
    args: &'a Args,
    model: Model,
    tokenizer: Tokenizer,
    folder: assets::Unpacked,
}

impl Demo<'_> {
    fn say(&self, text: String) -> Result<()> {
        match self.args.json {
            true => Ok(()),
            false => out::line(text),
        }
    }

    fn adapter_dir(&self) -> PathBuf {
        self.args.out.join("adapter")
    }

    fn evaluate(&self, adapter: Option<&Adapter>) -> Result<Evaluation> {
        let mut evaluator = Evaluator::new(&self.model, adapter);
        Ok(evaluator.run(&self.folder.valid, &self.tokenizer)?)
    }

    /// Trains, saves the adapter, draws the curve.
    fn fine_tune(&self) -> Result<Summary> {
        let adapter_config = open::fresh(8, Some(16.0), Targets::AllLinear)?;
        let seed = self.args.seed;
        let config = config(seed);
        let paths = vec![self.folder.train.clone()];
        let data = FeedSettings::new(paths, config.seq_len, config.batch, seed);
        let job = Job {
            model: &self.model,
            tokenizer: &self.tokenizer,
            adapter: &Adapter::new(&self.model, &adapter_config, seed)?,
            data: &data,
            valid: Some(&self.folder.valid),
            out: &self.adapter_dir(),
            base_name: &self.folder.model.display().to_string(),
            config: &config,
            keep: None,
            memory_bytes: None,
            threads: None,
            notes: notes(&adapter_config, ComputeDType::F32.name()),
        };
        let mut progress = Progress::new(match self.args.json {
            true => Show::Nothing,
            false => Show::Progress,
        });
        let summary = run_job(&job, &mut progress)?;
        let curve = self.args.out.join("curve.svg");
        chart::svg(&curve, &progress.curve, &progress.evals)?;
        let smooth = chart::smooth(&progress.curve, 10);
        self.say(format!("\n{}", chart::braille(&smooth).join("\n")))?;
        Ok(summary)
    }

    /// Answers to unseen questions, likeliest token by token, without and with the adapter.
    fn samples(&self, adapter: Option<&Adapter>) -> Result<Vec<Sample>> {
        let options = || GenerateOptions {
            sampling: Sampling::greedy(),
            max_new_tokens: ANSWER_TOKENS,
            stop: vec!["\n".to_owned()],
            ignore_eos: false,
        };
        let mut bare = Generator::new(&self.model, None, options())?;
        let mut tuned = Generator::new(&self.model, adapter, options())?;
        let mut all = vec![];
        for (i, text) in Lines::open(&self.folder.test)?.enumerate() {
            let text = text?;
            let Some(at) = text.rfind(ANSWER).filter(|_| ASKED.contains(&i)) else {
                continue;
            };
            let (prompt, wanted) = text.split_at(at + ANSWER.len());
            let question = prompt.trim_end_matches(ANSWER).lines().last();
            all.push(Sample {
                question: question.unwrap_or(prompt).to_owned(),
                wanted: wanted.trim().to_owned(),
                bare: bare
                    .generate(&self.tokenizer, prompt)?
                    .text
                    .trim()
                    .to_owned(),
                tuned: tuned
                    .generate(&self.tokenizer, prompt)?
                    .text
                    .trim()
                    .to_owned(),
            });
        }
        Ok(all)
    }
}

impl Sample {
    fn show(&self) -> String {
        format!(
            "\n{}\n  wanted   {}\n  without  {}\n  with     {}",
            self.question, self.wanted, self.bare, self.tuned
        )
    }
}

impl Report {
    fn json(&self, args: &Args) -> Value {
        let sample = |s: &Sample| {
            json!({
                "question": s.question,
                "wanted": s.wanted,
                "without": s.bare,
                "with": s.tuned,
            })
        };
        json!({
            "loss_before": self.before.loss,
            "loss_after": self.after.loss,
            "tokens_evaluated": self.after.tokens,
            "steps": self.summary.steps,
            "losses": self.summary.losses,
            "tokens_per_s": self.summary.tokens_per_s(),
            "plans": self.summary.recordings,
            "memory_bytes": self.summary.memory_bytes,
            "samples": self.samples.iter().map(sample).collect::<Vec<_>>(),
            "tax": self.tax.json(),
            "seconds": self.seconds,
            "adapter": args.out.join("adapter").display().to_string(),
            "curve": args.out.join("curve.svg").display().to_string(),
        })
    }
}

fn ending(args: &Args, seconds: f64) -> String {
    let dir = args.out.display();
    format!(
        "\nAll in {seconds:.0} s. In {dir}: adapter/ (PEFT's format), curve.svg, model/ and data/. Try next:\n\
         \x20 tallow generate --model {dir}/model --adapter {dir}/adapter --prompt $'table: 1-1\\ncolumns: Player, Position, Team\\nQ: Who plays for Toronto?\\nA:'\n\
         \x20 tallow train --model {dir}/model --data {dir}/data/train.jsonl --valid {dir}/data/valid.jsonl --out {dir}/mine --rank 16 --epochs 3 --lr 3e-3\n\
         \x20 tallow explain train --model {dir}/model --time"
    )
}
