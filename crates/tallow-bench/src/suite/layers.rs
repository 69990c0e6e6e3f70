//! The other layers of a model: attention, SwiGLU, rotary embedding, cross entropy, AdamW; forward, and forward with
//! backward where there is one.
//! Invariant: a backward task gives back the gradients of `Σ y·dy` for a random `dy`, all of them compared with the oracle.

use tallow::{DType, Mask, Tensor, TensorType, value_and_grad};

use super::{Context, Suite, Task};
use crate::Result;
use crate::ours::{Fill, Join, Operands, Ours, Reference, Subject};
use crate::peer::Job;
use crate::probe::Cost;

/// Query heads, key and value heads, elements of a head.
const HEADS: [usize; 3] = [8, 4, 64];
/// Rows and width of the MLP.
const MLP: [usize; 2] = [128, 1376];
/// Rows, channels and vocabulary of the loss.
const LOSS: [usize; 3] = [128, 256, 4096];
/// Tokens that are turned.
const ROPE_TOKENS: usize = 128;
/// Parameters of the optimizer.
const PARAMETERS: usize = 1 << 18;

/// A layer to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Causal, over so many tokens; with its gradients or without.
    Attention(usize, bool),
    /// With its gradients or without.
    SwiGlu(bool),
    /// Output projection and loss; with the gradient of what goes in, or without.
    CrossEntropy(bool),
    /// Forward only.
    Rope,
    /// A step.
    AdamW,
}

impl std::fmt::Display for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Layer::Attention(t, _) => write!(f, "attention {t} tokens, 8 heads (4 kv) of 64"),
            Layer::SwiGlu(_) => write!(f, "SwiGLU 128x1376"),
            Layer::CrossEntropy(_) => write!(f, "cross entropy 128x256 @ 256x4096"),
            Layer::Rope => write!(f, "rope 128 tokens, 8 heads of 64"),
            Layer::AdamW => write!(f, "AdamW 262144 parameters"),
        }?;
        match self.is_backward() {
            true => write!(f, ", forward + backward"),
            false => Ok(()),
        }
    }
}

impl Layer {
    /// Are gradients the result?
    #[must_use]
    pub fn is_backward(self) -> bool {
        match self {
            Layer::Attention(_, b) | Layer::SwiGlu(b) | Layer::CrossEntropy(b) => b,
            Layer::Rope | Layer::AdamW => false,
        }
    }

    /// Name and extents of the operands that vary, in the order they are made, for engines elsewhere.
    #[must_use]
    pub fn described(self) -> (&'static str, Vec<Vec<usize>>) {
        let [h, hk, d] = HEADS;
        let [n, c, _] = LOSS;
        let (name, mut shapes, out) = match self {
            Layer::Attention(t, _) => (
                "attention",
                vec![
                    vec![1, t, h, d],
                    vec![1, t, hk, d],
                    vec![1, t, hk, d],
                    vec![1, t],
                ],
                vec![1, t, h, d],
            ),
            Layer::SwiGlu(_) => ("swiglu", vec![MLP.to_vec(); 2], MLP.to_vec()),
            Layer::CrossEntropy(_) => ("cross_entropy", vec![vec![n, c], vec![n]], vec![n]),
            Layer::Rope => (
                "rope",
                vec![
                    vec![1, ROPE_TOKENS, h, d],
                    vec![1, ROPE_TOKENS],
                    vec![d / 2],
                ],
                vec![],
            ),
            Layer::AdamW => ("adamw", vec![vec![PARAMETERS]; 4], vec![]),
        };
        if self.is_backward() {
            shapes.push(out);
        }
        (name, shapes)
    }

    /// The work in tallow, and its cost.
    ///
    /// # Errors
    /// No memory.
    pub fn work(self, cx: &Context) -> Result<(Ours, Cost)> {
        match self {
            Layer::Attention(t, backward) => attention(cx, t, backward),
            Layer::SwiGlu(backward) => swiglu(cx, backward),
            Layer::CrossEntropy(backward) => cross_entropy(cx, backward),
            Layer::Rope => rope(cx),
            Layer::AdamW => adamw(cx),
        }
    }
}

/// The tasks.
#[must_use]
pub fn tasks(cx: &Context) -> Vec<Task> {
    let lengths: &[usize] = if cx.quick { &[128] } else { &[128, 512] };
    let mut all = vec![];
    for t in lengths {
        all.extend([false, true].map(|b| Layer::Attention(*t, b)));
    }
    for backward in [false, true] {
        all.extend([Layer::SwiGlu(backward), Layer::CrossEntropy(backward)]);
    }
    all.extend([Layer::Rope, Layer::AdamW]);
    all.into_iter().map(task).collect()
}

