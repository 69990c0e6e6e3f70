//! The reference: runs a graph node by node in f64. Kernels, gradients and passes are tested against it.
//! Invariant: composites run as their decomposition; floats are rounded only by a cast (or a
//! gather) to bf16 or f16, never to f32.
//! Absent on purpose: anything clever. Rows of a large product are made by several threads, each sum in its one order.
use std::borrow::Cow;

use crate::{
    Error, Result,
    element::{to_bf16, to_f16},
    graph::{Graph, NodeId},
    op::{Op, ReduceOp},
    pass::expand::expand_all,
    philox,
    types::{DType, Layout, Shape, TensorType},
};

pub mod bound;
pub mod sample;

/// A tensor in f64. Integers are exact.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// Shape, and the element type it stands for.
    pub ty: TensorType,
    /// Elements, row-major.
    pub data: Vec<f64>,
}

impl Value {
    /// A value from its parts; panics where their sizes differ (tests build values).
    pub fn new(ty: TensorType, data: Vec<f64>) -> Self {
        assert_eq!(ty.shape.numel(), data.len(), "elements of {ty}");
        Value { ty, data }
    }
    /// Every element the same.
    pub fn full(ty: TensorType, v: f64) -> Self {
        let data = vec![v; ty.shape.numel()];
        Value { ty, data }
    }
}

/// `v` as an element of type `d` holds it; f32 is not rounded. Integers truncate and saturate.
pub fn store(d: DType, v: f64) -> f64 {
    match d {
        DType::F32 => v,
        DType::BF16 => to_bf16(v).to_f64(),
        DType::F16 => to_f16(v).to_f64(),
        DType::I32 => f64::from(v as i32),
        DType::U32 => f64::from(v as u32),
        DType::U8 => f64::from(v as u8),
    }
}

/// Runs `g` on `inputs` (by slot). Returns its outputs, then the values of its updates.
///
/// # Errors
/// Inputs that do not fit the graph's.
pub fn eval(g: &Graph, inputs: &[Value]) -> Result<Vec<Value>> {
    check_inputs(g, inputs)?;
    let g = expand_all(g)?;
    let mut left = g.use_counts();
    let mut vals: Vec<Option<Vec<f64>>> = vec![None; g.nodes.len()];
    for (id, n) in g.iter() {
        let v = {
            let xs: Vec<&[f64]> = n
                .inputs
                .iter()
                .map(|i| vals[i.index()].as_deref().unwrap_or_default())
                .collect();
            match n.op {
                Op::Input(slot, _) => inputs[slot as usize].data.clone(),
                _ => node(&g, id, &xs)?,
            }
        };
        vals[id.index()] = Some(v);
        for i in &n.inputs {
            left[i.index()] -= 1;
            if left[i.index()] == 0 {
                vals[i.index()] = None;
            }
        }
    }
    let root = |r: NodeId| Value {
        ty: g.ty(r).clone(),
        data: vals[r.index()].clone().unwrap_or_default(),
    };
    Ok(g.roots().map(root).collect())
}

fn check_inputs(g: &Graph, inputs: &[Value]) -> Result<()> {
    for n in &g.nodes {
        if let Op::Input(slot, _) = n.op {
            match inputs.get(slot as usize) {
                Some(v) if v.ty == n.ty && v.data.len() == n.ty.shape.numel() => {}
                Some(v) => return Err(Error::shape("input", n.ty.to_string(), &[&v.ty])),
                None => {
                    let (want, got) = (slot as usize + 1, inputs.len());
                    return Err(Error::size("oracle inputs", want, got, "values"));
                }
            }
        }
    }
    Ok(())
}

/// One structural op; `xs` are its operands' elements.
fn node(g: &Graph, id: NodeId, xs: &[&[f64]]) -> Result<Vec<f64>> {
    let n = g.node(id);
    let sh = |k: usize| &g.ty(n.inputs[k]).shape;
    let count = n.ty.shape.numel();
    let through = |l: Layout| (0..count).map(|i| xs[0][l.index(i)]).collect();
    Ok(match &n.op {
        Op::Const(v) => vec![f64::from(v.get())],
        Op::Map(s) => {
            let mut args = [0.0; 3];
            let one = |i: usize| {
                for (a, x) in args.iter_mut().zip(xs) {
                    *a = x[i];
                }
                match n.ty.dtype {
                    d if d.is_float() => s.eval(&args[..xs.len()]),
                    d => store(d, s.eval(&args[..xs.len()])),
                }
            };
            (0..count).map(one).collect()
        }
        Op::Cast(d) => xs[0].iter().map(|v| store(*d, *v)).collect(),
        Op::Reduce(r, axis) => reduce(*r, *axis, sh(0), xs[0]),
        Op::Broadcast(to) => through(Layout::contiguous(sh(0)).broadcast(to)),
        Op::Reshape(_) | Op::Barrier(_) => xs[0].to_vec(),
        Op::Permute(axes) => through(Layout::contiguous(sh(0)).permute(axes)),
        Op::Slice { axis, start, len } => {
            through(Layout::contiguous(sh(0)).slice(*axis, *start, *len))
        }
        Op::Concat(axis) => {
            let mut out = vec![0.0; count];
            let mut at = 0;
            for (k, x) in xs.iter().enumerate() {
                place(&mut out, &n.ty.shape, *axis, at, sh(k), x);
                at += sh(k).0[*axis];
            }
            out
        }
        Op::Pad { axis, before, .. } => {
            let mut out = vec![0.0; count];
            place(&mut out, &n.ty.shape, *axis, *before, sh(0), xs[0]);
            out
        }
        Op::MatMul { ta, tb, alpha } => {
            let mut out = matmul([*ta, *tb], [sh(0), sh(1)], [xs[0], xs[1]]);
            out.iter_mut().for_each(|v| *v *= f64::from(alpha.get()));
            out
        }
        Op::Gather(d) => gather(*d, sh(0), xs[0], xs[1]),
        Op::ScatterAdd(_) => {
            let mut out = vec![0.0; count];
            let c = n.ty.shape.last();
            for (id, row) in xs[0].iter().zip(xs[1].chunks(c.max(1))) {
                // An id past the end has no row to add to.
                if let Some(to) = out.get_mut(*id as usize * c..(*id as usize + 1) * c) {
                    to.iter_mut().zip(row).for_each(|(t, r)| *t += r);
                }
            }
            out
        }
        Op::Iota(_, axis) => {
            let strides = n.ty.shape.strides();
            let at = |i: usize| (i / strides[*axis]) % n.ty.shape.0[*axis];
            (0..count).map(|i| at(i) as f64).collect()
        }
        Op::Random { id, .. } => {
            let seed = [xs[0][0] as u32, xs[0][1] as u32];
            let draw = |i| f64::from(philox::uniform(seed, *id, i));
            (0..count).map(draw).collect()
        }
        Op::Input(..) | Op::Part(_) | Op::Composite(_) => {
            let what = "composites expanded first (bug in tallow)";
            return Err(Error::shape(n.op.name(), what, &[&n.ty]));
        }
    })
}

