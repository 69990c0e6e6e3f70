//! Decides where every root lives: in a bound buffer, in the place of an operand that dies, or in the arena.
use super::{Draft, Place, Plan, Prepared, Span, Step, arena};
use crate::{
    backend::Backend,
    kernel::Body,
    op::Role,
    pass::fuse::{Root, RootId, RootKind, View},
};

/// How each update of state reaches its slot.
pub(super) struct Pending {
    /// Roots computed straight into an input's buffer: root and slot.
    pub(super) in_place: Vec<(RootId, u32)>,
    /// Values to be copied at the end.
    pub(super) copies: Vec<(View, u32)>,
}

/// Does `v` cover all of its root, in order?
fn whole(roots: &[Root], v: &View) -> bool {
    let full = v.layout.shape.numel() == roots[v.root.index()].elems;
    full && v.layout.offset == 0 && v.layout.is_contiguous()
}

fn writer(drafts: &[Draft], root: RootId) -> Option<(usize, usize)> {
    let mut found = None;
    for (t, d) in drafts.iter().enumerate() {
        for (k, w) in d.writes.iter().enumerate() {
            if w.as_ref().is_some_and(|w| w.root == root) {
                if found.is_some() {
                    return None; // several writers
                }
                found = Some((t, k));
            }
        }
    }
    found
}

/// May result `k` of `d` be written over operand root `old`?
fn elementwise(roots: &[Root], d: &Draft, k: usize, old: RootId) -> bool {
    let mut reads = d.reads.iter().enumerate().filter(|(_, v)| v.root == old);
    match &d.spec.body {
        Body::Map(_) => reads.all(|(_, v)| whole(roots, v)),
        Body::Composite(c) => reads.all(|(j, v)| c.in_place(k) == Some(j) && whole(roots, v)),
        _ => reads.next().is_none(),
    }
}

/// Decides for every update whether its value can be computed in the state's own buffer:
/// nobody may read the old value after the step that writes the new one.
pub(super) fn pending_updates(
    roots: &[Root],
    drafts: &[Draft],
    updates: &[(u32, View)],
) -> Pending {
    let mut out = Pending {
        in_place: vec![],
        copies: vec![],
    };
    let input = |slot: u32| {
        let is = |r: &Root| matches!(r.kind, RootKind::Input(s, _) if s == slot);
        roots.iter().position(is).map(|i| RootId(i as u32))
    };
    for (slot, v) in updates {
        let fits = input(*slot)
            .zip(writer(drafts, v.root))
            .is_some_and(|(old, (t, k))| {
                let late = |d: &Draft| d.reads.iter().any(|r| r.root == old);
                let same_size = roots[old.index()].elems == roots[v.root.index()].elems;
                let wanted_later = updates.iter().any(|(_, w)| w.root == old);
                let taken = out.in_place.iter().any(|(r, _)| *r == v.root);
                same_size
                    && !taken
                    && !wanted_later
                    && whole(roots, v)
                    && !drafts[t + 1..].iter().any(late)
                    && elementwise(roots, &drafts[t], k, old)
            });
        if fits {
            out.in_place.push((v.root, *slot));
        } else {
            out.copies.push((v.clone(), *slot));
        }
    }
    out
}

/// First and last step that touches each root, following roots that share storage.
fn lifetimes(
    drafts: &[Draft],
    n: usize,
    rep: impl Fn(RootId) -> RootId,
) -> Vec<Option<(usize, usize)>> {
    let mut lives: Vec<Option<(usize, usize)>> = vec![None; n];
    for (t, d) in drafts.iter().enumerate() {
        for v in d.reads.iter().chain(d.writes.iter().flatten()) {
            let l = lives[rep(v.root).index()].get_or_insert((t, t));
            l.1 = t;
        }
    }
    lives
}

/// For each step, whether a device may do it together with the next, which reads what it makes.
fn joined(drafts: &[Draft], be: &dyn Backend) -> Vec<bool> {
    let both = |w: &[Draft]| {
        let made = |r: RootId| w[0].writes.iter().flatten().any(|v| v.root == r);
        w[1].reads.iter().any(|v| made(v.root)) && be.joins(&w[0].spec, &w[1].spec)
    };
    drafts.windows(2).map(both).collect()
}

