//! Whole models in candle: the loss of every token, a prompt, a token, a training step.
//! Invariant: each run begins from the same keys and values, as everybody's; a training step clips and returns the norm.
//! Absent on purpose: families other than Llama, and types other than f32.

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::kv_cache::KvCache;
use candle_nn::{AdamW, Optimizer as _, ParamsAdamW};
use std::cell::RefCell;
use std::rc::Rc;
use tallow::llm::{Family, ModelConfig};

use super::attention::Kind;
use super::layer::loss as loss_of_rows;
use super::net::{Adapter, Net, Past, Span, read};
use super::{Engine, Way, f32s, last, said, u32s, whole};
use crate::ours::judge::judged;
use crate::peer::ModelJob;
use crate::suite::models::{self, Doing, Part};
use crate::suite::{Context, layers};
use crate::{Error, Result};

/// Which of the operands the targets are, the first keys, the parameters. The fed ids are the first.
const TARGETS: usize = 1;
const CACHES: usize = 2;
const PARAMETERS: usize = 5;

pub(super) fn ways(job: &ModelJob, cx: &Context) -> Result<Vec<Way>> {
    let config = ModelConfig::read(&job.dir)?;
    let kinds: &[Kind] = match job.doing {
        _ if config.family != Family::Llama => &[],
        Doing::Forward(_) | Doing::Prefill => &[Kind::Fused, Kind::Flash],
        Doing::Decode => &[Kind::Fused, Kind::Flash, Kind::Interleaved],
        Doing::Train(_) => &[Kind::Differentiable],
        Doing::TrainAgain(_) => &[],
    };
    let one = |kind: &Kind| {
        let made = models::work(
            &cx.session,
            &job.dir,
            cx.dtype,
            job.doing,
            job.adapted.as_ref(),
        );
        let (ours, cost) = made?;
        Ok(Way {
            name: kind.name(),
            engine: Box::new(Running::new(job, &config, *kind)?),
            judged: judged(ours),
            cost,
        })
    };
    kinds.iter().map(one).collect()
}

/// A model with its operands.
struct Running {
    net: Net,
    doing: Doing,
    span: Span,
    kind: Kind,
    /// Extents of keys and values: heads, elements of a head.
    kv: [usize; 2],
    ids: Vec<u32>,
    x: Option<Tensor>,
    targets: Option<Tensor>,
    past: Vec<Past>,
    /// In the order of `parts`.
    vars: Vec<[Var; 2]>,
    parts: Vec<Part>,
    optimizer: Option<AdamW>,
    results: Vec<Tensor>,
}

impl Running {
    fn new(job: &ModelJob, config: &ModelConfig, kind: Kind) -> Result<Self> {
        let (offset, [b, t]) = match job.doing {
            Doing::Forward(shape) | Doing::Train(shape) | Doing::TrainAgain(shape) => (0, shape),
            Doing::Prefill => (0, [1, models::PROMPT]),
            Doing::Decode => (models::POSITION, [1, 1]),
        };
        let span = Span { b, t, offset };
        let (parts, files) = match &job.adapted {
            None => (vec![], Adapter::new()),
            Some(adapted) => {
                let io = |source| Error::Io {
                    path: std::env::temp_dir(),
                    source,
                };
                let dir = tempfile::tempdir().map_err(io)?;
                let parts = adapted.write(config, 1, dir.path())?;
                let files = adapter(dir.path(), &parts).map_err(said)?;
                (parts, files)
            }
        };
        let trains = kind == Kind::Differentiable;
        let made = || {
            let var = |t: &Tensor| Var::from_tensor(t);
            let pair = |p: &Part| Ok([var(&files[&p.module][0])?, var(&files[&p.module][1])?]);
            let vars: Vec<[Var; 2]> = match trains {
                true => parts.iter().map(pair).collect::<candle_core::Result<_>>()?,
                false => vec![],
            };
            let trained = parts.iter().zip(&vars);
            let trained = trained.map(|(p, [a, b])| {
                let pair = [a.as_tensor().clone(), b.as_tensor().clone()];
                (p.module.clone(), pair)
            });
            let adapter = match trains {
                true => trained.collect(),
                false => files.clone(),
            };
            Ok((
                Net::new(config, read(&job.dir)?, adapter, (kind, span))?,
                vars,
            ))
        };
        let (net, vars) = made().map_err(said)?;
        Ok(Running {
            net,
            doing: job.doing,
            span,
            kind,
            kv: [config.kv_heads, config.head_dim],
            ids: vec![],
            x: None,
            targets: None,
            past: vec![Past::None; config.layers],
            vars,
            parts,
            optimizer: None,
            results: vec![],
        })
    }

