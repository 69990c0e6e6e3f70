//! Peers in Python: a small script, written out and run with the user's `python3`, that computes what it is asked.
//! Invariant: operands are drawn here and its results are judged here, by the same oracle as tallow's; it keeps the time of
//! its own loops, so that the pipe is not in it, and that time is held against the same floor. It computes where tallow
//! does, on a GPU or on the processor, and its version says so.
//! Absent on purpose: installing anything.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Deserialize;
use serde_json::{Value, json};
use tallow::DType;
use tallow::llm::ModelConfig;
use tempfile::TempDir;

use super::{Job, ModelJob, Peer, Place, RowOp};
use crate::measure::Contender;
use crate::ours::judge::{Judged, judged, judged_half};
use crate::probe::Cost;
use crate::suite::layers::Layer;
use crate::suite::models::{self, Doing, Part};
use crate::suite::products::{LoraShape, SCALE};
use crate::suite::rows::{EPS, SHAPE};
use crate::suite::{Context, products, rows};
use crate::work::{Check, Clock, Looped, Queued, Work};
use crate::{Error, Result};

/// The script and what it imports.
const SCRIPTS: [(&str, &str); 3] = [
    ("peer.py", include_str!("python/server.py")),
    ("torch_model.py", include_str!("python/torch_model.py")),
    ("mlx_model.py", include_str!("python/mlx_model.py")),
];
/// Which Python; a virtual environment's, for example.
const PYTHON: &str = "TALLOW_PYTHON";

/// Engines that the script knows, and what installs them.
pub const ENGINES: [(&str, &str); 5] = [
    ("torch", "pip install torch safetensors"),
    (
        "torch-compiled",
        "pip install torch safetensors; needs a C++ compiler",
    ),
    ("peft", "pip install torch peft"),
    ("mlx", MLX),
    ("mlx-lm", MLX_LM),
];

/// On a Mac it brings its GPU by itself.
#[cfg(target_os = "macos")]
const MLX: &str = "pip install mlx";
#[cfg(target_os = "macos")]
const MLX_LM: &str = "pip install mlx mlx-lm";
#[cfg(not(target_os = "macos"))]
const MLX: &str = "pip install 'mlx[cpu]', or 'mlx[cuda]'";
#[cfg(not(target_os = "macos"))]
const MLX_LM: &str = "pip install 'mlx[cpu]' mlx-lm, or 'mlx[cuda]' mlx-lm";

/// The process and its pipes.
struct Server {
    name: String,
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    dir: TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn fail(&self, what: impl Into<String>) -> Error {
        Error::Peer {
            peer: self.name.clone(),
            what: what.into(),
        }
    }

    fn start(python: &str, name: &str, place: &Place<'_>) -> Result<Self> {
        let fail = |what: String| Error::Peer {
            peer: name.to_owned(),
            what,
        };
        let dir = TempDir::new().map_err(|e| fail(format!("no folder for operands: {e}")))?;
        for (name, text) in SCRIPTS {
            let path = dir.path().join(name);
            std::fs::write(&path, text).map_err(|e| fail(format!("{}: {e}", path.display())))?;
        }
        let script = dir.path().join(SCRIPTS[0].0);
        let count = place.threads.to_string();
        let mut child = Command::new(python)
            .arg("-u")
            .args([&script])
            .args([name, &count, place.device])
            .envs(
                ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"].map(|k| (k, &count)),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| {
                fail(format!(
                    "{python} does not start: {e}; {PYTHON} may name another"
                ))
            })?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(fail("its pipes are missing (bug in tallow)".to_owned()));
        };
        Ok(Server {
            name: name.to_owned(),
            child,
            stdin,
            stdout: BufReader::new(stdout),
            dir,
        })
    }

    fn ask<T: for<'a> Deserialize<'a>>(&mut self, request: &Value) -> Result<T> {
        let sent = writeln!(self.stdin, "{request}").and_then(|()| self.stdin.flush());
        let mut line = String::new();
        let read = self.stdout.read_line(&mut line);
        if line.is_empty() {
            let why = sent
                .err()
                .or(read.err())
                .map_or(String::new(), |e| format!(": {e}"));
            return Err(self.fail(format!("its process ended without an answer{why}")));
        }
        let answer: Value = serde_json::from_str(&line)
            .map_err(|e| self.fail(format!("an answer that is not JSON: {e}")))?;
        if let Some(what) = answer["error"].as_str() {
            return Err(self.fail(what));
        }
        if let Some(what) = answer["missing"].as_str() {
            let pip = ENGINES.iter().find(|(name, _)| *name == self.name);
            let pip = pip.map_or("", |(_, pip)| pip);
            return Err(self.fail(format!("not installed: {pip} ({what})")));
        }
        serde_json::from_value(answer).map_err(|e| self.fail(format!("an odd answer: {e}")))
    }

    /// Writes f32 values into a file of the folder.
    fn put(&self, name: &str, values: &[f64]) -> Result<PathBuf> {
        let path = self.dir.path().join(name);
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|v| (*v as f32).to_le_bytes())
            .collect();
        match std::fs::write(&path, bytes) {
            Ok(()) => Ok(path),
            Err(e) => Err(self.fail(format!("{}: {e}", path.display()))),
        }
    }
}

