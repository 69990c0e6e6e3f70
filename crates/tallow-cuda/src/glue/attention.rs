//! Attention, forward and backward.
//! Invariant: no kernel holds scores of more than one tile of keys; what a query sees is a range of keys, so
//! causal masks, windows and several documents in a row are one case.
//! Absent on purpose: heads whose elements are not dense; the planner copies those. A cap so far from the scale that
//! their quotient is no normal number.
//!
//! A line `//cap TEXT` of a file is `TEXT` where scores are capped and else not there, so that a cap costs others nothing.
use super::{
    Arg, Job, Offer, THREADS, Target, blocks, c_type, early,
    elementwise::{head_strides, one_type},
    pairs::Next,
    source, word,
};
use crate::launch::{Kernel, Start};
use std::sync::Arc;
use tallow_core::{
    kernel::{KernelSpec, Operand},
    op::{Attention, Mask},
    types::DType,
};

const FILE: &str = include_str!("attention.cu");
const DECODE: &str = include_str!("attention_decode.cu");
const BACKWARD: &str = include_str!("attention_backward.cu");
const COMMON: &str = include_str!("attention_common.cu");
const TILES: &str = include_str!("attention_tiles.cu");
const DELTA: &str = include_str!("attention_delta.cu");
const HALF: &str = include_str!("attention_half.cu");
/// Longest head.
const MAX_HEAD: usize = 256;
/// Longest head on tensor cores.
const MAX_HALF: usize = 128;
/// Rows of a tile on tensor cores.
const HALF_ROWS: usize = 64;
/// Query rows of one key head that the decoding kernel takes.
const DECODE_ROWS: usize = 16;
/// Keys of one block of the decoding kernel.
const DECODE_KEYS: usize = 32;

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

/// Types of operands and results by their names in the kernels; none: f32 alone.
type Types = [(&'static str, DType)];

fn text(
    files: &[&str],
    a: &Attention,
    z: Sizes,
    own: (&str, usize),
    starts: bool,
    types: &Types,
) -> Arc<str> {
    let (causal, window) = match a.mask {
        Mask::Full => (0, 0),
        Mask::Causal { window } => (1, window.unwrap_or(0)),
    };
    let mut defines = vec![
        ("D", z.d.to_string()),
        ("G", format!("{}u", z.h / z.hk)),
        (own.0, own.1.to_string()),
        ("LANES", delta_lanes(z.d).to_string()),
        ("SCALE", format!("({:?}f)", a.scale.get())),
        ("CAUSAL", causal.to_string()),
        ("WINDOW", format!("{window}u")),
        ("STARTS", usize::from(starts).to_string()),
    ];
    if let Some(factors) = a.cap_around_scale() {
        let names = ["CAP_IN", "CAP_OUT"].into_iter();
        defines.extend(names.zip(factors.map(|f| format!("({f:?}f)"))));
    }
    defines.extend(types.iter().map(|(name, d)| (*name, c_type(*d).to_owned())));
    let text = [&[COMMON], files].concat().concat();
    source(&chosen(&text, a.cap.is_some()), &defines)
}

/// `text` with its lines for capped scores, or without.
fn chosen(text: &str, capped: bool) -> String {
    let lines = text.split_inclusive('\n');
    let one = |l| match str::strip_prefix(l, "//cap ") {
        Some(line) if capped => line,
        Some(_) => "",
        None => l,
    };
    lines.map(one).collect()
}

/// Few enough queries for the decoding kernel?
fn few_queries(z: Sizes) -> bool {
    z.t * (z.h / z.hk) <= DECODE_ROWS
}

/// Do the kernels of these sizes take bf16?
pub(super) fn takes_halves(spec: &KernelSpec) -> bool {
    sizes(spec).is_some_and(|z| !few_queries(z))
}

/// The types of these operands under their names; what is absent may be any.
fn named<'a>(
    names: &[&'static str],
    all: impl IntoIterator<Item = Option<&'a Operand>>,
) -> Option<Vec<(&'static str, DType)>> {
    let one = |(name, o): (&&'static str, Option<&'a Operand>)| {
        Some((*name, o.map_or(Some(DType::F32), |o| one_type([o]))?))
    };
    names.iter().zip(all).map(one).collect()
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
        start: Start::After,
    })
}

/// Floats of a tile's row with its padding.
fn row(d: usize) -> usize {
    d.next_multiple_of(16) + 4
}

/// Lanes that take a query in `delta`, eight elements each at a time.
fn delta_lanes(d: usize) -> usize {
    d.div_ceil(8).next_power_of_two().clamp(4, 32)
}

