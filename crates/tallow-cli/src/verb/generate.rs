//! `tallow generate`: continues a prompt, streaming whole characters.
use crate::{
    Outcome,
    open::{self, Global, ModelArgs},
    out,
};
use anyhow::Result;
use serde_json::{Value, json};
use std::{path::PathBuf, time::Instant};
use tallow::llm::{ChatTemplate, FinishReason, GenerateOptions, Generator, Sampling};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Adapter folder, in PEFT's format.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Text to continue.
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Take the prompt as a user's message, and answer it by the model's chat template.
    #[arg(long)]
    chat: bool,
    /// A system message before it.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Most tokens to add.
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// Divides the scores before drawing; 0 always takes the likeliest token.
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    temperature: f64,
    /// Draw from the N likeliest tokens; 0 for all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    top_k: usize,
    /// Draw from the fewest tokens whose probabilities reach this sum.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    top_p: f64,
    /// Draw from tokens at least this fraction as likely as the likeliest.
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    min_p: f64,
    /// Above 1: tokens seen before become less likely.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    repetition_penalty: f64,
    /// Seed of the draws.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Ends the text and is not part of it; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Print one JSON document at the end instead of streaming.
    #[arg(long)]
    json: bool,
}

impl Args {
    fn messages(&self) -> Vec<Value> {
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let system = self.system.iter().map(|s| message("system", s));
        system.chain([message("user", &self.prompt)]).collect()
    }

    fn options(&self) -> GenerateOptions {
        GenerateOptions {
            sampling: Sampling {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                seed: self.seed,
            },
            max_new_tokens: self.max_tokens,
            stop: self.stop.clone(),
            ignore_eos: false,
        }
    }
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<Outcome> {
    let model = args.model.load_to_run(global)?;
    let tokenizer = args.model.tokenizer()?;
    let adapter = open::adapter(&model, args.adapter.as_deref())?;
    let mut generator = Generator::new(&model, adapter.as_ref(), args.options())?;
    let mut stream = match args.chat {
        false => generator.stream(&tokenizer, &args.prompt)?,
        true => {
            let template = ChatTemplate::open(&tokenizer, None)?;
            let ids = template.prompt(&model.config, &args.messages())?;
            generator.stream_ids(&tokenizer, ids)?
        }
    };
    let mut text = String::new();
    let start = Instant::now();
    let mut first = None;
    for piece in &mut stream {
        let piece = piece?;
        first.get_or_insert_with(|| start.elapsed().as_secs_f64());
        if args.json {
            text.push_str(&piece.text);
        } else {
            out::piece(&piece.text)?;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let tokens = stream.ids().len();
    let finish = stream.finish_reason().map_or("error", FinishReason::name);
    // The first token waits for the prompt, so it is not counted.
    let after_first = (tokens > 1).then(|| {
        let rest = seconds - first.unwrap_or(0.0);
        (tokens - 1) as f64 / rest.max(1e-9)
    });
    if args.json {
        out::json(&json!({
            "prompt": args.prompt,
            "text": text,
            "ids": stream.ids(),
            "finish": finish,
            "prompt_tokens": stream.prompt_tokens(),
            "tokens": tokens,
            "seconds": seconds,
            "first_token_seconds": first,
            "tokens_per_s": after_first,
            "dtype": args.model.dtype.name(),
        }))?;
    } else {
        out::line("")?;
        tracing::info!(
            "{tokens} tokens ({finish}), first after {}, then {:.0} tokens/s",
            out::seconds(first.unwrap_or(0.0)),
            after_first.unwrap_or(0.0),
        );
    }
    Ok(Outcome::Fine)
}
