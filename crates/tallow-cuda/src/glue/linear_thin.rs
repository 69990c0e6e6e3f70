//! Linears of few outputs in f32: many small blocks, each with a row or some of them.
//! Invariant: as exact as the library's product; sums are made in one order.
//! Absent on purpose: adapters and residuals; what has few outputs is an adapter's own product, or a user's.
use super::{
    Arg, Offer, Target, early, kernel,
    linear::{Call, exact, weights},
    source, word,
};
use crate::launch::{Job, Kernel};
use tallow_core::{kernel::KernelSpec, types::DType};

const THIN: &str = include_str!("linear_thin.cu");
/// Outputs up to which it is offered.
const MOST_OUTPUTS: usize = 64;
/// Outputs of a block, and most rows: with more, their sums do not fit registers.
const TILE: usize = 8;
const MOST_ROWS: usize = 4;
/// Threads of a block.
const THREADS: u32 = 128;
/// Added to its estimate, so that it is taken where it was measured, and the library's product elsewhere.
const UNMEASURED_S: f64 = 1e-6;

/// Rows of a block: as many as leave a block for every processor.
fn rows(t: &Target, m: usize, tiles: usize) -> usize {
    let fills = |r: &usize| m.div_ceil(*r) * tiles >= t.processors as usize;
    let all = std::iter::successors(Some(MOST_ROWS), |r| (*r > 1).then_some(r / 2));
    all.into_iter().find(fills).unwrap_or(1)
}

/// One launch for one projection without an adapter.
pub(super) fn forward(t: &Target, c: &Call, spec: &KernelSpec) -> Option<Offer> {
    let ([block], [at]) = (c.blocks, &c.at[..]) else {
        return None;
    };
    let (n, k) = (block.n, spec.inputs[0].layout.shape.last());
    let plain = !c.adapted() && c.residual.is_none() && exact(spec, None);
    if !plain || n > MOST_OUTPUTS || n == 0 || k == 0 || c.m == 0 {
        return None;
    }
    let w = weights(spec, &c.at, DType::F32, false)?;
    let [row, 1] = w.strides[0] else { return None };
    let tile = if n <= TILE / 2 { TILE / 2 } else { TILE };
    let tiles = n.div_ceil(tile);
    let rows = rows(t, c.m, tiles);
    let number = |n: usize| format!("{n}u");
    let bias = match at.bias {
        Some(_) => "v += bias[o];",
        None => "",
    };
    let defines = [
        ("K", number(k)),
        ("OUTPUTS", number(n)),
        ("XS", number(c.in_row)),
        ("WS", number(row)),
        ("YS", number(c.out_row)),
        ("ROWS", rows.to_string()),
        ("TILE", tile.to_string()),
    ];
    let params = at.bias.map_or("", |_| ", const float* bias");
    let text = THIN
        .replace("PARAMS", params)
        .replace("BIAS\n", &format!("{bias}\n"));
    let mut args = vec![Arg::Read(0), Arg::Read(at.w), Arg::Write(0), word(c.m)?];
    args.extend(at.bias.map(Arg::Read));
    let grid = u32::try_from(c.m.div_ceil(rows)).ok()?;
    let job = match early(kernel("thin", source(&text, &defines), grid, THREADS, args)) {
        Job::Kernel(k) => Job::Kernel(Kernel {
            grid: [grid, tiles as u32, 1],
            ..k
        }),
        other => other,
    };
    Some(Offer {
        prepare: w.prepare,
        extra: UNMEASURED_S,
        ..Offer::new("linear_thin_f32", vec![job])
    })
}