#[derive(Deserialize)]
struct Hello {
    version: String,
    lazy: bool,
}

/// An engine behind the script.
pub struct Python {
    name: String,
    version: String,
    lazy: bool,
    server: Arc<Mutex<Server>>,
}

impl Python {
    /// Starts it.
    ///
    /// # Errors
    /// No Python; the engine is not installed (the message says how to install it).
    pub fn open(name: &str, place: &Place<'_>) -> Result<Self> {
        let python = std::env::var(PYTHON).unwrap_or_else(|_| "python3".to_owned());
        Self::open_with(&python, name, place)
    }

    fn open_with(python: &str, name: &str, place: &Place<'_>) -> Result<Self> {
        let mut server = Server::start(python, name, place)?;
        let hello: Hello = server.ask(&json!({ "op": "hello" }))?;
        Ok(Python {
            name: name.to_owned(),
            version: hello.version,
            lazy: hello.lazy,
            server: Arc::new(Mutex::new(server)),
        })
    }
}

impl Peer for Python {
    fn name(&self) -> &str {
        &self.name
    }

    fn version(&self) -> String {
        self.version.clone()
    }

    fn contenders(&mut self, job: &Job, cx: &Context) -> Result<Vec<Contender>> {
        let half = cx.dtype == DType::BF16;
        let asked = match job {
            Job::Lora(shape) => self.product(*shape, cx)?,
            // A norm has no weight matrix that could be bf16.
            Job::Rows(_) | Job::Layer(_) if half => return Ok(vec![]),
            Job::Rows(op) => self.row_op(*op, cx)?,
            Job::Layer(layer) => self.layer(*layer, cx)?,
            Job::Model(job) => self.model(job, cx)?,
        };
        #[derive(Deserialize)]
        struct Made {
            slot: Option<usize>,
        }
        let request = json!({
            "op": "make", "job": asked.job, "weights": asked.weights, "half": half,
            "shape": asked.judged.shape(),
        });
        let made: Made = self.lock().ask(&request)?;
        let contender = made.slot.map(|slot| Contender {
            engine: self.name.clone(),
            work: Box::new(Remote {
                server: self.server.clone(),
                judged: asked.judged,
                slot,
                whole: matches!(job, Job::Layer(_) | Job::Model(_)),
                changes: asked.changes,
            }),
            need: cx.need(&asked.cost),
            // A step reads what the one before it wrote: none can be left out.
            lazy: self.lazy && !asked.changes,
            memory: None,
        });
        Ok(contender.into_iter().collect())
    }
}

/// A job as the script is told of it.
struct Asked {
    judged: Judged,
    cost: Cost,
    job: Value,
    weights: Value,
    /// Does a run change what the next one reads?
    changes: bool,
}

impl Python {
    fn lock(&self) -> MutexGuard<'_, Server> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Files of the weights, under these names.
    fn weights(&self, judged: &Judged, names: [&str; 3]) -> Result<Value> {
        let server = self.lock();
        let mut all = serde_json::Map::new();
        for (name, (values, shape)) in names.iter().zip(judged.weights()) {
            all.insert(
                (*name).to_owned(),
                json!([server.put(name, &values)?, shape]),
            );
        }
        Ok(Value::Object(all))
    }

