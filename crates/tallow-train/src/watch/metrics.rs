//! `metrics.jsonl`: a line for everything that happens in a run.
//! Invariant: every line is one whole JSON object with `event` and `time`; a run that goes on from a checkpoint
//! keeps the lines up to it and drops those behind, so that no step is told twice.
//! Absent on purpose: buffering. A line is in the file when the call returns, whatever happens next.
use crate::{Event, feed::Line};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use super::{Record, TensorBoard};

/// The file's name, in the run's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The folder of TensorBoard's files.
const BOARD_DIR: &str = "tensorboard";

/// Writes the lines and TensorBoard's files.
pub struct Metrics {
    path: PathBuf,
    file: Option<File>,
    board: Option<TensorBoard>,
    /// What could not be written, once.
    problem: Option<String>,
}

/// An event as a line. What has no number of its own says so in words, under `text`.
#[must_use]
pub fn line(event: &Event) -> Value {
    let mut line = match event {
        Event::Start {
            data,
            total,
            trainable,
            batch,
            accumulate,
            checkpoint_layers,
            memory,
            settings,
        } => json!({
            "event": "start", "rows": data.rows, "tokens": data.tokens, "cut": data.cut,
            "too_short": data.too_short, "total": total, "trainable": trainable, "batch": batch,
            "accumulate": accumulate, "checkpoint_layers": checkpoint_layers, "memory_bytes": memory.total(),
            "settings": settings.iter().cloned().collect::<BTreeMap<_, _>>(),
        }),
        Event::Resumed {
            step,
            dir,
            remarks,
            seconds,
            ..
        } => json!({
            "event": "resumed", "step": step, "seconds": seconds, "remarks": remarks,
            "text": format!("went on from {}", dir.display()),
        }),
        Event::Planned {
            shape,
            memory_bytes,
            seconds,
        } => json!({
            "event": "planned", "shape": shape, "memory_bytes": memory_bytes, "seconds": seconds,
            "text": format!("planned batches of {} x {}", shape[0], shape[1]),
        }),
        Event::Step {
            step,
            epoch,
            loss,
            grad_norm,
            lr,
            tokens,
            seconds,
            skipped,
            empty,
            ..
        } => json!({
            "event": "step", "step": step, "epoch": epoch, "loss": loss, "grad_norm": grad_norm,
            "lr": lr, "tokens": tokens, "seconds": seconds, "skipped": skipped, "empty": empty,
            "tokens_per_s": *tokens as f64 / seconds.max(1e-9),
        }),
        Event::Skipped { step, lines } => {
            let lines: Vec<String> = lines.iter().map(Line::to_string).collect();
            json!({
                "event": "skipped", "step": step, "lines": lines,
                "text": format!("step {step} skipped: not finite; its lines: {}", lines.join(", ")),
            })
        }
        Event::Eval { step, result, best } => json!({
            "event": "eval", "step": step, "loss": result.loss, "perplexity": result.loss.exp(),
            "tokens": result.tokens, "best": best,
        }),
        Event::Checkpoint {
            step,
            dir,
            bytes,
            seconds,
        } => json!({
            "event": "checkpoint", "step": step, "bytes": bytes, "seconds": seconds,
            "text": format!("{} written in {:.0} ms", dir.display(), seconds * 1e3),
        }),
        Event::EarlyStop { step, best } => json!({
            "event": "early_stop", "step": step, "best": best,
            "text": format!("stopped early: the best evaluation was {:.4} at step {}", best.1, best.0),
        }),
        Event::Failed { step, why } => json!({
            "event": "failed", "step": step, "text": why,
        }),
        Event::Saved { dir } => json!({
            "event": "saved", "text": format!("adapter saved in {}", dir.display()),
        }),
    };
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    line["time"] = json!(since.map_or(0.0, |d| d.as_secs_f64()));
    line
}

