//! The candidates of one spec, run in turns on operands of their own, timed, and checked.
//! Invariant: inputs are random, results are filled with NaN before; a time is told only of a candidate whose timed result
//! passed: against the f64 oracle where that is quick or where candidates disagree, else against each other.
//! Absent on purpose: choice. What has no candidates to choose from is never run.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tallow_core::Result;
use tallow_core::backend::{Backend, Bindings, Buffer, Recording};
use tallow_core::graph::{Builder, Graph};
use tallow_core::kernel::{Body, Candidate, KernelSpec, Operand};
use tallow_core::op::{Composite, Op, Role};
use tallow_core::oracle::bound::{Bounded, eval_bounded};
use tallow_core::oracle::{Value, sample, store};
use tallow_core::plan::{Place, Plan, Prepared, Span, Step};
use tallow_core::types::DType;

/// What became of a candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Tried {
    /// The time of one run.
    Seconds(f64),
    /// Its result failed the check.
    Wrong(String),
    /// It could not be run.
    Refused(String),
}

/// Larger operands are not made a second time, in bytes.
const MOST_BYTES: usize = 256 << 20;
/// The oracle judges all that takes less arithmetic.
const ORACLE_FLOPS: f64 = 4e6;
/// Weights are read from copies that together are at least this large, as in a model, where they are seldom in cache.
const COLD_BYTES: usize = 32 << 20;
const MOST_COPIES: usize = 16;
/// A replay is to take about this long, so that starting it and waiting for it does not count.
const REPLAY_S: f64 = 200e-6;
const MOST_STEPS: usize = 64;
/// Rounds, as long as there is time.
const ROUNDS: usize = 15;
/// Above this much arithmetic not even a dispute is brought before the oracle.
const DISPUTE_FLOPS: f64 = 1e9;
/// How far, by norm, results may be apart that are judged by each other; the second where products are rounded to bf16.
const APART: [f64; 2] = [1e-4, 1e-2];

/// Why `spec` is not measured.
pub(crate) fn unfit(spec: &KernelSpec) -> Option<&'static str> {
    let operands = spec.inputs.iter().chain(spec.outputs.iter().flatten());
    let bytes: usize = operands.map(|o| o.layout.end() * o.dtype.bytes()).sum();
    match &spec.body {
        Body::Composite(Composite::KvWrite(_)) => Some("what is written in place is not measured"),
        Body::Composite(_) | Body::MatMul { .. } | Body::Reduce(..) if bytes > MOST_BYTES => {
            Some("operands too large to be made twice")
        }
        Body::Composite(_) | Body::MatMul { .. } | Body::Reduce(..) => None,
        _ => Some("only products, sums and fused ops are measured"),
    }
}

/// Times and checks all candidates, for about as long as `limit`.
///
/// # Errors
/// Operands that cannot be made. A candidate that fails is no error.
pub(crate) fn run(
    be: &dyn Backend,
    spec: &KernelSpec,
    c: &[Candidate],
    favourite: usize,
    limit: Duration,
) -> Result<Vec<Tried>> {
    let start = Instant::now();
    let bench = Bench::new(be, spec)?;
    let mut runs: Vec<Result<Run>> = c.iter().map(|c| bench.record(c)).collect();
    for round in 0..ROUNDS {
        if round > 2 && start.elapsed() > limit {
            break;
        }
        for run in &mut runs {
            let failed = run.as_mut().ok().and_then(|r| r.round(be).err());
            if let Some(e) = failed {
                *run = Err(e);
            }
        }
    }
    let results: Vec<Result<Vec<Vec<f64>>>> = runs
        .iter_mut()
        .map(|run| match run {
            Ok(run) => bench.result(run),
            Err(_) => Ok(vec![]),
        })
        .collect();
    let verdicts = bench.judge(c, &results, favourite)?;
    let one = |((run, result), verdict): ((&Result<Run>, &Result<_>), Option<String>)| match (
        run, result, verdict,
    ) {
        (Err(e), ..) | (_, Err(e), _) => Tried::Refused(e.to_string()),
        (.., Some(wrong)) => Tried::Wrong(wrong),
        (Ok(run), ..) => Tried::Seconds(run.best_s),
    };
    Ok(runs.iter().zip(&results).zip(verdicts).map(one).collect())
}

