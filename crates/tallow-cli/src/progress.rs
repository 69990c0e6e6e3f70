//! A training run as the user sees it: a bar on a terminal, some plain lines elsewhere, nothing with `--json`.
//! Invariant: everything goes to stderr; Ctrl-C stops the run after the step that is being computed.
use crate::{interrupt, out};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    io::IsTerminal as _,
    ops::ControlFlow,
    time::{Duration, Instant},
};
use tallow::train::{Event, Observer};

/// Plain lines of a run that is not shown on a terminal.
const PLAIN_LINES: u64 = 20;
/// Share of the newest step in the figures shown.
const SMOOTHING: f64 = 0.1;

/// How much is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Show {
    /// A bar or lines.
    Progress,
    /// Nothing.
    Nothing,
}

/// Shows a run and keeps its curve.
pub(crate) struct Progress {
    show: Show,
    bar: Option<ProgressBar>,
    started: Instant,
    loss: Option<f64>,
    tokens_per_s: Option<f64>,
    /// Step (from 1) and loss.
    pub curve: Vec<(f64, f64)>,
    /// Step and loss on the validation text.
    pub evals: Vec<(f64, f64)>,
    /// Rows cut to the longest allowed length, and all rows.
    pub cut: (usize, usize),
}

impl Progress {
    pub(crate) fn new(show: Show) -> Self {
        Progress {
            show,
            bar: None,
            started: Instant::now(),
            loss: None,
            tokens_per_s: None,
            curve: vec![],
            evals: vec![],
            cut: (0, 0),
        }
    }

    fn say(&self, text: &str) {
        match (self.show, &self.bar) {
            (Show::Nothing, _) => {}
            (Show::Progress, Some(bar)) => bar.suspend(|| eprintln!("{text}")),
            (Show::Progress, None) => eprintln!("{text}"),
        }
    }

    fn start(&mut self, total: u64) {
        self.started = Instant::now();
        if self.show == Show::Nothing || !std::io::stderr().is_terminal() {
            return;
        }
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(8));
        let template = "{bar:30} {pos}/{len}  {msg}  {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━╸ "));
        }
        self.bar = Some(bar);
    }

    fn step(&mut self, step: u64, total: u64, loss: f64, tokens_per_s: f64) {
        let smooth = |old: Option<f64>, new: f64| match old {
            None => new,
            Some(old) => old + SMOOTHING * (new - old),
        };
        self.curve.push((step as f64, loss));
        self.loss = Some(smooth(self.loss, loss));
        self.tokens_per_s = Some(smooth(self.tokens_per_s, tokens_per_s));
        let shown = format!(
            "loss {:.3}  {:>6.0} tokens/s",
            self.loss.unwrap_or(loss),
            self.tokens_per_s.unwrap_or(tokens_per_s),
        );
        if let Some(bar) = &self.bar {
            bar.set_position(step);
            bar.set_message(shown);
            if step == total {
                bar.finish();
            }
        } else if step == total || step == 1 || step.is_multiple_of((total / PLAIN_LINES).max(1)) {
            let left = self.started.elapsed().as_secs_f64() / step as f64 * (total - step) as f64;
            let left = Duration::from_secs_f64(left).as_secs();
            self.say(&format!("step {step}/{total}  {shown}  {left} s left"));
        }
    }
}

impl Observer for Progress {
    fn event(&mut self, event: &Event) -> ControlFlow<()> {
        match event {
            Event::Start {
                rows,
                cut,
                too_short,
                tokens,
                total,
                trainable,
            } => {
                self.cut = (*cut, *rows);
                self.say(&format!(
                    "{} rows, {} tokens; {total} steps; {} parameters to train",
                    out::count(*rows as u64),
                    out::count(*tokens as u64),
                    out::count(*trainable as u64),
                ));
                if *cut > 0 {
                    self.say(&format!("{cut} of {rows} rows are cut to --seq-len"));
                }
                if *too_short > 0 {
                    self.say(&format!(
                        "{too_short} lines without two tokens are left out"
                    ));
                }
                self.start(*total);
            }
            Event::Planned {
                shape: [b, t],
                memory_bytes,
                seconds,
            } => tracing::info!(
                "planned batches of {b} x {t} in {}, {} of memory",
                out::seconds(*seconds),
                out::bytes(*memory_bytes),
            ),
            Event::Step {
                step,
                total,
                loss,
                tokens,
                seconds,
                ..
            } => {
                let tokens_per_s = *tokens as f64 / seconds.max(1e-9);
                self.step(*step, *total, f64::from(*loss), tokens_per_s);
            }
            Event::Eval { step, result } => {
                self.evals.push((*step as f64, result.loss));
                self.say(&format!(
                    "step {step}: {:.4} on the validation text",
                    result.loss
                ));
            }
            Event::Saved { .. } => {}
        }
        match interrupt::asked() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}
