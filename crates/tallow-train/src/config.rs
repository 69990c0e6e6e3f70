//! The settings of a run, checked once and written beside the adapter.
//! Invariant: every number that changes the result is here; there is no default for any of them.
//! Absent on purpose: paths, and what only changes how a run is shown.
use crate::{Error, OptimizerKind, Result, Schedule};
use serde_json::{Value, json};
use tallow_llm::data::LossOn;

/// Everything that decides what a run computes, the adapter's own configuration aside.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainConfig {
    /// Optimizer steps; `None` takes `epochs`.
    pub steps: Option<u64>,
    /// Passes over the data, where `steps` is not given. May be a fraction.
    pub epochs: f64,
    /// Rows of a batch.
    pub batch: usize,
    /// Batches of a step: their gradients are added up, each token counting alike.
    pub accumulate: usize,
    /// Rows are cut after this many tokens, `<bos>` and `<eos>` included.
    pub seq_len: usize,
    /// Several documents share a row, none seeing another; rows are full but for the last.
    pub packing: bool,
    /// Which tokens count in the loss.
    pub loss_on: LossOn,
    /// What makes steps of gradients.
    pub optimizer: OptimizerKind,
    /// Peak learning rate.
    pub lr: f64,
    /// How it falls.
    pub schedule: Schedule,
    /// Steps in which it rises first.
    pub warmup: u64,
    /// Weight decay: decoupled, but for SGD.
    pub weight_decay: f64,
    /// Decay of the first moment; momentum of SGD.
    pub beta1: f64,
    /// Decay of the second moment; SGD has none.
    pub beta2: f64,
    /// Added to the root of AdamW's second moment.
    pub eps: f64,
    /// The gradient is scaled down to this norm where it is longer.
    pub clip: Option<f64>,
    /// Decides the order of the rows (and, given to the adapter, its start).
    pub seed: u64,
    /// Steps between evaluations; `None` evaluates at the end only.
    pub eval_every: Option<u64>,
    /// The run ends after this many evaluations without a new best one.
    pub patience: Option<u64>,
    /// Layers are computed again in the backward pass, instead of being kept: less memory, more time.
    pub checkpoint_layers: bool,
    /// A step whose loss or gradient is not finite is skipped and counted, instead of ending the run.
    pub skip_nonfinite: bool,
}

impl TrainConfig {
    /// Refuses numbers that no run can be made with.
    pub fn validate(&self) -> Result<()> {
        let check = |ok: bool, name: &'static str, want: &str, got: String| match ok {
            true => Ok(()),
            false => Err(Error::Setting {
                name,
                want: want.to_owned(),
                got,
            }),
        };
        let above = "a number above 0";
        let finite_above = |x: f64| x.is_finite() && x > 0.0;
        let steps = self.steps.unwrap_or(1);
        check(steps > 0, "steps", "1 or more", steps.to_string())?;
        let epochs = self.epochs;
        check(finite_above(epochs), "epochs", above, epochs.to_string())?;
        check(self.batch > 0, "batch", "1 or more", self.batch.to_string())?;
        let n = self.accumulate;
        check(n > 0, "accumulate", "1 or more batches", n.to_string())?;
        let seq = self.seq_len;
        check(seq >= 2, "seq_len", "2 or more tokens", seq.to_string())?;
        check(finite_above(self.lr), "lr", above, self.lr.to_string())?;
        let wd = self.weight_decay;
        let wd_ok = wd.is_finite() && wd >= 0.0;
        check(wd_ok, "weight_decay", "0 or more", wd.to_string())?;
        for (name, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            let ok = (0.0..1.0).contains(&beta);
            check(ok, name, "a number from 0 to below 1", beta.to_string())?;
        }
        check(finite_above(self.eps), "eps", above, self.eps.to_string())?;
        let clip = self.clip.unwrap_or(1.0);
        check(finite_above(clip), "clip", above, clip.to_string())?;
        let every = self.eval_every.unwrap_or(1);
        let want = "1 or more steps";
        check(every > 0, "eval_every", want, every.to_string())?;
        let patience = self.patience.unwrap_or(1);
        let want = "1 or more evaluations";
        check(patience > 0, "patience", want, patience.to_string())
    }

    /// Refuses settings of an adapter that is to be trained in the same passes as one with the settings `first`, where
    /// the passes themselves differ.
    pub(crate) fn check_beside(&self, first: &TrainConfig) -> Result<()> {
        let passes = |c: &TrainConfig| {
            let again = c.checkpoint_layers;
            [
                ("batch", c.batch.to_string()),
                ("accumulate", c.accumulate.to_string()),
                ("seq_len", c.seq_len.to_string()),
                ("packing", c.packing.to_string()),
                ("checkpoint_layers", again.to_string()),
            ]
        };
        let mut both = passes(first).into_iter().zip(passes(self));
        match both.find(|((_, want), (_, got))| want != got) {
            None => Ok(()),
            Some(((name, want), (_, got))) => Err(Error::Setting {
                name,
                want: format!("{want}, as in every adapter trained beside this one"),
                got,
            }),
        }
    }

    /// Optimizer steps of a run; `batches`: of one pass over the data, where that is known.
    ///
    /// # Errors
    /// Data of unknown length and no number of steps.
    pub fn total_steps(&self, batches: Option<u64>) -> Result<u64> {
        let Some(batches) = batches else {
            return self.steps.ok_or_else(|| Error::Setting {
                name: "steps",
                want: "a number, because this data is read as it is needed".into(),
                got: "epochs".into(),
            });
        };
        let an_epoch = batches.max(1) as f64 / self.accumulate.max(1) as f64;
        let all = || ((self.epochs * an_epoch).round() as u64).max(1);
        Ok(self.steps.unwrap_or_else(all))
    }

    /// Names and values, for the file beside the adapter. A clip of 0 is none.
    pub fn entries(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("steps", json!(self.steps)),
            ("epochs", json!(self.epochs)),
            ("batch", json!(self.batch)),
            ("accumulate", json!(self.accumulate)),
            ("seq_len", json!(self.seq_len)),
            ("packing", json!(self.packing)),
            ("loss_on", json!(self.loss_on.name())),
            ("optimizer", json!(self.optimizer.name())),
            ("lr", json!(self.lr)),
            ("schedule", json!(self.schedule.name())),
            ("warmup", json!(self.warmup)),
            ("weight_decay", json!(self.weight_decay)),
            ("beta1", json!(self.beta1)),
            ("beta2", json!(self.beta2)),
            ("eps", json!(self.eps)),
            ("clip", json!(self.clip.unwrap_or(0.0))),
            ("seed", json!(self.seed)),
            ("eval_every", json!(self.eval_every)),
            ("patience", json!(self.patience)),
            ("checkpoint_layers", json!(self.checkpoint_layers)),
            ("skip_nonfinite", json!(self.skip_nonfinite)),
        ]
    }
}

