//! Linears of one row with what stands around them in a decoder, as one launch: the norm in front, and the gate or the
//! rotation and the cache behind.
//! Invariant: `h` comes as parts that whoever makes the row leaves behind, from blocks that share it among themselves, or
//! from a launch of its own; never does each block make all of it. Sums are made in one order: equal runs give equal bits.
//! Absent on purpose: which steps of a plan these are; that is `crate::fused`.
use super::{Arg, Job, Target, early, kernel, linear::pick, source};
use crate::launch::{Kernel, Start};

const FILE: &str = include_str!("pairs.cu");
const DOWN: &str = include_str!("pairs_down.cu");

/// One projection: addresses, and the rank and scale of its adapter.
pub(crate) struct Part {
    pub(crate) n: usize,
    pub(crate) w: u64,
    pub(crate) bias: Option<u64>,
    /// Rank, scale, `A`, `B`.
    pub(crate) adapter: Option<(usize, f32, u64, u64)>,
}

/// What is made of the outputs.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    /// Nothing.
    Plain,
    /// `silu` of the first half times the second.
    Gate,
    /// Queries and keys rotated, keys and values written to the cache.
    Heads(Heads),
}

/// Extents and addresses of the heads behind a projection.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) d: usize,
    /// Positions of the cache.
    pub(crate) slots: u32,
    pub(crate) pos: u64,
    pub(crate) freq: u64,
    /// Keys and values.
    pub(crate) cache: [u64; 2],
}

/// One launch.
pub(crate) struct Pairs {
    pub(crate) k: usize,
    pub(crate) parts: Vec<Part>,
    pub(crate) kind: Kind,
    pub(crate) x: u64,
    pub(crate) y: u64,
    /// What is added to the result.
    pub(crate) past: Option<u64>,
    /// Weights of the norm in front and its epsilon.
    pub(crate) norm: Option<(u64, f32)>,
}

/// Parts of an `h` where they lie: `[rank, count]` floats.
#[derive(Clone, Copy)]
pub(crate) struct Left {
    pub(crate) at: Arg,
    pub(crate) count: usize,
}

/// The `h` that the next linear wants: `A` of all its blocks as code.
pub(crate) struct Next {
    pub(crate) rank: usize,
    /// Its inner extent.
    pub(crate) k: usize,
    /// Parameters after the first, and their arguments.
    pub(crate) params: String,
    pub(crate) args: Vec<Arg>,
    /// Sets `down` to row `r` of all `A`.
    pub(crate) row: String,
    /// Where the parts go.
    pub(crate) parts: Arg,
    /// Weights of the norm in front of it.
    pub(crate) norm: u64,
}

/// Blocks that make `h` together.
const GROUP: usize = 8;
/// Ranks up to which they do.
const MOST_OWN: usize = 32;

/// Loads of 16 bytes of a row that a lane can hold.
const MOST_LOADS: usize = 8;

