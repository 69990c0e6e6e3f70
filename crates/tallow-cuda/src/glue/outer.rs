//! Outer products over a long sum of rows, `dA = dhᵀ x` and `dB = s dyᵀ h`: few columns on one side.
//! Invariant: every sum has one order, so equal runs give equal bits.
//! Absent on purpose: which steps of a plan join; that is `fused`.
use super::{Arg, Job, Offer, c_type, early, source, word};
use crate::launch::{Kernel, Start};
use tallow_core::{
    kernel::{Body, KernelSpec},
    types::DType,
};

const FILE: &str = include_str!("outer.cu");
const HALF: &str = include_str!("outer_half.cu");
/// Columns of the narrow side that the kernels take.
pub(super) const NARROW: usize = 64;
/// Columns of a tile on tensor cores, and of the wide side that a block takes there.
const TILE: usize = 8;
const COLUMNS: usize = 64;
/// Multiprocessors of a large card.
const PROCESSORS: usize = 132;
/// Rows of which a chunk is a multiple: 16 for each warp of a block.
const TURN: usize = 128;

/// An outer product as its kernels see it: extents, operands, row strides of both and of the result.
#[derive(Clone, Copy)]
pub(crate) struct Outer {
    rows: usize,
    few: usize,
    many: usize,
    /// Which operand is narrow, and which is wide.
    pub(crate) at: [usize; 2],
    row: [usize; 3],
    turned: bool,
    alpha: f32,
    /// Type of the narrow operand.
    dtype: DType,
}

/// Name of the offer that `side_by_side` can join.
pub(crate) const OUTER_NAME: &str = "matmul_tn_outer_mma";
/// Products of one launch: their addresses are its arguments, of which there may be 4 KiB.
pub(crate) const MOST_OUTERS: usize = 128;

impl Outer {
    /// The outer product that `spec` is, if its kernel on tensor cores takes it.
    pub(crate) fn of(spec: &KernelSpec) -> Option<Outer> {
        let Body::MatMul { ta, tb, alpha } = &spec.body else {
            return None;
        };
        let o = outer_sides(*ta, *tb, alpha.get(), spec)?;
        let half = spec.inputs[o.at[1]].dtype == DType::BF16;
        half.then_some(o)
    }
    /// May both be made by one launch?
    pub(crate) fn joins(&self, other: &Outer) -> bool {
        (self.rows, self.dtype) == (other.rows, other.dtype)
    }
    fn tiles(&self) -> usize {
        self.few.div_ceil(TILE)
    }
}

/// Products by number that have one wide operand.
struct Group {
    one: Outer,
    many: Arg,
    all: Vec<usize>,
    tiles: usize,
}

impl Group {
    fn columns(&self) -> usize {
        self.one.many.div_ceil(COLUMNS)
    }
    /// May `o`, whose wide operand is at `many`, read it with these?
    fn takes(&self, o: &Outer, many: Arg) -> bool {
        let lie = |o: &Outer| (o.many, o.row[1]);
        let same = self.many == many && lie(&self.one) == lie(o);
        same && self.tiles + o.tiles() <= NARROW / TILE
    }
}

/// Groups of products, those with most to do for each byte first.
fn groups(all: &[(Outer, [Arg; 3])]) -> Vec<Group> {
    let mut groups: Vec<Group> = vec![];
    for (i, (one, [_, many, _])) in all.iter().enumerate() {
        match groups.iter_mut().find(|g| g.takes(one, *many)) {
            Some(g) => {
                g.all.push(i);
                g.tiles += one.tiles();
            }
            None => groups.push(Group {
                one: *one,
                many: *many,
                all: vec![i],
                tiles: one.tiles(),
            }),
        }
    }
    groups.sort_by_key(|g| std::cmp::Reverse(g.tiles));
    groups
}

/// Blocks that share a processor with the registers that so many tiles need.
fn resident(tiles: usize) -> usize {
    match tiles {
        ..=1 => 3,
        2..=4 => 2,
        _ => 1,
    }
}

/// Rows of a chunk, where `slots` blocks run at once: what ends soonest if a block takes one turn more than its rows, to begin
/// and to join.
fn chunk(rows: usize, columns: usize, slots: usize) -> usize {
    let turns = rows.div_ceil(TURN).max(1);
    let time = |n: &usize| (columns * turns.div_ceil(*n)).div_ceil(slots) * (n + 1);
    TURN * (1..=turns).rev().min_by_key(time).unwrap_or(turns)
}

