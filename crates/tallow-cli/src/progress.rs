//! A training run as the user sees it: a bar on a terminal, some plain lines elsewhere, nothing with `--json`.
//! Invariant: everything goes to stderr; Ctrl-C and SIGTERM stop the run after the step that is being computed.
use crate::{interrupt, out};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    io::IsTerminal as _,
    ops::ControlFlow,
    time::{Duration, Instant},
};
use tallow::train::{Event, FeedStats, Observer};

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
    /// Predicted for the run, in bytes.
    memory_bytes: usize,
    /// Step (from 1) and loss.
    pub curve: Vec<(f64, f64)>,
    /// Step and loss on the validation text.
    pub evals: Vec<(f64, f64)>,
    /// Steps done before this process began.
    resumed: u64,
}

impl Progress {
    pub(crate) fn new(show: Show) -> Self {
        Progress {
            show,
            bar: None,
            started: Instant::now(),
            loss: None,
            tokens_per_s: None,
            memory_bytes: 0,
            curve: vec![],
            evals: vec![],
            resumed: 0,
        }
    }

    fn say(&self, text: &str) {
        match (self.show, &self.bar) {
            (Show::Nothing, _) => {}
            (Show::Progress, Some(bar)) => bar.suspend(|| eprintln!("{text}")),
            (Show::Progress, None) => eprintln!("{text}"),
        }
    }

    fn begin(
        &mut self,
        data: &FeedStats,
        total: u64,
        trainable: usize,
        [batch, accumulate]: [usize; 2],
        memory_bytes: usize,
    ) {
        self.memory_bytes = memory_bytes;
        let rows = data.rows.unwrap_or(0);
        if let Some(tokens) = data.tokens {
            let (rows, tokens) = (out::count(rows as u64), out::count(tokens as u64));
            self.say(&format!("{rows} rows, {tokens} tokens"));
        }
        self.say(&format!(
            "{total} steps of {batch} x {accumulate} rows; {} parameters to train; {} of memory predicted",
            out::count(trainable as u64),
            out::bytes(memory_bytes),
        ));
        if data.cut > 0 {
            self.say(&format!("{} of {rows} rows are cut to --seq-len", data.cut));
        }
        if data.too_short > 0 {
            let n = data.too_short;
            self.say(&format!("{n} lines without two tokens are left out"));
        }
        if data.no_target > 0 {
            let n = data.no_target;
            self.say(&format!(
                "{n} lines have nothing to learn in their first --seq-len tokens and are left out"
            ));
        }
        if let Some(filled) = data.filled {
            self.say(&format!("rows are {:.1} % full", 100.0 * filled));
        }
        self.start(total);
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

    fn step(&mut self, [step, total]: [u64; 2], loss: f64, lr: f64, tokens_per_s: f64) {
        let smooth = |old: Option<f64>, new: f64| match old {
            None => new,
            Some(old) => old + SMOOTHING * (new - old),
        };
        self.curve.push((step as f64, loss));
        if loss.is_finite() {
            self.loss = Some(smooth(self.loss, loss));
        }
        self.tokens_per_s = Some(smooth(self.tokens_per_s, tokens_per_s));
        let shown = format!(
            "loss {:.3}  lr {lr:.2e}  {:>6.0} tokens/s  {}",
            self.loss.unwrap_or(loss),
            self.tokens_per_s.unwrap_or(tokens_per_s),
            out::bytes(self.memory_bytes),
        );
        if let Some(bar) = &self.bar {
            bar.set_position(step);
            bar.set_message(shown);
            if step == total {
                bar.finish();
            }
        } else if step == total
            || step == self.resumed + 1
            || step.is_multiple_of((total / PLAIN_LINES).max(1))
        {
            let left = self.started.elapsed().as_secs_f64() / (step - self.resumed) as f64
                * (total - step) as f64;
            let left = Duration::from_secs_f64(left).as_secs();
            self.say(&format!("step {step}/{total}  {shown}  {left} s left"));
        }
    }
}

impl Observer for Progress {
    fn event(&mut self, event: &Event) -> ControlFlow<()> {
        match event {
            Event::Start {
                data,
                total,
                trainable,
                batch,
                accumulate,
                checkpoint_layers,
                memory,
                ..
            } => {
                self.begin(data, *total, *trainable, [*batch, *accumulate], memory.total());
                if *checkpoint_layers {
                    self.say("layers are computed again in the backward pass");
                }
            }
            Event::Resumed {
                step,
                dir,
                remarks,
                losses,
                ..
            } => {
                self.say(&format!("going on after step {step}, from {}", dir.display()));
                for remark in remarks {
                    self.say(remark);
                }
                let steps = (1..).map(f64::from);
                let losses = losses.iter().map(|l| f64::from(*l));
                self.curve = steps.zip(losses).collect();
                self.resumed = *step;
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
                lr,
                tokens,
                seconds,
                ..
            } => {
                let tokens_per_s = *tokens as f64 / seconds.max(1e-9);
                self.step([*step, *total], f64::from(*loss), *lr, tokens_per_s);
            }
            Event::Skipped { step, lines } => {
                let first = lines.first();
                let at = first.map(|l| format!(", from {}:{}", l.file.display(), l.line));
                self.say(&format!(
                    "step {step} is skipped: its loss or gradient is not finite{}",
                    at.unwrap_or_default()
                ));
            }
            Event::Eval { step, result, .. } => {
                self.evals.push((*step as f64, result.loss));
                self.say(&format!(
                    "step {step}: {:.4} on the validation text",
                    result.loss
                ));
            }
            Event::Checkpoint {
                step,
                dir,
                bytes,
                seconds,
            } => tracing::info!(
                "step {step}: {} saved in {} ({})",
                out::bytes(*bytes as usize),
                dir.display(),
                out::seconds(*seconds),
            ),
            Event::EarlyStop { step, best: (at, loss) } => self.say(&format!(
                "stopped after step {step}: no better than {loss:.4} after step {at}, whose adapter is taken"
            )),
            Event::Failed { step, why } => self.say(&format!("step {step} failed: {why}")),
            Event::Saved { .. } => {}
        }
        match interrupt::asked() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}
