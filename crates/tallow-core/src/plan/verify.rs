//! Checks a finished plan from its bytes alone, knowing nothing of how it was made.
use super::{Body, Place, Plan, Span, Step};
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

/// Do values of its root lie in every byte of `r`?
fn written(held: &[Held], r: &Span) -> bool {
    let mut own: Vec<&Held> = held
        .iter()
        .filter(|h| h.place == r.place && h.root == r.root)
        .collect();
    own.sort_by_key(|h| h.from);
    let upto = own.iter().fold(r.offset, |upto, h| match h.from <= upto {
        true => upto.max(h.to),
        false => upto,
    });
    upto >= r.offset + r.bytes
}

/// Does result `k` of `s`, at `w`, leave alone what the step still reads?
fn may_write(s: &Step, k: usize, w: &Span) -> Result<(), String> {
    if s.workspace.is_some_and(|x| overlaps(w, &x)) {
        return Err(format!("writes {w:?} over its own workspace"));
    }
    let mut before = s.writes[..k].iter().flatten();
    if before.any(|o| overlaps(w, o) && w.root != o.root) {
        return Err(format!("writes {w:?} twice"));
    }
    for (j, r) in s.reads.iter().enumerate() {
        let may = match &s.spec.body {
            Body::Map(_) => true,
            Body::Composite(c) => c.in_place(k) == Some(j),
            _ => false,
        };
        let exact = r.offset == w.offset && r.bytes == w.bytes;
        if overlaps(w, r) && !(may && exact) {
            return Err(format!("writes {w:?} over its own operand {r:?}"));
        }
    }
    Ok(())
}

impl Plan {
    /// The safety argument of every backend rests on this: every byte read of the arena was
    /// written by an earlier step and not given to another value since; a step overwrites an
    /// operand only where it reads each element before writing it; nothing leaves its buffer.
    pub fn verify(&self) -> Result<()> {
        let mut held: Vec<Held> = vec![];
        for (i, s) in self.steps.iter().enumerate() {
            self.verify_step(s, &mut held)
                .map_err(|what| Error::PlanInvariant { step: i, what })?;
        }
        Ok(())
    }
    fn verify_step(&self, s: &Step, held: &mut Vec<Held>) -> Result<(), String> {
        let writes = || s.writes.iter().flatten();
        for r in s.reads.iter().chain(writes()).chain(&s.workspace) {
            if r.offset + r.bytes > self.size(r.place) {
                return Err(format!("{r:?} leaves its memory"));
            }
        }
        for r in s.reads.iter().filter(|r| r.place == Place::Arena) {
            if !written(held, r) {
                return Err(format!("reads {r:?}, which nobody wrote"));
            }
        }
        for (k, w) in s.writes.iter().enumerate() {
            let Some(w) = w else { continue };
            may_write(s, k, w)?;
            self.hold(held, w);
        }
        if let Some(w) = &s.workspace {
            if s.reads.iter().any(|r| overlaps(r, w)) {
                return Err(format!("uses {w:?} over its own operand"));
            }
            held.retain(|h| h.place != w.place || h.to <= w.offset || w.offset + w.bytes <= h.from);
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
