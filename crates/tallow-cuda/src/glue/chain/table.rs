//! The steps of one launch as the table that its kernel reads, and where each step leaves things for those behind it.
//! Invariant: a step finds a row where the last step that made it left it, or nobody in the launch made it; words left
//! behind belong to one step.
//! Absent on purpose: how steps are cut; that is `glue::chain`.
use super::{Cached, Cut, Link, SPLITS};
use crate::glue::{
    Arg,
    pairs::{Kind, Pairs},
};

/// Bytes of a step in the table.
pub(super) const PHASE_BYTES: usize = 328;

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

/// What one step leaves for those behind it, by byte from the beginning of a set.
#[derive(Clone, Copy, Default)]
pub(super) struct Leaves {
    /// Outputs of a linear.
    row: usize,
    /// Attention's parts and their statistics.
    parts: usize,
    stats: usize,
    /// Parts of the next `h`, or of the likeliest output.
    next: usize,
}

/// Where each step leaves things, and the bytes of a set.
pub(super) fn leaves(links: &[Link], blocks: usize) -> (Vec<Leaves>, usize) {
    let mut end = 0;
    let mut take = |floats: usize| {
        let at = end;
        end += (floats * 4).next_multiple_of(16);
        at
    };
    let one = |(i, l): (usize, &Link)| {
        let next = match links.get(i + 1) {
            Some(Link::Linear(p)) => p.rank(),
            _ => 0,
        };
        match l {
            Link::Linear(p) => match links.get(i + 1) {
                Some(Link::Top(_)) => Leaves {
                    next: take(4 * blocks),
                    ..Leaves::default()
                },
                _ => Leaves {
                    row: take(p.outputs() + 1),
                    next: take(next * blocks),
                    ..Leaves::default()
                },
            },
            Link::Attention(a) => Leaves {
                row: 0,
                parts: take(a.queries * SPLITS * a.d),
                stats: take(a.queries * SPLITS * 2),
                next: take(next * a.queries * SPLITS),
            },
            Link::Top(_) => Leaves::default(),
        }
    };
    let all = links.iter().enumerate().map(one).collect();
    (all, end)
}

/// Where a step finds its row `at`: left behind by an earlier one, or as it lies. None where it cannot be told.
fn source_of(links: &[Link], i: usize, at: u64) -> Option<Option<usize>> {
    let covers = |l: &Link| match l {
        Link::Linear(p) => (p.y..p.y + 4 * p.made() as u64).contains(&at),
        _ => false,
    };
    match links[..i].iter().rposition(covers) {
        None => Some(None),
        Some(j) => match &links[j] {
            Link::Linear(p) if p.y == at && !matches!(p.kind, Kind::Heads(_)) => Some(Some(j)),
            _ => None,
        },
    }
}

/// Does attention read what the step before it makes, and nothing else of this token?
fn follows(a: &Cached, before: Option<&Link>) -> bool {
    let Some(Link::Linear(p)) = before else {
        return false;
    };
    let Kind::Heads(h) = &p.kind else {
        return false;
    };
    (p.y, h.cache, h.queries, h.keys, h.d) == (a.q, a.cache, a.queries, a.keys, a.d)
}

const NULL: Arg = Arg::U64(0);
/// Which of a step's rows were left behind, as in the kernel.
const FRESH_X: usize = 1;
const FRESH_PAST: usize = 2;
const FRESH_H: usize = 4;

/// What a table is made of.
pub(super) struct Make<'a> {
    pub(super) links: &'a [Link<'a>],
    pub(super) leaves: &'a [Leaves],
    /// Where the first set lies.
    pub(super) base: usize,
    /// The first step's `h`.
    pub(super) first: Arg,
    pub(super) blocks: usize,
}

impl Make<'_> {
    fn left(&self, at: usize) -> Arg {
        Arg::Own(self.base + at)
    }
    fn before(&self, i: usize) -> Option<(&Link<'_>, Leaves)> {
        let i = i.checked_sub(1)?;
        Some((&self.links[i], self.leaves[i]))
    }
    /// The linear behind, if it has an adapter.
    fn next(&self, i: usize) -> Option<&Pairs> {
        match self.links.get(i + 1) {
            Some(Link::Linear(p)) if p.rank() > 0 => Some(*p),
            _ => None,
        }
    }
}

