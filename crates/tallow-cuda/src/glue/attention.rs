//! Attention, forward and backward.
//! Invariant: no kernel holds scores of more than one tile of keys; what a query sees is a range of keys, so
//! causal masks, windows and several documents in a row are one case.
//! Absent on purpose: heads whose elements are not dense; the planner copies those.
use super::{Arg, Job, Offer, Target, elementwise::head_strides, source, word};
use crate::launch::Kernel;
use std::sync::Arc;
use tallow_core::{
    kernel::{KernelSpec, Operand},
    op::{Attention, Mask},
};

const FILE: &str = include_str!("attention.cu");
const DECODE: &str = include_str!("attention_decode.cu");
const BACKWARD: &str = include_str!("attention_backward.cu");
const COMMON: &str = include_str!("attention_common.cu");
/// Longest head.
const MAX_HEAD: usize = 256;
/// Query rows of one key head that the decoding kernel takes.
const DECODE_ROWS: usize = 16;
/// Keys of one block of the decoding kernel.
const DECODE_KEYS: usize = 64;

/// Extents: batch, queries, heads, elements, keys, key heads.
#[derive(Clone, Copy)]
struct Sizes {
    b: usize,
    t: usize,
    h: usize,
    d: usize,
    s: usize,
    hk: usize,
}

fn sizes(spec: &KernelSpec) -> Option<Sizes> {
    let (q, k) = (
        &spec.inputs[0].layout.shape.0,
        &spec.inputs[1].layout.shape.0,
    );
    let fits = q[3] <= MAX_HEAD && q[2] <= 65_535 && q[0] <= 65_535;
    fits.then_some(Sizes {
        b: q[0],
        t: q[1],
        h: q[2],
        d: q[3],
        s: k[1],
        hk: k[2],
    })
}

fn text(file: &str, a: &Attention, z: Sizes, tile: usize, starts: bool) -> Arc<str> {
    let (causal, window) = match a.mask {
        Mask::Full => (0, 0),
        Mask::Causal { window } => (1, window.unwrap_or(0)),
    };
    let defines = [
        ("D", z.d.to_string()),
        ("G", format!("{}u", z.h / z.hk)),
        ("BT", tile.to_string()),
        ("SCALE", format!("({:?}f)", a.scale.get())),
        ("CAUSAL", causal.to_string()),
        ("WINDOW", format!("{window}u")),
        ("STARTS", usize::from(starts).to_string()),
    ];
    source(&[COMMON, file].concat(), &defines)
}

/// Strides of heads as arguments.
fn strides(all: &[&Operand]) -> Option<Vec<Arg>> {
    let mut args = vec![];
    for o in all {
        for s in head_strides(o)? {
            args.push(word(s)?);
        }
    }
    Some(args)
}

fn launch(
    entry: &'static str,
    source: &Arc<str>,
    grid: [usize; 3],
    block: u32,
    shared: usize,
    args: Vec<Arg>,
) -> Job {
    Job::Kernel(Kernel {
        entry,
        source: source.clone(),
        grid: grid.map(|g| g as u32),
        block,
        shared: shared as u32,
        args,
        unless_same: None,
    })
}

/// Floats of a tile's row with its padding.
fn row(d: usize) -> usize {
    d.next_multiple_of(16) + 4
}

pub(super) fn forward(t: &Target, a: &Attention, spec: &KernelSpec) -> Option<Offer> {
    let z = sizes(spec)?;
    let starts = spec.inputs.len() == 5;
    let dense = spec.inputs[3..]
        .iter()
        .chain(spec.outputs[1].iter())
        .all(Operand::is_dense);
    if !dense {
        return None;
    }
    let mut args: Vec<Arg> = (0..4).map(Arg::Read).collect();
    args.push(if starts { Arg::Read(4) } else { Arg::U64(0) });
    args.extend([Arg::Write(0), Arg::Write(1)]);
    for n in [z.t, z.h, z.s] {
        args.push(word(n)?);
    }
    args.extend(strides(&[
        &spec.inputs[0],
        &spec.inputs[1],
        &spec.inputs[2],
    ])?);
    match &spec.outputs[0] {
        Some(o) => args.extend(strides(&[o])?),
        None => args.extend([Arg::U32(0); 3]),
    }
    if z.t * (z.h / z.hk) <= DECODE_ROWS {
        return decode(a, z, starts, args);
    }
    let tile = if z.d <= 128 { 64 } else { 32 };
    let shared = (2 * tile * row(z.d) + tile * (tile + 4)) * 4;
    if shared > t.shared {
        return None;
    }
    let source = text(FILE, a, z, tile, starts);
    let grid = [z.t.div_ceil(tile), z.h, z.b];
    Some(Offer::new(
        "attention_tiles_f32",
        vec![launch("attention", &source, grid, 256, shared, args)],
    ))
}

