//! Neighbouring steps of a plan that one launch does: what a decoder layer is for one token.
//! Invariant: a value that a fused launch does not write is read by no other step; what it writes lies nowhere that it
//! reads; weights and adapters are only read ahead of time where no step of the plan changes them.
//! Absent on purpose: graphs. The plan stays as it was explained; a step that another launch does takes no time.
mod chain;
mod front;
mod launched;

pub(crate) use launched::launched;

use crate::{
    glue::{
        self, Target, attention_then,
        outer::{MOST_OUTERS, OUTER_NAME, Outer, side_by_side},
        pairs::{Heads, Kind, Left, Pairs, Part},
        row_weights,
    },
    launch::{Arg, Job, Offer},
};
use std::collections::HashMap;
use tallow_core::{
    kernel::{Body, KernelSpec},
    op::{Composite, Linear},
    plan::{Place, Plan, Span, Step},
    types::DType,
};

/// Launches in place of those offered, by step, and the memory they need.
#[derive(Default)]
pub(crate) struct Fused {
    pub(crate) jobs: HashMap<usize, Vec<Job>>,
    pub(crate) own_bytes: usize,
    /// What has to lie in that memory before the first launch.
    pub(crate) tables: Vec<glue::chain::Table>,
}

/// A linear of one row with its neighbours: steps `first..=last` of the plan.
struct Found {
    first: usize,
    last: usize,
    pairs: Pairs,
    /// The value that its `h` is made of, and the value that it makes.
    source: u32,
    makes: u32,
}

/// Addresses from and to.
type Range = (u64, u64);

struct Finder<'a> {
    target: &'a Target,
    plan: &'a Plan,
    at: &'a dyn Fn(&Span) -> Option<u64>,
}

/// What launches of `plan` can be had cheaper; `at` is where a span lies.
pub(crate) fn fuse(
    target: &Target,
    plan: &Plan,
    offers: &[Offer],
    at: &dyn Fn(&Span) -> Option<u64>,
) -> Fused {
    let f = Finder { target, plan, at };
    let linears = (0..plan.steps.len()).filter_map(|i| f.linear(i, &offers[i]));
    let mut all: Vec<Found> = linears.collect();
    // A step belongs to one launch.
    all.dedup_by(|next, before| next.first <= before.last);
    let mut out = Fused::default();
    f.outers(offers, &mut out);
    f.fronts(offers, &mut out);
    let taken = f.chains(&all, offers, &mut out);
    all.retain(|l| !taken.iter().any(|t| t.contains(&l.first)));
    let (mut lefts, mut nexts) = (HashMap::new(), HashMap::new());
    for (n, found) in all.iter().enumerate().filter(|(_, f)| f.pairs.rank() > 0) {
        let rank = found.pairs.rank();
        let maker = all[..n]
            .iter()
            .position(|m| m.makes == found.source && !matches!(m.pairs.kind, Kind::Heads(_)));
        let maker = maker.filter(|m| !nexts.contains_key(m));
        let heads = f.attention(found, offers, &mut out);
        if heads.is_none() && maker.is_none() && found.pairs.makes_own(target) {
            continue;
        }
        let count = match (&heads, maker.and_then(|m| all[m].pairs.blocks())) {
            (Some((_, count)), _) => *count,
            (None, Some(count)) => count,
            (None, None) => 1,
        };
        let parts = Arg::Own(out.own_bytes);
        out.own_bytes += (rank * count * 4).next_multiple_of(256);
        lefts.insert(n, Left { at: parts, count });
        let next = found.pairs.wants(parts);
        if let Some((step, _)) = heads {
            let Body::Composite(Composite::Attention(a)) = &plan.steps[step].spec.body else {
                continue;
            };
            let jobs = attention_then(a, &plan.steps[step].spec, &next);
            out.jobs.extend(jobs.map(|(jobs, _)| (step, jobs)));
        } else if let Some(m) = maker {
            nexts.insert(m, next);
        } else {
            out.jobs
                .entry(found.last)
                .or_default()
                .push(found.pairs.down(&next));
        }
    }
    for (n, found) in all.iter().enumerate() {
        let Some(job) = found.pairs.job(lefts.get(&n).copied(), nexts.get(&n)) else {
            continue;
        };
        for i in found.first..found.last {
            out.jobs.insert(i, vec![]);
        }
        out.jobs.entry(found.last).or_default().push(job);
    }
    out
}

/// Is `first` something that the launches of a linear may take in?
pub(crate) fn joins(first: &KernelSpec, second: &KernelSpec) -> bool {
    let in_front = |c: &Composite| matches!(c, Composite::RmsNorm(_) | Composite::SwiGlu(_));
    matches!(&first.body, Body::Composite(c) if in_front(c))
        && matches!(&second.body, Body::Composite(Composite::Linear(_)))
}

