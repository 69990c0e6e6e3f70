//! Attention, forward and backward.
//! Invariant: no kernel holds scores of more than one tile of keys; what a query sees is a range of keys, so causal
//! masks, windows and several documents in a row are one case. No atomics on sums: equal runs give equal bits.
//! Absent on purpose: heads whose elements are not dense; the planner copies those. A cap so far from the scale that
//! their quotient is no normal number.
//!
//! A line `//cap TEXT` of a file is `TEXT` where scores are capped and else not there, so that a cap costs others nothing.
use super::{
    rows::{part, repeated},
    word,
};
use crate::{
    launch::{Arg, Kernel, Offer, read, scratch, wide, write},
    shader::{Draft, Target, kernel, line},
};
use tallow_core::{
    kernel::{KernelSpec, Operand},
    op::{Attention, Mask},
    types::DType::{F32, U32},
};

const COMMON: &str = include_str!("attention_common.wgsl");
const TILES: &str = include_str!("attention_tiles.wgsl");
const LOAD: &str = include_str!("attention_load.wgsl");
const STORE: &str = include_str!("attention_store.wgsl");
const CAP: &str = include_str!("attention_cap.wgsl");
const FORWARD: &str = include_str!("attention.wgsl");
const DECODE: &str = include_str!("attention_decode.wgsl");
const JOIN: &str = include_str!("attention_join.wgsl");
const GRAD_ROWS: &str = include_str!("attention_grad_rows.wgsl");
const GRAD_Q: &str = include_str!("attention_grad_q.wgsl");
const GRAD_KV: &str = include_str!("attention_grad_kv.wgsl");
/// Longest head.
const MAX_HEAD: usize = 256;
/// Rows of a tile.
const TILE: usize = 32;
/// Query rows of one key head that the decoding kernel takes.
const DECODE_ROWS: usize = 16;
/// Keys of one workgroup of the decoding kernel.
const DECODE_KEYS: usize = 64;
/// Threads of a workgroup.
const THREADS: u32 = 64;

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
    let shape = |i: usize| &spec.inputs[i].layout.shape.0;
    let (q, k) = (shape(0), shape(1));
    (q[3] <= MAX_HEAD).then_some(Sizes {
        b: q[0],
        t: q[1],
        h: q[2],
        d: q[3],
        s: k[1],
        hk: k[2],
    })
}

/// The op on its operands, and the operand that holds the starts of documents.
struct Case<'a> {
    a: &'a Attention,
    spec: &'a KernelSpec,
    z: Sizes,
    starts: Option<usize>,
}

