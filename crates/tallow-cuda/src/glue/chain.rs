//! A token's way through a model as one launch: its steps as a table in memory, and what of a block's shared memory each
//! of them takes.
//! Invariant: a step reads what the steps before it made only where they leave it for each other, memory that is zero
//! until it is there; all else that it reads no step of the launch changes, or it is written by the thread that reads it.
//! Sums are made in one order: equal runs give equal bits.
//! Absent on purpose: which steps of a plan these are; that is `crate::fused`.
mod table;

use super::{
    Arg, Job, Target,
    pairs::{Heads, Kind, Pairs},
    source,
};
use crate::launch::{Kernel, Start};
pub(crate) use table::Table;
use table::{Make, PHASE_BYTES, leaves};

const FILE: &str = include_str!("chain.cu");
/// Warps of a block that compute, and pieces of weights that each has on their way; two more warps see to the others.
const WARPS: usize = 22;
const SLOTS: usize = 2;
/// Most parts that the keys of a head are read in, and keys of a tile.
const SPLITS: usize = 32;
const TILE: usize = 32;
/// Results of attention that a thread can hold.
const ACCS: usize = 4;
/// Bytes of what of a step lies in shared memory.
const STREAM_BYTES: usize = 72;
/// Shared memory for everything else.
const REST_BYTES: usize = 6 << 10;
/// Most pieces of a block and step.
const MOST_TASKS: usize = 1 << 15;
/// Most ranks of a step, and fewest bytes of a piece of weights that are worth a copy.
const MOST_RANKS: usize = 256;
const LEAST_SLOT: usize = 512;
/// Fewest bytes of weights that a block reads in a step, all steps taken together. Where there is less to read, launches of
/// their own are sooner done than blocks find each other's words. Measured, not derived: docs/benchmarks.md.
const LEAST_BYTES: usize = 32 << 10;

/// Attention of one token behind a cache.
#[derive(Clone, Copy)]
pub(crate) struct Cached {
    pub(crate) q: u64,
    /// Keys and values.
    pub(crate) cache: [u64; 2],
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) d: usize,
    pub(crate) slots: u32,
    pub(crate) scale: f32,
    /// Keys that are seen; 0: all.
    pub(crate) window: u32,
}

impl Cached {
    /// Can the kernel take it?
    pub(crate) fn fits(&self) -> bool {
        let group = self.queries / self.keys;
        let aligned = [self.q, self.cache[0], self.cache[1]];
        self.d.is_multiple_of(4)
            && self.queries <= 2 * SPLITS
            && group * self.d <= ACCS * WARPS * 32
            && aligned.iter().all(|a| a.is_multiple_of(16))
    }
    fn work(&self) -> usize {
        let group = self.queries / self.keys;
        4 * group * (self.d + 4 + TILE + self.d + 3)
    }
    /// Bytes of a tile of keys and one of values.
    fn tiles(&self) -> usize {
        2 * TILE * (self.d + 4) * 4
    }
}

/// A step.
pub(crate) enum Link<'a> {
    Linear(&'a Pairs),
    Attention(Cached),
    /// The likeliest of the outputs before it, written here.
    Top(u64),
}

/// A linear cut for the blocks and warps of a launch.
#[derive(Clone, Copy, Default)]
struct Cut {
    pieces: usize,
    /// Groups of eight columns of a piece.
    piece: usize,
}

/// Where a launch's shared memory goes.
struct Room {
    slot: usize,
    steps: usize,
    tiles: usize,
    work: usize,
    cuts: Vec<Cut>,
}

impl Room {
    fn bytes(&self) -> usize {
        WARPS * SLOTS * self.slot + self.steps * STREAM_BYTES + self.tiles + self.work
    }
}

/// A block for every processor; a whole number of warps reads what each left behind, where few processors stand idle then,
/// and whole loads everywhere.
fn blocks(t: &Target) -> usize {
    let all = t.processors as usize;
    match all % 32 {
        1..=4 if all > 32 => all / 32 * 32,
        _ => all / 4 * 4,
    }
}

