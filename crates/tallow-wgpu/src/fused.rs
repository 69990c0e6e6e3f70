//! Neighbouring steps of a plan that fewer dispatches do: what stands around the products of a decoded token.
//! Invariant: a value that is no longer written is read by no other step; what is written lies nowhere that the same
//! dispatches read.
//! Absent on purpose: graphs. The plan stays as it was explained; a step that another's dispatches do has none.
use crate::{
    glue::{self, Around, Gate, Heads, Norm},
    launch::{Kernel, Offer},
    shader::Target,
};
use tallow_core::{
    backend::Launched,
    kernel::{Body, KernelSpec, Operand},
    op::{Composite, Linear},
    plan::{Place, Plan, Span, Step},
    types::DType,
};

/// Steps that run together.
pub(crate) struct Group {
    /// The first and the last of them; none between is left out.
    pub(crate) first: usize,
    pub(crate) last: usize,
    /// In which order their operands and results are numbered.
    pub(crate) order: Vec<usize>,
    pub(crate) jobs: Vec<Kernel>,
    /// Scratch in bytes, which is not in the plan.
    pub(crate) scratch: usize,
}

/// All groups of a plan, first to last; they share no step.
pub(crate) fn groups(t: &Target, plan: &Plan, offers: &[Offer]) -> Vec<Group> {
    let f = Finder { t, plan, offers };
    let (mut all, mut i) = (vec![], 0);
    while i < plan.steps.len() {
        match f.linear(i).or_else(|| f.heads(i)) {
            Some(g) => {
                i = g.last + 1;
                all.push(g);
            }
            None => i += 1,
        }
    }
    all
}

/// What a recording of `plan`, whose kernels are `offers`, dispatches.
pub(crate) fn launched(t: &Target, plan: &Plan, offers: &[Offer]) -> Vec<Launched> {
    let (groups, mut all, mut i) = (groups(t, plan, offers), vec![], 0);
    while i < offers.len() {
        let (last, launches) = match groups.iter().find(|g| g.first == i) {
            Some(g) => (g.last, g.jobs.iter().map(name).collect()),
            None if offers[i].gemm.is_some() => (i, vec![offers[i].name.to_owned()]),
            None => {
                let jobs = offers[i].jobs.iter();
                let needed = jobs.filter(|k| !lies_there(&plan.steps[i], k));
                (i, needed.map(name).collect())
            }
        };
        all.push(Launched {
            steps: i..=last,
            launches,
        });
        i = last + 1;
    }
    all
}

fn name(k: &Kernel) -> String {
    let [x, y, z] = k.grid.map(u64::from);
    format!("{} ({} workgroups)", k.entry, x * y * z)
}

/// Is `k` not needed, because its result already lies in place?
fn lies_there(step: &Step, k: &Kernel) -> bool {
    k.unless_same.is_some_and(|(operand, result)| {
        let (r, w) = (&step.reads[operand], step.writes[result].as_ref());
        w.is_some_and(|w| (r.place, r.offset) == (w.place, w.offset))
    })
}

struct Finder<'a> {
    t: &'a Target,
    plan: &'a Plan,
    offers: &'a [Offer],
}

fn f32s<'a>(mut all: impl Iterator<Item = &'a Operand>) -> bool {
    all.all(|o| o.dtype == DType::F32)
}

fn meet(a: &Span, b: &Span) -> bool {
    a.place == b.place && a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes
}

