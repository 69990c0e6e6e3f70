//! Norms and gates of many rows that the launch in front of a product with adapters makes itself.
//! Invariant: nothing that the joined launch writes lies where it reads; rows that another step reads too are left where they
//! would have been.
//! Absent on purpose: one row; its linears have launches of their own.
use super::{Finder, Fused, Range, ends};
use crate::{
    glue::{
        self,
        framed::{Front, Kind},
    },
    launch::{Arg, Offer},
};
use tallow_core::{
    kernel::{Body, Operand},
    op::Composite,
    plan::{Place, Span, Step},
    types::DType,
};

impl Finder<'_> {
    /// Joins every such step with the one in front of it.
    pub(super) fn fronts(&self, offers: &[Offer], out: &mut Fused) {
        for (i, offer) in offers.iter().enumerate().skip(1) {
            let free = |i: usize| !out.jobs.contains_key(&i);
            if offer.name != glue::TAIL || !free(i) || !free(i - 1) {
                continue;
            }
            let Some(Body::Composite(Composite::Linear(l))) = self.step(i).map(|s| &s.spec.body)
            else {
                continue;
            };
            let joined = self
                .front(i)
                .and_then(|front| glue::behind(self.target, l, &self.plan.steps[i].spec, front));
            if let Some(jobs) = joined {
                out.jobs.insert(i - 1, vec![]);
                out.jobs.insert(i, jobs);
            }
        }
    }
    /// What step `i - 1` makes for the linear that is step `i`.
    fn front(&self, i: usize) -> Option<Front> {
        let (step, linear) = (self.step(i - 1)?, self.step(i)?);
        let made = step.writes[0].as_ref()?;
        let result = step.spec.outputs[0].as_ref()?;
        let read = linear.reads.first()?;
        let same = (read.root, read.offset, read.bytes) == (made.root, made.offset, made.bytes);
        if !same || !alike(result, &linear.spec.inputs[0]) {
            return None;
        }
        let row = |o: &Operand| o.layout.row_stride();
        let address = |n: usize| self.address(&step.reads[n]).map(Arg::U64);
        let x = &step.spec.inputs[0];
        let kind = match &step.spec.body {
            Body::Composite(Composite::RmsNorm(n)) => {
                let w = &step.spec.inputs[1];
                (w.is_dense() && w.dtype == DType::F32).then_some(())?;
                Kind::Norm {
                    w: address(1)?,
                    eps: n.eps.get(),
                }
            }
            Body::Composite(Composite::SwiGlu(_)) => {
                let up = &step.spec.inputs[1];
                (up.dtype == x.dtype).then_some(())?;
                Kind::Gate {
                    up: address(1)?,
                    row: row(up)?,
                }
            }
            _ => return None,
        };
        let again = linear.reads[1..].iter().any(|r| r.root == made.root);
        let alone = self.readers(made.root) == [i] && !again && made.place == Place::Arena;
        let plain = match alone {
            true => None,
            false => Some((Arg::U64(self.address(made)?), row(result)?, result.dtype)),
        };
        let front = Front {
            kind,
            x: address(0)?,
            row: row(x)?,
            dtype: x.dtype,
            plain,
        };
        let clear = self.clear(step, linear, plain.map(|_| made));
        (clear && front.fits(x.layout.shape.last())).then_some(front)
    }
    /// Does the joined launch write nothing where it reads? The product's own result is written by a later launch.
    fn clear(&self, step: &Step, linear: &Step, plain: Option<&Span>) -> bool {
        let range = |s: &Span| self.address(s).map(|a| (a, a + s.bytes as u64));
        let kept = linear.reads[1..].iter();
        let reads: Option<Vec<Range>> = step.reads.iter().chain(kept).map(range).collect();
        let hidden = ends(linear).skip(usize::from(linear.writes[0].is_some()));
        let writes = hidden.chain(&linear.workspace).chain(plain);
        let writes: Option<Vec<Range>> = writes.map(range).collect();
        let (Some(reads), Some(writes)) = (reads, writes) else {
            return false;
        };
        let apart = |(a, b): &Range| reads.iter().all(|(c, d)| b <= c || d <= a);
        writes.iter().all(apart)
    }
}

/// Have both the same rows, one behind the other in the same way?
fn alike(made: &Operand, read: &Operand) -> bool {
    let shape = |o: &Operand| {
        let l = &o.layout;
        (l.shape.rows(), l.shape.last(), l.row_stride())
    };
    made.dtype == read.dtype && shape(made) == shape(read) && made.layout.row_stride().is_some()
}