    fn product(&self, shape: LoraShape, cx: &Context) -> Result<Asked> {
        let judged = match cx.dtype {
            DType::BF16 => judged_half(products::lora_half(&cx.session, shape)?),
            _ => judged(products::lora(&cx.session, shape, cx.dtype)?),
        };
        Ok(Asked {
            weights: self.weights(&judged, ["w", "a", "b"])?,
            judged,
            cost: shape.cost(cx.dtype),
            job: json!({
                "kind": "lora", "k": shape.k, "n": shape.n, "rank": shape.rank, "scale": SCALE,
            }),
            changes: false,
        })
    }

    fn row_op(&self, op: RowOp, cx: &Context) -> Result<Asked> {
        let kind = match op {
            RowOp::Softmax => "softmax",
            RowOp::RmsNorm => "rms_norm",
            RowOp::LayerNorm => "layer_norm",
        };
        let judged = judged(rows::work(cx, op)?);
        Ok(Asked {
            // LayerNorm's second operand is its bias.
            weights: self.weights(&judged, ["w", "b", ""])?,
            judged,
            cost: rows::cost(op),
            job: json!({ "kind": kind, "shape": SHAPE, "eps": EPS }),
            changes: false,
        })
    }

    fn layer(&self, layer: Layer, cx: &Context) -> Result<Asked> {
        let (ours, cost) = layer.work(cx)?;
        let judged = judged(ours);
        let (kind, shapes) = layer.described();
        let backward = layer.is_backward();
        Ok(Asked {
            weights: self.weights(&judged, ["w", "", ""])?,
            judged,
            cost,
            job: json!({ "kind": kind, "shapes": shapes, "backward": backward }),
            changes: matches!(layer, Layer::AdamW),
        })
    }

    fn model(&self, job: &ModelJob, cx: &Context) -> Result<Asked> {
        let ModelJob {
            dir,
            doing,
            adapted,
        } = job;
        let (ours, cost) = models::work(&cx.session, dir, cx.dtype, *doing, adapted.as_ref())?;
        let judged = match cx.dtype {
            DType::BF16 => judged_half(ours),
            _ => judged(ours),
        };
        let judged = match doing {
            Doing::Train(_) => judged.only(&models::TRAINED),
            _ => judged,
        };
        let config = ModelConfig::read(dir)?;
        let mut described = json!({ "dir": dir, "vocab": config.vocab, "ids": true });
        let (kind, shape) = match doing {
            Doing::Forward(shape) => ("forward", *shape),
            Doing::Prefill => ("cached", [0, models::PROMPT]),
            Doing::Decode => ("cached", [models::POSITION, 1]),
            Doing::Train(shape) => ("train", *shape),
            Doing::TrainAgain(shape) => ("train again", *shape),
        };
        described["kind"] = kind.into();
        described["of"] = json!(shape);
        if let Some(adapted) = adapted {
            let server = self.lock();
            let to = server.dir.path().join("adapter");
            let parts = adapted.write(&config, 1, &to)?;
            let part = |p: &Part| json!([p.module, p.rank, p.n, p.k]);
            described["adapter"] = json!(to);
            described["parts"] = parts.iter().map(part).collect();
        }
        Ok(Asked {
            judged,
            cost,
            job: described,
            weights: json!({}),
            changes: matches!(doing, Doing::Train(_)),
        })
    }
}

/// The job in the other process.
struct Remote {
    server: Arc<Mutex<Server>>,
    judged: Judged,
    /// Its number there.
    slot: usize,
    /// A whole model takes all operands that vary, and gives several results.
    whole: bool,
    changes: bool,
}

impl Drop for Remote {
    fn drop(&mut self) {
        // A process that has ended holds nothing.
        let _ = self.ask::<Nothing>(json!({ "op": "drop" }));
    }
}

impl Remote {
    fn ask<T: for<'a> Deserialize<'a>>(&self, mut request: Value) -> Result<T> {
        request["slot"] = self.slot.into();
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        server.ask(&request)
    }
}

#[derive(Deserialize)]
struct Nothing {}

impl Work for Remote {
    fn renew(&mut self, seed: u64) -> Result<()> {
        let all = match self.whole {
            true => self.judged.draw_all(seed)?,
            false => vec![self.judged.draw(seed)?],
        };
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        let put = |(i, x): (usize, &Vec<f64>)| server.put(&format!("x{i}"), x);
        let paths = all
            .iter()
            .enumerate()
            .map(put)
            .collect::<Result<Vec<_>>>()?;
        drop(server);
        self.ask::<Nothing>(json!({ "op": "renew", "x": paths }))
            .map(drop)
    }