fn ends(step: &Step) -> impl Iterator<Item = &Span> {
    step.writes.iter().flatten()
}

/// Is this a composite of f32 operands on dense memory?
fn dense_f32(spec: &KernelSpec, which: &[usize]) -> bool {
    which
        .iter()
        .all(|i| spec.inputs[*i].is_dense() && spec.inputs[*i].dtype == DType::F32)
}

impl Finder<'_> {
    /// Launches for whole runs of steps, and the steps that they do.
    fn chains(
        &self,
        all: &[Found],
        offers: &[Offer],
        out: &mut Fused,
    ) -> Vec<std::ops::RangeInclusive<usize>> {
        let mut taken = vec![];
        for run in chain::runs(self, all, offers) {
            let made = glue::chain::chain(self.target, &run.links, run.pos, out.own_bytes);
            let Some((jobs, table, end)) = made else {
                continue;
            };
            for i in run.first..run.last {
                out.jobs.insert(i, vec![]);
            }
            out.jobs.insert(run.last, jobs);
            out.tables.push(table);
            out.own_bytes = end;
            taken.push(run.first..=run.last);
        }
        taken
    }
    fn step(&self, i: usize) -> Option<&Step> {
        self.plan.steps.get(i)
    }
    /// The steps that read a value.
    fn readers(&self, root: u32) -> Vec<usize> {
        let reads = |s: &Step| s.reads.iter().any(|r| r.root == root);
        let steps = self.plan.steps.iter().enumerate();
        steps.filter(|(_, s)| reads(s)).map(|(i, _)| i).collect()
    }
    /// The only step that writes a value.
    fn writer(&self, root: u32) -> Option<usize> {
        let mut steps = self.plan.steps.iter().enumerate();
        let writes = |s: &Step| ends(s).any(|w| w.root == root);
        let found = steps.find(|(_, s)| writes(s))?.0;
        (!steps.any(|(_, s)| writes(s))).then_some(found)
    }
    /// Is this memory an input that no step changes?
    fn constant(&self, span: &Span) -> bool {
        let changed = || {
            self.plan
                .steps
                .iter()
                .flat_map(ends)
                .any(|w| w.place == span.place)
        };
        match span.place {
            Place::Prepared(_) => true,
            Place::Input(_) => !changed(),
            Place::Output(_) | Place::Arena => false,
        }
    }
    fn address(&self, span: &Span) -> Option<u64> {
        (self.at)(span)
    }

    /// Step `i` as a linear of one row, with its neighbours.
    fn linear(&self, i: usize, offer: &Offer) -> Option<Found> {
        let step = self.step(i)?;
        let Body::Composite(Composite::Linear(l)) = &step.spec.body else {
            return None;
        };
        let one_row = step.spec.inputs[0].layout.shape.rows() == 1;
        let few = matches!(offer.name, "lora_linear_warp" | "linear_warp");
        if !one_row || !few || step.writes[1..].iter().any(Option::is_some) {
            return None;
        }
        let y = step.writes[0].as_ref()?;
        let past = match l.residual {
            true => Some(self.address(step.reads.last()?)?),
            false => None,
        };
        let mut found = Found {
            first: i,
            last: i,
            source: step.reads[0].root,
            makes: y.root,
            pairs: Pairs {
                k: step.spec.inputs[0].layout.shape.last(),
                parts: self.parts(step, l)?,
                kind: Kind::Plain,
                x: self.address(&step.reads[0])?,
                y: self.address(y)?,
                past,
                norm: None,
            },
        };
        self.norm(&mut found, i);
        if past.is_none() {
            let _ = self
                .gate(&mut found, i)
                .or_else(|| self.heads(&mut found, i, l));
        }
        (found.pairs.fits() && self.apart(&found)).then_some(found)
    }
    /// Weights and adapters, if they may be read ahead of time.
    fn parts(&self, step: &Step, l: &Linear) -> Option<Vec<Part>> {
        row_weights(self.target, &step.spec, l).then_some(())?;
        let constant = |i: usize| {
            let span = &step.reads[i];
            self.constant(span).then(|| self.address(span))?
        };
        let one = |(b, at): (&tallow_core::op::Block, tallow_core::op::LinearIns)| {
            let adapter = match (b.adapters[0], at.ab[0]) {
                (Some((r, scale)), Some((a, bb))) => {
                    Some((r, scale.get(), constant(a)?, constant(bb)?))
                }
                _ => None,
            };
            let bias = match at.bias {
                Some(i) => Some(constant(i)?),
                None => None,
            };
            Some(Part {
                n: b.n,
                w: constant(at.w)?,
                bias,
                adapter,
            })
        };
        l.blocks.iter().zip(l.ins()).map(one).collect()
    }
    /// Takes in the norm in front, if nobody else reads what it makes.
    fn norm(&self, found: &mut Found, i: usize) -> Option<()> {
        let step = self.step(i.checked_sub(1)?)?;
        let Body::Composite(Composite::RmsNorm(n)) = &step.spec.body else {
            return None;
        };
        let made = step.writes[0].as_ref()?;
        let alone = made.root == found.source && self.readers(made.root) == [i];
        let w = &step.reads[1];
        if !alone
            || made.place != Place::Arena
            || !dense_f32(&step.spec, &[0, 1])
            || !self.constant(w)
        {
            return None;
        }
        let (x, w) = (self.address(&step.reads[0])?, self.address(w)?);
        found.pairs.x = x;
        found.pairs.norm = Some((w, n.eps.get()));
        found.source = step.reads[0].root;
        found.first = i - 1;
        Some(())
    }
    /// Takes in the gate behind.
    fn gate(&self, found: &mut Found, i: usize) -> Option<()> {
        let (linear, step) = (self.step(i)?, self.step(i + 1)?);
        let Body::Composite(Composite::SwiGlu(_)) = &step.spec.body else {
            return None;
        };
        let (y, made) = (linear.writes[0].as_ref()?, step.writes[0].as_ref()?);
        let n = step.spec.inputs[0].layout.shape.last();
        let all: usize = found.pairs.parts.iter().map(|p| p.n).sum();
        let halves = [0, n * 4].map(|o| y.offset + o);
        let lie = step.reads.iter().map(|r| (r.root, r.offset));
        let fits = lie.eq(halves.map(|o| (y.root, o))) && all == 2 * n;
        if !fits || self.readers(y.root) != [i + 1] || y.place != Place::Arena {
            return None;
        }
        found.pairs.y = self.address(made)?;
        found.pairs.kind = Kind::Gate;
        found.makes = made.root;
        found.last = i + 1;
        Some(())
    }
    /// Takes in the rotation of queries and keys, and both writes to the cache.
    fn heads(&self, found: &mut Found, i: usize, l: &Linear) -> Option<()> {
        let (linear, rope) = (self.step(i)?, self.step(i + 1)?);
        let writes = [self.step(i + 2)?, self.step(i + 3)?];
        let Body::Composite(Composite::Rope(r)) = &rope.spec.body else {
            return None;
        };
        let is_write = |s: &Step| matches!(s.spec.body, Body::Composite(Composite::KvWrite(_)));
        let &[1, 1, turned, d] = &rope.spec.inputs[0].layout.shape.0[..] else {
            return None;
        };
        if r.inverse || !writes.into_iter().all(is_write) {
            return None;
        }
        let &[1, slots, keys, _] = &writes[0].spec.inputs[0].layout.shape.0[..] else {
            return None;
        };
        let (y, qk) = (linear.writes[0].as_ref()?, rope.writes[0].as_ref()?);
        let new = writes.map(|s| (s.reads[1].root, s.reads[1].offset));
        let queries = turned.checked_sub(keys)?;
        let from = [
            (qk.root, qk.offset + queries * d * 4),
            (y.root, y.offset + turned * d * 4),
        ];
        let pos = self.address(&rope.reads[1])?;
        let same_pos = writes
            .iter()
            .all(|s| self.address(&s.reads[2]) == Some(pos));
        let f32s = dense_f32(&rope.spec, &[0, 2]) && rope.spec.outputs[0].as_ref()?.is_dense();
        let caches = writes
            .iter()
            .all(|s| dense_f32(&s.spec, &[0]) && s.spec.inputs[1].layout.strides[2] == d);
        let alone = self.readers(y.root) == [i + 1, i + 3] && y.place == Place::Arena;
        let outputs: usize = l.blocks.iter().map(|b| b.n).sum();
        let whole = outputs == (turned + keys) * d && d % 2 == 0;
        if new != from
            || (rope.reads[0].root, rope.reads[0].offset) != (y.root, y.offset)
            || !same_pos
        {
            return None;
        }
        if !f32s || !caches || !alone || !whole || !self.constant(&rope.reads[2]) {
            return None;
        }
        let cache = |s: &Step| {
            let (old, new) = (
                self.address(&s.reads[0])?,
                self.address(s.writes[0].as_ref()?)?,
            );
            (old == new).then_some(new)
        };
        found.pairs.kind = Kind::Heads(Heads {
            queries,
            keys,
            d,
            slots: u32::try_from(slots).ok()?,
            pos,
            freq: self.address(&rope.reads[2])?,
            cache: [cache(writes[0])?, cache(writes[1])?],
        });
        found.pairs.y = self.address(qk)?;
        found.makes = qk.root;
        found.last = i + 3;
        Some(())
    }
    /// Does the launch write nothing that it reads, and nothing that a step it takes in would have read later?
    fn apart(&self, found: &Found) -> bool {
        let steps = &self.plan.steps[found.first..=found.last];
        let inner: Vec<u32> = steps[..steps.len() - 1]
            .iter()
            .flat_map(ends)
            .map(|w| w.root)
            .collect();
        let range = |s: &Span| self.address(s).map(|a| (a, a + s.bytes as u64));
        let is_cache = |s: &Step| matches!(s.spec.body, Body::Composite(Composite::KvWrite(_)));
        let reads = steps.iter().flat_map(|s| {
            let from = usize::from(is_cache(s));
            s.reads[from..].iter().filter(|r| !inner.contains(&r.root))
        });
        let reads: Vec<_> = reads.filter_map(range).collect();
        let makes = |w: &&Span| w.root == found.makes || matches!(w.place, Place::Input(_));
        let mut writes = steps.iter().flat_map(ends).filter(makes).filter_map(range);
        writes.all(|(a, b)| reads.iter().all(|(c, d)| b <= *c || *d <= a))
    }
    /// The attention whose result `found` reads, if it can leave parts behind, and how many.
    fn attention(
        &self,
        found: &Found,
        offers: &[Offer],
        out: &mut Fused,
    ) -> Option<(usize, usize)> {
        let i = self.writer(found.source)?;
        let step = self.step(i)?;
        let Body::Composite(Composite::Attention(a)) = &step.spec.body else {
            return None;
        };
        let dense = step.spec.outputs[0].as_ref()?.is_dense();
        let free = offers[i].name == "attention_decode_f32" && !out.jobs.contains_key(&i);
        if !free || !dense || found.pairs.norm.is_some() {
            return None;
        }
        let next = found.pairs.wants(Arg::Own(0));
        let (_, count) = attention_then(a, &step.spec, &next)?;
        Some((i, count))
    }
    /// Outer products one after another that do not read each other: one launch.
    fn outers(&self, offers: &[Offer], out: &mut Fused) {
        // One launch after another uses the same memory for parts.
        let (mut i, mut most) = (0, 0);
        while i < offers.len() {
            let run = self.run_of_outers(i, offers);
            if run.len() > 1 {
                let jobs = run.iter().map(|(o, args)| (*o, args.map(Arg::U64)));
                let all: Vec<_> = jobs.collect();
                if let Some((job, bytes)) = side_by_side(&all, Arg::Own(0)) {
                    for k in 0..run.len() - 1 {
                        out.jobs.insert(i + k, vec![]);
                    }
                    out.jobs.insert(i + run.len() - 1, vec![job]);
                    most = most.max(bytes);
                }
            }
            i += run.len().max(1);
        }
        out.own_bytes = most.next_multiple_of(256);
    }
    /// The products from step `i` on that join, with their addresses.
    fn run_of_outers(&self, i: usize, offers: &[Offer]) -> Vec<(Outer, [u64; 3])> {
        let mut run: Vec<(Outer, [u64; 3])> = vec![];
        let (mut read, mut written): (Vec<Range>, Vec<Range>) = (vec![], vec![]);
        let range = |s: &Span| self.address(s).map(|a| (a, a + s.bytes as u64));
        let clear = |these: &[Range], of: &[Range]| {
            these
                .iter()
                .all(|(a, b)| of.iter().all(|(c, d)| b <= c || d <= a))
        };
        for (step, offer) in self.plan.steps.iter().zip(offers).skip(i) {
            let here = || {
                let o = (offer.name == OUTER_NAME).then(|| Outer::of(&step.spec))??;
                let [few, many] = o.at.map(|k| self.address(&step.reads[k]));
                Some((o, [few?, many?, self.address(step.writes[0].as_ref()?)?]))
            };
            let reads: Vec<_> = step.reads.iter().filter_map(range).collect();
            let writes: Vec<_> = ends(step).filter_map(range).collect();
            let apart =
                clear(&reads, &written) && clear(&writes, &read) && clear(&writes, &written);
            match here() {
                Some(one) if apart && run.first().is_none_or(|r| r.0.joins(&one.0)) => {
                    run.push(one)
                }
                _ => break,
            }
            read.extend(reads);
            written.extend(writes);
            if run.len() == MOST_OUTERS {
                break;
            }
        }
        run
    }
}