/// Code that describes group `g`, whose parts lie from float `offset` on.
fn described(g: &Group, number: usize, all: &[(Outer, [Arg; 3])], offset: usize) -> String {
    let (n, mr, tiles) = (g.one.many, g.one.row[1], g.tiles);
    let mut code = format!(
        "p.many = m{number}; p.part = part + ({offset}u + j * chunks * {}u); p.column = j; \
         p.n = {n}u; p.mr = {mr}u; p.tiles = {tiles}u; ",
        tiles * TILE * COLUMNS
    );
    let mut tile = 0;
    for i in &g.all {
        let o = &all[*i].0;
        let ([fr, _, row], alpha, turned) = (o.row, o.alpha, o.turned);
        for first in (0..o.few).step_by(TILE) {
            let cols = TILE.min(o.few - first);
            let to = if turned { first } else { first * row };
            code += &format!(
                "p.tile[{tile}] = Tile{{f{i} + {first}, o{i} + {to}u, {fr}u, {cols}u, {row}u, {alpha:?}f, {turned}}}; "
            );
            tile += 1;
        }
    }
    code
}

/// One launch for products that join, each with its narrow operand, its wide one and its result; and the scratch it
/// needs at `parts`.
pub(crate) fn side_by_side(all: &[(Outer, [Arg; 3])], parts: Arg) -> Option<(Job, usize)> {
    let one = all.first()?.0;
    let groups = groups(all);
    let columns: usize = groups.iter().map(Group::columns).sum();
    let most = groups.first()?.tiles;
    let chunk = chunk(one.rows, columns, PROCESSORS * resident(most));
    let chunks = one.rows.div_ceil(chunk);
    let (mut params, mut names, mut args) = (String::new(), String::new(), vec![]);
    args.extend([parts, word(one.rows)?, word(chunk)?]);
    let mut param = |kind: &str, name: String, arg: Arg| {
        params += &format!(", {kind} {name}");
        names += &format!(", {name}");
        args.push(arg);
    };
    for (i, (_, [few, _, out])) in all.iter().enumerate() {
        param("const F*", format!("f{i}"), *few);
        param("float*", format!("o{i}"), *out);
    }
    let (mut picks, mut offset) = (vec![], 0);
    for (i, g) in groups.iter().enumerate() {
        param("const bf16*", format!("m{i}"), g.many);
        picks.push((g.columns(), described(g, i, all, offset)));
        offset += g.columns() * chunks * g.tiles * TILE * COLUMNS;
    }
    let mut sizes: Vec<usize> = groups.iter().map(|g| g.tiles).collect();
    sizes.dedup();
    let calls: Vec<String> = sizes.iter().map(|n| format!("CALL({n})")).collect();
    // One chunk needs no parts.
    let floats = if chunks > 1 { offset } else { 0 };
    word(offset)?;
    let defines = [
        ("F", c_type(one.dtype).to_owned()),
        ("MOST", most.to_string()),
        ("SIZES(CALL)", calls.join(" ")),
        ("BLOCKS", resident(most).to_string()),
        ("COLUMNS", columns.to_string()),
    ];
    let text = HALF
        .replace("PARAMS", &params)
        .replace("NAMES", &names)
        .replace("PICK", &super::linear::pick(picks.into_iter()));
    let job = Job::Kernel(Kernel {
        entry: "outer",
        source: source(&text, &defines),
        grid: [u32::try_from(columns).ok()?, chunks as u32, 1],
        block: 256,
        shared: 0,
        args,
        unless_same: None,
        start: Start::After,
    });
    Some((early(job), floats * 4))
}

/// Launches of products side by side, as no single step asks for them: shared wide operands, shares of the rows, other ranks.
pub(super) fn examples() -> Vec<Job> {
    let one = |rows: usize, few: usize, many: usize, at: u64| {
        let turned = at == 0;
        let row = [few, many, if turned { few } else { many }];
        let o = Outer {
            rows,
            few,
            many,
            at: [0, 1],
            row,
            turned,
            alpha: 1.5,
            dtype: DType::F32,
        };
        // A wide operand of its own, or one with others.
        (o, move |i: u64| [0, if at == 0 { 4096 + i } else { at }, i])
    };
    let projections = |rows: usize, k: usize, ns: &[usize], ranks: &[usize]| {
        let mut all = vec![];
        for (share, r) in ranks.iter().enumerate() {
            for n in ns {
                all.push(one(rows, *r, k, 1 + share as u64));
                all.push(one(rows, *r, *n, 0));
            }
        }
        let numbered = (0..).zip(all).map(|(i, (o, at))| (o, at(i).map(Arg::U64)));
        numbered.collect::<Vec<_>>()
    };
    let sets = [
        projections(4096, 896, &[896, 128, 128], &[8]),
        projections(4096, 896, &[4864, 4864], &[8]),
        projections(4096, 4864, &[896], &[8]),
        projections(512, 896, &[896, 128, 128], &[8; 8]),
        projections(512, 896, &[4864, 4864], &[8; 8]),
        projections(300, 70, &[33, 40], &[4, 16, 33, 64]),
        projections(4096, 2048, &[2048, 512, 512], &[16]),
        projections(4096, 2048, &[2048], &[64]),
        projections(4096, 2048, &[2048, 512], &[24]),
    ];
    let jobs = sets.iter().filter_map(|s| side_by_side(s, Arg::Own(0)));
    jobs.map(|(job, _)| job).collect()
}

