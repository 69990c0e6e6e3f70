//! Runs one case on a device and compares every output and updated state with the oracle.
//! Invariant: what is allowed is the oracle's own tolerance, on every device the same.
use crate::Case;
use tallow_core::{
    Result,
    graph::Graph,
    op::{Op, Role},
    oracle::{
        Value,
        bound::{Bounded, eval_bounded},
    },
    session::Session,
    tensor::{Tensor, lift},
    types::DType,
};

/// One element out of tolerance.
#[derive(Debug)]
pub struct Failure {
    /// Which case, output and element.
    pub at: String,
    /// From the device.
    pub got: f64,
    /// From the oracle.
    pub want: f64,
    /// Allowed distance.
    pub tolerance: f64,
}

/// Runs `case` on `session`; the first element out of tolerance, if any.
///
/// # Errors
/// What the compiler or the device report.
pub fn check(session: &Session, case: &Case) -> Result<Option<Failure>> {
    let want = eval_bounded(&case.graph, &case.inputs)?;
    for (k, (got, want)) in run(session, case)?.iter().zip(&want).enumerate() {
        let wanted = want.value.data.iter().zip(want.tolerances());
        for (i, (got, (w, tolerance))) in got.iter().zip(wanted).enumerate() {
            let same = got == w || (got.is_nan() && w.is_nan());
            if !same && (got - w).abs().partial_cmp(&tolerance) != Some(std::cmp::Ordering::Less) {
                return Ok(Some(Failure {
                    at: format!("{}, result {k}, element {i}", case.name),
                    got: *got,
                    want: *w,
                    tolerance,
                }));
            }
        }
    }
    Ok(None)
}

/// Runs `case` on `session` from poisoned outputs: its outputs, then its updated states.
fn run(session: &Session, case: &Case) -> Result<Vec<Vec<f64>>> {
    let leaves = leaves(session, &case.graph, &case.inputs)?;
    let outs = lift(&case.graph, &leaves);
    let mut g = case.graph.clone();
    g.outputs = case.graph.updates.iter().map(|u| u.value).collect();
    let values = lift(&g, &leaves);
    let states = case
        .graph
        .updates
        .iter()
        .map(|u| leaves[u.slot as usize].clone());
    let updates: Vec<(Tensor, Tensor)> = states.zip(values).collect();
    let mut p = session.record(&outs.iter().collect::<Vec<_>>(), &updates)?;
    for (o, t) in p.outputs.iter().zip(&outs) {
        poison(session, o, t.dtype())?;
    }
    p.replay()?;
    let read = p.outputs.iter().chain(updates.iter().map(|(s, _)| s));
    read.map(|t| download(session, t)).collect()
}

/// How far each result of `case` on `session` is from the oracle: the norm of the difference over the norm of the
/// result. For devices that were asked to round what they multiply.
///
/// # Errors
/// What the compiler or the device report.
pub fn distance(session: &Session, case: &Case) -> Result<Vec<f64>> {
    let want = eval_bounded(&case.graph, &case.inputs)?;
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let one = |(got, want): (&Vec<f64>, &Bounded)| {
        let want = &want.value.data;
        let off = norm(&mut got.iter().zip(want).map(|(g, w)| g - w));
        off / norm(&mut want.iter().copied()).max(1e-30)
    };
    Ok(run(session, case)?.iter().zip(&want).map(one).collect())
}

/// Runs all cases.
///
/// # Panics
/// If one fails, with every failure listed.
pub fn check_all(session: &Session, cases: Vec<Case>) {
    assert!(!cases.is_empty(), "a suite without cases proves nothing");
    let mut bad = vec![];
    for c in &cases {
        match check(session, c) {
            Ok(None) => {}
            Ok(Some(f)) => bad.push(format!("{f:?}")),
            Err(e) => bad.push(format!("{}: {e}", c.name)),
        }
    }
    assert!(
        bad.is_empty(),
        "{} of {} cases failed:\n{}",
        bad.len(),
        cases.len(),
        bad.join("\n")
    );
}

fn leaves(session: &Session, g: &Graph, inputs: &[Value]) -> Result<Vec<Tensor>> {
    let mut out = vec![];
    for (id, role, ty) in g.inputs() {
        let Op::Input(slot, _) = g.node(id).op else {
            continue;
        };
        let bytes = encode(&inputs[slot as usize]);
        let t = match role {
            Role::Frozen => {
                let n = bytes.len();
                session.adopt(std::sync::Arc::new(bytes), 0..n, ty)?
            }
            _ => {
                let t = session.zeros(ty, role)?;
                if let Some(b) = t.buffer() {
                    session.backend().upload(b, 0, &bytes)?;
                }
                t
            }
        };
        out.push(t);
    }
    Ok(out)
}

fn poison(session: &Session, t: &Tensor, dtype: DType) -> Result<()> {
    let nan = Value::full(
        t.ty().clone(),
        if dtype.is_float() { f64::NAN } else { 77.0 },
    );
    match t.buffer() {
        Some(b) => session.backend().upload(b, 0, &encode(&nan)),
        None => Ok(()),
    }
}

fn encode(v: &Value) -> Vec<u8> {
    let mut out = Vec::with_capacity(v.ty.bytes());
    for x in &v.data {
        match v.ty.dtype {
            DType::F32 => out.extend((*x as f32).to_le_bytes()),
            DType::BF16 => out.extend(bf16_bits(*x).to_le_bytes()),
            DType::F16 => out.extend(half::f16::from_f64(*x).to_le_bytes()),
            DType::I32 => out.extend((*x as i32).to_le_bytes()),
            DType::U32 => out.extend((*x as u32).to_le_bytes()),
            DType::U8 => out.push(*x as u8),
        }
    }
    out
}

fn bf16_bits(x: f64) -> u16 {
    half::bf16::from_f64(x).to_bits()
}

fn download(session: &Session, t: &Tensor) -> Result<Vec<f64>> {
    let mut bytes = vec![0; t.ty().bytes()];
    if let Some(b) = t.buffer() {
        session.backend().download(b, 0, &mut bytes)?;
    }
    let four = |c: &[u8]| [c[0], c[1], c[2], c[3]];
    Ok(match t.dtype() {
        DType::F32 => bytes
            .chunks_exact(4)
            .map(|c| f64::from(f32::from_le_bytes(four(c))))
            .collect(),
        DType::I32 => bytes
            .chunks_exact(4)
            .map(|c| f64::from(i32::from_le_bytes(four(c))))
            .collect(),
        DType::U32 => bytes
            .chunks_exact(4)
            .map(|c| f64::from(u32::from_le_bytes(four(c))))
            .collect(),
        DType::BF16 => bytes
            .chunks_exact(2)
            .map(|c| half::bf16::from_le_bytes([c[0], c[1]]).to_f64())
            .collect(),
        DType::F16 => bytes
            .chunks_exact(2)
            .map(|c| half::f16::from_le_bytes([c[0], c[1]]).to_f64())
            .collect(),
        DType::U8 => bytes.iter().map(|b| f64::from(*b)).collect(),
    })
}
