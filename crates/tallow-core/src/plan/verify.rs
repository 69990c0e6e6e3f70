//! Checks a finished plan from its bytes alone, knowing nothing of how it was made.
use super::{Body, Place, Plan, Span};
use crate::{Error, Result};

/// Bytes of one place that hold a value.
struct Held {
    place: Place,
    from: usize,
    to: usize,
    root: u32,
}

fn overlaps(a: &Span, b: &Span) -> bool {
    a.place == b.place && a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes
}

impl Plan {
    /// The safety argument of every backend rests on this: every byte read of the arena was
    /// written by an earlier step and not given to another value since; a step overwrites an
    /// operand only where it reads each element before writing it; nothing leaves its buffer.
    pub fn verify(&self) -> Result<()> {
        let mut held: Vec<Held> = vec![];
        for (i, s) in self.steps.iter().enumerate() {
            let bad = |what: String| Err(Error::PlanInvariant { step: i, what });
            for r in s
                .reads
                .iter()
                .chain(s.writes.iter().flatten())
                .chain(&s.workspace)
            {
                if r.offset + r.bytes > self.size(r.place) {
                    return bad(format!("{r:?} leaves its memory"));
                }
            }
            for r in s
                .reads
                .iter()
                .filter(|r| r.place == Place::Arena && r.bytes > 0)
            {
                let inside = |h: &Held| {
                    h.place == r.place
                        && h.root == r.root
                        && h.from < r.offset + r.bytes
                        && r.offset < h.to
                };
                if !held.iter().any(inside) {
                    return bad(format!("reads {r:?}, which nobody wrote"));
                }
            }
            for (k, w) in s.writes.iter().enumerate() {
                let Some(w) = w else { continue };
                if s.workspace.is_some_and(|x| overlaps(w, &x)) {
                    return bad(format!("writes {w:?} over its own workspace"));
                }
                if s.writes[..k]
                    .iter()
                    .flatten()
                    .any(|o| overlaps(w, o) && w.root != o.root)
                {
                    return bad(format!("writes {w:?} twice"));
                }
                for (j, r) in s.reads.iter().enumerate() {
                    let may = match &s.spec.body {
                        Body::Map(_) => true,
                        Body::Composite(c) => c.in_place(k) == Some(j),
                        _ => false,
                    };
                    let exact = r.offset == w.offset && r.bytes == w.bytes;
                    if overlaps(w, r) && !(may && exact) {
                        return bad(format!("writes {w:?} over its own operand {r:?}"));
                    }
                }
                self.hold(&mut held, w);
            }
            if let Some(w) = &s.workspace {
                if s.reads.iter().any(|r| overlaps(r, w)) {
                    return bad(format!("uses {w:?} over its own operand"));
                }
                held.retain(|h| {
                    h.place != w.place || h.to <= w.offset || w.offset + w.bytes <= h.from
                });
            }
        }
        Ok(())
    }
    fn hold(&self, held: &mut Vec<Held>, w: &Span) {
        let (from, to) = (w.offset, w.offset + w.bytes);
        let gone = |h: &Held| h.place == w.place && h.root != w.root && h.from < to && from < h.to;
        held.retain(|h| !gone(h));
        held.push(Held {
            place: w.place,
            from,
            to,
            root: w.root,
        });
    }
    fn size(&self, p: Place) -> usize {
        match p {
            Place::Input(i) => self.inputs.get(i as usize).map_or(0, |x| x.1),
            Place::Prepared(i) => self.prepared.get(i as usize).map_or(0, |p| p.format.bytes),
            Place::Output(i) => self.outputs.get(i as usize).copied().unwrap_or(0),
            Place::Arena => self.arena_bytes,
        }
    }
}