/// Bytes of the two pairs of tiles of the kernels on tensor cores. Products of a warp group need the `own` tiles of a block
/// beside them, from a multiple of 1024 on.
fn half_bytes(t: &Target, d: usize, own: usize) -> usize {
    let row = d.next_multiple_of(16);
    let tiles = |n: usize, row: usize| n * HALF_ROWS * row * 2;
    match t.bulk && row.is_multiple_of(64) {
        true => tiles(4 + own, row) + 1024,
        false => tiles(4, row + 8),
    }
}

/// Their grid over tiles of `rows`, which is the slowest axis: blocks with most to do come first.
fn half_grid(z: Sizes, rows: usize) -> Option<[usize; 3]> {
    let tiles = rows.div_ceil(HALF_ROWS);
    (tiles <= 65_535).then_some([z.h, z.b, tiles])
}

/// Are there starts of documents, and the arguments of the forward kernels.
fn forward_args(z: Sizes, spec: &KernelSpec) -> Option<(bool, Vec<Arg>)> {
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
    Some((starts, args))
}

pub(super) fn forward(t: &Target, a: &Attention, spec: &KernelSpec) -> Option<Offer> {
    let z = sizes(spec).filter(|_| a.bends_before_scaling())?;
    let (starts, args) = forward_args(z, spec)?;
    if few_queries(z) {
        one_type(spec.inputs[..3].iter().chain(&spec.outputs[0])).filter(|d| *d == DType::F32)?;
        return decode(a, z, starts, args);
    }
    let types = named(&["TQ", "TK", "TV"], spec.inputs[..3].iter().map(Some))?;
    let types = [types, named(&["TO"], [spec.outputs[0].as_ref()])?].concat();
    if t.weights == DType::BF16 && z.d <= MAX_HALF && a.scale.get() > 0.0 {
        let source = text(&[HALF], a, z, ("FORWARD", 1), starts, &types);
        let grid = half_grid(z, z.t)?;
        let job = early(launch(
            "attention",
            &source,
            grid,
            128,
            half_bytes(t, z.d, 1),
            args,
        ));
        return Some(Offer::new("attention_mma_bf16", vec![job]));
    }
    let tile = if z.d <= 128 { 64 } else { 32 };
    let shared = (2 * tile * row(z.d) + tile * (tile + 4)) * 4;
    if shared > t.shared {
        return None;
    }
    let source = text(&[TILES, FILE], a, z, ("BT", tile), starts, &types);
    let grid = [z.t.div_ceil(tile), z.h, z.b];
    Some(Offer::new(
        "attention_tiles_f32",
        vec![launch("attention", &source, grid, 256, shared, args)],
    ))
}

/// Few queries: blocks share the keys among them, then their parts are joined.
fn decode(a: &Attention, z: Sizes, starts: bool, args: Vec<Arg>) -> Option<Offer> {
    decode_for(a, z, starts, args, None)
}

/// The decoding kernels for one row, leaving behind parts of the `h` that the next linear makes of the result; and
/// how many parts.
pub(super) fn decode_then(
    a: &Attention,
    spec: &KernelSpec,
    next: &Next,
) -> Option<(Vec<Job>, usize)> {
    let z = sizes(spec).filter(|_| a.bends_before_scaling())?;
    // What the parts need of `A` lies in shared memory.
    let shared = next.rank * z.d * 4;
    if z.b * z.t != 1 || next.k != z.h * z.d || shared > 16 << 10 {
        return None;
    }
    let (starts, args) = forward_args(z, spec)?;
    Some((decode_for(a, z, starts, args, Some(next))?.jobs, z.h))
}

fn decode_for(
    a: &Attention,
    z: Sizes,
    starts: bool,
    args: Vec<Arg>,
    next: Option<&Next>,
) -> Option<Offer> {
    let mut text = text(&[TILES, DECODE], a, z, ("BT", DECODE_KEYS), starts, &[]).to_string();
    if let Some(n) = next {
        let define = format!("#define NEXT {}\n#ifndef NEXT\n", n.rank);
        text = text.replacen("#ifndef NEXT\n", &define, 1);
    }
    let params = next.map_or(String::new(), |n| format!(", float* np{}", n.params));
    let text = text.replace("PARAMS", &params);
    let source: Arc<str> = text.replace("NEXT_ROW", next.map_or("", |n| &n.row)).into();
    let splits = z.s.div_ceil(DECODE_KEYS);
    let rows = z.b * z.h * z.t;
    let parts = (rows * splits * z.d * 4).next_multiple_of(256);
    let mut first = args.clone();
    first.extend([Arg::Scratch(0), Arg::Scratch(parts), word(z.hk)?]);
    let queries = z.t * (z.h / z.hk);
    let shared = ((2 * DECODE_KEYS + queries) * row(z.d) + queries * DECODE_KEYS) * 4;
    let mut second = args;
    second.extend([
        Arg::Scratch(0),
        Arg::Scratch(parts),
        word(z.hk)?,
        word(splits)?,
    ]);
    if let Some(n) = next {
        second.push(n.parts);
        second.extend(&n.args);
    }
    let jobs = vec![
        early(launch(
            "decode",
            &source,
            [splits, z.hk, z.b],
            128,
            shared,
            first,
        )),
        early(launch(
            "join",
            &source,
            [z.t, z.h, z.b],
            128,
            splits.next_multiple_of(8) * 4,
            second,
        )),
    ];
    Some(Offer::new("attention_decode_f32", jobs).scratch(parts + rows * splits * 8))
}

