//! Runs side by side as the user sees them: a bar a run on a terminal, some plain lines elsewhere.
//! Invariant: everything goes to stderr.
//! Absent on purpose: the page in the browser.
use crate::out;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{io::IsTerminal as _, time::Instant};
use tallow::train::{Event, watch::Standing};

/// Plain lines of a sweep that is not shown on a terminal.
const PLAIN_LINES: u64 = 10;

/// What is shown of one run.
struct Line {
    name: String,
    bar: Option<ProgressBar>,
    step: u64,
    total: u64,
    loss: Option<f64>,
    over: bool,
}

/// What is shown of all runs.
pub(super) struct Board {
    shown: bool,
    bars: Option<MultiProgress>,
    lines: Vec<Line>,
    /// Targets of all runs, and the time of their steps.
    tokens: u64,
    seconds: f64,
    /// The step after which a plain line was written.
    written: u64,
    started: Instant,
}

impl Board {
    pub(super) fn new(names: Vec<String>, shown: bool) -> Self {
        let bars = (shown && std::io::stderr().is_terminal())
            .then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(8)));
        let width = names.iter().map(String::len).max().unwrap_or(0);
        let style = ProgressStyle::with_template("{prefix}  {bar:20} {pos}/{len}  {msg}");
        let line = |name: String| {
            let bar = bars.as_ref().map(|all| {
                let bar = all.add(ProgressBar::new(1));
                if let Ok(style) = &style {
                    bar.set_style(style.clone().progress_chars("━╸ "));
                }
                bar.set_prefix(format!("{name:width$}"));
                bar
            });
            Line {
                name,
                bar,
                step: 0,
                total: 0,
                loss: None,
                over: false,
            }
        };
        Board {
            shown,
            lines: names.into_iter().map(line).collect(),
            bars,
            tokens: 0,
            seconds: 0.0,
            written: 0,
            started: Instant::now(),
        }
    }

    fn say(&self, text: &str) {
        match &self.bars {
            _ if !self.shown => {}
            Some(bars) => drop(bars.println(text)),
            None => eprintln!("{text}"),
        }
    }

    /// Takes note of what happened in run `number`, which stands at `now`.
    pub(super) fn event(&mut self, number: usize, event: &Event, now: &Standing) {
        let name = self.lines[number].name.clone();
        match event {
            Event::Start {
                total,
                batch,
                accumulate,
                memory,
                ..
            } => {
                self.lines[number].total = *total;
                if let Some(bar) = &self.lines[number].bar {
                    bar.set_length(*total);
                }
                if number == 0 {
                    let memory = out::bytes(memory.total());
                    let runs = self.lines.len();
                    self.say(&format!(
                        "{runs} runs of {total} steps of {batch} x {accumulate} rows each; {memory} of memory for all"
                    ));
                }
            }
            Event::Resumed { step, remarks, .. } => {
                self.lines[number].step = *step;
                self.written = self.written.max(*step);
                self.say(&format!("{name}: going on after step {step}"));
                remarks
                    .iter()
                    .for_each(|r| self.say(&format!("{name}: {r}")));
            }
            Event::Step {
                step,
                tokens,
                seconds,
                ..
            } => {
                let first = self.lines.iter().position(|l| !l.over) == Some(number);
                self.tokens += *tokens as u64;
                // A step of all runs takes its time once.
                self.seconds += if first { *seconds } else { 0.0 };
                (self.lines[number].step, self.lines[number].loss) = (*step, now.loss);
                self.step(number, now);
            }
            Event::Skipped { step, .. } => self.say(&format!(
                "{name}: step {step} is skipped: its loss or gradient is not finite"
            )),
            Event::Eval { step, result, .. } => self.say(&format!(
                "{name}: step {step}: {:.4} on the validation text",
                result.loss
            )),
            Event::Failed { why, .. } => self.end(number, &format!("failed: {why}")),
            Event::EarlyStop { step, .. } => {
                self.say(&format!("{name}: stopped after step {step}"))
            }
            Event::Saved { .. } => self.end(number, "done"),
            Event::Planned { .. } | Event::Checkpoint { .. } => {}
        }
    }

    fn end(&mut self, number: usize, how: &str) {
        self.lines[number].over = true;
        match &self.lines[number].bar {
            Some(bar) => bar.abandon_with_message(how.to_owned()),
            None => self.say(&format!("{}: {how}", self.lines[number].name)),
        }
    }

    fn step(&mut self, number: usize, now: &Standing) {
        let figure = |x: Option<f64>| x.map_or("-".to_owned(), |x| format!("{x:.3}"));
        let line = &self.lines[number];
        if let Some(bar) = &line.bar {
            let valid = now.valid.map(|v| format!("  validation {v:.3}"));
            bar.set_position(line.step);
            bar.set_message(format!(
                "loss {}{}",
                figure(now.loss),
                valid.unwrap_or_default()
            ));
            return;
        }
        let last = self.lines.iter().rposition(|l| !l.over) == Some(number);
        let (step, total) = (line.step, line.total);
        let due = step == total || step >= self.written + (total / PLAIN_LINES).max(1);
        if !last || !due {
            return;
        }
        self.written = step;
        let each = self.lines.iter();
        let each: Vec<String> = each
            .map(|l| format!("{} {}", l.name, figure(l.loss)))
            .collect();
        let rate = self.tokens as f64 / self.seconds.max(1e-9);
        let spent = self.started.elapsed().as_secs();
        self.say(&format!(
            "step {step}/{total}  {}  {rate:.0} tokens/s  {spent} s",
            each.join("  ")
        ));
    }
}