/// A spec with operands.
struct Bench<'a> {
    be: &'a dyn Backend,
    spec: &'a KernelSpec,
    graph: Graph,
    values: Vec<Value>,
    /// By operand and copy; only what never changes has copies.
    inputs: Vec<Vec<Buffer>>,
    copies: usize,
}

/// A candidate with a recording.
struct Run {
    recording: Box<dyn Recording>,
    outputs: Vec<Option<Buffer>>,
    steps: usize,
    best_s: f64,
}

impl Run {
    fn round(&mut self, be: &dyn Backend) -> Result<()> {
        let start = Instant::now();
        self.recording.replay()?;
        be.wait()?;
        let seconds = start.elapsed().as_secs_f64() / self.steps as f64;
        self.best_s = self.best_s.min(seconds);
        Ok(())
    }
}

/// The spec as a graph of one op.
fn graph(spec: &KernelSpec) -> Result<Graph> {
    let mut b = Builder::default();
    let role = |o: &Operand| if o.frozen { Role::Frozen } else { Role::Data };
    let ins: Vec<_> = spec
        .inputs
        .iter()
        .map(|o| b.input(role(o), o.ty()))
        .collect();
    let all = match &spec.body {
        Body::Composite(c) => b.composite(c.clone(), &ins)?,
        Body::MatMul { ta, tb, alpha } => {
            let (ta, tb, alpha) = (*ta, *tb, *alpha);
            vec![b.push(Op::MatMul { ta, tb, alpha }, &ins)?]
        }
        Body::Reduce(r, axis) => vec![b.reduce(*r, *axis, ins[0])?],
        _ => vec![],
    };
    let wanted = all.into_iter().zip(&spec.outputs);
    let wanted = wanted.filter(|(_, o)| o.is_some()).map(|(id, _)| id);
    Ok(b.finish(wanted.collect(), vec![]))
}

/// Random operands. Floats are exact in bf16: a kernel that multiplies in it reads what the others read.
fn values(spec: &KernelSpec) -> Vec<Value> {
    let tys: Vec<_> = spec.inputs.iter().map(Operand::ty).collect();
    let drawn: Vec<Value> = match &spec.body {
        Body::Composite(c) => sample::operands(c, &tys, 1),
        _ => {
            let one = |(i, ty)| sample::random(ty, 1, 1, i as u32);
            tys.iter().enumerate().map(one).collect()
        }
    };
    let exact = |mut v: Value| {
        if v.ty.dtype.is_float() {
            v.data.iter_mut().for_each(|x| *x = store(DType::BF16, *x));
        }
        v
    };
    drawn.into_iter().map(exact).collect()
}

fn reach(o: &Operand) -> usize {
    o.layout.end() * o.dtype.bytes()
}

/// The operand as it lies in memory, NaN between its elements. Where several share a place, the value becomes the last.
fn laid_out(o: &Operand, v: &mut Value) -> Vec<u8> {
    let size = o.dtype.bytes();
    let mut bytes = vec![0xff; reach(o)];
    for (i, x) in o.dtype.encode(&v.data).chunks_exact(size).enumerate() {
        let at = o.layout.index(i) * size;
        bytes[at..at + size].copy_from_slice(x);
    }
    v.data = read(o, &bytes);
    bytes
}

/// The operand's values, out of memory where it lies with its strides.
fn read(o: &Operand, bytes: &[u8]) -> Vec<f64> {
    let size = o.dtype.bytes();
    let one = |i: usize| {
        let at = o.layout.index(i) * size;
        &bytes[at..at + size]
    };
    let dense: Vec<u8> = (0..o.layout.shape.numel()).flat_map(one).copied().collect();
    o.dtype.decode(&dense)
}

