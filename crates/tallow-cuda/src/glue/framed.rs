//! What stands in front of a product with adapters, as one launch: rows in bf16 with their `h` behind them, made of rows as
//! they lie, of a norm or of a gate; and on the way whatever else the product needs.
//! Invariant: a block makes whole rows and sums in one order, so equal runs give equal bits.
//! Absent on purpose: which step of a plan makes those rows; that is `crate::fused`. The product, and gradients.
use super::{
    Arg, Job, Target, c_type, early, kernel,
    linear::{Call, Share, behind, pick},
    linear_half::{Small, hidden_of},
    source, word,
};
use crate::launch::Kernel;
use tallow_core::{kernel::KernelSpec, op::Linear, types::DType};

const FILE: &str = include_str!("framed.cu");
/// Threads of a block.
const BLOCK: usize = 512;
/// Columns up to which the norm's weights fit the memory that a block has without asking, beside its sums.
const MOST_WEIGHTS: usize = 4096;

/// What makes the rows.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// Nothing: they lie there.
    Rows,
    /// A norm with its weights in f32.
    Norm { w: Arg, eps: f32 },
    /// `silu` of the operand times another, which lies at `up` with a row stride.
    Gate { up: Arg, row: usize },
}

/// Where rows come from: an operand with its row stride and type, and where they have to be left for other readers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Front {
    pub(crate) kind: Kind,
    pub(crate) x: Arg,
    pub(crate) row: usize,
    pub(crate) dtype: DType,
    pub(crate) plain: Option<(Arg, usize, DType)>,
}

impl Front {
    /// Can the kernel make rows of `k` columns this way?
    pub(crate) fn fits(&self, k: usize) -> bool {
        let plain = self.plain.map_or(DType::F32, |p| p.2);
        let known = |d| matches!(d, DType::F32 | DType::BF16);
        let norm = matches!(self.kind, Kind::Norm { .. });
        known(self.dtype) && known(plain) && (!norm || k <= MOST_WEIGHTS)
    }
}

/// Bytes that a processor reads or writes in a cycle.
const PORT: usize = 64;
/// Those that each has of the common cache when all are busy.
const SHARED: usize = 24;
/// Cycles that a round of blocks takes at least.
const ROUND: usize = 1500;

/// Rows of a block, of `shares` times `m` rows: few enough to keep all processors busy, and enough that `a`, which every
/// block reads, weighs little.
fn rows_of_a_block(t: &Target, [shares, m]: [usize; 2], row_bytes: usize, a_bytes: usize) -> usize {
    let processors = (t.processors as usize).max(1);
    let cycles = |rows: &usize| {
        let (blocks, bytes) = (shares * m.div_ceil(*rows), a_bytes + rows * row_bytes);
        let rounds = blocks.div_ceil(processors);
        let port = rounds * bytes / PORT;
        port.max(blocks * bytes / (SHARED * processors)) + rounds * ROUND
    };
    let all = [1, 2, 4, 8, 16, 32].into_iter();
    all.min_by_key(cycles).unwrap_or(16)
}