pub(super) fn backward(t: &Target, a: &Attention, spec: &KernelSpec) -> Option<Offer> {
    let z = sizes(spec).filter(|_| a.bends_before_scaling())?;
    let starts = spec.inputs.len() == 8;
    let dense = [3, 5].into_iter().chain(7..spec.inputs.len());
    if !dense.into_iter().all(|i| spec.inputs[i].is_dense()) {
        return None;
    }
    let half = t.weights == DType::BF16 && z.d <= MAX_HALF;
    let reads = [0, 1, 2, 4, 6].map(|i| Some(&spec.inputs[i]));
    let types = named(&["TQ", "TK", "TV", "TO", "TG"], reads)?;
    let writes = (0..3).map(|i| spec.outputs[i].as_ref());
    let types = [types, named(&["DQ", "DK", "DV"], writes)?].concat();
    let tile = if z.d <= 64 { 64 } else { 32 };
    let (source, block, shared) = match half {
        true => {
            let source = text(&[DELTA, HALF], a, z, ("BACKWARD", 1), starts, &types);
            (source, 128, half_bytes(t, z.d, 2))
        }
        false => {
            let source = text(
                &[TILES, DELTA, BACKWARD],
                a,
                z,
                ("BT", tile),
                starts,
                &types,
            );
            (source, 256, (4 * tile * row(z.d) + tile * (tile + 4)) * 4)
        }
    };
    if shared > t.shared {
        return None;
    }
    let (q, k, v, o, go) = (0, 1, 2, 4, 6);
    let delta = Arg::Scratch(0);
    let rows = z.b * z.t * z.h;
    let mut scratch = rows * 4;
    let mut args = vec![
        Arg::Read(o),
        Arg::Read(go),
        delta,
        word(z.t)?,
        word(z.h)?,
        word(rows)?,
    ];
    args.extend(strides(&[&spec.inputs[o], &spec.inputs[go]])?);
    let grid = [rows.div_ceil(128 / delta_lanes(z.d)), 1, 1];
    let mut jobs = vec![early(launch("delta", &source, grid, 128, 0, args))];
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
        let grid = match half {
            true => half_grid(z, z.t)?,
            false => [z.t.div_ceil(tile), z.h, z.b],
        };
        let job = launch("grad_q", &source, grid, block, shared, args);
        // Only the kernels on tensor cores know how to wait.
        jobs.push(if half { early(job) } else { job });
    }
    if spec.outputs[1].is_some() || spec.outputs[2].is_some() {
        let mut results = vec![Arg::Write(1), Arg::Write(2)];
        let mut lie = vec![];
        for o in &spec.outputs[1..3] {
            match o {
                Some(o) => lie.extend(strides(&[o])?),
                None => lie.extend([Arg::U32(0); 3]),
            }
        }
        let mut args = common;
        if half {
            // A block for each query head; their parts are joined in order.
            let at = scratch.next_multiple_of(256);
            scratch = at + 2 * z.b * z.h * z.s * z.d * 4;
            args.push(Arg::Scratch(at));
            let grid = half_grid(z, z.s)?;
            let job = launch("grad_kv", &source, grid, block, shared, args);
            jobs.push(early(job));
            let n = z.b * z.hk * z.s * z.d;
            let wide = if z.d.is_multiple_of(4) { 4 } else { 1 };
            let mut join = vec![Arg::Scratch(at)];
            join.append(&mut results);
            join.extend([word(n)?, word(z.s)?, word(z.hk)?]);
            join.extend(lie);
            let grid = [blocks(t, n / wide) as usize, 1, 1];
            jobs.push(early(launch("join_kv", &source, grid, THREADS, 0, join)));
        } else {
            args.append(&mut results);
            args.extend(lie);
            jobs.push(launch(
                "grad_kv",
                &source,
                [z.s.div_ceil(tile), z.hk, z.b],
                block,
                shared,
                args,
            ));
        }
    }
    let name = if half {
        "attention_grad_mma_bf16"
    } else {
        "attention_grad_tiles_f32"
    };
    Some(Offer::new(name, jobs).scratch(scratch))
}
