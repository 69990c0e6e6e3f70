//! A token's way through a model as one launch: its steps as a table in memory, and what of a block's shared memory each
//! of them takes.
//! Invariant: a step reads what the steps before it wrote only after all blocks waited for each other; before that only
//! what no step of the plan changes. Sums are made in one order: equal runs give equal bits.
//! Absent on purpose: which steps of a plan these are; that is `crate::fused`.
use super::{
    Arg, Job, Target,
    pairs::{Heads, Kind, Pairs},
    source,
};
use crate::launch::{Kernel, Start};

const FILE: &str = include_str!("chain.cu");
/// Warps of a block that compute, and pieces of weights that each has on their way; two more warps see to the others.
const WARPS: usize = 22;
const SLOTS: usize = 2;
/// Most parts that the keys of a head are read in, and keys of a tile.
const SPLITS: usize = 32;
const TILE: usize = 32;
/// Results of attention that a thread can hold.
const ACCS: usize = 4;
/// Bytes of a step in the table, and of what of it lies in shared memory.
const PHASE_BYTES: usize = 320;
const STREAM_BYTES: usize = 72;
/// Shared memory for everything else.
const REST_BYTES: usize = 6 << 10;
/// Most pieces of a block and step.
const MOST_TASKS: usize = 1 << 15;
/// Most ranks of a step, and fewest bytes of a piece of weights that are worth a copy.
const MOST_RANKS: usize = 256;
const LEAST_SLOT: usize = 512;

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

/// What the kernel reads its steps from, somewhere in memory of the recording.
pub(crate) struct Table {
    /// Where it lies there, by byte.
    pub(crate) at: usize,
    words: Vec<u32>,
    /// Words at which an address inside that memory begins.
    own: Vec<usize>,
}

impl Table {
    /// Its bytes, where the memory of the recording begins at `base`.
    pub(crate) fn bytes(&self, base: u64) -> Vec<u8> {
        let mut words = self.words.clone();
        for at in &self.own {
            let old = u64::from(words[*at]) | u64::from(words[at + 1]) << 32;
            let new = old + base;
            (words[*at], words[at + 1]) = (new as u32, (new >> 32) as u32);
        }
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }
    fn address(&mut self, a: Arg) {
        let v = match a {
            Arg::Own(at) => {
                self.own.push(self.words.len());
                at as u64
            }
            Arg::U64(v) => v,
            _ => 0,
        };
        self.words.extend([v as u32, (v >> 32) as u32]);
    }
    fn number(&mut self, n: usize) {
        self.words.push(n as u32);
    }
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

/// A block for every processor; a whole number of warps reads what each left behind, where few processors stand idle then.
fn blocks(t: &Target) -> usize {
    let all = t.processors as usize;
    match all % 32 {
        1..=4 if all > 32 => all / 32 * 32,
        _ => all,
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

/// What one step leaves for the next.
struct Between {
    /// Parts of `h`, by turns.
    parts: [Arg; 2],
    /// Attention's parts and their statistics.
    rows: Arg,
    stats: Arg,
    tops: Arg,
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
    let heads_of = |l: &Link| match l {
        Link::Attention(a) => (a.queries, a.queries * a.d),
        _ => (0, 0),
    };
    let queries = links.iter().map(|l| heads_of(l).0).max()?;
    let row = links.iter().map(|l| heads_of(l).1).max()?;
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
    if !t.bulk || most > MOST_RANKS {
        return None;
    }
    let mut own = Own(own);
    let bar = own.take(256);
    let count = blocks.max(queries * SPLITS);
    let between = Between {
        parts: [own.take(most * count * 4), own.take(most * count * 4)],
        rows: own.take(row * SPLITS * 4),
        stats: own.take(queries * SPLITS * 8),
        tops: own.take(blocks * 16),
    };
    let table = own.take(links.len() * PHASE_BYTES);
    let Arg::Own(at) = table else { return None };
    let mut out = Table {
        at,
        words: vec![],
        own: vec![],
    };
    let mut jobs = vec![];
    if let Link::Linear(first) = links.first()?
        && first.rank() > 0
    {
        jobs.push(first.down(&first.wants(between.parts[1])));
    }
    for (i, cut) in room.cuts.iter().enumerate() {
        out.phase(links, i, *cut, &between, blocks);
        debug_assert_eq!(out.words.len() * 4, (i + 1) * PHASE_BYTES);
    }
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
            bar,
            Arg::U64(pos),
            Arg::U64(heads.map_or(0, |h| h.freq)),
        ],
        unless_same: None,
        start: Start::Together,
    }));
    Some((jobs, out, own.0))
}

const NULL: Arg = Arg::U64(0);

