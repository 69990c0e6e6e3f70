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

/// Elements of a result that a distance in norm says something of: a handful of sums may cancel to nearly nothing, and then
/// their rounding is all there is.
const LEAST: usize = 16;

/// How far each result of `case` on `session` is from the oracle: the norm of the difference over the norm of the
/// result. For devices that were asked to round what they multiply. Results of fewer than 16 elements are left out.
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
    let all = run(session, case)?;
    let large = all.iter().zip(&want).filter(|(got, _)| got.len() >= LEAST);
    Ok(large.map(one).collect())
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
        let bytes = ty.dtype.encode(&inputs[slot as usize].data);
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
        Some(b) => session
            .backend()
            .upload(b, 0, &nan.ty.dtype.encode(&nan.data)),
        None => Ok(()),
    }
}

fn download(session: &Session, t: &Tensor) -> Result<Vec<f64>> {
    let mut bytes = vec![0; t.ty().bytes()];
    if let Some(b) = t.buffer() {
        session.backend().download(b, 0, &mut bytes)?;
    }
    Ok(t.dtype().decode(&bytes))
}
