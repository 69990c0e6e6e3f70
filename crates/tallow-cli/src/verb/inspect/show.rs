//! What `inspect` prints.
//! Invariant: text and JSON say the same.
use super::{Args, Cost, Found, Kind};
use crate::out;
use anyhow::Result;
use serde_json::{Map, Value, json};

/// How the times were made, for those who read them.
const TIMES: &str = "each launch of the plan at the speed this machine just reached on one product of 256 rows \
    (arithmetic) and of 1 row (memory) with a 4096 x 4096 matrix; not measured on this model";

fn kind(found: &Found) -> &'static str {
    match found.kind {
        Kind::Model => "model",
        Kind::Adapter | Kind::MlxAdapter => "adapter",
        Kind::Checkpoint => "checkpoint",
        Kind::Tensors => "tensors",
    }
}

pub(super) fn json(args: &Args, found: &Found) -> Value {
    let about: Map<String, Value> = found
        .about
        .iter()
        .map(|(k, v)| ((*k).to_owned(), v.clone()))
        .collect();
    let groups = found.groups.iter().map(|((name, shape, dtype), count)| {
        json!({ "name": name, "shape": shape, "dtype": dtype, "count": count })
    });
    let cost = |c: &Cost| {
        json!({
            "what": c.what,
            "memory_bytes": c.memory_bytes,
            "arena_bytes": c.arena_bytes,
            "state_bytes": c.state_bytes,
            "estimated_seconds": c.seconds,
        })
    };
    json!({
        "path": args.path.display().to_string(),
        "kind": kind(found),
        "about": about,
        "tensors": groups.collect::<Vec<_>>(),
        "parameters": found.elems,
        "bytes": found.bytes,
        "files": found.beside,
        "trained": found.share.map(|(trained, base)| json!({
            "parameters": trained,
            "base_parameters": base,
            "share": trained as f64 / base as f64,
        })),
        "predictions": found.costs.iter().map(cost).collect::<Vec<_>>(),
        "estimated_how": (!found.costs.is_empty()).then_some(TIMES),
    })
}

pub(super) fn lines(args: &Args, found: &Found) -> Result<()> {
    out::line(format!("{}: {}", args.path.display(), kind(found)))?;
    for (name, value) in found.about.iter().filter(|(_, v)| !v.is_null()) {
        out::line(format!("  {name:<12} {value}"))?;
    }
    let what = match found.kind {
        // The adapter, the same again as one piece, its moments and the losses.
        Kind::Checkpoint => "numbers",
        _ => "parameters",
    };
    out::line(format!(
        "{} {what}, {}",
        out::count(found.elems as u64),
        out::bytes(found.bytes)
    ))?;
    let widest = found.groups.keys().map(|k| k.0.len()).max().unwrap_or(0);
    for ((name, shape, dtype), count) in &found.groups {
        let times = match count {
            1 => String::new(),
            n => format!(" x {n}"),
        };
        out::line(format!("  {name:<widest$}  {shape:?} {dtype}{times}"))?;
    }
    for file in &found.beside {
        out::line(format!("  {file}"))?;
    }
    if let Some((trained, base)) = found.share {
        let whose = match found.kind {
            Kind::Model => "an adapter of rank 8 on all projections would train",
            _ => "trained:",
        };
        let share = 100.0 * trained as f64 / base as f64;
        out::line(format!(
            "{whose} {} parameters, {share:.2} % of the base's {}",
            out::count(trained as u64),
            out::count(base as u64)
        ))?;
    }
    for c in &found.costs {
        out::line(format!(
            "{}: {} of memory ({} of intermediates, {} of state), about {}",
            c.what,
            out::bytes(c.memory_bytes),
            out::bytes(c.arena_bytes),
            out::bytes(c.state_bytes),
            out::seconds(c.seconds)
        ))?;
    }
    match found.costs.is_empty() {
        true if matches!(found.kind, Kind::Adapter | Kind::Checkpoint) => out::line(
            "with --model: its share of the base's parameters, and predictions of memory and times",
        ),
        true => Ok(()),
        false => out::line(format!("times are estimates: {TIMES}")),
    }
}
