//! Static memory and launch order. After this module nothing allocates.
//! Invariant: no step writes bytes that it reads (but elementwise in place), and every byte read
//! was written before and not handed to another value since; [`Plan::verify`] checks it anew.
//! Absent on purpose: device calls but [`Backend::candidates`]. This module runs without a GPU.
use crate::{
    Error, Result,
    backend::{Backend, Chooser},
    kernel::{Body, Format, KernelId, KernelSpec, Operand},
    op::Role,
    pass::fuse::{Fused, Group, Root, RootId, RootKind, View},
    types::Layout,
};

mod arena;
mod narrow;
mod place;
#[cfg(test)]
mod tests;
mod verify;

/// Where a span lives while the plan runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// Bound input, by slot.
    Input(u32),
    /// Frozen operand in the backend's format, by entry of [`Plan::prepared`].
    Prepared(u32),
    /// Bound output.
    Output(u32),
    /// The plan's own memory.
    Arena,
}

/// A piece of memory that one operand of one step touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Which memory.
    pub place: Place,
    /// Start, in bytes.
    pub offset: usize,
    /// Length up to the last element touched, in bytes.
    pub bytes: usize,
    /// Which value, for [`Plan::verify`].
    pub root: u32,
}

/// A candidate that lost, for `explain`.
#[derive(Clone, Debug)]
pub struct Rejected {
    /// Kernel name.
    pub name: &'static str,
    /// Its estimate, in seconds.
    pub cost: f64,
}

/// One launch of a plan.
#[derive(Clone, Debug)]
pub struct Step {
    /// Handle in the backend that planned it.
    pub kernel: KernelId,
    /// Kernel name.
    pub kernel_name: &'static str,
    /// The backend's estimate, in seconds.
    pub cost: f64,
    /// Why this kernel.
    pub why: String,
    /// The others.
    pub rejected: Vec<Rejected>,
    /// What is computed.
    pub spec: KernelSpec,
    /// Operands.
    pub reads: Vec<Span>,
    /// Results.
    pub writes: Vec<Option<Span>>,
    /// Scratch memory in the arena.
    pub workspace: Option<Span>,
    /// What fusion and planning did.
    pub note: String,
}

/// A frozen operand wanted in a backend's format, made once when a recording is bound.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// Input it comes from.
    pub slot: u32,
    /// Start inside that input, in bytes.
    pub offset: usize,
    /// Type and strides there.
    pub operand: Operand,
    /// Format wanted.
    pub format: Format,
}

/// Launches with all their memory decided.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Launches in order.
    pub steps: Vec<Step>,
    /// Frozen operands in formats of the backend.
    pub prepared: Vec<Prepared>,
    /// Size of the plan's own memory, in bytes.
    pub arena_bytes: usize,
    /// Sum of all intermediates, had none shared memory, in bytes.
    pub naive_bytes: usize,
    /// Bound inputs by slot: role and size in bytes.
    pub inputs: Vec<(Role, usize)>,
    /// Bound outputs: size in bytes.
    pub outputs: Vec<usize>,
}

impl Plan {
    /// The kernels that won over others, by [`KernelSpec::key`] and name: for [`Session::pin`](crate::session::Session::pin).
    pub fn choices(&self) -> impl Iterator<Item = (String, String)> {
        let contested = self.steps.iter().filter(|s| !s.rejected.is_empty());
        contested.map(|s| (s.spec.key(), s.kernel_name.to_owned()))
    }
}

/// A launch whose operands are still views of roots.
pub(crate) struct Draft {
    spec: KernelSpec,
    reads: Vec<View>,
    writes: Vec<Option<View>>,
    chosen: Chosen,
    note: String,
}

struct Chosen {
    kernel: KernelId,
    name: &'static str,
    cost: f64,
    why: String,
    rejected: Vec<Rejected>,
    workspace: usize,
    prepare: Vec<(usize, Format)>,
}

struct Planner<'a> {
    be: &'a dyn Backend,
    ch: &'a dyn Chooser,
    roots: Vec<Root>,
    drafts: Vec<Draft>,
}

