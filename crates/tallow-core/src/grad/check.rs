//! Compares gradients with central differences, in f64.
//! Invariant: whatever passes here was compared along a random direction, which sees every element,
//! and at single elements.
//! Absent on purpose: tolerances. The caller decides what error is too large.
use super::grad;
use crate::{
    Result,
    graph::{Builder, Graph, NodeId},
    op::{Op, Role},
    oracle::{Value, eval},
    philox,
};

/// The largest disagreement found.
#[derive(Clone, Debug, PartialEq)]
pub struct Worst {
    /// `|gradient - difference|`, relative to the larger of the two and of the typical gradient.
    pub error: f64,
    /// Position in `wrt`.
    pub wrt: usize,
    /// Element; `None`: along a random direction.
    pub element: Option<usize>,
    /// What `grad` says.
    pub gradient: f64,
    /// What differences say.
    pub difference: f64,
}

/// Number of single elements compared for each of `wrt`.
const ELEMENTS: usize = 3;
/// Step of the differences, for inputs of order 1.
const STEP: f64 = 1e-5;

/// Checks `grad(g, wrt)` at `inputs` (by slot); the loss is the first output of `g`. Inputs should
/// be of order 1 and away from kinks (a tie of `max`, 0 of `abs`).
///
/// # Errors
/// Those of [`grad`] and [`eval`].
pub fn check_grad(g: &Graph, inputs: &[Value], wrt: &[NodeId]) -> Result<Worst> {
    let grads = eval(&grad(g, wrt)?, inputs)?;
    let (cut, mut inputs, slots) = cut_at(g, inputs, wrt)?;
    let mut worst = Worst {
        error: 0.0,
        wrt: 0,
        element: None,
        gradient: 0.0,
        difference: 0.0,
    };
    for (i, (slot, d)) in slots.iter().zip(&grads[1..]).enumerate() {
        let n = d.data.len();
        let typical = (d.data.iter().map(|v| v * v).sum::<f64>() / n.max(1) as f64).sqrt();
        let elements = (0..ELEMENTS).map(|k| Some((k * 7919 + 1) % n.max(1)));
        for element in elements.chain([None]).filter(|_| n > 0) {
            let u: Vec<f64> = match element {
                Some(e) => (0..n).map(|k| f64::from(u8::from(k == e))).collect(),
                None => direction(n, i),
            };
            let gradient: f64 = d.data.iter().zip(&u).map(|(a, b)| a * b).sum();
            let difference = difference(&cut, &mut inputs, *slot, &u)?;
            let scale = gradient.abs().max(difference.abs()).max(typical);
            let error = (gradient - difference).abs() / scale.max(1e-6);
            // A NaN is the worst, and stays it.
            if error.is_nan() || error > worst.error {
                worst = Worst {
                    error,
                    wrt: i,
                    element,
                    gradient,
                    difference,
                };
            }
        }
    }
    Ok(worst)
}

/// Random numbers in `[-1, 1)`.
fn direction(n: usize, id: usize) -> Vec<f64> {
    let at = |k| 2.0 * f64::from(philox::uniform([17, 4], id as u32, k)) - 1.0;
    (0..n).map(at).collect()
}

fn difference(g: &Graph, inputs: &mut [Value], slot: usize, u: &[f64]) -> Result<f64> {
    let at = inputs[slot].data.clone();
    let mut loss = |h: f64| -> Result<f64> {
        let moved = at.iter().zip(u).map(|(x, u)| x + h * u);
        inputs[slot].data = moved.collect();
        Ok(eval(g, inputs)?[0].data[0])
    };
    let (up, down) = (loss(STEP)?, loss(-STEP)?);
    inputs[slot].data = at;
    Ok((up - down) / (2.0 * STEP))
}

/// `g` with each of `wrt` made an input, all inputs with their values, and the slots of `wrt`.
fn cut_at(g: &Graph, inputs: &[Value], wrt: &[NodeId]) -> Result<(Graph, Vec<Value>, Vec<usize>)> {
    let whole = Graph {
        nodes: g.nodes.clone(),
        outputs: wrt.to_vec(),
        updates: vec![],
    };
    let values = eval(&whole, inputs)?;
    let mut inputs = inputs.to_vec();
    let mut slots: Vec<usize> = vec![];
    for (k, (w, v)) in wrt.iter().zip(values).enumerate() {
        let earlier = wrt[..k].iter().position(|e| e == w);
        slots.push(match (&g.node(*w).op, earlier) {
            (_, Some(e)) => slots[e],
            (Op::Input(slot, _), None) => *slot as usize,
            _ => {
                inputs.push(v);
                inputs.len() - 1
            }
        });
    }
    let mut b = Builder::default();
    let mut map: Vec<NodeId> = vec![];
    for (id, n) in g.iter() {
        let ins: Vec<NodeId> = n.inputs.iter().map(|i| map[i.index()]).collect();
        let cut = wrt.iter().position(|w| *w == id);
        map.push(match (cut, &n.op) {
            (_, Op::Input(slot, role)) => b.input_at(*slot, *role, n.ty.clone()),
            (Some(k), _) => b.input_at(slots[k] as u32, Role::Data, n.ty.clone()),
            (None, op) => b.push(op.clone(), &ins)?,
        });
    }
    let loss = map[g.outputs[0].index()];
    Ok((b.finish(vec![loss], vec![]), inputs, slots))
}