impl<'a> Bench<'a> {
    fn new(be: &'a dyn Backend, spec: &'a KernelSpec) -> Result<Self> {
        let frozen = spec.inputs.iter().filter(|o| o.frozen);
        let frozen: usize = frozen.map(reach).sum();
        let copies = match frozen {
            0 => 1,
            n => COLD_BYTES.div_ceil(n).clamp(1, MOST_COPIES),
        };
        let mut values = values(spec);
        let mut inputs = vec![];
        for (o, v) in spec.inputs.iter().zip(&mut values) {
            let bytes = laid_out(o, v);
            let mut all = vec![];
            for _ in 0..if o.frozen { copies } else { 1 } {
                let b = be.alloc(bytes.len())?;
                be.upload(&b, 0, &bytes)?;
                all.push(b);
            }
            inputs.push(all);
        }
        Ok(Bench {
            be,
            spec,
            graph: graph(spec)?,
            values,
            inputs,
            copies,
        })
    }

    /// A recording of the candidate: so many runs of it, each with the next copy of what never changes.
    fn record(&self, c: &Candidate) -> Result<Run> {
        let mut bind = Bindings::default();
        let mut plan = Plan {
            steps: vec![],
            prepared: vec![],
            arena_bytes: c.workspace,
            naive_bytes: 0,
            inputs: vec![],
            outputs: vec![],
        };
        let mut outputs = vec![];
        for o in &self.spec.outputs {
            let made = o.as_ref().map(|o| self.be.alloc(reach(o))).transpose()?;
            bind.outputs.extend(made.clone());
            plan.outputs.extend(made.as_ref().map(|b| b.bytes));
            outputs.push(made);
        }
        let mut reads = vec![];
        for copy in 0..self.copies {
            reads.push(self.operands(c, copy, &mut plan, &mut bind)?);
        }
        let steps = (REPLAY_S / c.cost.max(1e-9)).ceil() as usize;
        let steps = steps.clamp(self.copies.max(2), MOST_STEPS);
        for i in 0..steps {
            let reads = reads[i % self.copies].clone();
            plan.steps.push(self.step(c, reads));
        }
        Ok(Run {
            recording: self.be.record(Arc::new(plan), bind)?,
            outputs,
            steps,
            best_s: f64::INFINITY,
        })
    }

    /// Spans of one copy of the operands, bound.
    fn operands(
        &self,
        c: &Candidate,
        copy: usize,
        plan: &mut Plan,
        bind: &mut Bindings,
    ) -> Result<Vec<Span>> {
        let mut spans = vec![];
        for (k, (o, all)) in self.spec.inputs.iter().zip(&self.inputs).enumerate() {
            let from = &all[copy % all.len()];
            let slot = bind.inputs.len() as u32;
            bind.inputs.push(from.clone());
            let role = if o.frozen { Role::Frozen } else { Role::Data };
            plan.inputs.push((role, from.bytes));
            let mut place = (Place::Input(slot), from.bytes);
            if let Some((_, format)) = c.prepare.iter().find(|(i, _)| *i == k) {
                let to = self.be.alloc(format.bytes)?;
                self.be.prepare(*format, from, 0, o, &to)?;
                place = (Place::Prepared(bind.prepared.len() as u32), format.bytes);
                bind.prepared.push(to);
                plan.prepared.push(Prepared {
                    slot,
                    offset: 0,
                    operand: o.clone(),
                    format: *format,
                });
            }
            spans.push(span(place));
        }
        Ok(spans)
    }