fn cut(p: &Pairs, blocks: usize, slot: usize) -> Cut {
    let groups = p.k / 8;
    let needed = groups.div_ceil(slot / 32);
    // A warp for every piece, each with a whole load at least.
    let filling = WARPS / p.units().div_ceil(blocks).max(1);
    let pieces = needed.max(filling.min(groups.div_ceil(32))).max(1);
    let piece = groups.div_ceil(pieces);
    Cut {
        pieces: groups.div_ceil(piece),
        piece,
    }
}

fn room(t: &Target, links: &[Link]) -> Option<Room> {
    let blocks = blocks(t);
    let joined = |i: usize| match i.checked_sub(1).map(|i| &links[i]) {
        Some(Link::Attention(a)) => a.queries * SPLITS * 4,
        _ => 0,
    };
    let work = |slot: usize| {
        let one = |(i, l): (usize, &Link)| match l {
            Link::Linear(p) => {
                let units = p.units().div_ceil(blocks);
                let red = units * cut(p, blocks, slot).pieces * 8;
                p.k * 4 + red + 2 * units * 4 + joined(i)
            }
            Link::Attention(a) => a.work(),
            Link::Top(_) => 0,
        };
        links.iter().enumerate().map(one).max().unwrap_or(0)
    };
    let tiles = |l: &Link| match l {
        Link::Attention(a) => a.tiles(),
        _ => 0,
    };
    let tiles = links.iter().map(tiles).max()?;
    let steps = links.len().next_multiple_of(2);
    let taken = REST_BYTES + steps * STREAM_BYTES + tiles;
    let all = t.shared.checked_sub(taken)?;
    // Smaller pieces need more room for their sums.
    let mut slot = all / (WARPS * SLOTS);
    for _ in 0..8 {
        slot = (all.checked_sub(work(slot))? / (WARPS * SLOTS)).min(slot) / 32 * 32;
        if slot < LEAST_SLOT {
            return None;
        }
        if WARPS * SLOTS * slot + work(slot) <= all {
            let one = |l: &Link| match l {
                Link::Linear(p) => cut(p, blocks, slot),
                _ => Cut::default(),
            };
            let cuts: Vec<Cut> = links.iter().map(one).collect();
            let tasks = |(l, c): (&Link, &Cut)| match l {
                Link::Linear(p) => (p.units().div_ceil(blocks) + 1) * c.pieces,
                _ => 0,
            };
            if links.iter().zip(&cuts).map(tasks).any(|n| n > MOST_TASKS) {
                return None;
            }
            let largest = cuts.iter().map(|c| c.piece * 32).max()?;
            return Some(Room {
                slot: largest,
                steps,
                tiles,
                work: work(slot),
                cuts,
            });
        }
    }
    None
}

/// Memory of the recording, handed out from the front.
struct Own(usize);
impl Own {
    fn take(&mut self, bytes: usize) -> Arg {
        let at = self.0;
        self.0 = (at + bytes).next_multiple_of(256);
        Arg::Own(at)
    }
}