/// `[v | h | 0]` at `to`, rows of `pitch`, and `h` of all `shares`, which are alike; `small`: what else is to be done.
pub(super) fn framed(
    t: &Target,
    c: &Call,
    shares: &[Share],
    front: &Front,
    (to, pitch, k): (Arg, usize, usize),
    mut small: Small,
) -> Option<Job> {
    let (mut picks, mut aligned) = (vec![], String::new());
    let (share, count) = (shares.first()?, shares.len());
    for g in 0..count {
        for (i, (b, at)) in c.blocks.iter().zip(&c.at).enumerate() {
            if let (Some((r, _)), Some((a, _))) = (b.adapters[g], at.ab[g]) {
                small.param(&format!("a{i}_{g}"), "const float*", Arg::Read(a));
                aligned += &format!(" | (u64)a{i}_{g}");
                picks.push((r, format!("return a{i}_{g} + (u64)j * {k}u;")));
            }
        }
    }
    let hidden = hidden_of(shares, &mut small);
    let size = front.dtype.bytes();
    let (number, w, up, eps) = match front.kind {
        Kind::Rows => (0, None, None, 0.0),
        Kind::Norm { w, eps } => (1, Some(w), None, eps),
        Kind::Gate { up, row } => (2, None, Some((up, row)), 0.0),
    };
    let made = front.plain.map_or(0, |p| p.2.bytes()) + 2;
    let read = if up.is_some() { 2 * size } else { size };
    let rows = rows_of_a_block(t, [count, share.m], k * (read + made), share.rank * k * 4);
    let blocks = count * share.m.div_ceil(rows);
    let pieces = small.threads;
    // Idle processors do the rest; if there are none, the blocks do it when their rows are done.
    let idle = (t.processors as usize).saturating_sub(blocks);
    let own = match idle * 4 > t.processors as usize {
        true => pieces.div_ceil(BLOCK).min(idle),
        false => 0,
    };
    let mut defines = vec![
        ("SOURCE", number.to_string()),
        ("X", c_type(front.dtype).to_owned()),
        ("XW", format!("{}u", size * 2)),
        ("K", format!("{k}u")),
        ("R", format!("{}u", share.rank)),
        ("SHARES", format!("{count}u")),
        ("ROWS", format!("{rows}u")),
        ("PIECES", format!("{pieces}u")),
    ];
    let plain = front.plain.unwrap_or((Arg::U64(0), 0, DType::BF16));
    defines.push(("Y", c_type(plain.2).to_owned()));
    defines.extend(front.plain.map(|_| ("PLAIN", "1".to_owned())));
    let text = FILE
        .replace("PARAMS", &small.params)
        .replace("NAMES", &small.names)
        .replace("ALIGNED", &aligned)
        .replace("HIDDEN_OF", &hidden)
        .replace("BODY", &small.body)
        .replace("PICK", &pick(picks.into_iter()));
    let (up, up_row) = up.unwrap_or((Arg::U64(0), 0));
    let mut args = vec![front.x, up, w.unwrap_or(Arg::U64(0)), plain.0, to];
    args.push(share.hidden.0);
    for n in [
        blocks,
        share.m,
        front.row,
        up_row,
        plain.1,
        pitch,
        share.hidden.1,
    ] {
        args.push(word(n)?);
    }
    args.push(Arg::F32(eps));
    args.extend(small.args);
    let grid = u32::try_from(blocks + own).ok().filter(|g| *g > 0)?;
    let job = early(kernel("framed", source(&text, &defines), grid, 512, args));
    let shared = if w.is_some() { k * 4 } else { 0 };
    Some(match job {
        Job::Kernel(k) => Job::Kernel(Kernel {
            shared: shared as u32,
            ..k
        }),
        other => other,
    })
}

/// A linear's launches behind what may stand in front of it, for a machine without a card: behind everything where it has
/// many rows, else behind one thing or another.
pub(super) fn examples(t: &Target, l: &Linear, spec: &KernelSpec) -> Vec<Job> {
    let (k, dtype) = (spec.inputs[0].layout.shape.last(), spec.inputs[0].dtype);
    let at = Arg::U64(0);
    let norm = Kind::Norm { w: at, eps: 1e-5 };
    let gate = Kind::Gate { up: at, row: k };
    let left = Some((at, k, dtype));
    let all = [(norm, None), (norm, left), (gate, None), (gate, left)];
    let m = spec.inputs[0].layout.shape.rows();
    let which = |i: usize| m >= 128 || i == (m + k) % all.len();
    let all = (all.into_iter().enumerate()).filter(|(i, _)| which(*i));
    let jobs = all.flat_map(|(_, (kind, plain))| {
        let front = Front {
            kind,
            x: at,
            row: k,
            dtype,
            plain,
        };
        let made = behind(t, l, spec, front);
        made.unwrap_or_default()
    });
    jobs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_takes_few_of_few_rows_and_many_of_many() {
        let t = Target::hopper(DType::BF16);
        let rows =
            |m: usize, k: usize, rank: usize| rows_of_a_block(&t, [1, m], k * 4, rank * k * 4);
        assert_eq!(rows(1, 896, 8), 1);
        assert_eq!((rows(128, 512, 8), rows(128, 2048, 8)), (4, 4));
        assert_eq!((rows(4096, 896, 24), rows(4096, 4864, 8)), (32, 32));
        // A block has rows of one share.
        assert_eq!(rows_of_a_block(&t, [128, 1], 4096, 4096), 1);
    }
}