/// Turns drafts into steps with memory.
pub(super) fn place(
    roots: Vec<Root>,
    drafts: Vec<Draft>,
    outputs: &[RootId],
    in_state: &[(RootId, u32)],
    be: &dyn Backend,
) -> Plan {
    let homes = Homes::find(&roots, &drafts, outputs, in_state, be);
    let mut plan = Plan {
        steps: vec![],
        prepared: vec![],
        arena_bytes: homes.arena_bytes,
        naive_bytes: homes.naive_bytes,
        inputs: input_sizes(&roots),
        outputs: outputs.iter().map(|r| bytes(&roots[r.index()])).collect(),
    };
    for (t, d) in drafts.into_iter().enumerate() {
        let mut reads: Vec<Span> = d.reads.iter().map(|v| homes.span(&roots, v)).collect();
        for (k, format) in &d.chosen.prepare {
            let Place::Input(slot) = reads[*k].place else {
                continue;
            };
            let at = plan.prepared_as(Prepared {
                slot,
                offset: reads[*k].offset,
                operand: d.spec.inputs[*k].clone(),
                format: *format,
            });
            reads[*k] = Span {
                place: Place::Prepared(at),
                offset: 0,
                bytes: format.bytes,
                ..reads[*k]
            };
        }
        let write = |w: &Option<View>| w.as_ref().map(|v| homes.span(&roots, v));
        plan.steps.push(Step {
            kernel: d.chosen.kernel,
            kernel_name: d.chosen.name,
            cost: d.chosen.cost,
            why: d.chosen.why,
            rejected: d.chosen.rejected,
            reads,
            writes: d.writes.iter().map(write).collect(),
            workspace: homes.workspace(t, d.chosen.workspace),
            spec: d.spec,
            note: d.note,
        });
    }
    plan
}

impl Plan {
    /// Index of `p`, which many steps may share.
    fn prepared_as(&mut self, p: Prepared) -> u32 {
        let known = self.prepared.iter().position(|q| *q == p);
        let at = known.unwrap_or_else(|| {
            self.prepared.push(p);
            self.prepared.len() - 1
        });
        at as u32
    }
}

fn bytes(r: &Root) -> usize {
    r.elems * r.dtype.bytes()
}

/// Where every root and every step's workspace lies.
struct Homes {
    /// By root: an input's or an output's buffer.
    fixed: Vec<Option<Place>>,
    /// By root: the one whose place it takes.
    share: Vec<Option<RootId>>,
    /// By root: its offset in the arena, where it has one.
    arena: Vec<Option<usize>>,
    /// By step: the offset of its workspace.
    workspaces: Vec<usize>,
    arena_bytes: usize,
    naive_bytes: usize,
}

