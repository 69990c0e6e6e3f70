//! Other people's engines: what they can be asked to compute.
//! Absent on purpose: the engines themselves, which are behind features and in other processes.

use std::path::PathBuf;

use crate::measure::Contender;
use crate::suite::Context;
use crate::suite::layers::Layer;
use crate::suite::models::{Adapted, Doing};
use crate::suite::products::LoraShape;
use crate::{Error, Result};

#[cfg(feature = "peers")]
mod candle;
#[cfg(feature = "peers")]
mod gemm;
#[cfg(feature = "peers")]
pub mod local;
pub mod python;

/// Where tallow computes, and its peers if they can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place<'a> {
    /// Threads, on a processor.
    pub threads: usize,
    /// The backend's name: `cpu`, `cuda:0`, `wgpu:0`.
    pub device: &'a str,
}

/// A norm or a softmax over the last axis of 4x16x1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOp {
    /// Softmax.
    Softmax,
    /// Root mean square norm with weights.
    RmsNorm,
    /// Layer norm with weights and biases.
    LayerNorm,
}

impl RowOp {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Softmax, Self::RmsNorm, Self::LayerNorm];

    /// As in a table.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Softmax => "softmax",
            Self::RmsNorm => "RMSNorm",
            Self::LayerNorm => "LayerNorm",
        }
    }
}

/// What a peer computes.
#[derive(Clone, Debug, PartialEq)]
pub enum Job {
    /// A product, with or without an adapter.
    Lora(LoraShape),
    /// A norm or a softmax.
    Rows(RowOp),
    /// A layer of a model.
    Layer(Layer),
    /// A whole model.
    Model(ModelJob),
}

/// What a whole model is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelJob {
    /// Folder of the model.
    pub dir: PathBuf,
    /// What it does.
    pub doing: Doing,
    /// With which adapter.
    pub adapted: Option<Adapted>,
}

/// An engine that takes part in a run.
pub trait Peer {
    /// "candle", "mlx".
    fn name(&self) -> &str;
    /// Its version, and what it runs on where that matters ("0.32.4, reference BLAS").
    fn version(&self) -> String;
    /// Does it take part? If not, its version says why.
    fn is_there(&self) -> bool {
        true
    }
    /// It, with a job, by each way it has to do it; none where it has no such thing.
    ///
    /// # Errors
    /// What the engine reports.
    fn contenders(&mut self, job: &Job, cx: &Context) -> Result<Vec<Contender>>;
}

/// Names that this build knows.
#[must_use]
pub fn known() -> Vec<&'static str> {
    let python = python::ENGINES.iter().map(|(name, _)| *name);
    #[cfg(feature = "peers")]
    let python = python.chain(local::ENGINES);
    python.collect()
}

/// The variable that must hold the number of threads when a program with one of these engines starts, if there is one.
#[must_use]
pub fn wants(names: &[String]) -> Option<&'static str> {
    #[cfg(feature = "peers")]
    if names.iter().any(|n| local::ENGINES.contains(&&**n)) {
        return Some(local::THREADS);
    }
    let _ = names;
    None
}

/// The engines of these names, each with as many threads as tallow, on its device where they can. One that is not there takes part in nothing; its
/// version says why, and what installs it.
///
/// # Errors
/// A name that is unknown.
pub fn open(names: &[String], place: &Place<'_>) -> Result<Vec<Box<dyn Peer>>> {
    let mut all: Vec<Box<dyn Peer>> = vec![];
    for name in names {
        #[cfg(feature = "peers")]
        if let Some(local) = local::Local::open(name, place)? {
            all.push(Box::new(local));
            continue;
        }
        if !known().contains(&&**name) {
            return Err(Error::Setting {
                name: "--against",
                want: "torch, torch-compiled, peft, mlx, mlx-lm; candle, gemm, faer in a build with the feature tallow-bench/peers",
                got: name.clone(),
            });
        }
        all.push(match python::Python::open(name, place) {
            Ok(peer) => Box::new(peer),
            Err(Error::Peer { peer, what }) => Box::new(Missing {
                name: peer,
                why: what,
            }),
            Err(e) => return Err(e),
        });
    }
    Ok(all)
}

/// A peer that is not there.
struct Missing {
    name: String,
    why: String,
}

impl Peer for Missing {
    fn name(&self) -> &str {
        &self.name
    }
    fn version(&self) -> String {
        self.why.clone()
    }
    fn is_there(&self) -> bool {
        false
    }
    fn contenders(&mut self, _: &Job, _: &Context) -> Result<Vec<Contender>> {
        Ok(vec![])
    }
}
