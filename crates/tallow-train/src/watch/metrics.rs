//! `metrics.jsonl`: a line for everything that happens in a run.
//! Invariant: every line is one whole JSON object with `event` and `time`; a run that goes on from a checkpoint
//! keeps the lines up to it and drops those behind, so that no step is told twice.
//! Absent on purpose: buffering. A line is in the file when the call returns, whatever happens next.
use crate::{Event, Observer};
use serde_json::{Value, json};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead as _, BufReader, Write as _},
    ops::ControlFlow,
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

/// An event as a line; `None` for what is no event of a run's history.
#[must_use]
pub fn line(event: &Event) -> Option<Value> {
    let mut line = match event {
        Event::Start {
            rows,
            cut,
            too_short,
            tokens,
            total,
            trainable,
        } => json!({
            "event": "start", "rows": rows, "cut": cut, "too_short": too_short, "tokens": tokens,
            "total": total, "trainable": trainable,
        }),
        Event::Planned {
            shape,
            memory_bytes,
            seconds,
        } => json!({
            "event": "planned", "shape": shape, "memory_bytes": memory_bytes, "seconds": seconds,
        }),
        Event::Step {
            step,
            epoch,
            loss,
            grad_norm,
            lr,
            tokens,
            seconds,
            ..
        } => json!({
            "event": "step", "step": step, "epoch": epoch, "loss": loss, "grad_norm": grad_norm,
            "lr": lr, "tokens": tokens, "seconds": seconds,
            "tokens_per_s": *tokens as f64 / seconds.max(1e-9),
        }),
        Event::Eval { step, result } => json!({
            "event": "eval", "step": step, "loss": result.loss, "perplexity": result.loss.exp(),
            "tokens": result.tokens,
        }),
        Event::Saved { dir } => json!({"event": "saved", "dir": dir.display().to_string()}),
    };
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    line["time"] = json!(since.map_or(0.0, |d| d.as_secs_f64()));
    Some(line)
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

impl Observer for Metrics {
    fn event(&mut self, event: &Event) -> ControlFlow<()> {
        let line = line(event).filter(|_| self.problem.is_none());
        if let Some(Err(e)) = line.map(|line| self.write(&line)) {
            (self.file, self.board) = (None, None);
            self.problem = Some(format!("{}: cannot write ({e})", self.path.display()));
        }
        ControlFlow::Continue(())
    }
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
            let _ = metrics.event(&step(i, i as f32));
        }
        drop(metrics);
        // Killed while it wrote step 6.
        let path = dir.path().join(METRICS_FILE);
        let mut file = OpenOptions::new().append(true).open(path).unwrap();
        file.write_all(b"{\"event\": \"step\", \"ste").unwrap();
        let (mut metrics, record) = Metrics::open(dir.path(), 3).unwrap();
        assert_eq!(record.points.len(), 3);
        let _ = metrics.event(&step(4, 0.5));
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
            assert_eq!(metrics.event(&step(i, 1.0)), ControlFlow::Continue(()));
        }
        let problem = metrics.problem().unwrap();
        assert!(problem.starts_with("/dev/full: cannot write"), "{problem}");
    }
}
