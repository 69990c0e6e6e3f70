//! Layers of a model in candle: attention, SwiGLU, the loss, rope, AdamW.
//! Invariant: fused ops forward, ops with a backward where gradients are the result.

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer as _};

use super::attention::{Kind, by_products, causal_mask, flash};
use super::model::settings;
use super::{Engine, Operand, Way, f32s, last, said, u32s, weight, whole};
use crate::Result;
use crate::ours::judge::judged;
use crate::suite::Context;
use crate::suite::layers::{self, Layer};

pub(super) fn ways(layer: Layer, cx: &Context) -> Result<Vec<Way>> {
    let kinds: &[Kind] = match layer {
        Layer::Attention(_, false) => &[Kind::Fused, Kind::Flash],
        _ => &[Kind::Differentiable],
    };
    let one = |kind: &Kind| {
        let (ours, cost) = match layer {
            // It keeps its moments to itself, so it takes its first step, and what it makes of them is not looked at.
            Layer::AdamW => layers::first_step(cx)?,
            _ => layer.work(cx)?,
        };
        let judged = judged(ours);
        let engine: Box<dyn Engine> = match layer {
            Layer::AdamW => Box::new(Step::default()),
            _ => Box::new(Many {
                layer,
                kind: *kind,
                w: super::weights(&judged)
                    .iter()
                    .map(|(v, shape)| weight(v, shape, DType::F32, &Device::Cpu))
                    .collect::<candle_core::Result<_>>()
                    .map_err(said)?,
                fed: Operand::on(&Device::Cpu),
                rest: vec![],
                results: vec![],
            }),
        };
        Ok(Way {
            name: kind.name(),
            engine,
            judged,
            cost,
        })
    };
    kinds.iter().map(one).collect()
}

/// `logits [n, vocab]`, `targets [n]` -> `[n, 1]`.
pub(super) fn loss(logits: &Tensor, targets: &Tensor) -> candle_core::Result<Tensor> {
    let scores = candle_nn::ops::log_softmax(logits, 1)?;
    scores.gather(&targets.unsqueeze(1)?, 1)?.neg()
}

/// A function of several tensors, or its gradients.
struct Many {
    layer: Layer,
    kind: Kind,
    w: Vec<Tensor>,
    /// The operand that is fed.
    fed: Operand,
    /// Those behind it, as the function wants them.
    rest: Vec<Tensor>,
    results: Vec<Tensor>,
}

impl Many {
    fn shape(&self) -> Vec<usize> {
        self.layer.described().1.remove(0)
    }

    fn renewed(&mut self, operands: &[Vec<f64>]) -> candle_core::Result<()> {
        let (_, shapes) = self.layer.described();
        let f32s = |i: usize| Tensor::from_vec(f32s(&operands[i]), &*shapes[i], &Device::Cpu);
        let u32s = |i: usize| Tensor::from_vec(u32s(&operands[i]), &*shapes[i], &Device::Cpu);
        self.rest = match self.layer {
            Layer::Attention(t, _) => {
                let mut all = vec![f32s(1)?, f32s(2)?];
                all.extend(causal_mask(t, 0)?);
                all
            }
            Layer::SwiGlu(_) => vec![f32s(1)?],
            Layer::CrossEntropy(_) => vec![u32s(1)?],
            Layer::Rope => {
                let (positions, freq) = (&operands[1], &operands[2]);
                let angle = |p: &f64| {
                    freq.iter()
                        .map(|f| (*p as f32) * (*f as f32))
                        .collect::<Vec<_>>()
                };
                let angles: Vec<f32> = positions.iter().flat_map(angle).collect();
                let angles = Tensor::from_vec(angles, (positions.len(), freq.len()), &Device::Cpu)?;
                vec![angles.cos()?, angles.sin()?]
            }
            Layer::AdamW => vec![],
        };
        if self.layer.is_backward() {
            self.rest.push(f32s(shapes.len() - 1)?);
        }
        self.fed.renew(&operands[0], &shapes[0], DType::F32)
    }