impl<'a> Case<'a> {
    /// `known`: operands without starts; `floats`: those of them that are f32.
    fn new(a: &'a Attention, spec: &'a KernelSpec, known: usize, floats: &[usize]) -> Option<Self> {
        let floats = floats.iter().map(|i| &spec.inputs[*i]);
        let mut all = floats.chain(spec.outputs.iter().flatten());
        (a.bends_before_scaling() && all.all(|o| o.dtype == F32)).then_some(Case {
            a,
            spec,
            z: sizes(spec)?,
            starts: (spec.inputs.len() > known).then_some(known),
        })
    }
    fn consts(&self) -> Vec<(&'static str, String)> {
        let (causal, window) = match self.a.mask {
            Mask::Full => (false, 0),
            Mask::Causal { window } => (true, window.unwrap_or(0)),
        };
        vec![
            ("D", format!("{}u", self.z.d)),
            ("G", format!("{}u", self.z.h / self.z.hk)),
            ("SCALE", format!("{:?}f", self.a.scale.get())),
            ("CAUSAL", causal.to_string()),
            ("WINDOW", format!("{window}u")),
        ]
    }
    /// Positions, and starts of documents.
    fn rows(&self) -> [Arg; 2] {
        let none = || Arg::Absent("starts".into());
        let starts = self.starts.map_or_else(none, |i| read("starts", i, U32));
        [read("pos", 3, U32), starts]
    }
    fn kernel(
        &self,
        t: &Target,
        entry: &'static str,
        body: &str,
        grid: [usize; 3],
        args: Vec<Arg>,
    ) -> Option<Kernel> {
        self.kernel_with(t, entry, body, grid, args, vec![])
    }
    fn kernel_with(
        &self,
        t: &Target,
        entry: &'static str,
        body: &str,
        grid: [usize; 3],
        args: Vec<Arg>,
        more: Vec<(&'static str, String)>,
    ) -> Option<Kernel> {
        let [x, y, z] = grid.map(|n| u32::try_from(n).ok());
        let mut consts = [self.consts(), more].concat();
        let (mut text, bends) = chosen(body, self.a.cap.is_some());
        if let Some([into, out]) = self.a.cap_around_scale().filter(|_| bends) {
            consts
                .extend([("CAP_IN", into), ("CAP_OUT", out)].map(|(n, f)| (n, format!("{f:?}f"))));
            text.insert_str(0, CAP);
        }
        let draft = Draft {
            entry,
            body: &text,
            consts: &consts,
            threads: THREADS,
            grid: [x?, y?, z?],
            args,
        };
        kernel(t, self.spec, draft)
    }
}

/// `text` with its lines for capped scores or without; and were there any?
fn chosen(text: &str, capped: bool) -> (String, bool) {
    let mut any = false;
    let lines = text.split_inclusive('\n').map(|l| {
        let line = l.strip_prefix("//cap ");
        any |= line.is_some();
        line.map_or(l, |line| if capped { line } else { "" })
    });
    let text = lines.collect();
    (text, any)
}

/// A body on tiles: loads as (buffer, tile), stores by buffer.
fn tiled(z: Sizes, file: &str, loads: &[(&str, &str)], stores: &[&str]) -> String {
    let mut text = String::from(TILES);
    for (name, tile) in loads {
        text += &LOAD.replace("NAME", name).replace("TILE", tile);
    }
    for name in stores {
        text += &STORE.replace("NAME", name);
    }
    text + &repeated(file, "CHUNK", z.d.div_ceil(TILE))
}

/// Strides of batch row, token and head, where the elements of a head are dense.
pub(super) fn head_strides(o: &Operand) -> Option<[usize; 3]> {
    let (s, n) = (&o.layout.strides, &o.layout.shape.0);
    (n[3] == 1 || s[3] == 1).then(|| [s[0], s[1], s[2]])
}

/// Strides as numbers; of what is absent zeros.
fn strides(names: [&'static str; 3], o: Option<&Operand>) -> Option<Vec<Arg>> {
    let strides = o.map_or(Some([0; 3]), head_strides)?;
    let all = names.into_iter().zip(strides);
    all.map(|(name, s)| word(name, s)).collect()
}

const Q: [&str; 3] = ["qb", "qt", "qh"];
const K: [&str; 3] = ["kb", "kt", "kh"];
const V: [&str; 3] = ["vb", "vt", "vh"];
const O: [&str; 3] = ["ob", "ot", "oh"];
const GO: [&str; 3] = ["gb", "gt", "gh"];

/// q, k and v, and their strides.
fn qkv(spec: &KernelSpec) -> Option<(Vec<Arg>, Vec<Arg>)> {
    let buffers = vec![wide("q", 0, F32), wide("k", 1, F32), wide("v", 2, F32)];
    let mut numbers = vec![];
    for (i, names) in [Q, K, V].into_iter().enumerate() {
        numbers.extend(strides(names, Some(&spec.inputs[i]))?);
    }
    Some((buffers, numbers))
}

pub(super) fn forward(t: &Target, a: &Attention, spec: &KernelSpec) -> Option<Offer> {
    let c = Case::new(a, spec, 4, &[0, 1, 2])?;
    let z = c.z;
    let mut rows = spec.inputs[3..].iter().chain(spec.outputs[1].iter());
    if !rows.all(Operand::is_dense) {
        return None;
    }
    if z.t * (z.h / z.hk) <= DECODE_ROWS {
        return decode(t, &c);
    }
    let (mut args, strides_in) = qkv(spec)?;
    args.extend(c.rows());
    args.extend([write("o", 0, F32), write("lse", 1, F32)]);
    args.extend([word("t", z.t)?, word("h", z.h)?, word("s", z.s)?]);
    args.extend(strides_in);
    args.extend(strides(O, spec.outputs[0].as_ref())?);
    let loads = [("q", "ta"), ("k", "tb"), ("v", "tb")];
    let body = tiled(z, &[COMMON, FORWARD].concat(), &loads, &["o"]);
    let job = c.kernel(t, "attention", &body, [z.t.div_ceil(TILE), z.h, z.b], args)?;
    Some(Offer::new("attention_tiles_f32", vec![job]))
}

/// Few queries: workgroups share the keys among them, then their parts are joined.
fn decode(t: &Target, c: &Case<'_>) -> Option<Offer> {
    let (z, spec) = (c.z, c.spec);
    let (splits, queries) = (z.s.div_ceil(DECODE_KEYS), z.t * (z.h / z.hk));
    let parts = z.b * z.hk * splits * queries;
    let stats_at = (parts * z.d * 4).next_multiple_of(256);
    let left = [
        scratch("part", 0, parts * z.d * 4, F32),
        scratch("stats", stats_at, parts * 8, F32),
    ];
    let numbers = [word("s", z.s)?, word("hk", z.hk)?, word("splits", splits)?];
    let more = vec![("T", format!("{}u", z.t)), ("ROWS", format!("{queries}u"))];
    let (mut args, strides_in) = qkv(spec)?;
    args.extend(c.rows());
    args.extend(left.clone());
    args.extend(numbers.clone());
    args.extend(strides_in);
    let four = |name| part(DECODE, "four").replace("NAME", name);
    let fours = ["k", "q", "v"].map(four).concat();
    let body = [COMMON, &fours, &repeated(part(DECODE, "decode"), "STEP", 8)].concat();
    let first = c.kernel_with(t, "decode", &body, [splits, z.hk, z.b], args, more.clone())?;
    let mut args = left.to_vec();
    args.extend(c.rows());
    args.extend([write("o", 0, F32), write("lse", 1, F32)]);
    args.extend(numbers);
    args.extend(strides(O, spec.outputs[0].as_ref())?);
    let body = [COMMON, &repeated(JOIN, "CHUNK", z.d.div_ceil(DECODE_KEYS))].concat();
    let second = c.kernel_with(t, "join", &body, [z.t, z.h, z.b], args, more)?;
    let offer = Offer::new("attention_decode_f32", vec![first, second]);
    Some(offer.scratch(stats_at + parts * 8))
}

pub(super) fn backward(t: &Target, a: &Attention, spec: &KernelSpec) -> Option<Offer> {
    let c = Case::new(a, spec, 7, &[0, 1, 2, 4, 5, 6])?;
    let z = c.z;
    let mut dense = [3, 5].into_iter().chain(c.starts);
    if !dense.all(|i| spec.inputs[i].is_dense()) {
        return None;
    }
    let (o, g) = (4, 6);
    let rows = z.b * z.h * z.t;
    let known = scratch("rows", 0, rows * 16, U32);
    let mut args = vec![read("o", o, F32), read("g", g, F32), read("lse", 5, F32)];
    args.extend(c.rows());
    args.push(known.clone());
    for (name, n) in [("b", z.b), ("t", z.t), ("h", z.h), ("s", z.s)] {
        args.push(word(name, n)?);
    }
    args.extend(strides(O, Some(&spec.inputs[o]))?);
    args.extend(strides(GO, Some(&spec.inputs[g]))?);
    let body = [COMMON, GRAD_ROWS].concat();
    let grid = line(rows.div_ceil(8))?.map(|n| n as usize);
    let mut jobs = vec![c.kernel(t, "grad_rows", &body, grid, args)?];
    let (mut common, strides_in) = qkv(spec)?;
    common.extend([wide("g", g, F32), known]);
    common.extend([word("t", z.t)?, word("h", z.h)?, word("s", z.s)?]);
    common.extend(strides_in);
    common.extend(strides(GO, Some(&spec.inputs[g]))?);
    if let Some(dq) = &spec.outputs[0] {
        let mut args = common.clone();
        args.push(write("dq", 0, F32));
        args.extend(strides(O, Some(dq))?);
        let loads = [("q", "ta"), ("k", "tb"), ("g", "ta"), ("v", "tb")];
        let body = tiled(z, GRAD_Q, &loads, &["dq"]);
        let grid = [z.t.div_ceil(TILE), z.h, z.b];
        jobs.push(c.kernel(t, "grad_q", &body, grid, args)?);
    }
    if spec.outputs[1].is_some() || spec.outputs[2].is_some() {
        let mut args = common;
        args.extend([write("dk", 1, F32), write("dv", 2, F32)]);
        args.extend(strides(["xb", "xt", "xh"], spec.outputs[1].as_ref())?);
        args.extend(strides(["yb", "yt", "yh"], spec.outputs[2].as_ref())?);
        let loads = [("q", "tb"), ("k", "ta"), ("g", "tb"), ("v", "ta")];
        let body = tiled(z, GRAD_KV, &loads, &["dk", "dv"]);
        let grid = [z.s.div_ceil(TILE), z.hk, z.b];
        jobs.push(c.kernel(t, "grad_kv", &body, grid, args)?);
    }
    Some(Offer::new("attention_grad_tiles_f32", jobs).scratch(rows * 16))
}
