//! Linears over few rows: one dispatch for all blocks.
//! Invariant: a column's weight is read once for all rows.
//! Absent on purpose: many rows; their products are tiled.
use super::{
    Arg, Target,
    linear::{Call, Share},
    matmul::SUMS,
    rows::part,
    word,
};
use crate::{
    launch::{Kernel, read},
    shader::{Draft, kernel, line},
};
use std::fmt::Write;
use tallow_core::kernel::KernelSpec;

const FILE: &str = include_str!("few.wgsl");
/// Most rows of the kernel that reads a weight once for all of them.
pub(super) const FEW_ROWS: usize = 8;
/// Threads for the sum of one column.
const EACH: usize = 32;

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
    args.push(if share.rank > 0 {
        share.hidden.0.clone()
    } else {
        Arg::Absent("h".into())
    });
    let (mut text, mut r0) = (String::new(), 0);
    for (i, p) in c.pieces.iter().enumerate() {
        args.push(p.weight(format!("w_{i}")));
        args.push(match p.at.bias {
            Some(bias) => read(format!("bias_{i}"), bias, SUMS),
            None => Arg::Absent(format!("bias_{i}").into()),
        });
        let (rank, scale) = match (p.adapters[g], p.at.ab[g]) {
            (Some((rank, scale)), Some((_, ib))) => {
                args.push(read(format!("b_{i}"), ib, SUMS));
                (rank, scale.get())
            }
            _ => {
                args.push(Arg::Absent(format!("b_{i}").into()));
                (0, 0.0)
            }
        };
        let _ = writeln!(
            text,
            "const WC_{i} = {}u; const FIRST_{i} = {}u; const RANK_{i} = {rank}u; const R0_{i} = {r0}u; const SCALE_{i} = f32({scale:?});",
            p.strides[0], p.first
        );
        text += &part(FILE, "few_block").replace("_I", &format!("_{i}"));
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
        .replace("DOTS", &pick(ends(), "dots_I(j, lane);"))
        .replace("ADDED", &pick(ends(), "mine += added_I(j, lane);"));
    let body = format!(
        "var<private> acc: array<f32, ROWS>;\nvar<private> squares: array<f32, ROWS>;\n{text}{main}"
    );
    let draft = Draft {
        entry: "few",
        body: &body,
        consts: &[
            ("ROWS", format!("{m}u")),
            ("G", format!("{EACH}u")),
            ("OUTPUTS", format!("{outputs}u")),
            ("GATE", gate.to_string()),
        ],
        threads: 256,
        grid: line(outputs.div_ceil(256 / EACH))?,
        args,
    };
    kernel(t, spec, draft)
}
