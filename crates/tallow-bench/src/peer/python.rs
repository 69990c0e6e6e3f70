//! Peers in Python: a small script, written out and run with the user's `python3`, that computes what it is asked.
//! Invariant: operands are drawn here and its results are judged here, by the same oracle as tallow's; it keeps the time of
//! its own loops, so that the pipe is not in it, and that time is held against the same floor.
//! Absent on purpose: installing anything.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;
use serde_json::{Value, json};
use tallow::DType;
use tempfile::TempDir;

use super::{Job, Peer, RowOp};
use crate::measure::Contender;
use crate::ours::judge::{Judged, judged};
use crate::suite::products::SCALE;
use crate::suite::rows::{EPS, SHAPE};
use crate::suite::{Context, products, rows};
use crate::work::{Check, Clock, Looped, Queued, Work};
use crate::{Error, Result};

const SCRIPT: &str = include_str!("server.py");
/// Which Python; a virtual environment's, for example.
const PYTHON: &str = "TALLOW_PYTHON";

/// Engines that the script knows, and what installs them.
pub const ENGINES: [(&str, &str); 4] = [
    ("torch", "pip install torch"),
    ("peft", "pip install torch peft"),
    ("mlx", "pip install 'mlx[cpu]'"),
    ("mlx-lm", "pip install 'mlx[cpu]' mlx-lm"),
];

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

    fn start(python: &str, name: &str, threads: usize) -> Result<Self> {
        let fail = |what: String| Error::Peer {
            peer: name.to_owned(),
            what,
        };
        let dir = TempDir::new().map_err(|e| fail(format!("no folder for operands: {e}")))?;
        let script = dir.path().join("peer.py");
        std::fs::write(&script, SCRIPT).map_err(|e| fail(format!("{}: {e}", script.display())))?;
        let count = threads.to_string();
        let mut child = Command::new(python)
            .arg("-u")
            .args([&script])
            .args([name, &count])
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
            return Err(self.fail(format!("not installed ({what}); {pip}")));
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
    pub fn open(name: &str, threads: usize) -> Result<Self> {
        let python = std::env::var(PYTHON).unwrap_or_else(|_| "python3".to_owned());
        Self::open_with(&python, name, threads)
    }

    fn open_with(python: &str, name: &str, threads: usize) -> Result<Self> {
        let mut server = Server::start(python, name, threads)?;
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

    fn contender(&mut self, job: &Job, cx: &Context) -> Result<Option<Contender>> {
        // In bf16 the engines round results too, so that the same check would not mean the same.
        if cx.dtype != DType::F32 {
            return Ok(None);
        }
        let (ours, cost, described) = match job {
            Job::Lora(shape) => (
                products::lora(&cx.session, *shape, cx.dtype)?,
                shape.cost(cx.dtype),
                json!({ "kind": "lora", "k": shape.k, "n": shape.n, "rank": shape.rank, "scale": SCALE }),
            ),
            Job::Rows(op) => {
                let kind = match op {
                    RowOp::Softmax => "softmax",
                    RowOp::RmsNorm => "rms_norm",
                    RowOp::LayerNorm => "layer_norm",
                };
                (
                    rows::work(cx, *op)?,
                    rows::cost(*op),
                    json!({ "kind": kind, "shape": SHAPE, "eps": EPS }),
                )
            }
        };
        let judged = judged(ours);
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        let mut weights = serde_json::Map::new();
        for (name, (values, shape)) in ["w", "a", "b"].iter().zip(judged.weights()) {
            // LayerNorm's second operand is its bias.
            let name = match (job, *name) {
                (Job::Rows(_), "a") => "b",
                (_, name) => name,
            };
            weights.insert(name.to_owned(), json!([server.put(name, &values)?, shape]));
        }
        #[derive(Deserialize)]
        struct Made {
            can: bool,
        }
        let request = json!({
            "op": "make", "job": described, "weights": weights, "shape": judged.shape(),
        });
        let made: Made = server.ask(&request)?;
        drop(server);
        Ok(made.can.then(|| Contender {
            engine: self.name.clone(),
            work: Box::new(Remote {
                server: self.server.clone(),
                judged,
            }),
            floor: cx.probe.floor(&cost, cx.threads),
            lazy: self.lazy,
        }))
    }
}

/// The job in the other process, which holds one at a time.
struct Remote {
    server: Arc<Mutex<Server>>,
    judged: Judged,
}

impl Remote {
    fn ask<T: for<'a> Deserialize<'a>>(&self, request: &Value) -> Result<T> {
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        server.ask(request)
    }
}

#[derive(Deserialize)]
struct Nothing {}

impl Work for Remote {
    fn renew(&mut self, seed: u64) -> Result<()> {
        let x = self.judged.draw(seed)?;
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        let path = server.put("x", &x)?;
        server
            .ask::<Nothing>(&json!({ "op": "renew", "x": path }))
            .map(drop)
    }

    fn feed(&mut self, link: f32) -> Result<()> {
        self.judged.feed(link)
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
        let done: Finished = self.ask(&json!({ "op": "finish" }))?;
        Ok((done.value, done.seconds))
    }

    fn waited(&mut self, _: &dyn Clock, n: usize, first: f32) -> Result<Looped> {
        let scale = self.judged.scale();
        let request = json!({ "op": "waited", "n": n, "first": first, "scale": scale });
        let looped: Looped = self.ask(&request)?;
        if let Some((link, _)) = looped.links.last() {
            self.judged.feed(*link)?;
        }
        Ok(looped)
    }

    fn queued(&mut self, _: &dyn Clock, n: usize, first: f32) -> Result<Queued> {
        self.judged.feed(first)?;
        let scale = self.judged.scale();
        self.ask(&json!({ "op": "queued", "n": n, "first": first, "scale": scale }))
    }

    fn check(&mut self, returned: f32) -> Result<Check> {
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        let path = server.dir.path().join("y");
        drop(server);
        self.ask::<Nothing>(&json!({ "op": "result", "path": path }))?;
        let bytes = std::fs::read(&path).map_err(|source| Error::Io { path, source })?;
        let four = |c: &[u8]| f64::from(f32::from_le_bytes([c[0], c[1], c[2], c[3]]));
        let got: Vec<f64> = bytes.chunks_exact(4).map(four).collect();
        self.judged.check(got, returned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        Python::open_with(python, "mlx", 1)
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
                "pip install 'mlx[cpu]'",
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
        let peer = Python::open_with(&fake(dir.path(), good), "mlx", 1).unwrap();
        assert_eq!((peer.version(), peer.lazy), ("1.2".to_owned(), true));
    }
}