/// On tensor cores, where the wide operand is bf16.
fn half(spec: &KernelSpec) -> Option<Offer> {
    let o = Outer::of(spec)?;
    let args = [Arg::Read(o.at[0]), Arg::Read(o.at[1]), Arg::Write(0)];
    let (job, scratch) = side_by_side(&[(o, args)], Arg::Scratch(0))?;
    Some(Offer::new(OUTER_NAME, vec![job]).scratch(scratch))
}

fn outer_sides(ta: bool, tb: bool, alpha: f32, spec: &KernelSpec) -> Option<Outer> {
    let (a, b, c) = (&spec.inputs[0], &spec.inputs[1], spec.outputs[0].as_ref()?);
    let floats = [a, b]
        .iter()
        .all(|o| matches!(o.dtype, DType::F32 | DType::BF16));
    if !(ta && !tb && floats && c.dtype == DType::F32 && a.layout.shape.rank() == 2) {
        return None;
    }
    let (rows, p, q) = (
        a.layout.shape.0[0],
        a.layout.shape.0[1],
        b.layout.shape.0[1],
    );
    let (few, many) = (p.min(q), p.max(q));
    if few > NARROW || rows < 256 {
        return None;
    }
    let turned = p > q;
    let (ar, br, cr) = (
        a.layout.row_stride()?,
        b.layout.row_stride()?,
        c.layout.row_stride()?,
    );
    let (few_at, many_at, few_row, many_row) = match turned {
        false => (0, 1, ar, br),
        true => (1, 0, br, ar),
    };
    Some(Outer {
        rows,
        few,
        many,
        at: [few_at, many_at],
        row: [few_row, many_row, cr],
        turned,
        alpha,
        dtype: spec.inputs[few_at].dtype,
    })
}

/// `dA = dhᵀ x`, `dB = s dyᵀ h` in f32, or whichever types the two have.
pub(super) fn offer(ta: bool, tb: bool, alpha: f32, spec: &KernelSpec) -> Option<Offer> {
    if let Some(offer) = half(spec) {
        return Some(offer);
    }
    let Outer {
        rows,
        few,
        many,
        at: [few_at, many_at],
        row: [few_row, many_row, cr],
        turned,
        ..
    } = outer_sides(ta, tb, alpha, spec)?;
    // Pairs of columns, where all of them lie on four bytes and few is small enough to keep their sums.
    let paired = spec.inputs[many_at].dtype == DType::BF16 && many % 2 == 0 && many_row % 2 == 0;
    let cols = if paired && few <= 16 { 2 } else { 1 };
    // About a thousand blocks, each with at least 32 rows.
    let wanted = (1024 / many.div_ceil(128 * cols)).max(1);
    let chunk = rows.div_ceil(wanted).next_multiple_of(32);
    let chunks = rows.div_ceil(chunk);
    let defines = [
        ("FEW", few.to_string()),
        ("TURNED", usize::from(turned).to_string()),
        ("COLS", cols.to_string()),
        ("F", c_type(spec.inputs[few_at].dtype).to_owned()),
        ("M", c_type(spec.inputs[many_at].dtype).to_owned()),
    ];
    let source = source(FILE, &defines);
    let mut args = vec![Arg::Read(few_at), Arg::Read(many_at), Arg::Scratch(0)];
    for v in [rows, many, chunk, few_row, many_row] {
        args.push(word(v)?);
    }
    let first = Job::Kernel(Kernel {
        entry: "outer_parts",
        source: source.clone(),
        grid: [many.div_ceil(128 * cols) as u32, chunks as u32, 1],
        block: 128,
        shared: 0,
        args,
        unless_same: None,
        start: Start::After,
    });
    let args = vec![
        Arg::Scratch(0),
        Arg::Write(0),
        word(many)?,
        word(chunks)?,
        word(cr)?,
        Arg::F32(alpha),
    ];
    let second = super::kernel(
        "outer_join",
        source,
        (few * many).div_ceil(256) as u32,
        256,
        args,
    );
    Some(Offer::new("matmul_tn_outer", vec![first, second]).scratch(chunks * few * many * 4))
}
