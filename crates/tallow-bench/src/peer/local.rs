//! Peers in this process: candle, gemm and faer, as their users call them.
//! Invariant: each gets tallow's operands and the same check; what is timed is the call and the look at its last element,
//! not the copy of the operands.
//! Absent on purpose: tuning that a user of the peer would not do.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use tallow::DType;

use super::gemm::gemm_xwt;
use super::{Job, Peer, RowOp};
use crate::measure::Contender;
use crate::ours::judge::{Judged, judged};
use crate::suite::products::{LoraShape, SCALE};
use crate::suite::rows::EPS;
use crate::suite::{Context, products, rows};
use crate::work::{Check, Clock, Looped, Queued, Work, link};
use crate::{Error, Result};

/// Names of the peers of this file.
pub const ENGINES: [&str; 3] = ["candle", "gemm", "faer"];

/// Without it candle counts the cores in `/proc/cpuinfo` again for every product, which is not its arithmetic.
pub const THREADS: &str = "RAYON_NUM_THREADS";

/// A peer of this process.
pub struct Local(&'static str);

impl Local {
    /// The peer of that name, if there is one.
    ///
    /// # Errors
    /// Threads that are not set.
    pub fn open(name: &str, threads: usize) -> Result<Option<Self>> {
        let Some(name) = ENGINES.into_iter().find(|n| *n == name) else {
            return Ok(None);
        };
        match std::env::var(THREADS) {
            Ok(n) if n == threads.to_string() => Ok(Some(Local(name))),
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
        self.0
    }

    fn version(&self) -> String {
        version(self.0)
    }

    fn contender(&mut self, job: &Job, cx: &Context) -> Result<Option<Contender>> {
        if cx.dtype != DType::F32 {
            return Ok(None);
        }
        let (judged, cost) = match job {
            Job::Lora(shape) => (
                judged(products::lora(&cx.session, *shape, cx.dtype)?),
                shape.cost(cx.dtype),
            ),
            Job::Rows(op) => (judged(rows::work(cx, *op)?), rows::cost(*op)),
            Job::Layer(_) | Job::Model(_) => return Ok(None),
        };
        let Some(engine) = engine(self.0, job, &judged, cx.threads)? else {
            return Ok(None);
        };
        let work = Here {
            engine,
            x: vec![],
            y: vec![],
            judged,
        };
        Ok(Some(Contender {
            engine: self.0.to_owned(),
            work: Box::new(work),
            floor: cx.probe.floor(&cost, cx.threads),
            lazy: false,
        }))
    }
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
trait Engine {
    /// New operands, as the peer wants them.
    fn take(&mut self, x: &[f32]) -> Result<()>;
    /// The work, and the last element of the result.
    fn run(&mut self) -> Result<f32>;
    /// The whole result.
    fn result(&mut self) -> Result<Vec<f32>>;
}

/// A peer with a job.
struct Here {
    engine: Box<dyn Engine>,
    x: Vec<f32>,
    /// The last element of the last result.
    y: Vec<f32>,
    judged: Judged,
}

impl Work for Here {
    fn renew(&mut self, seed: u64) -> Result<()> {
        self.x = self.judged.draw(seed)?.iter().map(|v| *v as f32).collect();
        self.y = vec![f32::NAN];
        Ok(())
    }

    fn feed(&mut self, link: f32) -> Result<()> {
        self.judged.feed(link)?;
        if let Some(last) = self.x.last_mut() {
            *last = self.judged.scale() * link;
        }
        self.engine.take(&self.x)
    }

    fn start(&mut self) -> Result<()> {
        self.y = vec![self.engine.run()?];
        Ok(())
    }

    fn finish(&mut self) -> Result<f32> {
        Ok(self.y.first().copied().unwrap_or(f32::NAN))
    }

    fn waited(&mut self, clock: &dyn Clock, n: usize, first: f32) -> Result<Looped> {
        let (mut seconds, mut links, mut next) = (0.0, Vec::with_capacity(n), first);
        for i in 0..n {
            self.feed(next)?;
            let start = clock.now();
            let y = self.engine.run()?;
            seconds += clock.now() - start;
            links.push((next, y));
            self.y = vec![y];
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

    fn check(&mut self, returned: f32) -> Result<Check> {
        let got = self.engine.result()?.into_iter().map(f64::from).collect();
        self.judged.check(got, returned)
    }
}

fn engine(
    name: &str,
    job: &Job,
    judged: &Judged,
    threads: usize,
) -> Result<Option<Box<dyn Engine>>> {
    let f32s = |(v, shape): (Vec<f64>, Vec<usize>)| {
        (v.iter().map(|v| *v as f32).collect::<Vec<f32>>(), shape)
    };
    let weights: Vec<(Vec<f32>, Vec<usize>)> = judged.weights().into_iter().map(f32s).collect();
    Ok(match (name, job) {
        ("candle", _) => Some(Box::new(Candle::new(
            job.clone(),
            &weights,
            judged.shape(),
        )?)),
        (_, Job::Lora(shape)) => {
            let values = |i: usize| weights.get(i).map_or(vec![], |w| w.0.clone());
            Some(Box::new(Slices {
                product: if name == "gemm" { gemm_xwt } else { faer_xwt },
                threads,
                shape: *shape,
                x: vec![],
                w: values(0),
                a: values(1),
                b: values(2),
                h: vec![0.0; shape.m * shape.rank],
                y: vec![f32::NAN; shape.m * shape.n],
            }))
        }
        (_, Job::Rows(_) | Job::Layer(_) | Job::Model(_)) => None,
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
    fn take(&mut self, x: &[f32]) -> Result<()> {
        self.x.clear();
        self.x.extend_from_slice(x);
        self.y.fill(f32::NAN);
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

    fn result(&mut self) -> Result<Vec<f32>> {
        Ok(self.y.clone())
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

/// candle, with its fused norms.
struct Candle {
    job: Job,
    shape: Vec<usize>,
    /// Those of a product are turned.
    weights: Vec<candle_core::Tensor>,
    x: Option<candle_core::Tensor>,
    y: Option<candle_core::Tensor>,
}

fn candle<T>(r: candle_core::Result<T>) -> Result<T> {
    r.map_err(|e| Error::Peer {
        peer: "candle".to_owned(),
        what: e.to_string(),
    })
}

impl Candle {
    fn new(job: Job, weights: &[(Vec<f32>, Vec<usize>)], shape: Vec<usize>) -> Result<Self> {
        let one = |(v, shape): &(Vec<f32>, Vec<usize>)| {
            let t =
                candle_core::Tensor::from_slice(v, shape.as_slice(), &candle_core::Device::Cpu)?;
            if shape.len() == 2 { t.t() } else { Ok(t) }
        };
        Ok(Candle {
            job,
            shape,
            weights: candle(weights.iter().map(one).collect())?,
            x: None,
            y: None,
        })
    }

    fn forward(&self, x: &candle_core::Tensor) -> candle_core::Result<candle_core::Tensor> {
        let w = &self.weights;
        match &self.job {
            Job::Lora(LoraShape { rank: 0, .. }) => x.matmul(&w[0]),
            Job::Lora(_) => {
                let y = x.matmul(&w[0])?;
                y + (x.matmul(&w[1])?.matmul(&w[2])? * f64::from(SCALE))?
            }
            Job::Rows(RowOp::Softmax) => candle_nn::ops::softmax_last_dim(x),
            Job::Rows(RowOp::RmsNorm) => candle_nn::ops::rms_norm(x, &w[0], EPS),
            Job::Layer(_) | Job::Model(_) => candle_core::bail!("not here (bug in tallow)"),
            Job::Rows(RowOp::LayerNorm) => candle_nn::ops::layer_norm(x, &w[0], &w[1], EPS),
        }
    }

    fn last(y: &candle_core::Tensor) -> candle_core::Result<f32> {
        let flat = y.flatten_all()?;
        flat.get(flat.elem_count() - 1)?.to_scalar()
    }
}

impl Engine for Candle {
    fn take(&mut self, x: &[f32]) -> Result<()> {
        let x =
            candle_core::Tensor::from_slice(x, self.shape.as_slice(), &candle_core::Device::Cpu);
        self.x = Some(candle(x)?);
        self.y = None;
        Ok(())
    }

    fn run(&mut self) -> Result<f32> {
        let Some(x) = &self.x else {
            return Ok(f32::NAN);
        };
        let y = candle(self.forward(x))?;
        let last = candle(Self::last(&y))?;
        self.y = Some(y);
        Ok(last)
    }

    fn result(&mut self) -> Result<Vec<f32>> {
        match &self.y {
            None => Ok(vec![]),
            Some(y) => candle(y.flatten_all().and_then(|y| y.to_vec1())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Probe;
    use crate::work::Wall;

    #[test]
    fn peers_agree_with_the_oracle_and_a_changed_element_does_not() {
        let cx = Context {
            session: tallow::open("cpu").unwrap(),
            threads: 2,
            dtype: DType::F32,
            quick: true,
            probe: Probe::default(),
            models: vec![],
            spinner: None,
        };
        let shape = LoraShape {
            m: 17,
            k: 33,
            n: 29,
            rank: 5,
        };
        let jobs = [Job::Lora(shape), Job::Lora(LoraShape { rank: 0, ..shape })];
        let jobs = jobs.into_iter().chain(RowOp::ALL.map(Job::Rows));
        for job in jobs {
            for name in ENGINES {
                let Some(made) = Local(name).contender(&job, &cx).unwrap() else {
                    continue;
                };
                let mut work = made.work;
                work.renew(3).unwrap();
                let done = work.waited(&Wall::new(), 3, 0.4).unwrap();
                let (_, y) = done.links[2];
                let check = work.check(y).unwrap();
                assert!(check.pass(), "{name} {job:?}: {check:?}");
                assert!(!work.check(y + 0.5).unwrap().pass());
            }
        }
    }
}