impl Table {
    /// Step `i`, in the order of the kernel's `Phase`.
    fn phase(&mut self, links: &[Link], i: usize, cut: Cut, b: &Between, blocks: usize) {
        let before = i.checked_sub(1).map(|i| &links[i]);
        let next = match links.get(i + 1) {
            Some(Link::Linear(p)) if p.rank() > 0 => Some(*p),
            _ => None,
        };
        match &links[i] {
            Link::Linear(p) => {
                let top = matches!(links.get(i + 1), Some(Link::Top(_)));
                self.linear(p, (before, next, top), cut, (b, i), blocks);
            }
            Link::Attention(a) => self.attention(a, next, (b, i)),
            Link::Top(y) => {
                let outputs = match before {
                    Some(Link::Linear(p)) => p.outputs(),
                    _ => 0,
                };
                self.addresses(&[NULL; 12]);
                self.addresses(&[b.tops, Arg::U64(*y)]);
                self.addresses(&[NULL; 9]);
                self.numbers(&[4, 8, 0, outputs, 1, 1]);
                self.numbers(&[0; 28]);
            }
        }
    }
    fn addresses(&mut self, all: &[Arg]) {
        all.iter().for_each(|a| self.address(*a));
    }
    fn numbers(&mut self, all: &[usize]) {
        all.iter().for_each(|n| self.number(*n));
    }
    /// `A` of every part of the next linear that has one, and the ends of their ranks.
    fn next(next: Option<&Pairs>) -> ([Arg; 3], [usize; 2]) {
        let (mut at, mut ends, mut r) = ([NULL; 3], [usize::MAX; 2], 0);
        let adapters = next.iter().flat_map(|p| p.parts.iter());
        for (i, (rank, _, a, _)) in adapters.filter_map(|p| p.adapter).enumerate() {
            r += rank;
            at[i] = Arg::U64(a);
            if let Some(end) = ends.get_mut(i) {
                *end = r;
            }
        }
        (at, ends)
    }
    fn linear(
        &mut self,
        p: &Pairs,
        (before, next, top): (Option<&Link>, Option<&Pairs>, bool),
        cut: Cut,
        (b, i): (&Between, usize),
        blocks: usize,
    ) {
        let each = |f: &dyn Fn(usize) -> u64| [0, 1, 2].map(|k| Arg::U64(f(k)));
        let part = |k: usize| p.parts.get(k);
        self.addresses(&each(&|k| part(k).map_or(0, |p| p.w)));
        self.addresses(&each(&|k| part(k).and_then(|p| p.bias).unwrap_or(0)));
        self.addresses(&each(&|k| {
            part(k).and_then(|p| p.adapter).map_or(0, |a| a.3)
        }));
        let (down, ends) = Self::next(next);
        self.addresses(&down);
        let joined = match before {
            Some(Link::Attention(a)) => Some(a),
            _ => None,
        };
        self.addresses(&[
            Arg::U64(p.x),
            Arg::U64(p.y),
            Arg::U64(p.past.unwrap_or(0)),
            Arg::U64(p.norm.map_or(0, |n| n.0)),
            b.parts[(i + 1) % 2],
            if top { b.tops } else { b.parts[i % 2] },
            Arg::U64(next.and_then(|n| n.norm).map_or(0, |n| n.0)),
        ]);
        let (kind, heads) = match p.kind {
            Kind::Plain => (0, None),
            Kind::Gate => (1, None),
            Kind::Heads(h) => (2, Some(h)),
        };
        let address = |v: Option<u64>| Arg::U64(v.unwrap_or(0));
        self.addresses(&[
            address(heads.map(|h| h.cache[0])),
            address(heads.map(|h| h.cache[1])),
            b.rows,
            b.stats,
        ]);
        let mut out_ends = [usize::MAX; 2];
        let mut n = 0;
        for (k, end) in out_ends.iter_mut().enumerate() {
            n += part(k).map_or(0, |p| p.n);
            if k + 1 < p.parts.len() {
                *end = n;
            }
        }
        self.numbers(&[kind, p.k, p.units(), p.outputs(), cut.pieces, cut.piece]);
        self.numbers(&out_ends);
        let rank = [0, 1, 2].map(|k| part(k).and_then(|p| p.adapter).map_or(0, |a| a.0));
        self.numbers(&rank);
        self.numbers(&[0, rank[0], rank[0] + rank[1]]);
        for k in 0..3 {
            let scale = part(k).and_then(|p| p.adapter).map_or(0.0, |a| a.1);
            self.words.push(scale.to_bits());
        }
        // The first step finds its h whole.
        let count = if before.is_none() { 1 } else { blocks };
        let (half, queries, keys, slots) = match (heads, joined) {
            (Some(h), _) => (h.d / 2, h.queries, h.keys, h.slots),
            (_, Some(a)) => (a.d / 2, a.queries, a.keys, a.slots),
            _ => (1, 0, 1, 0),
        };
        self.numbers(&[p.rank(), count, next.map_or(0, Pairs::rank)]);
        self.numbers(&[next.map_or(0, |n| n.k), ends[0], ends[1]]);
        self.numbers(&[half, queries, keys, slots as usize]);
        self.words.push(p.norm.map_or(0.0, |n| n.1).to_bits());
        self.words.push(0);
        self.numbers(&[joined.map_or(0, |a| a.window as usize)]);
        let most = rank.iter().max().copied().unwrap_or(0);
        self.numbers(&[usize::from(joined.is_some()), usize::from(top), most, 0]);
    }
    fn attention(&mut self, a: &Cached, next: Option<&Pairs>, (b, i): (&Between, usize)) {
        self.addresses(&[NULL; 9]);
        let (down, ends) = Self::next(next);
        self.addresses(&down);
        let [keys, values] = a.cache.map(Arg::U64);
        self.addresses(&[Arg::U64(a.q), NULL, NULL, NULL, NULL, b.parts[i % 2], NULL]);
        self.addresses(&[keys, values, b.rows, b.stats]);
        self.numbers(&[3, 8, 0, 0, 1, 1, 0, 0]);
        self.numbers(&[0; 9]);
        self.numbers(&[0, 0, next.map_or(0, Pairs::rank), next.map_or(0, |n| n.k)]);
        self.numbers(&ends);
        self.numbers(&[a.d / 2, a.queries, a.keys, a.slots as usize, 0]);
        self.words.push(a.scale.to_bits());
        self.numbers(&[a.window as usize, 0, 0, 0, 0]);
    }
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
        Target {
            processors: 132,
            shared: 227 << 10,
            weights: tallow_core::types::DType::BF16,
            bulk: true,
        }
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
        let all = super::super::pairs::examples_of_all();
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
