//! Linears over few rows: one dispatch for all blocks.
//! Invariant: a column's weight is read once for all rows.
//! Absent on purpose: many rows; their products are tiled.
use super::{
    Arg, Target,
    linear::{Call, Piece, Share},
    matmul::SUMS,
    rows::part,
    word,
};
use crate::{
    launch::{Kernel, read, wide},
    shader::{Draft, kernel, line},
};
use std::fmt::Write;
use tallow_core::kernel::KernelSpec;

const FILE: &str = include_str!("few.wgsl");
/// Most rows of the kernel that reads a weight once for all of them.
pub(super) const FEW_ROWS: usize = 8;
/// Threads for the sum of one column.
const EACH: usize = 32;
/// Threads of a workgroup.
const THREADS: usize = 256;
/// Columns of a workgroup, and of `h` that it makes at once.
const COLUMNS: usize = THREADS / EACH;
/// Most elements of the weights that every workgroup makes `h` for itself beside: A is read again for each eight of
/// their columns, from a cache, where a dispatch of its own would cost 2 µs of the host and 3 of the GPU (H200).
const OWN_WEIGHTS: usize = 1 << 20;
/// Most columns of `h` of a block made so.
const OWN_RANK: usize = 2 * COLUMNS;

/// WGSL that picks a block by column `o`: `code` sees `j`, the column inside it, and `_I`.
pub(super) fn pick(ends: impl Iterator<Item = usize>, code: &str) -> String {
    let (mut text, mut start) = (String::new(), 0);
    for (i, n) in ends.enumerate() {
        let end = start + n;
        let code = code.replace("_I", &format!("_{i}"));
        let _ = write!(
            text,
            "if (o < {end}u) {{ let j = o - {start}u; {code} }} else "
        );
        start = end;
    }
    text + "{ }"
}

/// Does the kernel make `h` of `share` `g` by itself?
pub(super) fn makes_hidden(c: &Call, spec: &KernelSpec, g: usize, share: &Share) -> bool {
    let k = spec.inputs[0].layout.shape.last();
    let wanted = !matches!(share.hidden.0, Arg::Scratch { .. });
    let rank = |p: &Piece| p.adapters[g].map_or(0, |(rank, _)| rank);
    // A workgroup's columns are of one block.
    let apart = |p: &Piece| p.n.is_multiple_of(COLUMNS) && rank(p) <= OWN_RANK;
    let weights: usize = c.pieces.iter().map(|p| p.n * k).sum();
    share.rank > 0 && !wanted && weights <= OWN_WEIGHTS && c.pieces.iter().all(apart)
}

/// One dispatch for the rows of `share` of a forward linear whose weights are dense along the sum.
pub(super) fn forward(
    t: &Target,
    c: &Call,
    spec: &KernelSpec,
    g: usize,
    share: &Share,
) -> Option<Kernel> {
    let [first, m] = share.rows;
    if m > FEW_ROWS || c.pieces.iter().any(|p| p.strides[1] != 1) {
        return None;
    }
    let (x, y) = (c.input(spec, share, 0), c.output(spec, share, 0));
    let gate = c.around.gate.is_some();
    let outputs = c.pieces.iter().map(|p| p.n).sum::<usize>() / if gate { 2 } else { 1 };
    let mut args = vec![x.arg, y.arg];
    args.extend(c.around.norm_args());
    let own = makes_hidden(c, spec, g, share);
    args.push(if share.rank > 0 && !own {
        share.hidden.0.clone()
    } else {
        Arg::Absent("h".into())
    });
    let most = c
        .pieces
        .iter()
        .filter_map(|p| p.adapters[g])
        .map(|(r, _)| r);
    let turns = if own {
        most.max().unwrap_or(0).div_ceil(COLUMNS)
    } else {
        0
    };
    let h_of = match own {
        true => "own[row * TURNS * (WG / G) + r]",
        false => "ld_h(row * a.hr + R0_I + r)",
    };
    let block = part(FILE, "few_block").replace("H_OF", h_of);
    let (mut text, mut r0) = (String::new(), 0);
    for (i, p) in c.pieces.iter().enumerate() {
        args.push(p.weight(format!("w_{i}")));
        args.push(match p.at.bias {
            Some(bias) => read(format!("bias_{i}"), bias, SUMS),
            None => Arg::Absent(format!("bias_{i}").into()),
        });
        let (rank, scale) = match (p.adapters[g], p.at.ab[g]) {
            (Some((rank, scale)), Some((ia, ib))) => {
                args.push(read(format!("b_{i}"), ib, SUMS));
                args.push(match own {
                    true => wide(format!("a_{i}"), ia, SUMS),
                    false => Arg::Absent(format!("a_{i}").into()),
                });
                (rank, scale.get())
            }
            _ => {
                args.push(Arg::Absent(format!("b_{i}").into()));
                args.push(Arg::Absent(format!("a_{i}").into()));
                (0, 0.0)
            }
        };
        let _ = writeln!(
            text,
            "const WC_{i} = {}u; const FIRST_{i} = {}u; const RANK_{i} = {rank}u; const R0_{i} = {r0}u; const SCALE_{i} = f32({scale:?});",
            p.strides[0], p.first
        );
        text += &block.replace("_I", &format!("_{i}"));
        r0 += if p.ends() { rank } else { 0 };
    }
    match c.past {
        Some((i, row)) => {
            args.push(read("past", i, spec.inputs[i].dtype));
            args.extend([word("past0", first * row)?, word("pastr", row)?]);
        }
        None => {
            args.push(Arg::Absent("past".into()));
            args.extend([word("past0", 0)?, word("pastr", 0)?]);
        }
    }
    let k = spec.inputs[0].layout.shape.last();
    args.extend([word("k", k)?, word("x0", x.at)?, word("xr", x.strides[0])?]);
    args.extend([word("y0", y.at)?, word("yr", y.strides[0])?]);
    args.push(word("hr", share.hidden.1)?);
    let ends = || c.pieces.iter().map(|p| p.n);
    let main = part(FILE, "few")
        .replace("DOTS", &pick(ends(), "dots_I(j, lane, g);"))
        .replace("ADDED", &pick(ends(), "mine += added_I(j, lane);"))
        .replace("OWN\n", if own { part(FILE, "few_own") } else { "\n" });
    let body = format!(
        "var<private> acc: array<f32, ROWS>;\nvar<private> squares: array<f32, ROWS>;\n\
         var<private> into: array<f32, max(TURNS, 1u) * ROWS>;\n\
         var<workgroup> own: array<f32, max(TURNS, 1u) * ROWS * (WG / G)>;\n{text}{main}"
    );
    let draft = Draft {
        entry: "few",
        body: &body,
        consts: &[
            ("ROWS", format!("{m}u")),
            ("G", format!("{EACH}u")),
            ("OUTPUTS", format!("{outputs}u")),
            ("GATE", gate.to_string()),
            ("TURNS", format!("{turns}u")),
        ],
        threads: THREADS as u32,
        grid: line(outputs.div_ceil(COLUMNS))?,
        args,
    };
    kernel(t, spec, draft)
}
