//! Reports for people at a terminal.
//! Invariant: a row without figures shows its reason in their place.

use tallow::train::memory::show;

use super::{Group, Report, seconds};
use crate::measure::{Memory, Row, Verdict};
use crate::stats::Summary;
use crate::work::{Check, Judge};

/// Columns behind the engine's name.
const HEAD: [&str; 8] = [
    "built",
    "queued",
    "waited",
    "(p10 - p90)",
    "in plan",
    "floor",
    "x floor",
    "check",
];

/// What stands above everything: the machine and what it reaches.
#[must_use]
pub fn head(report: &Report) -> Vec<String> {
    let m = &report.machine;
    let load = match m.load {
        Some(load) if load > 0.3 => {
            format!("; load {load:.1}: OTHERS ARE AT WORK, trust no figure")
        }
        Some(load) => format!("; load {load:.1}"),
        None => String::new(),
    };
    let peers = report
        .peers
        .iter()
        .map(|(name, version)| format!("; {name} {version}"));
    let mut lines = vec![
        format!("tallow {}{}", report.tallow, peers.collect::<String>()),
        match &m.device {
            None => format!(
                "{}, {}, {} of {} threads, {} weights{load}",
                m.processor, m.isa, report.threads, m.logical, report.dtype
            ),
            Some(device) => format!(
                "{device}, {} weights; behind {}{load}",
                report.dtype, m.processor
            ),
        },
    ];
    let missing = report.missing.iter();
    lines.extend(missing.map(|(name, why)| format!("{name} takes no part: {why}")));
    let (p, t) = (&report.probe, report.threads);
    let rate = |kib: usize| format!("{:.0}", p.bytes_per_s(kib << 10, t) / 1e9);
    let peak = |d| p.flops(d, t) / 1e9;
    lines.push(format!(
        "this machine reaches {:.0} GFLOP/s (f32), {:.0} (bf16); reads {} GB/s of 32 KiB, {} of 1 MiB, {} of 16 MiB, {} of 256 MiB",
        peak(tallow::DType::F32),
        peak(tallow::DType::BF16),
        rate(32),
        rate(1 << 10),
        rate(16 << 10),
        rate(256 << 10),
    ));
    lines
}

/// A task's rows.
#[must_use]
pub fn group(g: &Group) -> Vec<String> {
    let mut lines = vec![String::new(), format!("{}: {}", g.suite, g.name)];
    let wide = g.rows.iter().map(|r| r.engine.chars().count()).max();
    let wide = wide.unwrap_or(0).max(8);
    let lazy = lazy(g);
    if g.rows.iter().any(|r| r.figures().is_some()) {
        let [built, queued, waited, spread, plan, floor, times, check] = HEAD;
        let not_executed = if lazy { " NOT EXECUTED" } else { "" };
        lines.push(format!(
            "  {:wide$} {built:>9} {queued:>9} {waited:>9} {spread:>23} {plan:>9} {floor:>9} {times:>7}{not_executed}  {check}",
            "",
        ));
    }
    for (i, row) in g.rows.iter().enumerate() {
        lines.push(format!("  {:wide$} {}", row.engine, cells(row, lazy)));
        let more = more(g, i, row);
        if !more.is_empty() {
            lines.push(format!("  {:wide$} {}", "", more.join("; ")));
        }
    }
    if lazy {
        lines.push(format!("  NOT EXECUTED: {NOT_EXECUTED}"));
    }
    lines.extend(no_plan(g).map(|why| format!("  no time in a plan: {why}")));
    lines.extend(g.revised.iter().map(|r| format!("  {r}")));
    if !g.rounds.fine() {
        lines.push(format!("  {}", g.rounds));
    }
    lines
}

/// Why the first row has no time in a plan, if it should have one.
pub(super) fn no_plan(g: &Group) -> Option<&str> {
    g.rows.first()?.figures()?.no_plan.as_deref()
}

/// Is there a row of a lazy engine?
pub(super) fn lazy(g: &Group) -> bool {
    let mut all = g.rows.iter().filter_map(Row::figures);
    all.any(|f| f.not_executed.is_some())
}

/// What the column of that name is.
pub(super) const NOT_EXECUTED: &str = "as people time a lazy engine: many calls, and the last result evaluated; the others were never computed";

fn cells(row: &Row, lazy: bool) -> String {
    let f = match &row.verdict {
        Verdict::Invalid(reason) => return format!("INVALID: {reason}"),
        Verdict::Valid(f) => f,
    };
    let of = |s: &Summary| seconds(s.median);
    let some = |s: &Option<Summary>| s.as_ref().map_or("-".to_owned(), of);
    let spread = format!("({} - {})", seconds(f.waited.p10), seconds(f.waited.p90));
    let not_executed = match lazy {
        true => format!(" {:>12}", some(&f.not_executed)),
        false => String::new(),
    };
    format!(
        "{:>9} {:>9} {:>9} {spread:>23} {:>9} {:>9} {:>7.2}{not_executed}  {}",
        of(&f.built),
        some(&f.queued),
        of(&f.waited),
        some(&f.in_plan),
        seconds(row.floor.seconds),
        f.waited.median / row.floor.seconds,
        check(&f.check),
    )
}

/// "ok, error 12 % of what rounding may cause".
#[must_use]
pub fn check(c: &Check) -> String {
    let of = match c.compared < c.of {
        true => format!(", {} of {} elements", c.compared, c.of),
        false => String::new(),
    };
    let by = match c.by {
        Judge::Oracle => " of rounding",
        Judge::Portable => " (portable kernels)",
        Judge::Processor => " (the processor's kernels)",
    };
    format!("ok, {:.0} %{by}{of}", c.worst * 100.0)
}

/// "54.0 MiB of intermediates, 56.5 MiB with state; the process grew by 54.8 MiB".
pub(super) fn memory(m: &Memory) -> String {
    let grew = m.grew.map(|g| format!("; the process grew by {}", show(g)));
    let [intermediates, own] = [m.intermediates, m.own].map(show);
    let grew = grew.unwrap_or_default();
    format!("{intermediates} of intermediates, {own} with state{grew}")
}

/// Tokens a second, the ratio to the first row, and memory.
fn more(g: &Group, i: usize, row: &Row) -> Vec<String> {
    let mut all = vec![];
    let Some(f) = row.figures() else {
        return all;
    };
    if let Some(tokens) = g.tokens {
        all.push(format!("{:.0} tokens/s", tokens as f64 / f.waited.median));
    }
    if let Some(r) = g.ratio(i) {
        let first = &g.rows[0].engine;
        let mut text = format!("{:.3} x {first} ({:.3} - {:.3})", r.middle, r.low, r.high);
        if let Some(floor) = g.floor_ratio(i).filter(|f| (f - 1.0).abs() > 1e-6) {
            text += &format!(", floor {floor:.3}");
        }
        all.push(text);
    }
    if let Some(r) = g.ratio_in_plan(i) {
        let [middle, low, high] = [r.middle, r.low, r.high];
        all.push(format!("in plan {middle:.3} ({low:.3} - {high:.3})"));
    }
    all.extend(row.memory.as_ref().map(memory));
    all
}
