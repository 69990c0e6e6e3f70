//! Runs of steps of a plan that one launch does: a token's way through a model.
//! Invariant: a run is steps without a gap, each of which the launch can do; what attention makes is read by the linear
//! behind it alone, and an `h` is made of what the step before made.
//! Absent on purpose: the launch itself; that is `glue::chain`.
use super::{Finder, Found, ends};
use crate::{
    glue::{
        chain::{Cached, Link},
        pairs::Kind,
    },
    launch::Offer,
};
use tallow_core::{
    kernel::Body,
    op::{Composite, Mask},
    plan::Place,
};

/// Fewer steps than this are no run.
const LEAST: usize = 4;
/// Projections of a linear that the launch takes.
const MOST_PARTS: usize = 3;

/// Steps `first..=last` as one launch.
pub(super) struct Run<'a> {
    pub(super) first: usize,
    pub(super) last: usize,
    pub(super) links: Vec<Link<'a>>,
    /// Address of the position.
    pub(super) pos: u64,
}

/// What the step before made.
#[derive(Clone, Copy)]
enum Made {
    Nothing,
    /// A value of a linear, which leaves parts of an `h` behind.
    Row(u32),
    Attention(u32),
    /// Something that leaves nothing behind.
    Other,
}

/// All runs of a plan, first to last.
pub(super) fn runs<'a>(f: &Finder, all: &'a [Found], offers: &[Offer]) -> Vec<Run<'a>> {
    let (mut out, mut i) = (vec![], 0);
    while i < f.plan.steps.len() {
        let run = run(f, i, all, offers);
        let long = run.links.len() >= LEAST && run.keeps_its_position(f);
        i = if long { run.last } else { i } + 1;
        out.extend(long.then_some(run));
    }
    out
}

fn run<'a>(f: &Finder, first: usize, all: &'a [Found], offers: &[Offer]) -> Run<'a> {
    let mut run = Run {
        first,
        last: first,
        links: vec![],
        pos: 0,
    };
    let (mut at, mut made) = (first, Made::Nothing);
    while at < f.plan.steps.len() {
        let next = linear(f, all, at, made, &mut run)
            .or_else(|| attention(f, at, offers, &mut run))
            .or_else(|| top(f, at, made, offers, &mut run));
        let Some((last, makes)) = next else { break };
        // What attention leaves behind is for the linear next to it.
        if !matches!(makes, Made::Attention(_)) {
            run.last = last;
        }
        (at, made) = (last + 1, makes);
    }
    if let Some(Link::Attention(_)) = run.links.last() {
        run.links.pop();
    }
    run
}

impl Run<'_> {
    /// The same position for all, and one that no step changes.
    fn at(&mut self, pos: u64) -> bool {
        let fits = self.pos == 0 || self.pos == pos;
        self.pos = pos;
        fits
    }
    /// The position is read once, ahead of all steps: it may change behind the run only.
    fn keeps_its_position(&self, f: &Finder) -> bool {
        let steps = &f.plan.steps[self.first..=self.last];
        let mut writes = steps.iter().flat_map(ends);
        writes.all(|w| {
            let at = f.address(w);
            at.is_some_and(|a| self.pos + 4 <= a || a + w.bytes as u64 <= self.pos)
        })
    }
}

/// The linear that begins at step `at`.
fn linear<'a>(
    f: &Finder,
    all: &'a [Found],
    at: usize,
    made: Made,
    run: &mut Run<'a>,
) -> Option<(usize, Made)> {
    let found = all.iter().find(|l| l.first == at)?;
    let p = &found.pairs;
    let plain = p.norm.is_none() && matches!(p.kind, Kind::Plain);
    let h = match made {
        // A launch in front makes it.
        Made::Nothing => true,
        Made::Row(v) => p.rank() == 0 || v == found.source,
        Made::Attention(v) => plain && v == found.source && f.readers(v) == [at],
        Made::Other => p.rank() == 0,
    };
    let pos = match &p.kind {
        Kind::Heads(h) => run.at(h.pos) && h.d.is_multiple_of(4),
        _ => true,
    };
    if !h || !pos || p.parts.len() > MOST_PARTS {
        return None;
    }
    run.links.push(Link::Linear(p));
    let makes = match p.kind {
        Kind::Heads(_) => Made::Other,
        _ => Made::Row(found.makes),
    };
    Some((found.last, makes))
}

/// Attention of one token at step `at`.
fn attention(f: &Finder, at: usize, offers: &[Offer], run: &mut Run) -> Option<(usize, Made)> {
    let step = f.step(at)?;
    let Body::Composite(Composite::Attention(a)) = &step.spec.body else {
        return None;
    };
    let Mask::Causal { window } = a.mask else {
        return None;
    };
    let [q, k, v, _] = &step.spec.inputs[..] else {
        return None;
    };
    let &[1, 1, queries, d] = &q.layout.shape.0[..] else {
        return None;
    };
    let &[1, slots, keys, _] = &k.layout.shape.0[..] else {
        return None;
    };
    let o = step.writes[0].as_ref()?;
    let statistics = step.writes.get(1).is_some_and(Option::is_some);
    let rows = q.layout.strides[2] == d && q.layout.strides[3] == 1;
    let simple = rows && k.is_dense() && v.is_dense() && !statistics && o.place == Place::Arena;
    // The launch bends no scores.
    if offers[at].name != "attention_decode_f32" || !simple || a.cap.is_some() {
        return None;
    }
    let cached = Cached {
        q: f.address(&step.reads[0])?,
        cache: [f.address(&step.reads[1])?, f.address(&step.reads[2])?],
        queries,
        keys,
        d,
        slots: u32::try_from(slots).ok()?,
        scale: a.scale.get(),
        window: window.unwrap_or(0),
    };
    let pos = f.address(&step.reads[3])?;
    (cached.fits() && run.at(pos)).then_some(())?;
    run.links.push(Link::Attention(cached));
    Some((at, Made::Attention(o.root)))
}

/// The likeliest output of the linear before step `at`.
fn top(
    f: &Finder,
    at: usize,
    made: Made,
    offers: &[Offer],
    run: &mut Run,
) -> Option<(usize, Made)> {
    let step = f.step(at)?;
    let Made::Row(row) = made else { return None };
    let one = step.spec.inputs.first()?.layout.shape.rows() == 1;
    let plain = matches!(run.links.last(), Some(Link::Linear(p)) if matches!(p.kind, Kind::Plain));
    let fits = offers[at].name == "top_f32" && step.reads[0].root == row && one && plain;
    fits.then_some(())?;
    run.links
        .push(Link::Top(f.address(step.writes[0].as_ref()?)?));
    Some((at, Made::Other))
}