    fn renewed(&mut self, operands: &[Vec<f64>]) -> candle_core::Result<()> {
        self.ids = u32s(&operands[0]);
        self.x = Some(ids(&self.ids)?);
        match self.doing {
            Doing::Prefill | Doing::Decode => {
                let pairs = operands[CACHES..].chunks_exact(2);
                let past = pairs.map(|pair| self.kept(&pair[0], &pair[1]));
                self.past = past.collect::<candle_core::Result<_>>()?;
            }
            _ => self.targets = Some(ids(&u32s(&operands[TARGETS]))?),
        }
        if self.vars.is_empty() {
            return Ok(());
        }
        let mut values = f32s(&operands[PARAMETERS]).into_iter();
        for (part, [a, b]) in self.parts.iter().zip(&self.vars) {
            for (var, shape) in [(a, (part.rank, part.k)), (b, (part.n, part.rank))] {
                let some = values.by_ref().take(shape.0 * shape.1);
                var.set(&Tensor::from_iter(some, &Device::Cpu)?.reshape(shape)?)?;
            }
        }
        let all = self.vars.iter().flatten().cloned().collect();
        self.optimizer = Some(AdamW::new(all, settings(1e-4))?);
        Ok(())
    }

    /// Keys and values `[s, hk, d]` of the tokens before, as this way of attention wants them, and room for the new ones.
    fn kept(&self, k: &[f64], v: &[f64]) -> candle_core::Result<Past> {
        let (Span { t, offset, .. }, [hk, d]) = (self.span, self.kv);
        if self.kind == Kind::Interleaved {
            let [k, v] = [k, v].map(f32s);
            let pairs = k.chunks_exact(d).zip(v.chunks_exact(d));
            let rows = pairs.flat_map(|(k, v)| [k, v].concat()).collect();
            return Ok(Past::Interleaved(Rc::new(RefCell::new(rows))));
        }
        let (dim, by_head) = if self.kind == Kind::Flash {
            (1, false)
        } else {
            (2, true)
        };
        let mut cache = KvCache::new(dim, offset + t);
        if offset > 0 {
            let before = |x: &[f64]| {
                let x = Tensor::from_vec(
                    f32s(&x[..offset * hk * d]),
                    (1, offset, hk, d),
                    &Device::Cpu,
                )?;
                if by_head {
                    x.transpose(1, 2)?.contiguous()
                } else {
                    Ok(x)
                }
            };
            cache.append(&before(k)?, &before(v)?)?;
        }
        Ok(Past::Tensors(cache))
    }

    fn once(&mut self) -> candle_core::Result<Vec<Tensor>> {
        let Some(x) = &self.x else {
            return Ok(vec![]);
        };
        let mut past = self.past.clone();
        let h = self.net.hidden(x, &mut past)?;
        let Some(targets) = &self.targets else {
            return Ok(vec![self.net.logits(&Net::last_row(&h)?)?]);
        };
        let logits = self.net.logits(&h)?;
        let Some(optimizer) = &mut self.optimizer else {
            return Ok(vec![loss_of_rows(&logits, targets)?]);
        };
        let loss = candle_nn::loss::cross_entropy(&logits, targets)?;
        let mut grads = loss.backward()?;
        let vars = || self.vars.iter().flatten();
        let squares = vars().map(|v| match grads.get(v) {
            Some(g) => g.sqr()?.sum_all(),
            None => candle_core::bail!("no gradient for an adapter"),
        });
        let squares = squares.collect::<candle_core::Result<Vec<_>>>()?;
        let norm = Tensor::stack(&squares, 0)?.sum_all()?.sqrt()?;
        let most = f64::from(norm.to_scalar::<f32>()?);
        if most > 1.0 {
            for var in vars() {
                if let Some(g) = grads.remove(var) {
                    grads.insert(var, (g * (1.0 / (most + 1e-6)))?);
                }
            }
        }
        optimizer.step(&grads)?;
        Ok(vec![loss, norm])
    }
}

pub(super) fn settings(lr: f64) -> ParamsAdamW {
    let [_, beta1, beta2, eps, weight_decay] = layers::ADAMW;
    ParamsAdamW {
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
    }
}

fn ids(ids: &[u32]) -> candle_core::Result<Tensor> {
    Tensor::from_slice(ids, ids.len(), &Device::Cpu)
}

/// The adapter in the folder, by module.
fn adapter(dir: &std::path::Path, parts: &[Part]) -> candle_core::Result<Adapter> {
    let mut all = read(dir)?;
    let mut out = Adapter::new();
    for part in parts {
        let mut one = |end: &str| {
            let name = format!("base_model.model.{}.lora_{end}.weight", part.module);
            match all.remove(&name) {
                Some(t) => t.to_dtype(DType::F32),
                None => candle_core::bail!("{name} is not in the adapter's file"),
            }
        };
        out.insert(part.module.clone(), [one("A")?, one("B")?]);
    }
    Ok(out)
}

impl Engine for Running {
    fn renew(&mut self, operands: &[Vec<f64>]) -> Result<()> {
        self.results = vec![];
        self.renewed(operands).map_err(said)
    }

    fn feed(&mut self, value: f64) -> Result<()> {
        if let Some(last) = self.ids.last_mut() {
            *last = value as u32;
        }
        self.x = Some(ids(&self.ids).map_err(said)?);
        Ok(())
    }

    fn run(&mut self) -> Result<f32> {
        self.results = self.once().map_err(said)?;
        match self.results.first() {
            Some(y) => last(y).map_err(said),
            None => Ok(f32::NAN),
        }
    }

    fn results(&mut self) -> Result<Vec<Vec<f32>>> {
        let all = self.results.iter().map(whole);
        all.collect::<candle_core::Result<_>>().map_err(said)
    }

    fn remembers(&self) -> bool {
        self.kind == Kind::Differentiable
    }
}
