//! Peers in this process: candle, gemm and faer, as their users call them.
//! Invariant: each gets tallow's operands and the same check; what is timed is the call and the look at its last element,
//! not the copy of the operands.
//! Absent on purpose: tuning that a user of the peer would not do.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use tallow::DType;

use super::gemm::gemm_xwt;
use super::{Job, Peer, Place, candle};
use crate::measure::Contender;
use crate::ours::judge::{Judged, judged};
use crate::probe::Cost;
use crate::suite::products::{LoraShape, SCALE};
use crate::suite::{Context, products};
use crate::work::{Check, Clock, Looped, Queued, Work, link};
use crate::{Error, Result};

/// Names of the peers of this file.
pub const ENGINES: [&str; 3] = ["candle", "gemm", "faer"];

/// Without it candle counts the cores in `/proc/cpuinfo` again for every product, which is not its arithmetic.
pub const THREADS: &str = "RAYON_NUM_THREADS";

/// A peer of this process.
pub struct Local {
    name: &'static str,
    /// Where candle computes.
    device: candle_core::Device,
    /// Does tallow compute somewhere else?
    elsewhere: bool,
}

impl Local {
    /// The peer of that name, if there is one.
    ///
    /// # Errors
    /// Threads that are not set; Metal that does not open.
    pub fn open(name: &str, place: &Place<'_>) -> Result<Option<Self>> {
        let Place { threads, device } = *place;
        let Some(name) = ENGINES.into_iter().find(|n| *n == name) else {
            return Ok(None);
        };
        match std::env::var(THREADS) {
            Ok(n) if n == threads.to_string() => {
                let own = match name {
                    "candle" => candle::device(device)?,
                    _ => candle_core::Device::Cpu,
                };
                Ok(Some(Local {
                    name,
                    elsewhere: device != "cpu" && own.is_cpu(),
                    device: own,
                }))
            }
            got => Err(Error::Peer {
                peer: name.to_owned(),
                what: format!(
                    "needs {THREADS}={threads} in the environment, got \"{}\"",
                    got.unwrap_or_default()
                ),
            }),
        }
    }
}

impl Peer for Local {
    fn name(&self) -> &str {
        self.name
    }

    fn version(&self) -> String {
        let version = version(self.name);
        match (self.elsewhere, self.device.is_metal()) {
            (true, _) => format!("{version}, on the processor"),
            (false, true) => format!("{version}, on Metal"),
            (false, false) => version,
        }
    }

    fn contenders(&mut self, job: &Job, cx: &Context) -> Result<Vec<Contender>> {
        let ways = match (self.name, job) {
            ("candle", _) => candle::ways(job, cx, &self.device)?,
            (_, Job::Lora(shape)) => vec![slices(self.name, *shape, cx)?],
            (_, Job::Rows(_) | Job::Layer(_) | Job::Model(_)) => vec![],
        };
        let contender = |way: Way| Contender {
            engine: match way.name {
                "" => self.name.to_owned(),
                name => format!("{}, {name}", self.name),
            },
            work: Box::new(Here {
                engine: way.engine,
                y: f32::NAN,
                judged: way.judged,
            }),
            need: cx.need(&way.cost),
            lazy: false,
            memory: None,
        };
        Ok(ways.into_iter().map(contender).collect())
    }
}

/// One of the ways in which a peer does a job.
pub(super) struct Way {
    /// Behind the peer's name, where there are several or it is not what was asked for.
    pub(super) name: &'static str,
    /// What it does.
    pub(super) engine: Box<dyn Engine>,
    /// Its operands, and what is right.
    pub(super) judged: Judged,
    /// The least of it.
    pub(super) cost: Cost,
}

/// Versions in the lock file that this was built with.
fn version(name: &str) -> String {
    let package = if name == "candle" {
        "candle-core"
    } else {
        name
    };
    let header = format!("name = \"{package}\"");
    let lines: Vec<&str> = include_str!("../../../../Cargo.lock").lines().collect();
    let next = |pair: &[&str]| {
        (pair[0] == header).then(|| pair[1].split('"').nth(1).unwrap_or("?").to_owned())
    };
    let found: Vec<String> = lines.windows(2).filter_map(next).collect();
    found.join("/")
}

/// What a peer does with operands.
pub(super) trait Engine {
    /// New operands: all that vary, in the order they were made. Results are poisoned.
    fn renew(&mut self, operands: &[Vec<f64>]) -> Result<()>;
    /// The last element of the first operand becomes this.
    fn feed(&mut self, value: f64) -> Result<()>;
    /// The work, and the last element of the first result.
    fn run(&mut self) -> Result<f32>;
    /// All results, whole.
    fn results(&mut self) -> Result<Vec<Vec<f32>>>;
    /// Does a run change its own operands?
    fn remembers(&self) -> bool {
        false
    }
}

/// A peer with a job.
struct Here {
    engine: Box<dyn Engine>,
    /// The last element of the last result.
    y: f32,
    judged: Judged,
}

impl Work for Here {
    fn renew(&mut self, seed: u64) -> Result<()> {
        self.y = f32::NAN;
        self.engine.renew(&self.judged.draw_all(seed)?)
    }

    fn feed(&mut self, link: f32) -> Result<()> {
        let value = self.judged.feed(link)?;
        self.engine.feed(value)
    }