impl Pairs {
    pub(crate) fn rank(&self) -> usize {
        self.parts
            .iter()
            .filter_map(|p| p.adapter)
            .map(|a| a.0)
            .sum()
    }
    pub(crate) fn outputs(&self) -> usize {
        self.parts.iter().map(|p| p.n).sum()
    }
    /// Elements of the row at `y`.
    pub(crate) fn made(&self) -> usize {
        match &self.kind {
            Kind::Plain => self.outputs(),
            Kind::Gate => self.outputs() / 2,
            Kind::Heads(h) => (h.queries + h.keys) * h.d,
        }
    }
    pub(crate) fn units(&self) -> usize {
        self.outputs().div_ceil(2)
    }
    /// Warps of a pair: enough that its weights fit registers, and that the launch fills a card.
    fn split(&self) -> Option<usize> {
        let loads = |s: usize| self.k.div_ceil(256 * s);
        let good = |s: &usize| {
            let full = self.units().div_ceil(8 / s) >= 200 || loads(*s) == 1;
            loads(*s) <= 5 && full
        };
        let found = [1, 2, 4, 8].into_iter().find(good);
        found.or_else(|| (loads(8) <= MOST_LOADS).then_some(8))
    }
    /// Blocks of the launch, which is how many parts it leaves behind.
    pub(crate) fn blocks(&self) -> Option<usize> {
        Some(self.units().div_ceil(8 / self.split()?))
    }
    /// Can the kernel take it?
    pub(crate) fn fits(&self) -> bool {
        let aligned = self.parts.iter().all(|p| p.w.is_multiple_of(16));
        let whole = matches!(self.kind, Kind::Plain) || self.outputs().is_multiple_of(2);
        aligned
            && whole
            && self.k.is_multiple_of(8)
            && self.x.is_multiple_of(16)
            && self.split().is_some()
    }
    /// Can its blocks make `h` themselves?
    pub(crate) fn makes_own(&self, t: &Target) -> bool {
        let mut adapters = self.parts.iter().filter_map(|p| p.adapter);
        let aligned = adapters.all(|(_, _, a, _)| a.is_multiple_of(16));
        let groups = self.blocks().is_some_and(|b| b.is_multiple_of(GROUP));
        t.bulk && aligned && groups && self.rank() <= MOST_OWN
    }
    /// The `h` of this linear as somebody else's next, with its parts at `parts`.
    pub(crate) fn wants(&self, parts: Arg) -> Next {
        let (mut params, mut args, mut rows) = (String::new(), vec![], vec![]);
        for (i, p) in self.parts.iter().enumerate() {
            if let Some((r, _, a, _)) = p.adapter {
                params += &format!(", const float* na{i}");
                args.push(Arg::U64(a));
                rows.push((r, format!("down = na{i} + (u64)j * {}u;", self.k)));
            }
        }
        Next {
            rank: self.rank(),
            k: self.k,
            params,
            args,
            row: pick(rows.into_iter())
                .replace("(o <", "(r <")
                .replace("= o -", "= r -"),
            parts,
            norm: self.norm.map_or(0, |n| n.0),
        }
    }
    /// The launch that makes all of `h` from `x`, for want of parts.
    pub(crate) fn down(&self, next: &Next) -> Job {
        let text = DOWN
            .replace("PARAMS", &next.params)
            .replace("NEXT_ROW", &next.row);
        let source = source(&text, &[("NEXT_K", format!("{}u", self.k))]);
        let mut args = vec![Arg::U64(self.x), next.parts, Arg::U64(next.norm)];
        args.extend(&next.args);
        early(kernel("down", source, next.rank as u32, 256, args))
    }
    /// The launch itself, given parts of `h`; without them its blocks make it.
    pub(crate) fn job(&self, h: Option<Left>, next: Option<&Next>) -> Option<Job> {
        let split = self.split()?;
        let (mut params, mut names, mut own) = (String::new(), String::new(), vec![]);
        let (mut rows, mut downs, mut r0) = (vec![], vec![], 0);
        let mut push = |name: String, kind: &str, at: u64| {
            params += &format!(", {kind} {name}");
            names += &format!(", {name}");
            own.push(Arg::U64(at));
        };
        for (i, p) in self.parts.iter().enumerate() {
            push(format!("w{i}"), "const bf16*", p.w);
            let mut body = format!("row.w = w{i} + (u64)j * {}u;", self.k);
            if let Some(bias) = p.bias {
                push(format!("c{i}"), "const float*", bias);
                body += &format!(" row.bias = c{i} + j;");
            }
            if let Some((r, scale, a, b)) = p.adapter {
                push(format!("b{i}"), "const float*", b);
                push(format!("a{i}"), "const float*", a);
                downs.push((r, format!("return a{i} + (u64)j * {}u;", self.k)));
                body += &format!(
                    " row.up = b{i} + (u64)j * {r}u; row.scale = {scale:?}f; row.r0 = {r0}; row.rank = {r};"
                );
                r0 += r;
            }
            rows.push((p.n, body));
        }
        let locate = params.clone();
        let (next_rank, next_k) = next.map_or((0, 1), |n| (n.rank, n.k));
        if let Some(n) = next {
            params += &n.params;
            own.extend(&n.args);
        }
        let (kind, heads) = match self.kind {
            Kind::Plain => (0, None),
            Kind::Gate => (1, None),
            Kind::Heads(h) => (2, Some(h)),
        };
        let number = |n: usize| format!("{n}u");
        let defines = [
            ("SPLIT", split.to_string()),
            ("KIND", kind.to_string()),
            ("K", number(self.k)),
            ("UNITS", number(self.units())),
            ("OUTPUTS", number(self.outputs())),
            ("LOADS", self.k.div_ceil(256 * split).to_string()),
            ("R", r0.to_string()),
            ("OWN", usize::from(r0 > 0 && h.is_none()).to_string()),
            ("PARTS", number(h.map_or(1, |h| h.count))),
            ("NORM", usize::from(self.norm.is_some()).to_string()),
            ("NEXT", next_rank.to_string()),
            ("NEXT_K", number(next_k)),
            ("D", number(heads.map_or(2, |h| h.d))),
            ("QUERIES", number(heads.map_or(0, |h| h.queries))),
            ("KEYS", number(heads.map_or(1, |h| h.keys))),
        ];
        let text = FILE
            .replace("LOCATE", &locate)
            .replace("PICK_A", &pick(downs.into_iter()))
            .replace("PICK", &pick(rows.into_iter()))
            .replace("PARAMS", &params)
            .replace("NAMES", &names)
            .replace("NEXT_ROW", next.map_or("", |n| &n.row));
        let address = |v: Option<u64>| Arg::U64(v.unwrap_or(0));
        let mut args = vec![
            Arg::U64(self.x),
            Arg::U64(self.y),
            address(self.past),
            address(self.norm.map(|n| n.0)),
            Arg::F32(self.norm.map_or(0.0, |n| n.1)),
            h.map_or(Arg::U64(0), |h| h.at),
            next.map_or(Arg::U64(0), |n| n.parts),
            Arg::U64(next.map_or(0, |n| n.norm)),
            address(heads.map(|h| h.pos)),
            address(heads.map(|h| h.freq)),
            address(heads.map(|h| h.cache[0])),
            address(heads.map(|h| h.cache[1])),
            Arg::U32(heads.map_or(0, |h| h.slots)),
        ];
        args.extend(own);
        Some(Job::Kernel(Kernel {
            entry: "pairs",
            source: source(&text, &defines),
            grid: [self.blocks()? as u32, 1, 1],
            block: 256,
            shared: (self.k * 4) as u32,
            args,
            unless_same: None,
            start: Start::Early,
        }))
    }
}

