//! What a device reaches that only its backend can drive: by copies, sums and products through the session.
//! Invariant: many replays lie in its queue before one wait, so that neither starting nor waiting is in a rate that something
//! bigger has not beaten; what is probed is what the works run on, the best kernel of the largest shape that pays.
//! Absent on purpose: data sheets, and kernels for the probe alone. A kernel that reaches more than all of these would be
//! under its floor, and its row would say so.

use half::bf16;
use tallow::{DType, Program, Role, Session, TensorType};

use super::{Bandwidth, LARGEST, Peak, Probe, best};
use crate::Result;
use crate::work::Clock;

/// The smallest working set, in bytes. Below it a rate is that of starting kernels.
const SMALLEST: usize = 256 << 10;
/// Bytes moved between two waits: as many,
const QUEUED_BYTES: usize = 1 << 30;
/// but not for longer than this, in seconds, as far as smaller sets have shown. Software that plays a device is slow.
const QUEUED_S: f64 = 0.02;
/// Most replays between two waits.
const QUEUED: usize = 64;
/// Extents of the square products, until one takes longer than [`LONG_S`].
const EXTENTS: [usize; 6] = [256, 512, 1024, 2048, 4096, 8192];
const LONG_S: f64 = 0.02;

impl Probe {
    /// Looks for the rates of the device behind `session`, whose weights are kept in `dtype`.
    ///
    /// # Errors
    /// What the device reports.
    pub fn device(clock: &dyn Clock, session: &Session, dtype: DType) -> Result<Self> {
        let mut probe = Self::default();
        let (mut bytes, mut bytes_per_s) = (SMALLEST, f64::INFINITY);
        while bytes <= LARGEST {
            let most = (bytes_per_s * QUEUED_S).min(QUEUED_BYTES as f64) as usize;
            bytes_per_s = match moving(clock, session, bytes, most) {
                Ok(rate) => rate,
                // Some bind no more at once. What else is wrong will show in the products.
                Err(_) if !probe.bandwidth.is_empty() => break,
                Err(e) => return Err(e),
            };
            probe.bandwidth.push(Bandwidth {
                threads: 1,
                bytes,
                bytes_per_s,
                by: None,
            });
            bytes *= 2;
        }
        let flops = computing(clock, session, dtype)?;
        // A device that was asked for bf16 may multiply everything so.
        let f32_too = (dtype != DType::F32).then_some(DType::F32);
        for dtype in std::iter::once(dtype).chain(f32_too) {
            probe.peak.push(Peak {
                threads: 1,
                dtype: dtype.name().to_owned(),
                flops,
                by: None,
            });
        }
        Ok(probe)
    }
}

/// Replays `times` times, waits once.
fn queued(session: &Session, program: &mut Program, times: usize) -> Result<()> {
    for _ in 0..times {
        program.replay()?;
    }
    Ok(session.backend().wait()?)
}

/// Bytes a second of a copy or a sum with a working set of so many bytes, whichever is faster; about `most` bytes between waits.
fn moving(clock: &dyn Clock, session: &Session, bytes: usize, most: usize) -> Result<f64> {
    let times = (most / bytes).clamp(1, QUEUED);
    let mut most = 0.0f64;
    for sum in [false, true] {
        // A copy reads one half and writes the other.
        let n = if sum { bytes / 4 } else { bytes / 8 };
        let x = session.zeros(TensorType::f32([n / 1024, 1024]), Role::Data)?;
        let y = if sum {
            x.sum_all()?
        } else {
            x.mul_scalar(0.5)?
        };
        let mut program = session.record(&[&y], &[])?;
        let mut failed = None;
        let rate = best(clock, 0.0, || {
            failed = queued(session, &mut program, times).err().or(failed.take());
            (bytes * times) as f64
        });
        if let Some(e) = failed {
            return Err(e);
        }
        most = most.max(rate);
    }
    Ok(most)
}

/// Operations a second of square products with weights of `dtype`.
fn computing(clock: &dyn Clock, session: &Session, dtype: DType) -> Result<f64> {
    let mut rng = fastrand::Rng::with_seed(3);
    let mut most = 0.0f64;
    for n in EXTENTS {
        let ty = TensorType::f32([n, n]);
        // Not zeros: what does not change costs less to multiply, and some hardware runs faster for it.
        let values: Vec<f32> = (0..n * n).map(|_| rng.f32() - 0.5).collect();
        let x = session.zeros(ty, Role::Data)?;
        session.write(&x, &values)?;
        let bytes: Vec<u8> = match dtype {
            DType::BF16 => values
                .iter()
                .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
                .collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        let all = 0..bytes.len();
        let w = session.adopt(
            std::sync::Arc::new(bytes),
            all,
            TensorType::new([n, n], dtype),
        )?;
        let mut program = session.record(&[&x.linear(&w)?], &[])?;
        let flops = 2.0 * (n as f64).powi(3);
        let mut failed = None;
        let rate = best(clock, 0.0, || {
            failed = queued(session, &mut program, 4).err().or(failed.take());
            4.0 * flops
        });
        if let Some(e) = failed {
            return Err(e);
        }
        most = most.max(rate);
        if flops / rate > LONG_S {
            break;
        }
    }
    Ok(most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Cost;
    use crate::work::Wall;

    #[test]
    fn any_backend_can_be_probed_through_its_session() {
        let session = tallow::open("cpu").unwrap();
        let probe = Probe::device(&Wall::new(), &session, DType::F32).unwrap();
        assert!(probe.bandwidth.iter().all(|b| b.bytes_per_s > 1e8));
        // Whatever the machine does: between a slow core and a large card.
        let cost = Cost {
            bytes: 1 << 20,
            flops: 1e9,
            dtype: DType::F32,
        };
        let floor = probe.floor(&cost, 7).seconds;
        assert!((1e-6..10.0).contains(&floor), "{floor}");
    }
}
