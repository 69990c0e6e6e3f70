//! `tallow data`: what a training run would make of some files, without a model in memory.
//! Invariant: what is shown of a file cannot steer the terminal; figures are those a run would report.
//! Absent on purpose: changing files.
use crate::{Outcome, out};
use anyhow::Result;
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::IsTerminal as _,
    path::PathBuf,
};
use tallow::{
    llm::{
        ModelConfig, Tokenizer,
        data::{Encoder, Examples, Folder, LossOn, Row},
    },
    train::{Tally, data::pack},
};

/// Bars of the histogram.
const BARS: usize = 12;
/// Characters of the longest bar.
const BAR_WIDTH: usize = 40;
/// Tokens shown of a row.
const SHOWN_TOKENS: usize = 400;
/// Duplicates named.
const NAMED: usize = 3;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// JSON lines with "text", "prompt" and "completion", or "messages"; folders with train.jsonl; - for standard input.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Folder of the model: its config.json, tokenizer and chat template.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Rows are cut after this many tokens.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..))]
    seq_len: u32,
    /// Which tokens count: answers (completions, the assistant's words, whole texts) or everything.
    #[arg(long, value_name = "WHICH", default_value = "answers")]
    loss_on: LossOn,
    /// Rows to show.
    #[arg(long, value_name = "N", default_value_t = 3)]
    show: usize,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// What was found.
#[derive(Default)]
struct Survey {
    lines: u64,
    /// Tokens of every line, before cutting.
    lengths: Vec<usize>,
    /// Model inputs of every row that would be trained on.
    inputs: Vec<usize>,
    targets: u64,
    tally: Tally,
    /// Lines with the tokens of an earlier one, and the first few: line and earlier line.
    duplicates: u64,
    named: Vec<[String; 2]>,
    first: Vec<(String, Row)>,
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    let config = ModelConfig::read(&args.model)?;
    let tokenizer = Tokenizer::open(&args.model)?;
    let mut encoder = Encoder::new(&tokenizer, &config, args.loss_on);
    let longest = (args.seq_len as usize).min(config.max_positions);
    let survey = survey(args, &mut encoder, longest)?;
    match args.json {
        true => out::json(&survey.json(args)?)?,
        false => survey.print(args, &tokenizer)?,
    }
    Ok(Outcome::Fine)
}

fn survey(args: &Args, encoder: &mut Encoder, longest: usize) -> Result<Survey> {
    let mut found = Survey::default();
    let mut seen: HashMap<u64, (usize, u64)> = HashMap::new();
    let files: Vec<PathBuf> = args
        .files
        .iter()
        .map(|f| Ok(Folder::find(f)?.map_or_else(|| f.clone(), |folder| folder.train)))
        .collect::<Result<_>>()?;
    for (i, file) in files.iter().enumerate() {
        let name = |i: usize, line: u64| format!("{}:{line}", files[i].display());
        let mut examples = Examples::open(file)?;
        while let Some(example) = examples.next() {
            let row = encoder.encode(&example?);
            let mut row = row.map_err(|e| examples.blame(e))?;
            let line = examples.line();
            found.lines += 1;
            found.lengths.push(row.ids.len());
            let mut hasher = DefaultHasher::new();
            row.ids.hash(&mut hasher);
            if let Some((file, earlier)) = seen.insert(hasher.finish(), (i, line)) {
                found.duplicates += 1;
                if found.named.len() < NAMED {
                    found.named.push([name(i, line), name(file, earlier)]);
                }
            }
            if found.tally.fit(&mut row, longest) {
                found.inputs.push(row.ids.len() - 1);
                found.targets += row.targets() as u64;
                if found.first.len() < args.show {
                    found.first.push((name(i, line), row));
                }
            }
        }
    }
    Ok(found)
}

impl Survey {
    /// Tokens of the line at this share of all, the shortest first.
    fn at(sorted: &[usize], share: f64) -> usize {
        let last = sorted.len().saturating_sub(1);
        let i = (share * last as f64).round() as usize;
        sorted.get(i).copied().unwrap_or(0)
    }

    fn sorted(&self) -> Vec<usize> {
        let mut sorted = self.lengths.clone();
        sorted.sort_unstable();
        sorted
    }

    /// The longest line of each bar, and how many lines it stands for.
    fn histogram(&self) -> Vec<(usize, usize)> {
        let most = self.lengths.iter().max().copied().unwrap_or(0);
        let width = most.div_ceil(BARS).max(1);
        let mut bars: Vec<(usize, usize)> = (1..=BARS).map(|i| (i * width, 0)).collect();
        for n in &self.lengths {
            bars[(n.saturating_sub(1) / width).min(BARS - 1)].1 += 1;
        }
        while bars.last().is_some_and(|b| b.1 == 0) {
            bars.pop();
        }
        bars
    }

    fn packed(&self, args: &Args) -> (usize, f64) {
        pack::measure(self.inputs.iter().copied(), args.seq_len as usize)
    }