    fn start(&mut self) -> Result<()> {
        self.y = self.engine.run()?;
        Ok(())
    }

    fn finish(&mut self) -> Result<f32> {
        Ok(self.y)
    }

    fn waited(&mut self, clock: &dyn Clock, n: usize, first: f32) -> Result<Looped> {
        let (mut seconds, mut links, mut next) = (0.0, Vec::with_capacity(n), first);
        for i in 0..n {
            self.feed(next)?;
            let start = clock.now();
            let y = self.engine.run()?;
            seconds += clock.now() - start;
            links.push((next, y));
            self.y = y;
            next = link(y, i);
        }
        Ok(Looped { seconds, links })
    }

    fn queued(&mut self, clock: &dyn Clock, n: usize, first: f32) -> Result<Queued> {
        self.feed(first)?;
        let start = clock.now();
        for _ in 0..n {
            self.start()?;
        }
        let seconds = clock.now() - start;
        Ok(Queued {
            // They compute when they are called.
            built_s: seconds,
            seconds,
            last: self.finish()?,
        })
    }

    fn fetch(&mut self, clock: &dyn Clock) -> Result<f64> {
        let start = clock.now();
        self.engine.results()?;
        Ok(clock.now() - start)
    }

    fn check(&mut self, returned: f32) -> Result<Check> {
        let wide = |y: Vec<f32>| y.into_iter().map(f64::from).collect();
        let got: Vec<_> = self.engine.results()?.into_iter().map(wide).collect();
        self.judged.check_all(&got, returned)
    }

    fn remembers(&self) -> bool {
        self.engine.remembers()
    }
}

/// Elements of weights, as f32, with their extents.
pub(super) fn weights(judged: &Judged) -> Vec<(Vec<f32>, Vec<usize>)> {
    let narrow =
        |(v, shape): (Vec<f64>, Vec<usize>)| (v.iter().map(|v| *v as f32).collect(), shape);
    judged.weights().into_iter().map(narrow).collect()
}

/// gemm or faer. Neither has a product of bf16 (gemm has one of f16), so where tallow's weights are bf16 they get f32 copies.
fn slices(name: &'static str, shape: LoraShape, cx: &Context) -> Result<Way> {
    let judged = judged(products::lora(&cx.session, shape, cx.dtype)?);
    let values = |i: usize| weights(&judged).get(i).map_or(vec![], |w| w.0.clone());
    let engine = Slices {
        product: if name == "gemm" { gemm_xwt } else { faer_xwt },
        threads: cx.threads,
        shape,
        x: vec![],
        w: values(0),
        a: values(1),
        b: values(2),
        h: vec![0.0; shape.m * shape.rank],
        y: vec![f32::NAN; shape.m * shape.n],
    };
    Ok(Way {
        name: match cx.dtype {
            DType::BF16 => "no bf16 product: its f32 one",
            _ => "",
        },
        engine: Box::new(engine),
        judged,
        cost: shape.cost(DType::F32),
    })
}

/// `y = x·wᵀ`, or `y += scale·x·wᵀ`: rows and columns `(m, n, k)`, `y [m, n]`, `x [m, k]`, `w [n, k]`, threads.
pub(super) type Product = fn((usize, usize, usize), &mut [f32], &[f32], &[f32], Option<f32>, usize);

/// gemm and faer: products of slices.
struct Slices {
    product: Product,
    threads: usize,
    shape: LoraShape,
    x: Vec<f32>,
    w: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    h: Vec<f32>,
    y: Vec<f32>,
}

impl Engine for Slices {
    fn renew(&mut self, operands: &[Vec<f64>]) -> Result<()> {
        self.x = operands[0].iter().map(|v| *v as f32).collect();
        self.y.fill(f32::NAN);
        Ok(())
    }

    fn feed(&mut self, value: f64) -> Result<()> {
        if let Some(last) = self.x.last_mut() {
            *last = value as f32;
        }
        Ok(())
    }

    fn run(&mut self) -> Result<f32> {
        let LoraShape { m, k, n, rank } = self.shape;
        let t = self.threads;
        (self.product)((m, n, k), &mut self.y, &self.x, &self.w, None, t);
        if rank > 0 {
            (self.product)((m, rank, k), &mut self.h, &self.x, &self.a, None, t);
            (self.product)((m, n, rank), &mut self.y, &self.h, &self.b, Some(SCALE), t);
        }
        Ok(self.y[m * n - 1])
    }

    fn results(&mut self) -> Result<Vec<Vec<f32>>> {
        Ok(vec![self.y.clone()])
    }
}

fn faer_xwt(
    (m, n, k): (usize, usize, usize),
    y: &mut [f32],
    x: &[f32],
    w: &[f32],
    add_scaled: Option<f32>,
    threads: usize,
) {
    let par = if threads > 1 {
        Par::rayon(threads)
    } else {
        Par::Seq
    };
    let x = MatRef::from_row_major_slice(x, m, k);
    let w = MatRef::from_row_major_slice(w, n, k);
    let y = MatMut::from_row_major_slice_mut(y, m, n);
    let accum = if add_scaled.is_some() {
        Accum::Add
    } else {
        Accum::Replace
    };
    matmul(y, accum, x, w.transpose(), add_scaled.unwrap_or(1.0), par);
}

#[cfg(test)]
mod tests;
