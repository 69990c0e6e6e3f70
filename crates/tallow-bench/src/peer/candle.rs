//! candle as a careful user would write it: its default features, its fused ops where nothing is differentiated, and the ones
//! with a backward where something is; its own AdamW. On Metal (feature `peers-metal`) products, norms and softmax alone.
//! Absent on purpose: custom ops. What candle does not ship is not candle.

use candle_core::{DType as Kind, Device, Tensor};
use tallow::DType;

use super::local::{Engine, Way, weights};
use super::{Job, RowOp};
use crate::ours::judge::{Judged, judged, judged_half};
use crate::suite::products::{LoraShape, SCALE};
use crate::suite::rows::EPS;
use crate::suite::{Context, products, rows};
use crate::{Error, Result};

mod attention;
mod layer;
mod model;
mod net;

/// Where it computes when tallow does so on `device`.
#[cfg(all(feature = "peers-metal", target_os = "macos"))]
pub(super) fn device(device: &str) -> Result<Device> {
    match device.starts_with("wgpu") {
        true => Device::new_metal(0).map_err(said),
        false => Ok(Device::Cpu),
    }
}

/// Where it computes when tallow does so on `device`.
#[cfg(not(all(feature = "peers-metal", target_os = "macos")))]
pub(super) fn device(_: &str) -> Result<Device> {
    Ok(Device::Cpu)
}

/// All ways in which it does a job on `device`.
pub(super) fn ways(job: &Job, cx: &Context, device: &Device) -> Result<Vec<Way>> {
    let half = cx.dtype == DType::BF16;
    let (judged, cost) = match job {
        Job::Lora(shape) => (product(*shape, cx)?, shape.cost(cx.dtype)),
        // In bf16 it has products, which widen whole operands, and nothing else that is worth a row.
        _ if half => return Ok(vec![]),
        Job::Layer(_) | Job::Model(_) if !device.is_cpu() => return Ok(vec![]),
        Job::Rows(op) => (judged(rows::work(cx, *op)?), rows::cost(*op)),
        Job::Layer(layer) => return layer::ways(*layer, cx),
        Job::Model(job) => return model::ways(job, cx),
    };
    let kind = if half { Kind::BF16 } else { Kind::F32 };
    let engine = Function {
        w: weights(&judged)
            .iter()
            .map(|(v, shape)| weight(v, shape, kind, device))
            .collect::<candle_core::Result<_>>()
            .map_err(said)?,
        job: job.clone(),
        shape: judged.shape(),
        kind,
        x: Operand::on(device),
        y: None,
    };
    Ok(vec![Way {
        name: "",
        engine: Box::new(engine),
        judged,
        cost,
    }])
}

fn product(shape: LoraShape, cx: &Context) -> Result<Judged> {
    Ok(match cx.dtype {
        DType::BF16 => judged_half(products::lora_half(&cx.session, shape)?),
        _ => judged(products::lora(&cx.session, shape, cx.dtype)?),
    })
}

/// Its errors, as ours.
fn said(e: candle_core::Error) -> Error {
    Error::Peer {
        peer: "candle".to_owned(),
        what: e.to_string(),
    }
}

/// Matrices are turned: `[n, k]` as stored, `[k, n]` as a view.
fn weight(
    values: &[f32],
    shape: &[usize],
    kind: Kind,
    device: &Device,
) -> candle_core::Result<Tensor> {
    let t = Tensor::from_slice(values, shape, device)?.to_dtype(kind)?;
    if shape.len() == 2 { t.t() } else { Ok(t) }
}

fn f32s(values: &[f64]) -> Vec<f32> {
    values.iter().map(|v| *v as f32).collect()
}

fn u32s(values: &[f64]) -> Vec<u32> {
    values.iter().map(|v| *v as u32).collect()
}

/// The last element.
fn last(y: &Tensor) -> candle_core::Result<f32> {
    let flat = y.flatten_all()?;
    let one = flat.get(flat.elem_count() - 1)?;
    one.to_dtype(Kind::F32)?.to_scalar()
}

fn whole(y: &Tensor) -> candle_core::Result<Vec<f32>> {
    y.flatten_all()?.to_dtype(Kind::F32)?.to_vec1()
}

/// The operand that is fed: on the host, and as a tensor.
struct Operand {
    host: Vec<f32>,
    tensor: Option<Tensor>,
    device: Device,
}

impl Operand {
    fn on(device: &Device) -> Self {
        Operand {
            host: vec![],
            tensor: None,
            device: device.clone(),
        }
    }

    fn make(&mut self, shape: &[usize], kind: Kind) -> candle_core::Result<()> {
        let t = Tensor::from_slice(&self.host, shape, &self.device)?;
        self.tensor = Some(t.to_dtype(kind)?);
        Ok(())
    }

    fn renew(&mut self, values: &[f64], shape: &[usize], kind: Kind) -> candle_core::Result<()> {
        self.host = f32s(values);
        self.make(shape, kind)
    }

    fn feed(&mut self, value: f64, shape: &[usize], kind: Kind) -> candle_core::Result<()> {
        if let Some(last) = self.host.last_mut() {
            *last = value as f32;
        }
        self.make(shape, kind)
    }
}

/// Products, norms and softmax: one tensor in, one out.
struct Function {
    job: Job,
    shape: Vec<usize>,
    kind: Kind,
    w: Vec<Tensor>,
    x: Operand,
    y: Option<Tensor>,
}

impl Function {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let w = &self.w;
        match &self.job {
            Job::Lora(LoraShape { rank: 0, .. }) => x.matmul(&w[0]),
            Job::Lora(_) => {
                let y = x.matmul(&w[0])?;
                y + (x.matmul(&w[1])?.matmul(&w[2])? * f64::from(SCALE))?
            }
            Job::Rows(RowOp::Softmax) => candle_nn::ops::softmax_last_dim(x),
            Job::Rows(RowOp::RmsNorm) => candle_nn::ops::rms_norm(x, &w[0], EPS),
            Job::Rows(RowOp::LayerNorm) => candle_nn::ops::layer_norm(x, &w[0], &w[1], EPS),
            Job::Layer(_) | Job::Model(_) => candle_core::bail!("not here (bug in tallow)"),
        }
    }
}

impl Engine for Function {
    fn renew(&mut self, operands: &[Vec<f64>]) -> Result<()> {
        self.y = None;
        let renewed = self.x.renew(&operands[0], &self.shape, self.kind);
        renewed.map_err(said)
    }

    fn feed(&mut self, value: f64) -> Result<()> {
        self.x.feed(value, &self.shape, self.kind).map_err(said)
    }

    fn run(&mut self) -> Result<f32> {
        let Some(x) = &self.x.tensor else {
            return Ok(f32::NAN);
        };
        let y = self.forward(x).map_err(said)?;
        let value = last(&y).map_err(said)?;
        self.y = Some(y);
        Ok(value)
    }

    fn results(&mut self) -> Result<Vec<Vec<f32>>> {
        let all = self.y.iter().map(whole);
        all.collect::<candle_core::Result<_>>().map_err(said)
    }
}