/// Few queries: blocks share the keys among them, then their parts are joined.
fn decode(a: &Attention, z: Sizes, starts: bool, args: Vec<Arg>) -> Option<Offer> {
    let source = text(DECODE, a, z, DECODE_KEYS, starts);
    let splits = z.s.div_ceil(DECODE_KEYS);
    let rows = z.b * z.h * z.t;
    let parts = (rows * splits * z.d * 4).next_multiple_of(256);
    let mut first = args.clone();
    first.extend([Arg::Scratch(0), Arg::Scratch(parts), word(z.hk)?]);
    let queries = z.t * (z.h / z.hk);
    let shared = (DECODE_KEYS * row(z.d) + queries * row(z.d) + queries * DECODE_KEYS) * 4;
    let mut second = args;
    second.extend([
        Arg::Scratch(0),
        Arg::Scratch(parts),
        word(z.hk)?,
        word(splits)?,
    ]);
    let jobs = vec![
        launch("decode", &source, [splits, z.hk, z.b], 128, shared, first),
        launch("join", &source, [z.t, z.h, z.b], 64, 0, second),
    ];
    Some(Offer::new("attention_decode_f32", jobs).scratch(parts + rows * splits * 8))
}

pub(super) fn backward(t: &Target, a: &Attention, spec: &KernelSpec) -> Option<Offer> {
    let z = sizes(spec)?;
    let starts = spec.inputs.len() == 8;
    let dense = [3, 5].into_iter().chain(7..spec.inputs.len());
    if !dense.into_iter().all(|i| spec.inputs[i].is_dense()) {
        return None;
    }
    let tile = if z.d <= 64 { 64 } else { 32 };
    let shared = (4 * tile * row(z.d) + tile * (tile + 4)) * 4;
    if shared > t.shared {
        return None;
    }
    let source = text(BACKWARD, a, z, tile, starts);
    let (q, k, v, o, go) = (0, 1, 2, 4, 6);
    let delta = Arg::Scratch(0);
    let rows = z.b * z.t * z.h;
    let mut args = vec![
        Arg::Read(o),
        Arg::Read(go),
        delta,
        word(z.t)?,
        word(z.h)?,
        word(rows)?,
    ];
    args.extend(strides(&[&spec.inputs[o], &spec.inputs[go]])?);
    let mut jobs = vec![launch(
        "delta",
        &source,
        [rows.div_ceil(4), 1, 1],
        128,
        0,
        args,
    )];
    let mut common = vec![Arg::Read(q), Arg::Read(k), Arg::Read(v), Arg::Read(3)];
    common.push(if starts { Arg::Read(7) } else { Arg::U64(0) });
    common.extend([Arg::Read(5), Arg::Read(go), delta]);
    for n in [z.t, z.h, z.s] {
        common.push(word(n)?);
    }
    common.extend(strides(&[
        &spec.inputs[q],
        &spec.inputs[k],
        &spec.inputs[v],
        &spec.inputs[go],
    ])?);
    if let Some(dq) = &spec.outputs[0] {
        let mut args = common.clone();
        args.push(Arg::Write(0));
        args.extend(strides(&[dq])?);
        jobs.push(launch(
            "grad_q",
            &source,
            [z.t.div_ceil(tile), z.h, z.b],
            256,
            shared,
            args,
        ));
    }
    if spec.outputs[1].is_some() || spec.outputs[2].is_some() {
        let mut args = common;
        args.extend([Arg::Write(1), Arg::Write(2)]);
        for o in &spec.outputs[1..3] {
            match o {
                Some(o) => args.extend(strides(&[o])?),
                None => args.extend([Arg::U32(0); 3]),
            }
        }
        jobs.push(launch(
            "grad_kv",
            &source,
            [z.s.div_ceil(tile), z.hk, z.b],
            256,
            shared,
            args,
        ));
    }
    Some(Offer::new("attention_grad_tiles_f32", jobs).scratch(rows * 4))
}