impl Finder<'_> {
    /// Steps numbered together: the operands and results of all.
    fn all(&self, order: &[usize]) -> KernelSpec {
        let specs = || order.iter().map(|i| &self.plan.steps[*i].spec);
        KernelSpec {
            body: self.plan.steps[order[0]].spec.body.clone(),
            inputs: specs().flat_map(|s| s.inputs.clone()).collect(),
            outputs: specs().flat_map(|s| s.outputs.clone()).collect(),
        }
    }
    /// Does step `i` alone read what `made` holds, in the plan's own memory?
    fn only(&self, made: &Span, readers: &[usize]) -> bool {
        let steps = self.plan.steps.iter().enumerate();
        let mut reads = steps.filter(|(_, s)| s.reads.iter().any(|r| r.root == made.root));
        made.place == Place::Arena && reads.all(|(i, _)| readers.contains(&i))
    }
    /// Does none of `writes` lie where the steps `order` read what none of them made? `gone`: values not made any more.
    fn apart(&self, order: &[usize], writes: &[&Span], gone: &[u32]) -> bool {
        let reads = order.iter().flat_map(|i| &self.plan.steps[*i].reads);
        let mut left = reads.filter(|r| !gone.contains(&r.root));
        left.all(|r| !writes.iter().any(|w| meet(r, w)))
    }

    /// A linear of few rows from step `i` on, with the norm in front of it or the gate behind it.
    fn linear(&self, i: usize) -> Option<Group> {
        let norm = self.norm(i);
        let at = if norm.is_some() { i + 1 } else { i };
        let step = self.plan.steps.get(at)?;
        let Body::Composite(Composite::Linear(l)) = &step.spec.body else {
            return None;
        };
        let few = self.offers[at].name.ends_with("linear_few");
        let alone = step.writes[1..].iter().all(Option::is_none);
        if !few || !alone || step.spec.inputs[0].dtype != DType::F32 {
            return None;
        }
        let with_gate = || {
            self.gate(at, l)
                .and_then(|g| self.join(at, l, norm, Some(g)))
        };
        with_gate().or_else(|| self.join(at, l, norm, None))
    }
    fn join(
        &self,
        at: usize,
        l: &Linear,
        norm: Option<(Norm, &Span)>,
        gate: Option<Gate>,
    ) -> Option<Group> {
        if norm.is_none() && gate.is_none() {
            return None;
        }
        let step = &self.plan.steps[at];
        let (mut order, mut gone) = (vec![at], vec![]);
        let mut around = Around { norm: None, gate };
        if let Some((n, made)) = norm {
            order.push(at - 1);
            gone.push(made.root);
            let base = step.spec.inputs.len();
            let (x, w) = (base + n.x, base + n.w);
            around.norm = Some(Norm { x, w, ..n });
        }
        let mut y = step.writes[0].as_ref()?;
        if let Some(g) = gate {
            gone.push(y.root);
            order.push(at + 1);
            y = self.plan.steps[at + 1].writes[0].as_ref()?;
            let before = step.spec.outputs.len() + order.len() - 2;
            around.gate = Some(Gate { y: before, ..g });
        }
        if !self.apart(&order, &[y], &gone) {
            return None;
        }
        let all = self.all(&order);
        let (jobs, scratch) = glue::with_neighbours(self.t, l, (&step.spec, &all), around)?;
        Some(Group {
            first: at - usize::from(norm.is_some()),
            last: at + usize::from(gate.is_some()),
            order,
            jobs,
            scratch,
        })
    }
    /// Step `i` as a norm that the linear behind it alone needs, and what it makes.
    fn norm(&self, i: usize) -> Option<(Norm, &Span)> {
        let (step, next) = (&self.plan.steps[i], self.plan.steps.get(i + 1)?);
        let Body::Composite(Composite::RmsNorm(n)) = &step.spec.body else {
            return None;
        };
        let Body::Composite(Composite::Linear(_)) = &next.spec.body else {
            return None;
        };
        let made = step.writes[0].as_ref()?;
        let read = &next.reads[0];
        let whole = (made.root, made.offset) == (read.root, read.offset);
        // The rest of the operands may not be a view of the same value.
        let once = next.reads[1..].iter().all(|r| r.root != made.root);
        let dense = step.spec.inputs[1].is_dense() && next.spec.inputs[0].is_dense();
        let made_dense = step.spec.outputs[0].as_ref()?.is_dense();
        let same = self.rows(step) == self.rows(next);
        let floats = f32s(
            step.spec
                .inputs
                .iter()
                .chain(step.spec.outputs.iter().flatten()),
        );
        let fits = whole && once && dense && made_dense && same && floats;
        if !fits || !self.only(made, &[i + 1]) {
            return None;
        }
        let row = step.spec.inputs[0].layout.row_stride()?;
        let (x, w, eps) = (0, 1, n.eps.get());
        Some((Norm { x, w, row, eps }, made))
    }
    fn rows(&self, s: &Step) -> [usize; 2] {
        let shape = &s.spec.inputs[0].layout.shape;
        [shape.rows(), shape.last()]
    }
    /// The gate behind the linear `at`, whose halves it multiplies.
    fn gate(&self, at: usize, l: &Linear) -> Option<Gate> {
        let (step, next) = (&self.plan.steps[at], self.plan.steps.get(at + 1)?);
        let Body::Composite(Composite::SwiGlu(_)) = &next.spec.body else {
            return None;
        };
        let (made, out) = (step.writes[0].as_ref()?, next.spec.outputs[0].as_ref()?);
        let n = out.layout.shape.last();
        let lie = next.reads.iter().map(|r| (r.root, r.offset));
        let halves = [0, n * 4].map(|o| (made.root, made.offset + o));
        let outputs: usize = l.blocks.iter().map(|b| b.n).sum();
        let row = step.spec.outputs[0].as_ref()?.layout.row_stride();
        let one = out.layout.shape.rows() == 1;
        let rows = |o: &Operand| one || o.layout.row_stride() == row;
        let fits = lie.eq(halves) && outputs == 2 * n && next.spec.inputs.iter().all(rows);
        let floats = f32s(next.spec.inputs.iter().chain([out]));
        if !fits || !floats || l.residual || !self.only(made, &[at + 1]) {
            return None;
        }
        let row = out.layout.row_stride()?;
        Some(Gate { y: 0, row })
    }
    /// A rotation of one token's queries and keys from step `i` on, and both writes to the cache behind it.
    fn heads(&self, i: usize) -> Option<Group> {
        let steps = self.plan.steps.get(i..i + 3)?;
        let is_write = |s: &Step| matches!(s.spec.body, Body::Composite(Composite::KvWrite(_)));
        let Body::Composite(Composite::Rope(r)) = &steps[0].spec.body else {
            return None;
        };
        let [rope, keys, values] = [&steps[0], &steps[1], &steps[2]];
        if r.inverse || !is_write(keys) || !is_write(values) {
            return None;
        }
        let x = &rope.spec.inputs[0];
        let &[rows, 1, turned, d] = &x.layout.shape.0[..] else {
            return None;
        };
        let out = rope.spec.outputs[0].as_ref()?;
        let new = |s: &Step| s.spec.inputs[1].layout.shape.0.clone();
        let kept = new(keys).get(2).copied()?;
        let shapes = new(keys) == [rows, 1, kept, d] && new(values) == new(keys);
        let queries = turned.checked_sub(kept)?;
        let made = rope.writes[0].as_ref()?;
        // Keys are the last heads of what was rotated.
        let head = out.layout.strides[2];
        let lies = (keys.reads[1].root, keys.reads[1].offset)
            == (made.root, made.offset + queries * head * 4);
        let strides =
            [0, 2].map(|a| keys.spec.inputs[1].layout.strides[a] == out.layout.strides[a]);
        let stands = lies && (rows == 1 || strides[0]) && (kept == 1 || strides[1]);
        let pos = &rope.reads[1];
        let same = |s: &Step| (s.reads[2].place, s.reads[2].offset) == (pos.place, pos.offset);
        let in_place = |s: &Step| {
            let (old, new) = (&s.reads[0], s.writes[0].as_ref());
            new.is_some_and(|n| (n.place, n.offset) == (old.place, old.offset))
        };
        let dense = |s: &Step| s.spec.inputs[0].is_dense() && s.spec.inputs[2].is_dense();
        let cache = |s: &Step| s.spec.inputs[0].layout.shape.0[1];
        let even = cache(keys) == cache(values) && d % 2 == 0;
        let both = [keys, values];
        let fits =
            shapes && stands && even && both.iter().all(|s| same(s) && in_place(s) && dense(s));
        let floats = [x, out]
            .into_iter()
            .chain(both.iter().flat_map(|s| &s.spec.inputs[..2]));
        let tables = rope.spec.inputs[1..].iter().all(Operand::is_dense);
        if !fits || !f32s(floats) || !tables {
            return None;
        }
        let order: Vec<usize> = (i..i + 3).collect();
        let caches = both.map(|s| s.writes[0].as_ref());
        let (kc, vc) = (caches[0]?, caches[1]?);
        // What the caches held before, and the keys on their way, are not read.
        let gone = [keys.reads[0].root, values.reads[0].root, made.root];
        if !self.apart(&order, &[made, kc, vc], &gone) || meet(kc, vc) {
            return None;
        }
        let h = Heads {
            rope: &rope.spec,
            writes: [&keys.spec, &values.spec],
        };
        let job = glue::heads(self.t, &h, &self.all(&order))?;
        Some(Group {
            first: i,
            last: i + 2,
            order,
            jobs: vec![job],
            scratch: 0,
        })
    }
}