/// The launches for `links`, the table that they read, and the end of the memory of the recording, which was used up to
/// `own`. `pos`: where the token's position is.
pub(crate) fn chain(
    t: &Target,
    links: &[Link],
    pos: u64,
    own: usize,
) -> Option<(Vec<Job>, Table, usize)> {
    let blocks = blocks(t);
    let room = room(t, links)?;
    let ranks = |l: &Link| match l {
        Link::Linear(p) => p.rank(),
        _ => 0,
    };
    let most = links.iter().map(ranks).max()?;
    // Angles are made once for all layers.
    let turned = |l: &Link| match l {
        Link::Linear(p) => match p.kind {
            Kind::Heads(h) => Some(h),
            _ => None,
        },
        _ => None,
    };
    let heads = links.iter().find_map(turned);
    let same = |h: &Heads| heads.is_some_and(|o| (o.freq, o.d) == (h.freq, h.d));
    if !links.iter().filter_map(turned).all(|h| same(&h)) {
        return None;
    }
    let weights = |l: &Link| match l {
        Link::Linear(p) => 2 * p.k * p.outputs(),
        _ => 0,
    };
    let bytes: usize = links.iter().map(weights).sum();
    // All wait for what each block leaves behind: each needs a part of every linear.
    let parts = |l: &Link| match l {
        Link::Linear(p) => p.units() >= blocks,
        _ => true,
    };
    if !links.iter().all(parts) {
        return None;
    }
    if !t.bulk || most > MOST_RANKS || bytes < LEAST_BYTES * blocks * links.len() {
        return None;
    }
    let mut own = Own(own);
    let turns = own.take(256);
    let first = own.take(most * 4);
    let table = own.take(links.len() * PHASE_BYTES);
    let (leaves, set) = leaves(links, blocks);
    let sets = own.take(2 * set);
    let Arg::Own(base) = sets else { return None };
    let Arg::Own(at) = table else { return None };
    let mut jobs = vec![];
    if let Link::Linear(p) = links.first()?
        && p.rank() > 0
    {
        jobs.push(p.down(&p.wants(first)));
    }
    let make = Make {
        links,
        leaves: &leaves,
        base,
        first,
        blocks,
    };
    let out = Table::new(&make, &room.cuts, at)?;
    let defines = [
        ("WARPS", WARPS.to_string()),
        ("SLOTS", SLOTS.to_string()),
        ("SLOT", room.slot.to_string()),
        ("STEPS", room.steps.to_string()),
        ("TILE_BYTES", room.tiles.to_string()),
        ("RANKS", most.max(1).to_string()),
        ("HALF", heads.map_or(1, |h| h.d / 2).to_string()),
    ];
    jobs.push(Job::Kernel(Kernel {
        entry: "chain",
        source: source(FILE, &defines),
        grid: [blocks as u32, 1, 1],
        block: ((WARPS + 2) * 32) as u32,
        shared: room.bytes() as u32,
        args: vec![
            table,
            Arg::U32(links.len() as u32),
            turns,
            sets,
            Arg::U64(set as u64),
            Arg::U64(pos),
            Arg::U64(heads.map_or(0, |h| h.freq)),
        ],
        unless_same: None,
        start: Start::Together,
    }));
    Some((jobs, out, own.0))
}

/// Launches for a machine without a card to compile.
pub(super) fn examples(t: &Target) -> Vec<Job> {
    let all = super::pairs::examples_of_all();
    let attention = Cached {
        q: 0,
        cache: [0; 2],
        queries: 6,
        keys: 2,
        d: 64,
        slots: 256,
        scale: 1.0,
        window: 0,
    };
    let links = [
        Link::Linear(&all[0]),
        Link::Attention(attention),
        Link::Linear(&all[1]),
        Link::Linear(&all[2]),
        Link::Top(0),
    ];
    chain(t, &links, 0, 0).map_or(vec![], |c| c.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target() -> Target {
        Target::hopper(tallow_core::types::DType::BF16)
    }

    #[test]
    fn shared_memory_is_enough_and_pieces_cover_every_row() {
        let all = super::super::pairs::examples_of_all();
        let links: Vec<Link> = all.iter().map(Link::Linear).collect();
        let room = room(&target(), &links).unwrap();
        assert!(room.bytes() + REST_BYTES <= target().shared);
        for (p, c) in all.iter().zip(&room.cuts) {
            assert!(c.pieces * c.piece * 8 >= p.k && (c.pieces - 1) * c.piece * 8 < p.k);
            assert!(c.piece * 32 <= room.slot);
        }
    }

    #[test]
    fn a_table_names_its_own_memory() {
        let mut all = super::super::pairs::examples_of_all();
        // Nothing but attention reads what lies there.
        all[0].y = 1 << 30;
        let links: Vec<Link> = all.iter().map(Link::Linear).collect();
        let (jobs, table, end) = chain(&target(), &links, 7, 512).unwrap();
        assert_eq!(jobs.len(), 2);
        let bytes = table.bytes(1 << 40);
        assert_eq!(bytes.len(), links.len() * PHASE_BYTES);
        assert!(table.at >= 512 && table.at + bytes.len() <= end);
        let word = |i: usize| u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().unwrap());
        // Parts of h lie in the recording's own memory, weights do not.
        assert!(word(16) > 1 << 40 && word(17) > 1 << 40 && word(0) == 0);
    }
}