/// Every kind, for a machine without a card: sizes of a small model, an adapter on every part.
pub(super) fn examples_of_all() -> [Pairs; 4] {
    let part = |n: usize, bias: bool| Part {
        n,
        w: 0,
        bias: bias.then_some(0),
        adapter: Some((8, 2.0, 0, 0)),
    };
    let heads = Heads {
        queries: 6,
        keys: 2,
        d: 64,
        slots: 256,
        pos: 0,
        freq: 0,
        cache: [0, 0],
    };
    let make = |(k, parts, kind, norm): (usize, Vec<Part>, Kind, bool)| Pairs {
        k,
        parts,
        kind,
        x: 0,
        y: 0,
        past: None,
        norm: norm.then_some((0, 1e-5)),
    };
    let qkv = vec![part(384, true), part(128, true), part(128, true)];
    let all = [
        (896, qkv, Kind::Heads(heads), true),
        (
            896,
            vec![part(4864, false), part(4864, false)],
            Kind::Gate,
            true,
        ),
        (4864, vec![part(896, false)], Kind::Plain, false),
        (16384, vec![part(4097, false)], Kind::Plain, true),
    ];
    all.map(make)
}

/// Their launches.
pub(super) fn examples(t: &Target) -> Vec<Job> {
    let all = examples_of_all();
    let left = Left {
        at: Arg::Own(0),
        count: 7,
    };
    let mut jobs = vec![];
    for (i, p) in all.iter().enumerate() {
        let next = all[(i + 1) % all.len()].wants(Arg::Own(0));
        let next = (!matches!(p.kind, Kind::Heads(_))).then_some(next);
        jobs.extend(p.job(Some(left), next.as_ref()));
        jobs.extend(p.makes_own(t).then(|| p.job(None, next.as_ref())).flatten());
        jobs.push(p.down(&p.wants(Arg::Own(0))));
    }
    jobs
}