impl Metrics {
    /// Opens the files in a run's folder, which exists. `from_step`: steps that a checkpoint has; 0 begins anew.
    /// Returns the history that is kept, too.
    ///
    /// # Errors
    /// Files that cannot be read or made.
    pub fn open(dir: &Path, from_step: u64) -> io::Result<(Self, Record)> {
        let path = dir.join(METRICS_FILE);
        let mut record = Record::default();
        keep(&path, from_step, &mut record)?;
        let metrics = Metrics {
            file: Some(OpenOptions::new().create(true).append(true).open(&path)?),
            board: Some(TensorBoard::create(&dir.join(BOARD_DIR), from_step)?),
            path,
            problem: None,
        };
        Ok((metrics, record))
    }

    /// Why writing ended early, if it did.
    #[must_use]
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// Writes a line. The first failure ends both files.
    pub fn add(&mut self, line: &Value) {
        if self.problem.is_some() {
            return;
        }
        if let Err(e) = self.write(line) {
            (self.file, self.board) = (None, None);
            self.problem = Some(format!("{}: cannot write ({e})", self.path.display()));
        }
    }

    fn write(&mut self, line: &Value) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            let mut text = line.to_string();
            text.push('\n');
            file.write_all(text.as_bytes())?;
        }
        match &mut self.board {
            Some(board) => board.add(line),
            None => Ok(()),
        }
    }
}

/// Rewrites the file with its lines up to a step, and tells them to `record`. Half a line at the end, from a
/// run that was killed, is dropped.
fn keep(path: &Path, from_step: u64, record: &mut Record) -> io::Result<()> {
    if from_step == 0 {
        return match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        };
    }
    let old = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    let beside = path.with_extension("jsonl.new");
    let mut new = io::BufWriter::new(File::create(&beside)?);
    for text in BufReader::new(old).split(b'\n') {
        let Ok(line) = serde_json::from_slice::<Value>(&text?) else {
            continue;
        };
        if line["step"].as_u64().is_some_and(|step| step > from_step) {
            continue;
        }
        record.add(&line);
        writeln!(new, "{line}")?;
    }
    new.into_inner()?.sync_all()?;
    fs::rename(beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64, loss: f32) -> Event {
        Event::Step {
            step,
            total: 9,
            epoch: 0,
            loss,
            grad_norm: 1.0,
            lr: 0.5,
            tokens: 100,
            seconds: 0.5,
            skipped: 0,
            empty: 0,
        }
    }

    fn losses(dir: &Path) -> Vec<(u64, f64)> {
        let text = fs::read_to_string(dir.join(METRICS_FILE)).unwrap();
        let read = |l: &str| {
            let line: Value = serde_json::from_str(l).unwrap();
            assert!(line["time"].as_f64().unwrap() > 1e9);
            (
                line["step"].as_u64().unwrap(),
                line["loss"].as_f64().unwrap(),
            )
        };
        text.lines().map(read).collect()
    }

    #[test]
    fn going_on_from_a_checkpoint_tells_no_step_twice() {
        let dir = tempfile::tempdir().unwrap();
        let (mut metrics, _) = Metrics::open(dir.path(), 0).unwrap();
        for i in 1..=5 {
            metrics.add(&line(&step(i, i as f32)));
        }
        drop(metrics);
        // Killed while it wrote step 6.
        let path = dir.path().join(METRICS_FILE);
        let mut file = OpenOptions::new().append(true).open(path).unwrap();
        file.write_all(b"{\"event\": \"step\", \"ste").unwrap();
        let (mut metrics, record) = Metrics::open(dir.path(), 3).unwrap();
        assert_eq!(record.points.len(), 3);
        metrics.add(&line(&step(4, 0.5)));
        let want = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 0.5)];
        assert_eq!(losses(dir.path()), want);
        // A new run begins a new history.
        let (_, record) = Metrics::open(dir.path(), 0).unwrap();
        assert!(record.points.is_empty() && losses(dir.path()).is_empty());
    }

    #[test]
    fn a_full_disk_ends_the_file_and_not_the_run() {
        let Ok(full) = OpenOptions::new().append(true).open("/dev/full") else {
            return;
        };
        let mut metrics = Metrics {
            path: "/dev/full".into(),
            file: Some(full),
            board: None,
            problem: None,
        };
        for i in 1..=2 {
            metrics.add(&line(&step(i, 1.0)));
        }
        let problem = metrics.problem().unwrap();
        assert!(problem.starts_with("/dev/full: cannot write"), "{problem}");
    }
}