/// A YAML mapping, one line a key. JSON values are YAML, so strings are quoted where they must be.
pub fn to_yaml(entries: &[(&'static str, Value)]) -> String {
    let line = |(key, value): &(&'static str, Value)| format!("{key}: {value}\n");
    entries.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usual() -> TrainConfig {
        TrainConfig {
            steps: None,
            epochs: 2.0,
            batch: 4,
            accumulate: 1,
            seq_len: 128,
            packing: false,
            loss_on: LossOn::Answers,
            optimizer: OptimizerKind::AdamW,
            lr: 1e-3,
            schedule: Schedule::Linear,
            warmup: 10,
            weight_decay: 0.01,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            clip: None,
            seed: 0,
            eval_every: None,
            patience: None,
            checkpoint_layers: false,
            skip_nonfinite: false,
        }
    }

    #[test]
    fn epochs_become_steps_unless_steps_are_given() {
        assert_eq!(usual().total_steps(Some(3)).unwrap(), 6);
        let two = TrainConfig {
            accumulate: 2,
            ..usual()
        };
        assert_eq!(two.total_steps(Some(3)).unwrap(), 3);
        let half = TrainConfig {
            epochs: 0.5,
            ..usual()
        };
        assert_eq!(half.total_steps(Some(1)).unwrap(), 1);
        let fixed = TrainConfig {
            steps: Some(7),
            ..usual()
        };
        assert!(usual().total_steps(None).is_err());
        assert_eq!(fixed.total_steps(Some(1000)).unwrap(), 7);
    }

    #[test]
    fn senseless_numbers_are_named() {
        let refuse = |change: fn(&mut TrainConfig), want: &str| {
            let mut c = usual();
            change(&mut c);
            assert_eq!(c.validate().unwrap_err().to_string(), want);
        };
        assert!(usual().validate().is_ok());
        refuse(|c| c.lr = f64::NAN, "lr: want a number above 0, got NaN");
        refuse(|c| c.batch = 0, "batch: want 1 or more, got 0");
        refuse(|c| c.seq_len = 1, "seq_len: want 2 or more tokens, got 1");
        refuse(|c| c.steps = Some(0), "steps: want 1 or more, got 0");
        refuse(|c| c.clip = Some(0.0), "clip: want a number above 0, got 0");
        refuse(
            |c| c.beta2 = 1.0,
            "beta2: want a number from 0 to below 1, got 1",
        );
    }

    #[test]
    fn the_file_is_yaml_with_quoted_strings() {
        let text = to_yaml(&usual().entries());
        assert!(text.starts_with("steps: null\nepochs: 2.0\nbatch: 4\naccumulate: 1\n"));
        assert!(text.contains("schedule: \"linear\"\n"));
    }
}