impl Homes {
    fn find(
        roots: &[Root],
        drafts: &[Draft],
        outputs: &[RootId],
        in_state: &[(RootId, u32)],
        be: &dyn Backend,
    ) -> Self {
        let mut fixed: Vec<Option<Place>> = roots
            .iter()
            .map(|r| match r.kind {
                RootKind::Input(slot, _) => Some(Place::Input(slot)),
                RootKind::Computed => None,
            })
            .collect();
        for (r, slot) in in_state {
            fixed[r.index()] = Some(Place::Input(*slot));
        }
        for (k, r) in outputs.iter().enumerate() {
            fixed[r.index()] = Some(Place::Output(k as u32));
        }
        let share = share_dying(roots, drafts, &fixed);
        let mut homes = Homes {
            fixed,
            share,
            arena: vec![None; roots.len()],
            workspaces: vec![],
            arena_bytes: 0,
            naive_bytes: 0,
        };
        homes.pack(roots, drafts, be);
        homes
    }
    /// Gives a place in the arena to every root that has none elsewhere, and to every workspace.
    fn pack(&mut self, roots: &[Root], drafts: &[Draft], be: &dyn Backend) {
        let mut lives = lifetimes(drafts, roots.len(), |r| self.rep(r));
        // One launch for two steps writes what the second makes while it reads what the first does.
        for (t, both) in joined(drafts, be).into_iter().enumerate() {
            for v in drafts[t].reads.iter().filter(|_| both) {
                let life = &mut lives[self.rep(v.root).index()];
                *life = life.map(|(first, last)| (first, last.max(t + 1)));
            }
        }
        let computed = |i: &usize| self.fixed[*i].is_none();
        self.naive_bytes = (0..roots.len())
            .filter(computed)
            .filter(|i| lives[self.rep(RootId(*i as u32)).index()].is_some())
            .map(|i| bytes(&roots[i]))
            .sum();
        let wanted: Vec<(usize, arena::Life)> = (0..roots.len())
            .filter(computed)
            .filter_map(|i| {
                let (first, last) = lives[i]?;
                let bytes = bytes(&roots[i]);
                Some((i, arena::Life { bytes, first, last }))
            })
            .collect();
        let during = |(t, d): (usize, &Draft)| arena::Life {
            bytes: d.chosen.workspace,
            first: t,
            last: t,
        };
        let workspaces = drafts.iter().enumerate().map(during);
        let all: Vec<arena::Life> = wanted.iter().map(|w| w.1).chain(workspaces).collect();
        let (offsets, arena_bytes) = arena::pack(&all, be.info().arena);
        for ((i, _), at) in wanted.iter().zip(&offsets) {
            self.arena[*i] = Some(*at);
        }
        self.workspaces = offsets[wanted.len()..].to_vec();
        self.arena_bytes = arena_bytes;
    }
    /// The root whose memory `r` lies in.
    fn rep(&self, mut r: RootId) -> RootId {
        while let Some(next) = self.share[r.index()] {
            r = next;
        }
        r
    }
    fn span(&self, roots: &[Root], v: &View) -> Span {
        let r = self.rep(v.root).index();
        let (place, base) = match (self.fixed[r], self.arena[r]) {
            (Some(place), _) => (place, 0),
            (None, Some(at)) => (Place::Arena, at),
            (None, None) => unreachable!("a root that a step touches has a life (bug in tallow)"),
        };
        let size = roots[v.root.index()].dtype.bytes();
        Span {
            place,
            offset: base + v.layout.offset * size,
            bytes: (v.layout.end() - v.layout.offset) * size,
            root: v.root.0,
        }
    }
    fn workspace(&self, step: usize, bytes: usize) -> Option<Span> {
        (bytes > 0).then(|| Span {
            place: Place::Arena,
            offset: self.workspaces[step],
            bytes,
            root: u32::MAX,
        })
    }
}

fn input_sizes(roots: &[Root]) -> Vec<(Role, usize)> {
    let mut v: Vec<(u32, Role, usize)> = roots
        .iter()
        .filter_map(|r| match r.kind {
            RootKind::Input(slot, role) => Some((slot, role, r.elems * r.dtype.bytes())),
            RootKind::Computed => None,
        })
        .collect();
    v.sort_by_key(|x| x.0);
    v.into_iter()
        .map(|(_, role, bytes)| (role, bytes))
        .collect()
}

/// Elementwise results that take over an operand nobody reads afterwards: result root to operand root.
fn share_dying(roots: &[Root], drafts: &[Draft], fixed: &[Option<Place>]) -> Vec<Option<RootId>> {
    let mut share: Vec<Option<RootId>> = vec![None; roots.len()];
    let lives = lifetimes(drafts, roots.len(), |r| r);
    for (t, d) in drafts.iter().enumerate() {
        let mut given: Vec<RootId> = vec![];
        for (k, w) in d.writes.iter().enumerate() {
            let Some(w) = w else { continue };
            let born_here = lives[w.root.index()].is_some_and(|l| l.0 == t);
            if fixed[w.root.index()].is_some() || !born_here || !whole(roots, w) {
                continue;
            }
            let dies = |v: &&View| {
                let (a, b) = (&roots[v.root.index()], &roots[w.root.index()]);
                let last = lives[v.root.index()].is_some_and(|l| l.1 == t);
                last && fixed[v.root.index()].is_none()
                    && !given.contains(&v.root)
                    && v.root != w.root
                    && (a.elems, a.dtype) == (b.elems, b.dtype)
                    && whole(roots, v)
                    && takes_over(roots, d, k, v.root)
            };
            if let Some(v) = d.reads.iter().find(dies) {
                share[w.root.index()] = Some(v.root);
                given.push(v.root);
            }
        }
    }
    share
}

/// Like [`elementwise`], but only bodies that are known to read an element before writing it.
fn takes_over(roots: &[Root], d: &Draft, k: usize, old: RootId) -> bool {
    matches!(d.spec.body, Body::Map(_) | Body::Composite(_)) && elementwise(roots, d, k, old)
}