fn reduce(r: ReduceOp, axis: usize, s: &Shape, x: &[f64]) -> Vec<f64> {
    let inner: usize = s.0[axis + 1..].iter().product();
    let outer: usize = s.0[..axis].iter().product();
    let n = s.0[axis];
    let one = |at: usize| {
        let (o, i) = (at / inner, at % inner);
        let all = (0..n).map(|k| x[(o * n + k) * inner + i]);
        match r {
            ReduceOp::Sum => all.sum(),
            ReduceOp::Max => all.fold(f64::NEG_INFINITY, f64::max),
        }
    };
    (0..outer * inner).map(one).collect()
}

/// Copies `x` of shape `s` into `out` of shape `to`, starting at index `at` of `axis`.
fn place(out: &mut [f64], to: &Shape, axis: usize, at: usize, s: &Shape, x: &[f64]) {
    let inner: usize = s.0[axis + 1..].iter().product();
    let (chunk, step) = (s.0[axis] * inner, to.0[axis] * inner);
    if chunk == 0 {
        return;
    }
    for (o, part) in x.chunks(chunk).enumerate() {
        let start = o * step + at * inner;
        out[start..start + chunk].copy_from_slice(part);
    }
}

fn matmul(t: [bool; 2], s: [&Shape; 2], x: [&[f64]; 2]) -> Vec<f64> {
    let rank = s[0].rank();
    let dims = |i: usize| {
        let (a, b) = (s[i].0[rank - 2], s[i].0[rank - 1]);
        if t[i] { (b, a) } else { (a, b) }
    };
    let ((m, k), (_, n)) = (dims(0), dims(1));
    let batches: usize = s[0].0[..rank - 2].iter().product();
    let (ai, ak) = if t[0] { (1, m) } else { (k, 1) };
    let mut out = vec![0.0; batches * m * n];
    for p in 0..batches {
        let a = &x[0][p * m * k..];
        let b = rows(t[1], [k, n], &x[1][p * k * n..][..k * n]);
        let part = |from: usize, out: &mut [f64]| {
            for (i, out) in out.chunks_mut(n.max(1)).enumerate() {
                for q in 0..k {
                    let v = a[(from + i) * ai + q * ak];
                    let row = &b[q * n..][..n];
                    out.iter_mut().zip(row).for_each(|(o, b)| *o += v * b);
                }
            }
        };
        let out = &mut out[p * m * n..(p + 1) * m * n];
        let threads = match m * k * n {
            0..MUCH => 1,
            _ => std::thread::available_parallelism().map_or(1, usize::from),
        };
        let each = m.div_ceil(threads).max(1);
        std::thread::scope(|all| {
            let mut parts = out.chunks_mut(each * n.max(1)).enumerate();
            let first = parts.next();
            for (i, out) in parts {
                all.spawn(move || part(i * each, out));
            }
            if let Some((_, out)) = first {
                part(0, out);
            }
        });
    }
    out
}

/// Multiply-adds from which a product is worth threads of its own.
const MUCH: usize = 1 << 24;

/// `[k, n]` row by row, of an operand that may lie with rows and columns exchanged.
fn rows(exchanged: bool, [k, n]: [usize; 2], x: &[f64]) -> Cow<'_, [f64]> {
    if !exchanged {
        return Cow::Borrowed(x);
    }
    let at = |i: usize| x[i % n * k + i / n];
    Cow::Owned((0..k * n).map(at).collect())
}

fn gather(d: DType, s: &Shape, table: &[f64], ids: &[f64]) -> Vec<f64> {
    let (v, c) = (s.0[0], s.0[1]);
    let mut out = Vec::with_capacity(ids.len() * c);
    for id in ids {
        match *id as usize {
            i if i < v => out.extend(table[i * c..(i + 1) * c].iter().map(|x| store(d, *x))),
            _ => out.resize(out.len() + c, 0.0),
        }
    }
    out
}

#[cfg(test)]
mod tests;