fn task(layer: Layer) -> Task {
    Task {
        suite: Suite::Layers,
        name: layer.to_string(),
        tokens: None,
        peers: vec![(String::new(), Job::Layer(layer))],
        make: Box::new(move |cx| {
            let (work, cost) = layer.work(cx)?;
            Ok(vec![cx.ours("tallow", work, &cost)])
        }),
    }
}

type Forward = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;

/// A layer, alone or with the gradients of what is carried.
fn layer(
    mut o: Operands<'_>,
    carried: Vec<Tensor>,
    forward: Forward,
    (backward, join): (bool, Join),
) -> Result<Ours> {
    let subject = if backward {
        let out = forward(&carried)?.ty().clone();
        let dy = o.data(out, Fill::Signed(1.0))?;
        Subject {
            carried,
            again: Box::new(move |x| {
                let loss = forward(x)?.mul(&dy)?.sum_all()?;
                let wrt: Vec<&Tensor> = x.iter().collect();
                Ok(value_and_grad(&loss, &wrt)?.grads)
            }),
            updates: vec![],
            join: Join::None(
                "gradients of gradients fade into denormal numbers, which cost more than others",
            ),
            reference: Reference::Whole,
        }
    } else {
        Subject {
            carried,
            again: Box::new(move |x| Ok(vec![forward(x)?])),
            updates: vec![],
            join,
            reference: Reference::Whole,
        }
    };
    Ours::new(o, subject)
}

fn attention(cx: &Context, t: usize, backward: bool) -> Result<(Ours, Cost)> {
    let [h, hk, d] = HEADS;
    let mut o = Operands::new(&cx.session, 13);
    let q = o.data(TensorType::f32([1, t, h, d]), Fill::Signed(1.0))?;
    let k = o.data(TensorType::f32([1, t, hk, d]), Fill::Signed(1.0))?;
    let v = o.data(TensorType::f32([1, t, hk, d]), Fill::Signed(1.0))?;
    let pos = o.data(TensorType::u32([1, t]), Fill::Positions)?;
    let scale = 1.0 / (d as f32).sqrt();
    // Scores and values of what the causal mask lets through; backward five products more, and the scores again.
    let one = (h * t * (t + 1) * d) as f64;
    let io = 4 * (2 * t * h * d + 2 * t * hk * d);
    let cost = Cost {
        bytes: io * if backward { 2 } else { 1 },
        flops: one * if backward { 7.0 } else { 2.0 },
        dtype: DType::F32,
    };
    let mask = Mask::Causal { window: None };
    let run = move |q: &Tensor, k: &Tensor, v: &Tensor| -> Result<Tensor> {
        Ok(q.attention(k, v, &pos, scale, mask)?)
    };
    let (carried, forward): (Vec<Tensor>, Forward) = match backward {
        true => (vec![q, k, v], Box::new(move |x| run(&x[0], &x[1], &x[2]))),
        false => (vec![q], Box::new(move |x| run(&x[0], &k, &v))),
    };
    Ok((layer(o, carried, forward, (backward, Join::Feed))?, cost))
}

fn swiglu(cx: &Context, backward: bool) -> Result<(Ours, Cost)> {
    let n = MLP[0] * MLP[1];
    let mut o = Operands::new(&cx.session, 14);
    let gate = o.data(TensorType::f32(MLP), Fill::Signed(2.0))?;
    // About 2, so that a chain neither fades into denormal numbers nor leaves those of f32.
    let up = o.data(TensorType::f32(MLP), Fill::Near(2.0))?;
    let cost = Cost {
        bytes: 4 * n * if backward { 5 } else { 3 },
        flops: 4.0 * n as f64,
        dtype: DType::F32,
    };
    let (carried, forward): (Vec<Tensor>, Forward) = match backward {
        true => (vec![gate, up], Box::new(|x| Ok(x[0].swiglu(&x[1])?))),
        false => (vec![gate], Box::new(move |x| Ok(x[0].swiglu(&up)?))),
    };
    Ok((layer(o, carried, forward, (backward, Join::Feed))?, cost))
}

fn cross_entropy(cx: &Context, backward: bool) -> Result<(Ours, Cost)> {
    let [n, c, v] = LOSS;
    let mut o = Operands::new(&cx.session, 15);
    let x = o.data(TensorType::f32([n, c]), Fill::Signed(1.0))?;
    let w = o.weights(&[v, c], cx.dtype, (3.0 / c as f32).sqrt())?;
    let target = o.data(TensorType::u32([n]), Fill::Below(v as u32))?;
    let cost = Cost {
        bytes: cx.dtype.bytes() * v * c + 4 * (n * c * if backward { 2 } else { 1 } + 2 * n),
        flops: 2.0 * (n * c * v) as f64 * if backward { 2.0 } else { 1.0 },
        dtype: cx.dtype,
    };
    let forward: Forward = Box::new(move |x| Ok(x[0].cross_entropy(&w, &target)?));
    let ours = layer(o, vec![x], forward, (backward, Join::Add))?;
    Ok(match cx.dtype {
        DType::BF16 => (ours.in_half(), cost),
        _ => (ours, cost),
    })
}