impl Table {
    /// The table for steps cut like this, at byte `at` of the recording's memory.
    pub(super) fn new(m: &Make, cuts: &[Cut], at: usize) -> Option<Self> {
        let mut table = Table {
            at,
            words: vec![],
            own: vec![],
        };
        for (i, cut) in cuts.iter().enumerate() {
            table.phase(m, i, *cut)?;
            debug_assert_eq!(table.words.len() * 4, (i + 1) * PHASE_BYTES);
        }
        Some(table)
    }
    /// Step `i`, in the order of the kernel's `Phase`.
    fn phase(&mut self, m: &Make, i: usize, cut: Cut) -> Option<()> {
        match &m.links[i] {
            Link::Linear(p) => self.linear(p, m, i, cut)?,
            Link::Attention(a) => {
                follows(a, m.before(i).map(|b| b.0)).then_some(())?;
                self.attention(a, m, i);
            }
            Link::Top(y) => {
                let (before, left) = m.before(i)?;
                let outputs = match before {
                    Link::Linear(p) => p.outputs(),
                    _ => 0,
                };
                self.addresses(&[NULL; 12]);
                self.addresses(&[m.left(left.next), Arg::U64(*y)]);
                self.addresses(&[NULL; 10]);
                self.numbers(&[4, 8, 0, outputs, 1, 1]);
                self.numbers(&[0; 28]);
            }
        }
        Some(())
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
    fn linear(&mut self, p: &Pairs, m: &Make, i: usize, cut: Cut) -> Option<()> {
        let (before, next) = (m.before(i), m.next(i));
        let top = matches!(m.links.get(i + 1), Some(Link::Top(_)));
        let here = &m.leaves[i];
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
            Some((Link::Attention(a), left)) => Some((a, left)),
            _ => None,
        };
        let mut fresh = 0;
        let mut find = |at: u64, flag: usize| {
            Some(match source_of(m.links, i, at)? {
                Some(j) => {
                    fresh |= flag;
                    m.left(m.leaves[j].row)
                }
                None => Arg::U64(at),
            })
        };
        let x = match joined {
            Some(_) => NULL,
            None => find(p.x, FRESH_X)?,
        };
        let past = match p.past {
            Some(at) => find(at, FRESH_PAST)?,
            None => NULL,
        };
        if before.is_some() {
            fresh |= FRESH_H;
        }
        self.addresses(&[
            x,
            Arg::U64(p.y),
            past,
            Arg::U64(p.norm.map_or(0, |n| n.0)),
            before.map_or(m.first, |(_, left)| m.left(left.next)),
            m.left(here.next),
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
            joined.map_or(NULL, |(_, left)| m.left(left.parts)),
            joined.map_or(NULL, |(_, left)| m.left(left.stats)),
            if top { NULL } else { m.left(here.row) },
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
        let count = if before.is_none() { 1 } else { m.blocks };
        let joined = joined.map(|j| j.0);
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
        self.numbers(&[usize::from(joined.is_some()), usize::from(top), most, fresh]);
        Some(())
    }
    fn attention(&mut self, a: &Cached, m: &Make, i: usize) {
        let (next, here) = (m.next(i), &m.leaves[i]);
        let queries = m.before(i).map_or(NULL, |(_, left)| m.left(left.row));
        self.addresses(&[NULL; 9]);
        let (down, ends) = Self::next(next);
        self.addresses(&down);
        let [keys, values] = a.cache.map(Arg::U64);
        self.addresses(&[queries, NULL, NULL, NULL, NULL, m.left(here.next), NULL]);
        self.addresses(&[keys, values, m.left(here.parts), m.left(here.stats), NULL]);
        self.numbers(&[3, 8, 0, 0, 1, 1, 0, 0]);
        self.numbers(&[0; 9]);
        self.numbers(&[0, 0, next.map_or(0, Pairs::rank), next.map_or(0, |n| n.k)]);
        self.numbers(&ends);
        self.numbers(&[a.d / 2, a.queries, a.keys, a.slots as usize, 0]);
        self.words.push(a.scale.to_bits());
        self.numbers(&[a.window as usize, 0, 0, 0, 0]);
    }
}
