//! A plan as lines of text and as JSON.
//! Invariant: both say the same.
use super::Found;
use crate::out;
use anyhow::Result;
use serde_json::{Value, json};
use tallow::core::{backend::Launched, kernel::Body, plan::Step};

/// Losing candidates shown for a step; JSON has all.
const LOSERS: usize = 4;
/// The longest signature shown in full.
const SIGNATURE: usize = 110;

/// What a plan does besides the work asked for.
fn is_copy(s: &Step) -> bool {
    matches!(s.spec.body, Body::Copy)
}

pub(super) fn json(f: &Found) -> Value {
    let plan = &f.compiled.plan;
    let memory = plan.memory();
    let step = |(i, s): (usize, &Step)| {
        let losers = s.rejected.iter();
        json!({
            "step": i,
            "kernel": s.kernel_name,
            "op": s.spec.name(),
            "signature": s.spec.signature(),
            "why": s.why,
            "rejected": losers.map(|r| json!({ "kernel": r.name, "estimate_s": r.cost })).collect::<Vec<_>>(),
            "note": s.note,
            "copy": is_copy(s),
            "bytes": s.spec.bytes(),
            "flops": s.spec.flops(),
            "estimate_s": s.cost,
            "seconds": f.times.as_ref().map(|t| t[i]),
        })
    };
    let launched = |l: &Launched| json!({ "first_step": l.steps.start(), "last_step": l.steps.end(), "launches": l.launches });
    json!({
        "plan": f.title,
        "steps": plan.steps.iter().enumerate().map(step).collect::<Vec<_>>(),
        "launches": f.launched.iter().map(launched).collect::<Vec<_>>(),
        "rewrites": f.compiled.notes,
        "decomposed": f.decomposed,
        "copies": plan.steps.iter().filter(|s| is_copy(s)).count(),
        "bytes": plan.steps.iter().map(|s| s.spec.bytes()).sum::<usize>(),
        "flops": plan.steps.iter().map(|s| s.spec.flops()).sum::<f64>(),
        "estimate_s": plan.steps.iter().map(|s| s.cost).sum::<f64>(),
        "seconds": f.times.as_ref().map(|t| t.iter().sum::<f64>()),
        "memory_bytes": {
            "arena": memory.arena,
            "arena_without_sharing": plan.naive_bytes,
            "prepared": memory.prepared,
            "frozen": memory.frozen,
            "state": memory.state,
            "data": memory.data,
            "outputs": memory.outputs,
            "total": memory.total(),
        },
    })
}

pub(super) fn lines(f: &Found) -> Result<()> {
    out::line(format!("{}\n", f.title))?;
    for note in &f.compiled.notes {
        out::line(format!("rewritten: {note}"))?;
    }
    let plan = &f.compiled.plan;
    for l in &f.launched {
        let many = l.steps.clone().count();
        if many > 1 {
            out::line(format!(
                "{many} steps as one: {}",
                l.launches.join(", then ")
            ))?;
        }
        for i in l.steps.clone() {
            step(f, i, &plan.steps[i])?;
        }
        if many == 1 && l.launches != [plan.steps[*l.steps.start()].kernel_name] {
            out::line(format!("      starts {}", l.launches.join(", then ")))?;
        }
    }
    totals(f)?;
    fallbacks(f)
}

fn step(f: &Found, i: usize, s: &Step) -> Result<()> {
    let took = match &f.times {
        Some(t) => format!("{:>10}", out::seconds(t[i])),
        None => String::new(),
    };
    out::line(format!(
        "{i:>4}  {:<34} {:>10} est.{took} {:>10} {:>9.2} MFLOP",
        s.kernel_name,
        out::seconds(s.cost),
        out::bytes(s.spec.bytes()),
        s.spec.flops() / 1e6,
    ))?;
    let mut signature = s.spec.signature();
    if let Some((at, _)) = signature.char_indices().nth(SIGNATURE) {
        signature.truncate(at);
        signature.push('…');
    }
    out::line(format!("      {} {signature}", s.spec.name()))?;
    let mut why = s.why.clone();
    for r in s.rejected.iter().take(LOSERS) {
        why.push_str(&format!("; {} {}", r.name, out::seconds(r.cost)));
    }
    if s.rejected.len() > LOSERS {
        why.push_str(&format!("; {} more", s.rejected.len() - LOSERS));
    }
    let note = match s.note.as_str() {
        "" => String::new(),
        note => format!("  [{note}]"),
    };
    out::line(format!("      {why}{note}"))
}

fn totals(f: &Found) -> Result<()> {
    let plan = &f.compiled.plan;
    let (bytes, flops, cost) = plan.steps.iter().fold((0, 0.0, 0.0), |(b, fl, c), s| {
        (b + s.spec.bytes(), fl + s.spec.flops(), c + s.cost)
    });
    let took = match &f.times {
        Some(t) => format!(", measured {}", out::seconds(t.iter().sum())),
        None => String::new(),
    };
    out::line(format!(
        "\n{} steps in {} launches, {} touched, {:.1} MFLOP, estimated {}{took}",
        plan.steps.len(),
        f.launched.iter().map(|l| l.launches.len()).sum::<usize>(),
        out::bytes(bytes),
        flops / 1e6,
        out::seconds(cost),
    ))?;
    let m = plan.memory();
    out::line(format!(
        "memory {}: intermediates {} ({} if none shared), weights laid out for the kernels {}, weights as loaded {}, \
         adapter, moments and cache {}, inputs {}, results {}",
        out::bytes(m.total()),
        out::bytes(m.arena),
        out::bytes(plan.naive_bytes),
        out::bytes(m.prepared),
        out::bytes(m.frozen),
        out::bytes(m.state),
        out::bytes(m.data),
        out::bytes(m.outputs),
    ))
}

fn fallbacks(f: &Found) -> Result<()> {
    for (name, n) in &f.decomposed {
        out::line(format!("no kernel, decomposed {n} times: {name}"))?;
    }
    let copies: Vec<&Step> = f
        .compiled
        .plan
        .steps
        .iter()
        .filter(|s| is_copy(s))
        .collect();
    if !copies.is_empty() {
        let bytes = copies.iter().map(|s| s.spec.bytes()).sum();
        out::line(format!("{} copies, {}", copies.len(), out::bytes(bytes)))?;
    }
    if f.decomposed.is_empty() && copies.is_empty() {
        out::line("no fallbacks: every composite has a kernel, nothing is copied")?;
    }
    Ok(())
}
