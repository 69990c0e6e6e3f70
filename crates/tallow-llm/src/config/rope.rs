//! Rotary position embedding: the inverse frequencies, for plain, linear and llama3 scaling.
//! Invariant: `inv_freq` follows transformers step by step in f32 (the order of roundings included), only
//! the power is taken in f64. Absent on purpose: yarn, dynamic, longrope, mrope, partial rotation: refused by name.

use serde_json::{Map, Value};

use super::unsupported;
use crate::error::{Result, quote};
use crate::json::{Fields, brief};

/// How long contexts are reached.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeKind {
    /// As trained.
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// How much longer the context becomes.
        factor: f32,
    },
    /// Low frequencies divided by `factor`, high ones kept, a smooth change between.
    Llama3 {
        /// How much longer the context becomes.
        factor: f32,
        /// Wavelengths above `original / low_freq` are divided.
        low_freq: f32,
        /// Wavelengths below `original / high_freq` are kept.
        high_freq: f32,
        /// Context length before scaling, in tokens.
        original: f32,
    },
}

/// Rotary position embedding of one model: pair `i` of a head turns by `position * inv_freq[i]` radians.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The scaling.
    pub kind: RopeKind,
    /// Base wavelength, dimensionless.
    pub theta: f64,
    /// Radians a token, `head_dim / 2` of them.
    pub inv_freq: Vec<f32>,
}

impl Rope {
    /// Computes the frequencies of `head_dim / 2` pairs.
    pub fn new(kind: RopeKind, theta: f64, head_dim: usize) -> Self {
        let plain = plain(theta, head_dim);
        let inv_freq = match kind {
            RopeKind::Default => plain,
            RopeKind::Linear { factor } => plain.into_iter().map(|f| f / factor).collect(),
            RopeKind::Llama3 { .. } => plain.into_iter().map(|f| llama3(f, kind)).collect(),
        };
        Self {
            kind,
            theta,
            inv_freq,
        }
    }
}

fn plain(theta: f64, head_dim: usize) -> Vec<f32> {
    let theta = f64::from(theta as f32);
    (0..head_dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f32 / head_dim as f32;
            1.0 / (theta.powf(f64::from(exponent)) as f32)
        })
        .collect()
}

fn llama3(inv_freq: f32, kind: RopeKind) -> f32 {
    let RopeKind::Llama3 {
        factor,
        low_freq,
        high_freq,
        original,
    } = kind
    else {
        return inv_freq;
    };
    // PyTorch divides a number by a tensor as number * (1 / tensor); two roundings.
    let wavelength = (1.0 / inv_freq) * std::f32::consts::TAU;
    if wavelength > original / low_freq {
        return inv_freq / factor;
    }
    if wavelength < original / high_freq {
        return inv_freq;
    }
    let smooth = ((1.0 / wavelength) * original - low_freq) / (high_freq - low_freq);
    (1.0 - smooth) * inv_freq / factor + smooth * inv_freq
}

/// Reads either layout: `rope_parameters` (new), or `rope_theta` beside `rope_scaling` (old).
pub(super) fn read(f: &Fields, head_dim: usize, max_positions: usize) -> Result<Rope> {
    let empty = Map::new();
    let (prefix, map) = match (scaling(f, "rope_scaling")?, scaling(f, "rope_parameters")?) {
        (Some(old), _) => ("rope_scaling.", old),
        (None, Some(new)) => ("rope_parameters.", new),
        (None, None) => ("", &empty),
    };
    let inner = Fields {
        path: f.path,
        prefix,
        map,
    };
    if map.values().any(Value::is_object) {
        let what = format!("{prefix}* by layer type");
        return Err(unsupported(
            f,
            what,
            "this version wants one rope for all layers",
        ));
    }
    for fields in [&inner, f] {
        if let Some(part) = fields.number("partial_rotary_factor")?
            && part != 1.0
        {
            let what = format!("partial_rotary_factor {part}");
            return Err(unsupported(
                f,
                what,
                "this version rotates whole heads only",
            ));
        }
    }
    let theta = match inner.number("rope_theta")? {
        Some(theta) => theta,
        None => f.number("rope_theta")?.unwrap_or(10_000.0),
    };
    if !(theta as f32 > 0.0 && (theta as f32).is_finite()) {
        return Err(f.bad("rope_theta", "a number above 0", theta.to_string()));
    }
    Ok(Rope::new(kind(&inner, f, max_positions)?, theta, head_dim))
}

fn scaling<'a>(f: &Fields<'a>, key: &str) -> Result<Option<&'a Map<String, Value>>> {
    match f.get(key) {
        None => Ok(None),
        Some(Value::Object(map)) if map.is_empty() => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(other) => Err(f.bad(key, "an object or null", brief(other))),
    }
}

fn kind(inner: &Fields, f: &Fields, max_positions: usize) -> Result<RopeKind> {
    let name = match inner.text("rope_type")? {
        Some(name) => Some(name),
        None => inner.text("type")?,
    };
    match name.unwrap_or("default") {
        "default" => Ok(RopeKind::Default),
        "linear" => Ok(RopeKind::Linear {
            factor: positive(inner, "factor")?,
        }),
        "llama3" => {
            let original = match inner.count("original_max_position_embeddings", 1 << 31)? {
                Some(n) => n,
                None => f
                    .count("original_max_position_embeddings", 1 << 31)?
                    .unwrap_or(max_positions),
            };
            let low_freq = positive(inner, "low_freq_factor")?;
            let high_freq = positive(inner, "high_freq_factor")?;
            if high_freq <= low_freq {
                let want = format!("a number above low_freq_factor ({low_freq})");
                return Err(inner.bad("high_freq_factor", want, high_freq.to_string()));
            }
            Ok(RopeKind::Llama3 {
                factor: positive(inner, "factor")?,
                low_freq,
                high_freq,
                original: original as f32,
            })
        }
        other => Err(unsupported(
            f,
            format!("rope scaling {}", quote(other)),
            "this version computes default, linear and llama3",
        )),
    }
}

/// A number above zero whose reciprocal is finite too.
fn positive(f: &Fields, key: &str) -> Result<f32> {
    let want = "a number from 1e-6 to 1e6";
    match f.number(key)? {
        Some(v) if (1e-6..=1e6).contains(&v) => Ok(v as f32),
        Some(v) => Err(f.bad(key, want, v.to_string())),
        None => Err(f.bad(key, want, "nothing")),
    }
}