    fn step(&self, c: &Candidate, reads: Vec<Span>) -> Step {
        let mut number = 0;
        let write = |o: &Option<Operand>| {
            let o = o.as_ref()?;
            number += 1;
            Some(span((Place::Output(number - 1), reach(o))))
        };
        Step {
            kernel: c.kernel,
            kernel_name: c.name,
            cost: c.cost,
            why: String::new(),
            rejected: vec![],
            spec: self.spec.clone(),
            reads,
            writes: self.spec.outputs.iter().map(write).collect(),
            workspace: (c.workspace > 0).then(|| span((Place::Arena, c.workspace))),
            note: String::new(),
        }
    }

    /// What a run gives, from poisoned memory: the wanted results in order.
    fn result(&self, run: &mut Run) -> Result<Vec<Vec<f64>>> {
        for b in run.outputs.iter().flatten() {
            self.be.upload(b, 0, &vec![0xff; b.bytes])?;
        }
        run.recording.replay()?;
        let mut all = vec![];
        for (o, b) in self.spec.outputs.iter().zip(&run.outputs) {
            let (Some(o), Some(b)) = (o, b) else { continue };
            let mut bytes = vec![0; b.bytes];
            self.be.download(b, 0, &mut bytes)?;
            all.push(read(o, &bytes));
        }
        Ok(all)
    }

    /// What is wrong with each result.
    fn judge(
        &self,
        c: &[Candidate],
        results: &[Result<Vec<Vec<f64>>>],
        favourite: usize,
    ) -> Result<Vec<Option<String>>> {
        let there: Vec<Option<&Vec<Vec<f64>>>> = results
            .iter()
            .map(|r| r.as_ref().ok().filter(|r| !r.is_empty()))
            .collect();
        let reference = there[favourite].or(there.iter().flatten().next().copied());
        let allowed = |c: &Candidate| APART[usize::from(c.name.ends_with("bf16"))];
        let loosest = c.iter().map(allowed).fold(0.0, f64::max);
        let agree = there.iter().flatten().all(|r| {
            let reference = reference.map_or(&[][..], Vec::as_slice);
            let far = r.iter().zip(reference).map(|(a, b)| distance(a, b));
            far.fold(0.0, f64::max) <= loosest
        });
        // One alone agrees with itself.
        let several = there.iter().flatten().count() > 1;
        if agree && several && self.spec.flops() > ORACLE_FLOPS {
            return Ok(vec![None; c.len()]);
        }
        if self.spec.flops() > DISPUTE_FLOPS {
            let apart = "disagrees with the estimate's favourite, and is too large for the oracle";
            let one = |(i, got): (usize, &Option<&Vec<Vec<f64>>>)| {
                (got.is_some() && i != favourite).then(|| apart.to_owned())
            };
            return Ok(there.iter().enumerate().map(one).collect());
        }
        let want = eval_bounded(&self.graph, &self.values)?;
        let one = |(c, got): (&Candidate, &Option<&Vec<Vec<f64>>>)| {
            let got = (*got)?;
            let exact = got.iter().zip(&want).all(|(g, w)| within(g, w));
            let far = got
                .iter()
                .zip(&want)
                .map(|(g, w)| distance(g, &w.value.data));
            let far = far.fold(0.0, f64::max);
            let near = c.name.ends_with("bf16") && far <= allowed(c);
            (!exact && !near).then(|| format!("failed its check, off by {far:.1e}"))
        };
        Ok(c.iter().zip(&there).map(one).collect())
    }
}

fn span((place, bytes): (Place, usize)) -> Span {
    Span {
        place,
        offset: 0,
        bytes,
        root: 0,
    }
}

/// The norm of the difference over the norm of `b`; infinite where something is not a number.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let off = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
    let far = off / norm(&mut b.iter().copied()).max(1e-30);
    if far.is_finite() { far } else { f64::INFINITY }
}

fn within(got: &[f64], want: &Bounded) -> bool {
    let wanted = want.value.data.iter().zip(want.tolerances());
    got.iter()
        .zip(wanted)
        .all(|(got, (w, tolerance))| (got - w).abs() <= tolerance)
}