    fn forward(&self, x: &Tensor, rest: &[Tensor]) -> candle_core::Result<Tensor> {
        match self.layer {
            Layer::Attention(..) if self.kind == Kind::Flash => flash(x, &rest[0], &rest[1], 0),
            Layer::Attention(..) => {
                let by_head = |x: &Tensor| x.transpose(1, 2)?.contiguous();
                let (q, k, v) = (by_head(x)?, by_head(&rest[0])?, by_head(&rest[1])?);
                by_products((&q, &k, &v), rest.get(2), self.kind)
            }
            Layer::SwiGlu(_) => x.silu()? * &rest[0],
            Layer::CrossEntropy(_) => loss(&x.matmul(&self.w[0])?, &rest[0]),
            Layer::Rope => candle_nn::rotary_emb::rope_thd(x, &rest[0], &rest[1]),
            Layer::AdamW => candle_core::bail!("not here (bug in tallow)"),
        }
    }

    fn once(&self) -> candle_core::Result<Vec<Tensor>> {
        let Some(x) = &self.fed.tensor else {
            return Ok(vec![]);
        };
        if !self.layer.is_backward() {
            return Ok(vec![self.forward(x, &self.rest)?]);
        }
        // What is differentiated for, in the order of the results.
        let more = match self.layer {
            Layer::Attention(..) => 2,
            Layer::SwiGlu(_) => 1,
            _ => 0,
        };
        let x = Var::from_tensor(x)?;
        let mut rest = self.rest.clone();
        for t in rest.iter_mut().take(more) {
            *t = Var::from_tensor(t)?.into_inner();
        }
        let y = self.forward(x.as_tensor(), &rest)?;
        let dy = self.rest[self.rest.len() - 1].reshape(y.shape())?;
        let grads = (y * dy)?.sum_all()?.backward()?;
        let wrt = std::iter::once(x.as_tensor()).chain(&rest[..more]);
        let grad = |t: &Tensor| match grads.get(t) {
            Some(g) => Ok(g.clone()),
            None => candle_core::bail!("no gradient"),
        };
        wrt.map(grad).collect()
    }
}

impl Engine for Many {
    fn renew(&mut self, operands: &[Vec<f64>]) -> Result<()> {
        self.results = vec![];
        self.renewed(operands).map_err(said)
    }

    fn feed(&mut self, value: f64) -> Result<()> {
        let shape = self.shape();
        self.fed.feed(value, &shape, DType::F32).map_err(said)
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
}

/// A step of candle's AdamW, on one variable.
#[derive(Default)]
struct Step {
    host: Vec<f32>,
    made: Option<(Var, AdamW, candle_core::backprop::GradStore)>,
    done: bool,
}

impl Step {
    fn renewed(&mut self, operands: &[Vec<f64>]) -> candle_core::Result<()> {
        self.host = f32s(&operands[0]);
        let one = |v: Vec<f32>| Tensor::from_slice(&v, v.len(), &Device::Cpu);
        let var = Var::from_tensor(&one(self.host.clone())?)?;
        let gradient = one(f32s(&operands[1]))?;
        let grads = (var.as_tensor() * gradient)?.sum_all()?.backward()?;
        let optimizer = AdamW::new(vec![var.clone()], settings(layers::ADAMW[0]))?;
        self.made = Some((var, optimizer, grads));
        Ok(())
    }

    fn stepped(&mut self) -> candle_core::Result<f32> {
        let Some((var, optimizer, grads)) = &mut self.made else {
            return Ok(f32::NAN);
        };
        optimizer.step(grads)?;
        last(var.as_tensor())
    }
}

impl Engine for Step {
    fn renew(&mut self, operands: &[Vec<f64>]) -> Result<()> {
        self.done = false;
        self.renewed(operands).map_err(said)
    }

    fn feed(&mut self, value: f64) -> Result<()> {
        if let Some(last) = self.host.last_mut() {
            *last = value as f32;
        }
        let Some((var, ..)) = &self.made else {
            return Ok(());
        };
        let p = Tensor::from_slice(&self.host, self.host.len(), &Device::Cpu);
        p.and_then(|p| var.set(&p)).map_err(said)
    }

    fn run(&mut self) -> Result<f32> {
        self.done = true;
        self.stepped().map_err(said)
    }

    fn results(&mut self) -> Result<Vec<Vec<f32>>> {
        match &self.made {
            Some((var, ..)) if self.done => Ok(vec![whole(var.as_tensor()).map_err(said)?]),
            _ => Ok(vec![]),
        }
    }

    fn remembers(&self) -> bool {
        true
    }
}