fn rope(cx: &Context) -> Result<(Ours, Cost)> {
    let ([h, _, d], t) = (HEADS, ROPE_TOKENS);
    let mut o = Operands::new(&cx.session, 16);
    let x = o.data(TensorType::f32([1, t, h, d]), Fill::Signed(1.0))?;
    let pos = o.data(TensorType::u32([1, t]), Fill::Positions)?;
    let freq = (0..d / 2).map(|i| f64::from(10_000f32.powf(-2.0 * i as f32 / d as f32)));
    let freq = o.data(TensorType::f32([d / 2]), Fill::Fixed(freq.collect()))?;
    let cost = Cost {
        bytes: 4 * 2 * t * h * d,
        flops: 3.0 * (t * h * d) as f64,
        dtype: DType::F32,
    };
    let forward: Forward = Box::new(move |x| Ok(x[0].rope(&pos, &freq)?));
    Ok((layer(o, vec![x], forward, (false, Join::Feed))?, cost))
}

/// Learning rate, both betas, epsilon, weight decay of the suite's AdamW: but for epsilon powers of two and one less, so that
/// engines that keep them as f64 and engines that keep them as f32 compute the same.
pub const ADAMW: [f64; 5] = [1.0 / 1024.0, 0.875, 1.0 - 1.0 / 1024.0, 1e-8, 1.0 / 128.0];

/// `ADAMW` behind it the corrections of both moments, and the factor on the gradient.
fn hyper(o: &mut Operands<'_>, corrections: [f64; 2]) -> Result<Tensor> {
    let all = ADAMW.into_iter().chain(corrections).chain([1.0]);
    let all = all.map(|v| f64::from(v as f32)).collect();
    o.data(TensorType::f32([8]), Fill::Fixed(all))
}

fn step_cost() -> Cost {
    Cost {
        bytes: 4 * 7 * PARAMETERS,
        flops: 10.0 * PARAMETERS as f64,
        dtype: DType::F32,
    }
}

/// A step far from the first: the corrections are 1.
fn adamw(cx: &Context) -> Result<(Ours, Cost)> {
    let ty = TensorType::f32([PARAMETERS]);
    let mut o = Operands::new(&cx.session, 17);
    let p = o.data(ty.clone(), Fill::Signed(1.0))?;
    let m = o.data(ty.clone(), Fill::Signed(0.1))?;
    let v = o.data(ty.clone(), Fill::Positive(0.1))?;
    let g = o.data(ty, Fill::Signed(0.1))?;
    let hyper = hyper(&mut o, [1.0, 1.0])?;
    let subject = Subject {
        carried: vec![p, m, v],
        again: Box::new(move |x| Ok(x[0].adamw(&g, &x[1], &x[2], &hyper)?.to_vec())),
        updates: vec![],
        join: Join::Feed,
        reference: Reference::Whole,
    };
    Ok((Ours::new(o, subject)?, step_cost()))
}

/// The parameters behind the first step, for an optimizer that keeps its moments to itself. Operands: parameters, gradient,
/// then moments of zero.
///
/// # Errors
/// No memory.
pub fn first_step(cx: &Context) -> Result<(Ours, Cost)> {
    let ty = TensorType::f32([PARAMETERS]);
    let mut o = Operands::new(&cx.session, 17);
    let p = o.data(ty.clone(), Fill::Signed(1.0))?;
    let g = o.data(ty.clone(), Fill::Signed(0.1))?;
    let m = o.data(ty.clone(), Fill::Fixed(vec![0.0; PARAMETERS]))?;
    let v = o.data(ty, Fill::Fixed(vec![0.0; PARAMETERS]))?;
    let [_, beta1, beta2, ..] = ADAMW;
    let hyper = hyper(&mut o, [1.0 - beta1, (1.0 - beta2).sqrt()])?;
    let again = move |x: &[Tensor]| {
        let [p, ..] = x[0].adamw(&g, &m, &v, &hyper)?;
        Ok(vec![p])
    };
    let subject = Subject {
        carried: vec![p],
        again: Box::new(again),
        updates: vec![],
        join: Join::Feed,
        reference: Reference::Whole,
    };
    Ok((Ours::new(o, subject)?, step_cost()))
}