    fn json(&self, args: &Args) -> Result<Value> {
        let sorted = self.sorted();
        let (rows, filled) = self.packed(args);
        let bar = |(to, lines): &(usize, usize)| json!({"to": to, "lines": lines});
        Ok(json!({
            "lines": self.lines,
            "rows": self.inputs.len(),
            "tokens": self.lengths.iter().sum::<usize>(),
            "targets": self.targets,
            "length": {
                "least": Self::at(&sorted, 0.0),
                "median": Self::at(&sorted, 0.5),
                "p95": Self::at(&sorted, 0.95),
                "most": Self::at(&sorted, 1.0),
            },
            "histogram": self.histogram().iter().map(bar).collect::<Vec<_>>(),
            "cut": self.tally.cut,
            "too_short": self.tally.too_short,
            "no_target": self.tally.no_target,
            "duplicates": self.duplicates,
            "packed_rows": rows,
            "packed_filled": filled,
            "seq_len": args.seq_len,
            "loss_on": args.loss_on.name(),
        }))
    }

    fn print(&self, args: &Args, tokenizer: &Tokenizer) -> Result<()> {
        let paint = Paint {
            colours: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
        };
        for (at, row) in &self.first {
            let n = row.targets();
            out::line(format!("{at}: {} tokens, {n} of them count", row.ids.len()))?;
            out::line(paint.row(row, tokenizer)?)?;
            out::line("")?;
        }
        let sorted = self.sorted();
        let tokens: usize = self.lengths.iter().sum();
        out::line(format!(
            "{} lines, {} tokens; {} count in the loss",
            out::count(self.lines),
            out::count(tokens as u64),
            out::count(self.targets),
        ))?;
        let bars = self.histogram();
        let most = bars.iter().map(|b| b.1).max().unwrap_or(0).max(1);
        for (to, lines) in &bars {
            let bar = "█".repeat((lines * BAR_WIDTH).div_ceil(most));
            out::line(format!("{to:>8} {bar} {lines}"))?;
        }
        out::line(format!(
            "tokens a line: {} to {}, median {}, 95 % up to {}",
            Self::at(&sorted, 0.0),
            Self::at(&sorted, 1.0),
            Self::at(&sorted, 0.5),
            Self::at(&sorted, 0.95),
        ))?;
        let seq_len = args.seq_len;
        for (n, what) in [
            (self.tally.cut, format!("are cut after {seq_len} tokens")),
            (self.tally.too_short, "have fewer than two tokens".into()),
            (self.tally.no_target, "have nothing left to learn".into()),
        ] {
            if n > 0 {
                out::line(format!("{n} lines {what}"))?;
            }
        }
        if self.duplicates > 0 {
            let named: Vec<String> = self.named.iter().map(|n| n.join(" as ")).collect();
            let more = if self.duplicates > NAMED as u64 {
                ", .."
            } else {
                ""
            };
            let n = self.duplicates;
            out::line(format!("{n} duplicates: {}{more}", named.join(", ")))?;
        }
        let (rows, filled) = self.packed(args);
        out::line(format!(
            "packed: {rows} rows of {seq_len}, {:.1} % full",
            100.0 * filled
        ))
    }
}

/// Tokens as text, those that count set apart.
struct Paint {
    colours: bool,
}

impl Paint {
    fn row(&self, row: &Row, tokenizer: &Tokenizer) -> Result<String> {
        let (on, off) = match self.colours {
            true => ("\u{1b}[32m", "\u{1b}[0m"),
            false => ("«", "»"),
        };
        let mut text = String::new();
        let mut at = 0;
        let n = row.ids.len().min(SHOWN_TOKENS);
        while at < n {
            let counted = row.counted[at];
            let run = row.counted[at..n]
                .iter()
                .take_while(|c| **c == counted)
                .count();
            let words = self.words(&row.ids[at..at + run], tokenizer)?;
            match counted {
                true => text += &format!("{on}{words}{off}"),
                false => text += &words,
            }
            at += run;
        }
        if n < row.ids.len() {
            text += &format!(" .. and {} tokens more", row.ids.len() - n);
        }
        Ok(text)
    }

    /// The text of some ids, special tokens by their names, without characters that a terminal obeys.
    fn words(&self, ids: &[u32], tokenizer: &Tokenizer) -> Result<String> {
        let mut text = String::new();
        let mut plain = vec![];
        for id in ids {
            if tokenizer.decode(&[*id])?.is_empty() {
                text += &tokenizer.decode(&plain)?;
                plain.clear();
                text += &tokenizer.token(*id).unwrap_or_default();
            } else {
                plain.push(*id);
            }
        }
        text += &tokenizer.decode(&plain)?;
        let clean = |c: char| match c {
            '\n' => c,
            c if c.is_control() => '\u{fffd}',
            c => c,
        };
        Ok(text.chars().map(clean).collect())
    }
}