    fn feed(&mut self, link: f32) -> Result<()> {
        self.judged.feed(link).map(drop)
    }

    /// One repetition on what was fed.
    fn start(&mut self) -> Result<()> {
        let link = self.judged.link();
        self.waited(&crate::work::Wall::new(), 1, link).map(drop)
    }

    fn finish(&mut self) -> Result<f32> {
        Ok(self.again(&crate::work::Wall::new())?.0)
    }

    fn again(&mut self, _: &dyn Clock) -> Result<(f32, f64)> {
        #[derive(Deserialize)]
        struct Finished {
            value: f32,
            seconds: f64,
        }
        let done: Finished = self.ask(json!({ "op": "finish" }))?;
        Ok((done.value, done.seconds))
    }

    fn fetch(&mut self, _: &dyn Clock) -> Result<f64> {
        #[derive(Deserialize)]
        struct Fetched {
            seconds: f64,
        }
        let done: Fetched = self.ask(json!({ "op": "fetch" }))?;
        Ok(done.seconds)
    }

    fn waited(&mut self, _: &dyn Clock, n: usize, first: f32) -> Result<Looped> {
        let scale = self.judged.scale();
        let request = json!({ "op": "waited", "n": n, "first": first, "scale": scale });
        let looped: Looped = self.ask(request)?;
        if let Some((link, _)) = looped.links.last() {
            self.judged.feed(*link)?;
        }
        Ok(looped)
    }

    fn queued(&mut self, _: &dyn Clock, n: usize, first: f32) -> Result<Queued> {
        self.judged.feed(first)?;
        let scale = self.judged.scale();
        self.ask(json!({ "op": "queued", "n": n, "first": first, "scale": scale }))
    }

    fn check(&mut self, returned: f32) -> Result<Check> {
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        let path = server.dir.path().join("y");
        drop(server);
        #[derive(Deserialize)]
        struct Lengths {
            elements: Vec<usize>,
        }
        let lengths: Lengths = self.ask(json!({ "op": "result", "path": path }))?;
        let bytes = std::fs::read(&path).map_err(|source| Error::Io { path, source })?;
        let four = |c: &[u8]| f64::from(f32::from_le_bytes([c[0], c[1], c[2], c[3]]));
        let mut values = bytes.chunks_exact(4).map(four);
        let each = lengths.elements.iter();
        let mut got: Vec<Vec<f64>> = each.map(|n| values.by_ref().take(*n).collect()).collect();
        match self.whole {
            true => self.judged.check_all(&got, returned),
            false => self.judged.check(got.pop().unwrap_or_default(), returned),
        }
    }

    fn remembers(&self) -> bool {
        self.changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Place<'_> = Place {
        threads: 1,
        device: "cpu",
    };

    /// A program that answers every line as told, in place of Python.
    #[cfg(unix)]
    fn fake(dir: &std::path::Path, body: &str) -> String {
        use std::os::unix::fs::PermissionsExt as _;
        let path = dir.join("python");
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path.display().to_string()
    }

    fn refused(python: &str) -> String {
        Python::open_with(python, "mlx", &HERE)
            .err()
            .unwrap()
            .to_string()
    }

    #[test]
    fn no_python_is_said() {
        let e = refused("/nowhere/python3");
        assert!(e.contains("does not start") && e.contains(PYTHON), "{e}");
    }

    #[test]
    #[cfg(unix)]
    fn what_is_missing_or_broken_is_said() {
        let dir = tempfile::tempdir().unwrap();
        for (body, wanted) in [
            (
                "echo '{\"missing\": \"No module named mlx\"}'",
                "not installed: pip install",
            ),
            ("exit 3", "ended without an answer"),
            ("echo hello", "not JSON"),
            ("read x; echo '{\"error\": \"boom\"}'", "boom"),
            ("read x; echo '{\"version\": 7}'", "odd answer"),
        ] {
            let e = refused(&fake(dir.path(), body));
            assert!(e.contains(wanted), "{body}: {e}");
        }
        let good = "read x; echo '{\"version\": \"1.2\", \"lazy\": true}'; read x";
        let peer = Python::open_with(&fake(dir.path(), good), "mlx", &HERE).unwrap();
        assert_eq!((peer.version(), peer.lazy), ("1.2".to_owned(), true));
    }
}
