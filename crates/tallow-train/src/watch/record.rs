//! A run's history in memory, for its page.
//! Invariant: memory is bounded, however long the run: points are merged two by two when there are too many.
use serde_json::Value;

/// Most points kept.
const MOST: usize = 4096;

/// Some steps, merged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// The last of them.
    pub step: u64,
    /// How many there are.
    pub count: u64,
    /// Mean loss a token, weighted by step.
    pub loss: f64,
    /// Learning rate of the last.
    pub lr: f64,
    /// Largest gradient norm.
    pub grad_norm: f64,
    /// Tokens predicted.
    pub tokens: f64,
    /// Time taken, in seconds.
    pub seconds: f64,
}

impl Point {
    fn with(self, b: Point) -> Point {
        let (m, n) = (self.count as f64, b.count as f64);
        Point {
            step: b.step,
            count: self.count + b.count,
            loss: (self.loss * m + b.loss * n) / (m + n),
            lr: b.lr,
            grad_norm: self.grad_norm.max(b.grad_norm),
            tokens: self.tokens + b.tokens,
            seconds: self.seconds + b.seconds,
        }
    }
}

/// Something else that happened, in words.
#[derive(Clone, Debug, PartialEq)]
pub struct Mark {
    /// Steps done by then.
    pub step: u64,
    /// What.
    pub text: String,
}

/// A prompt continued twice.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// What both were given.
    pub prompt: String,
    /// What stands in the data.
    pub wanted: String,
    /// The base model's text.
    pub before: String,
    /// The trained one's.
    pub after: String,
}

/// What a page shows of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Record {
    /// A line over the page.
    pub title: String,
    /// Settings and versions, by name.
    pub facts: Vec<(String, String)>,
    /// The curve; each point stands for `merged` steps or fewer.
    pub points: Vec<Point>,
    /// Step and loss on the validation text.
    pub evals: Vec<(u64, f64)>,
    /// Everything else.
    pub marks: Vec<Mark>,
    /// Text before and after.
    pub samples: Vec<Sample>,
    /// Steps planned.
    pub total: u64,
    /// Predicted memory of the largest recording, in bytes.
    pub memory_bytes: u64,
    /// The run is over.
    pub done: bool,
    /// Why it ended before its time, where it did.
    pub failed: Option<String>,
    /// Steps that a point stands for; 0 before the first merge.
    pub(super) merged: u64,
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Standing {
    /// Steps done.
    pub step: u64,
    /// Training loss, in nats a token: the mean of the last tenth of the steps.
    pub loss: Option<f64>,
    /// The last loss on the validation text.
    pub valid: Option<f64>,
}

/// Which run is the best so far: by the validation text where all have been evaluated, else by the training loss.
pub fn best(runs: &[(String, Record)]) -> Option<usize> {
    let going = || {
        runs.iter()
            .enumerate()
            .filter(|(_, (_, r))| r.failed.is_none())
    };
    let all_evaluated = going().all(|(_, (_, r))| r.standing().valid.is_some());
    let score = |r: &Record| match all_evaluated {
        true => r.standing().valid,
        false => r.standing().loss,
    };
    let scored = going().filter_map(|(i, (_, r))| Some((i, score(r).filter(|x| x.is_finite())?)));
    scored.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(i, _)| i)
}

impl Record {
    /// Where the run stands.
    pub fn standing(&self) -> Standing {
        let recent = self.points.len().div_ceil(10);
        let last = &self.points[self.points.len() - recent..];
        let steps: u64 = last.iter().map(|p| p.count).sum();
        let sum: f64 = last.iter().map(|p| p.loss * p.count as f64).sum();
        Standing {
            step: self.points.last().map_or(0, |p| p.step),
            loss: (steps > 0).then(|| sum / steps as f64),
            valid: self.evals.last().map(|e| e.1),
        }
    }

    /// Adds a line of `metrics.jsonl`.
    pub fn add(&mut self, line: &Value) {
        let number = |key: &str| line[key].as_f64().unwrap_or(f64::NAN);
        let at = line["step"].as_u64();
        let bytes = line["memory_bytes"].as_u64().unwrap_or(0);
        self.memory_bytes = self.memory_bytes.max(bytes);
        if let Some(text) = line["text"].as_str() {
            self.mark(text.to_owned());
        }
        match line["event"].as_str() {
            Some("start") => {
                self.total = line["total"].as_u64().unwrap_or(0);
                self.settings(&line["settings"]);
            }
            Some("step") => self.push(Point {
                step: at.unwrap_or(0),
                count: 1,
                loss: number("loss"),
                lr: number("lr"),
                grad_norm: number("grad_norm"),
                tokens: number("tokens"),
                seconds: number("seconds"),
            }),
            Some("eval") => self.evals.extend(at.map(|step| (step, number("loss")))),
            Some("failed") => self.failed = line["text"].as_str().map(str::to_owned),
            _ => {}
        }
    }

    /// Notes something in words.
    pub fn mark(&mut self, text: String) {
        let step = self.points.last().map_or(0, |p| p.step);
        if self.marks.len() == MOST {
            self.marks.remove(0);
        }
        self.marks.push(Mark { step, text });
    }

    /// Settings as facts, in place of those of an earlier start.
    fn settings(&mut self, settings: &Value) {
        for (name, value) in settings.as_object().into_iter().flatten() {
            let text = value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned);
            match self.facts.iter_mut().find(|f| f.0 == *name) {
                Some(fact) => fact.1 = text,
                None => self.facts.push((name.clone(), text)),
            }
        }
    }

    fn push(&mut self, point: Point) {
        let width = self.merged.max(1);
        match self.points.last_mut() {
            Some(last) if last.count < width => *last = last.with(point),
            _ => self.points.push(point),
        }
        if self.points.len() > MOST {
            self.merged = width * 2;
            let merge = |pair: &[Point]| match pair {
                [a, b] => a.with(*b),
                _ => pair[0],
            };
            self.points = self.points.chunks(2).map(merge).collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_long_run_is_merged_and_loses_no_step() {
        let mut record = Record::default();
        let steps = 3 * MOST as u64 + 5;
        for step in 1..=steps {
            record.add(&json!({
                "event": "step", "step": step, "loss": 2.0, "lr": 0.1, "grad_norm": step as f64,
                "tokens": 10, "seconds": 0.5,
            }));
            assert!(record.points.len() <= MOST);
        }
        assert_eq!(record.points.iter().map(|p| p.count).sum::<u64>(), steps);
        let last = record.points.last().unwrap();
        assert_eq!((last.step, last.grad_norm), (steps, steps as f64));
        let tokens: f64 = record.points.iter().map(|p| p.tokens).sum();
        assert_eq!(tokens, 10.0 * steps as f64);
        assert!(record.points.iter().all(|p| p.loss == 2.0));
        assert!(record.points.windows(2).all(|w| w[0].step < w[1].step));
    }
}
