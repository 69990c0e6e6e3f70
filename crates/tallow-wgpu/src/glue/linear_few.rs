//! Linears over few rows: one dispatch for all blocks.
//! Invariant: a column's weight is read once for all rows.
//! Absent on purpose: many rows; their products are tiled.
use super::{
    Arg, Target,
    linear::{Call, Piece, Share},
    matmul::SUMS,
    rows::{part, repeated},
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
/// Fewest and most threads for the sum of one column.
const EACH: [usize; 2] = [32, 128];
/// Threads of a workgroup that makes no `h`.
const THREADS: usize = 256;
/// Columns of one that does, and of `h` that it makes at once.
const COLUMNS: usize = 8;
/// Threads that have loads under way while a weight is read fast: 1000 for each of an H200's 132 processors.
const BUSY: usize = 1 << 17;
/// Elements of a weight that a thread takes at once.
const EIGHT: usize = 8;
/// Most of those that a thread reads before it multiplies one.
const STEPS: usize = 6;
/// Most elements of the weights that every workgroup makes `h` for itself beside: A is read again for each eight of
/// their columns, twice the weights' bytes from a cache, where a dispatch of its own would cost 2 µs of the host and 5 of
/// the GPU (H200).
const OWN_WEIGHTS: usize = 1 << 24;
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

/// Threads for the sum of one of `columns` over `k` elements: more where there are few columns, each with something to do.
fn each(columns: usize, k: usize, most: usize) -> usize {
    let mut n = EACH[0];
    while n < most && columns * n < BUSY && 2 * n * EIGHT <= k {
        n *= 2;
    }
    n
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
    let k = spec.inputs[0].layout.shape.last();
    // The more columns a workgroup has, the fewer make the same `h`.
    let most = match own {
        true => EACH[1].min(t.threads as usize / COLUMNS),
        false => EACH[1],
    };
    let each = each(outputs, k, most);
    let whole = k / EIGHT * EIGHT;
    let columns = if own { COLUMNS } else { THREADS / each };
    let rounds = (k / EIGHT).div_ceil(each);
    let steps = rounds.div_ceil(rounds.div_ceil(STEPS).max(1)).max(1);
    let spell = |text: &str| {
        let all = [("STEP", steps), ("TURN", turns), ("ROW", m)];
        all.iter()
            .fold(text.to_owned(), |t, (token, n)| repeated(&t, token, *n))
    };
    let slow = part(FILE, "few_eight").replace("eight_I", "slow_eight_I");
    let eight = part(FILE, "few_eight").replace("ld4", "get4");
    let block = [&eight, &slow, part(FILE, "few_block")].concat();
    let block = spell(&block.replace("H_OF", h_of));
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
    args.extend([word("k", k)?, word("x0", x.at)?, word("xr", x.strides[0])?]);
    args.extend([word("y0", y.at)?, word("yr", y.strides[0])?]);
    args.push(word("hr", share.hidden.1)?);
    let ends = || c.pieces.iter().map(|p| p.n);
    let main = part(FILE, "few")
        .replace("DOTS", &pick(ends(), "dots_I(j, lane, g);"))
        .replace("ADDED", &pick(ends(), "mine += added_I(j, lane);"))
        .replace("OWN\n", if own { part(FILE, "few_own") } else { "\n" });
    let held = spell(part(FILE, "few_held"));
    let body = [held, text, spell(&main)].concat();
    let draft = Draft {
        entry: "few",
        body: &body,
        consts: &[
            ("ROWS", format!("{m}u")),
            ("G", format!("{each}u")),
            ("WHOLE", format!("{whole}u")),
            ("LAST", format!("{}u", whole.saturating_sub(EIGHT))),
            ("STEPS", format!("{steps}u")),
            ("OUTPUTS", format!("{outputs}u")),
            ("GATE", gate.to_string()),
            ("TURNS", format!("{turns}u")),
        ],
        threads: (columns * each) as u32,
        grid: line(outputs.div_ceil(columns))?,
        args,
    };
    kernel(t, spec, draft)
}
