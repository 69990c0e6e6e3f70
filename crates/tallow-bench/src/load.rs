//! Another program at work: a process that keeps every core busy when it is told to, and idle otherwise.
//! Invariant: it ends with whoever started it, for then its input ends; between [`Load::on`] and [`Load::off`] every one of
//! its threads computes.
//! Absent on purpose: priorities. It is as good a program as any other.

use std::ffi::OsString;
use std::hint::black_box;
use std::io::{BufRead as _, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::work::{Check, Clock, Looped, Queued, Work};
use crate::{Error, Result};

/// Until the system has spread all threads over the cores.
const SETTLE: Duration = Duration::from_millis(20);

/// The process.
pub struct Load {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

fn failed(what: impl std::fmt::Display) -> Error {
    Error::Peer {
        peer: "the program that keeps the cores busy".to_owned(),
        what: what.to_string(),
    }
}

impl Load {
    /// Starts `command`, which calls [`spin`]. Idle at first.
    ///
    /// # Errors
    /// A command that does not start.
    pub fn start(command: &[OsString]) -> Result<Self> {
        let (program, args) = command.split_first().ok_or_else(|| failed("no command"))?;
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(stdin), Some(stdout)) => Ok(Load {
                child,
                stdin,
                stdout: BufReader::new(stdout),
            }),
            _ => Err(failed("its pipes are missing (bug in tallow)")),
        }
    }

    fn tell(&mut self, word: &str) -> Result<()> {
        let mut answer = String::new();
        writeln!(self.stdin, "{word}")
            .and_then(|()| self.stdin.flush())
            .and_then(|()| self.stdout.read_line(&mut answer))
            .map_err(failed)?;
        match answer.trim() == word {
            true => Ok(()),
            false => Err(failed(format!(
                "told \"{word}\", it answered \"{}\"",
                answer.trim()
            ))),
        }
    }

    /// From here on every core is busy.
    ///
    /// # Errors
    /// A process that has ended.
    pub fn on(&mut self) -> Result<()> {
        self.tell("on")?;
        thread::sleep(SETTLE);
        Ok(())
    }

    /// From here on it is idle again.
    ///
    /// # Errors
    /// As [`Load::on`].
    pub fn off(&mut self) -> Result<()> {
        self.tell("off")
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The other end: `threads` threads that compute whenever the last line of `input` was `on`, until it ends.
///
/// # Errors
/// A pipe that breaks.
pub fn spin(
    threads: usize,
    input: impl std::io::BufRead,
    mut output: impl Write,
) -> std::io::Result<()> {
    let (busy, end, working) = (
        AtomicBool::new(false),
        AtomicBool::new(false),
        AtomicUsize::new(0),
    );
    thread::scope(|scope| {
        let all: Vec<_> = (0..threads)
            .map(|i| {
                let (busy, end, working) = (&busy, &end, &working);
                scope
                    .spawn(move || worker(i as u64, busy, end, working))
                    .thread()
                    .clone()
            })
            .collect();
        let result = (|| {
            for line in input.lines() {
                let line = line?;
                let (on, there) = (line == "on", if line == "on" { threads } else { 0 });
                busy.store(on, Ordering::SeqCst);
                all.iter().for_each(thread::Thread::unpark);
                while working.load(Ordering::SeqCst) != there {
                    thread::sleep(Duration::from_micros(100));
                }
                writeln!(output, "{line}")?;
                output.flush()?;
            }
            Ok(())
        })();
        busy.store(false, Ordering::SeqCst);
        end.store(true, Ordering::SeqCst);
        all.iter().for_each(thread::Thread::unpark);
        result
    })
}

fn worker(mut x: u64, busy: &AtomicBool, end: &AtomicBool, working: &AtomicUsize) {
    while !end.load(Ordering::SeqCst) {
        if !busy.load(Ordering::SeqCst) {
            thread::park();
            continue;
        }
        working.fetch_add(1, Ordering::SeqCst);
        while busy.load(Ordering::Relaxed) {
            for _ in 0..1000 {
                x = black_box(x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
            }
        }
        working.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A work beside a busy program: its loops run while every core has something else to do.
pub struct Beside<W> {
    work: W,
    load: Load,
}

impl<W: Work> Beside<W> {
    /// `work`, with a busy program of its own.
    pub fn new(work: W, load: Load) -> Self {
        Beside { work, load }
    }

    fn busily<T>(&mut self, run: impl FnOnce(&mut W) -> Result<T>) -> Result<T> {
        self.load.on()?;
        let result = run(&mut self.work);
        self.load.off()?;
        result
    }
}

impl<W: Work> Work for Beside<W> {
    fn renew(&mut self, seed: u64) -> Result<()> {
        self.work.renew(seed)
    }
    fn feed(&mut self, link: f32) -> Result<()> {
        self.work.feed(link)
    }
    fn start(&mut self) -> Result<()> {
        self.work.start()
    }
    fn finish(&mut self) -> Result<f32> {
        self.work.finish()
    }
    fn fetch(&mut self, clock: &dyn Clock) -> Result<f64> {
        self.work.fetch(clock)
    }
    fn check(&mut self, returned: f32) -> Result<Check> {
        self.work.check(returned)
    }
    fn waited(&mut self, clock: &dyn Clock, n: usize, first: f32) -> Result<Looped> {
        self.busily(|w| w.waited(clock, n, first))
    }
    fn queued(&mut self, clock: &dyn Clock, n: usize, first: f32) -> Result<Queued> {
        self.busily(|w| w.queued(clock, n, first))
    }
    fn again(&mut self, clock: &dyn Clock) -> Result<(f32, f64)> {
        self.work.again(clock)
    }
    fn remembers(&self) -> bool {
        self.work.remembers()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn every_line_is_answered_and_the_end_of_input_ends_it() {
        let mut said = vec![];
        spin(3, &b"on\noff\non\n"[..], &mut said).unwrap();
        assert_eq!(said, b"on\noff\non\n");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn it_computes_only_while_it_is_told_to() {
        use std::io::Read as _;
        use std::os::unix::net::UnixStream;
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let input = BufReader::new(theirs.try_clone().unwrap());
        let worker = thread::spawn(move || spin(1, input, theirs));
        let cpu_s = || {
            let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
            let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
            fields[11].parse::<f64>().unwrap() / 100.0
        };
        let mut tell = |word: &[u8]| {
            ours.write_all(word).unwrap();
            let mut answer = vec![0; word.len()];
            ours.read_exact(&mut answer).unwrap();
            assert_eq!(answer, word);
            let (start, before) = (Instant::now(), cpu_s());
            while start.elapsed() < Duration::from_millis(300) {
                thread::sleep(Duration::from_millis(20));
            }
            cpu_s() - before
        };
        assert!(tell(b"on\n") > 0.05);
        drop(ours);
        worker.join().unwrap().unwrap();
    }

    #[test]
    fn a_command_that_is_no_such_program_is_said() {
        let none = Load::start(&["/nowhere/spin".into()]).err().unwrap();
        assert!(none.to_string().contains("keeps the cores busy"), "{none}");
        let mut other = Load::start(&["echo".into(), "hello".into()]).unwrap();
        let e = other.on().err().unwrap().to_string();
        assert!(e.contains("answered") || e.contains("pipe"), "{e}");
    }
}