fn operand(roots: &[Root], v: &View) -> Operand {
    let root = &roots[v.root.index()];
    Operand {
        dtype: root.dtype,
        layout: Layout {
            offset: 0,
            ..v.layout.clone()
        },
        frozen: matches!(root.kind, RootKind::Input(_, Role::Frozen)),
    }
}

/// Chooses a kernel for every group and a place for every value.
pub fn plan(mut f: Fused, be: &dyn Backend, ch: &dyn Chooser) -> Result<Plan> {
    narrow::narrow(&mut f, be)?;
    let mut p = Planner {
        be,
        ch,
        roots: f.roots,
        drafts: vec![],
    };
    for g in f.groups {
        p.group(g)?;
    }
    let pending = place::pending_updates(&p.roots, &p.drafts, &f.updates);
    let placed = pending.in_place;
    let copies = p.stage(pending.copies, &f.updates)?;
    for (from, slot) in copies {
        p.copy_to_state(from, slot)?;
    }
    let plan = place::place(p.roots, p.drafts, &f.outputs, &placed, be);
    plan.verify()?;
    Ok(plan)
}

impl Planner<'_> {
    fn choose(&self, spec: &KernelSpec) -> Result<Option<Chosen>> {
        let cands = self.be.candidates(spec)?;
        if cands.is_empty() {
            return Ok(None);
        }
        let (best, why) = self.ch.choose(spec, &cands)?;
        let rejected = (0..cands.len()).filter(|i| *i != best).map(|i| Rejected {
            name: cands[i].name,
            cost: cands[i].cost,
        });
        let c = &cands[best];
        Ok(Some(Chosen {
            kernel: c.kernel,
            name: c.name,
            cost: c.cost,
            why,
            rejected: rejected.collect(),
            workspace: c.workspace,
            prepare: c.prepare.clone(),
        }))
    }
    fn spec(&self, body: &Body, reads: &[View], writes: &[Option<View>]) -> KernelSpec {
        KernelSpec {
            body: body.clone(),
            inputs: reads.iter().map(|v| operand(&self.roots, v)).collect(),
            outputs: writes
                .iter()
                .map(|w| w.as_ref().map(|v| operand(&self.roots, v)))
                .collect(),
        }
    }
    fn dense(&mut self, v: &View) -> View {
        let dtype = self.roots[v.root.index()].dtype;
        let (elems, kind) = (v.layout.shape.numel(), RootKind::Computed);
        self.roots.push(Root { elems, dtype, kind });
        View {
            root: RootId(self.roots.len() as u32 - 1),
            layout: Layout::contiguous(&v.layout.shape),
        }
    }
    /// Finds a kernel for `g`; where none reads or writes its strides, copies make them dense.
    fn group(&mut self, g: Group) -> Result<()> {
        let empty = |w: &Option<View>| w.as_ref().is_none_or(|v| v.layout.shape.numel() == 0);
        if g.writes.iter().all(empty) {
            return Ok(());
        }
        let spec = self.spec(&g.body, &g.reads, &g.writes);
        if let Some(chosen) = self.choose(&spec)? {
            self.push(spec, g.reads, g.writes, chosen, g.note);
            return Ok(());
        }
        let no_kernel = || Error::NoKernel {
            op: format!("{} {}", spec.name(), spec.signature()),
            device: self.be.info().name.clone(),
        };
        if matches!(g.body, Body::Copy) {
            return Err(no_kernel());
        }
        let err = no_kernel();
        let mut reads = g.reads.clone();
        let mut before = vec![];
        for v in &mut reads {
            if !v.layout.is_contiguous() {
                let to = self.dense(v);
                before.push((v.clone(), to.clone()));
                *v = to;
            }
        }
        let spec = self.spec(&g.body, &reads, &g.writes);
        if let Some(chosen) = self.choose(&spec)? {
            self.copies(before, "dense operand of the next step")?;
            self.push(spec, reads, g.writes, chosen, g.note);
            return Ok(());
        }
        let mut writes = g.writes.clone();
        let mut after = vec![];
        for v in writes.iter_mut().flatten() {
            if !v.layout.is_contiguous() {
                let from = self.dense(v);
                after.push((from.clone(), v.clone()));
                *v = from;
            }
        }
        let spec = self.spec(&g.body, &reads, &writes);
        let chosen = self.choose(&spec)?.ok_or(err)?;
        self.copies(before, "dense operand of the next step")?;
        self.push(spec, reads, writes, chosen, g.note);
        self.copies(after, "strided result of the step before")
    }
    fn copies(&mut self, pairs: Vec<(View, View)>, note: &str) -> Result<()> {
        for (from, to) in pairs {
            let (reads, writes) = (vec![from], vec![Some(to)]);
            let spec = self.spec(&Body::Copy, &reads, &writes);
            let chosen = self.choose(&spec)?.ok_or_else(|| Error::NoKernel {
                op: format!("copy {}", spec.signature()),
                device: self.be.info().name.clone(),
            })?;
            self.push(spec, reads, writes, chosen, note.into());
        }
        Ok(())
    }
    fn push(
        &mut self,
        spec: KernelSpec,
        reads: Vec<View>,
        writes: Vec<Option<View>>,
        chosen: Chosen,
        note: String,
    ) {
        self.drafts.push(Draft {
            spec,
            reads,
            writes,
            chosen,
            note,
        });
    }
    /// Next values that are old values of states themselves being updated are set aside first.
    fn stage(
        &mut self,
        copies: Vec<(View, u32)>,
        updates: &[(u32, View)],
    ) -> Result<Vec<(View, u32)>> {
        let mut out = vec![];
        for (from, slot) in copies {
            let overwritten = match self.roots[from.root.index()].kind {
                RootKind::Input(s, _) => updates.iter().any(|(u, _)| *u == s),
                RootKind::Computed => false,
            };
            if !overwritten {
                out.push((from, slot));
                continue;
            }
            let kept = self.dense(&from);
            self.copies(vec![(from, kept.clone())], "old value of a state set aside")?;
            out.push((kept, slot));
        }
        Ok(out)
    }
    /// The next value of a state that could not be computed in place.
    fn copy_to_state(&mut self, from: View, slot: u32) -> Result<()> {
        let is_slot = |r: &Root| matches!(r.kind, RootKind::Input(s, _) if s == slot);
        let root = self.roots.iter().position(is_slot).ok_or_else(|| {
            Error::size("update of state", 1, 0, &format!("inputs in slot {slot}"))
        })?;
        let to = View {
            root: RootId(root as u32),
            layout: Layout::contiguous(&from.layout.shape),
        };
        self.copies(vec![(from, to)], "state could not be updated in place")
    }
}

impl Plan {
    /// Predicted memory of one recording, in bytes.
    pub fn memory(&self) -> Memory {
        let of = |role| {
            let same = |(r, b): &(Role, usize)| if *r == role { *b } else { 0 };
            self.inputs.iter().map(same).sum()
        };
        Memory {
            arena: self.arena_bytes,
            prepared: self.prepared.iter().map(|p| p.format.bytes).sum(),
            frozen: of(Role::Frozen),
            state: of(Role::State),
            data: of(Role::Data),
            outputs: self.outputs.iter().sum(),
        }
    }
}

/// Memory of one recording, by kind, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Memory {
    /// Intermediates.
    pub arena: usize,
    /// Frozen operands in formats of the backend.
    pub prepared: usize,
    /// Frozen operands as loaded (mapped files count here; pages never read take no memory).
    pub frozen: usize,
    /// State: adapters, moments, caches.
    pub state: usize,
    /// What the host uploads.
    pub data: usize,
    /// What the host reads.
    pub outputs: usize,
}

impl Memory {
    /// All of it.
    pub fn total(&self) -> usize {
        self.arena + self.prepared + self.frozen + self.state + self.data + self.outputs
    }
}
