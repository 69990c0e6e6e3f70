//! A report as one page: no script that runs, nothing from outside, readable in print and in the dark.
//! Invariant: every text from the report is escaped; the page carries the report itself, every sample in it.

use super::{Group, Report, seconds, table};
use crate::Result;
use crate::measure::{Row, Verdict};

mod draw;

const STYLE: &str = include_str!("html/style.css");

/// The page.
///
/// # Errors
/// None in practice.
pub fn page(r: &Report) -> Result<String> {
    let mut out = String::with_capacity(1 << 16);
    out += "<!doctype html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\">";
    out += "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">";
    out += &format!("<title>tallow bench</title><style>{STYLE}</style></head>\n<body>\n");
    out += "<h1>tallow bench</h1>\n";
    for line in table::head(r) {
        out += &format!("<p class=\"facts\">{}</p>\n", text(&line));
    }
    out += &format!("<p class=\"facts\"><code>{}</code></p>\n", text(&r.command));
    if r.stopped {
        out += "<p class=\"bad\">Stopped before its end.</p>\n";
    }
    out += "<h2>Times over the floor</h2>\n<p>The floor (1) is the time that nothing on this machine can be faster than: \
        bytes over bandwidth or multiply-adds over peak, both measured in this run. Bars are medians of the \
        waited time, the fine line spans the 10th to the 90th percentile.</p>\n";
    for g in &r.groups {
        out += &group(g);
    }
    out += "<h2>Roofline</h2>\n<p>Each point is a valid row: arithmetic for each byte that must be moved, and the arithmetic \
        a second it reached. The lines are what the machine reached in this run.</p>\n";
    out += &draw::roofline(r);
    out += "<h2>The machine</h2>\n";
    out += &machine(r);
    out += "<h2>Method</h2>\n";
    out += METHOD;
    let json = r.json()?.replace('<', "\\u003c");
    out += &format!("<script type=\"application/json\" id=\"report\">{json}</script>\n");
    out += "</body>\n</html>\n";
    Ok(out)
}

const METHOD: &str = "<p><b>built</b>: the host's time to start the work. <b>queued</b>: many started, one wait. \
    <b>waited</b>: each result waited for, and a number made of it fed to the next repetition. <b>in plan</b>: inside a replayed \
    plan of dependent repetitions. Operands are random and new in every round, results are poisoned before and compared with an f64 \
    interpreter after. A row under its floor, one whose time does not grow about fourfold with four times the dependent \
    repetitions, or one that fails its check is INVALID and has no figure. Where a row was under its floor the machine was probed again, \
    and the task says so. Beside a busy program a loop takes at least 100 ms. <b>Not executed</b>: a lazy engine timed as people time it, \
    where only the last result is computed.</p>\n";

fn group(g: &Group) -> String {
    let mut out = format!(
        "<section><h3>{}: {}</h3>\n{}",
        text(&g.suite),
        text(&g.name),
        draw::bars(g)
    );
    out += "<table><tr><th>engine</th><th>built</th><th>queued</th><th>waited</th><th>p10 – p90</th><th>in plan</th>\
        <th>floor</th><th>× floor</th>";
    let lazy = table::lazy(g);
    if lazy {
        out += "<th>not executed</th>";
    }
    out += "<th>check</th></tr>\n";
    for (i, row) in g.rows.iter().enumerate() {
        out += &line(g, i, row, lazy);
    }
    out += "</table>\n";
    if lazy {
        let what = table::NOT_EXECUTED;
        out += &format!("<p class=\"facts\">Not executed: {what}.</p>\n");
    }
    if let Some(why) = table::no_plan(g) {
        out += &format!("<p class=\"facts\">No time in a plan: {}.</p>\n", text(why));
    }
    for revised in &g.revised {
        let what = text(&revised.to_string());
        out += &format!("<p class=\"facts\">{what}.</p>\n");
    }
    if !g.rounds.fine() {
        let what = text(&g.rounds.to_string());
        out += &format!("<p class=\"facts\">{what}.</p>\n");
    }
    out += "<details><summary>samples, µs</summary>\n";
    for row in &g.rows {
        if let Some(f) = row.figures() {
            let all = f.waited.samples.iter().map(|s| format!("{:.2}", s * 1e6));
            let all: Vec<String> = all.collect();
            out += &format!("<p><b>{}</b> {}</p>\n", text(&row.engine), all.join(" "));
        }
    }
    out + "</details></section>\n"
}

fn line(g: &Group, i: usize, row: &Row, lazy: bool) -> String {
    let f = match &row.verdict {
        Verdict::Valid(f) => f,
        Verdict::Invalid(reason) => {
            return format!(
                "<tr><td>{}</td><td class=\"bad\" colspan=\"{}\">INVALID: {}</td></tr>\n",
                text(&row.engine),
                if lazy { 9 } else { 8 },
                text(&reason.to_string())
            );
        }
    };
    let median = |s: &Option<crate::stats::Summary>| {
        s.as_ref().map_or("–".to_owned(), |s| seconds(s.median))
    };
    let mut cells = vec![
        seconds(f.built.median),
        median(&f.queued),
        seconds(f.waited.median),
        format!("{} – {}", seconds(f.waited.p10), seconds(f.waited.p90)),
        median(&f.in_plan),
        seconds(row.floor.seconds),
        format!("{:.2}", f.waited.median / row.floor.seconds),
    ];
    if lazy {
        cells.push(median(&f.not_executed));
    }
    cells.push(table::check(&f.check));
    let mut more = vec![];
    if let Some(tokens) = g.tokens {
        more.push(format!("{:.0} tokens/s", tokens as f64 / f.waited.median));
    }
    if let Some(r) = g.ratio(i) {
        let first = &g.rows[0].engine;
        let ratio = format!("{:.3} × {first} ({:.3} – {:.3})", r.middle, r.low, r.high);
        more.push(ratio);
    }
    if let Some(r) = g.ratio_in_plan(i) {
        let [middle, low, high] = [r.middle, r.low, r.high];
        more.push(format!("in plan {middle:.3} ({low:.3} – {high:.3})"));
    }
    more.extend(row.memory.as_ref().map(table::memory));
    let more = more.join(", ");
    let cells: String = cells
        .iter()
        .map(|c| format!("<td>{}</td>", text(c)))
        .collect();
    format!(
        "<tr><td>{}<small>{}</small></td>{cells}</tr>\n",
        text(&row.engine),
        text(&more)
    )
}

fn machine(r: &Report) -> String {
    let mut out =
        String::from("<table><tr><th>threads</th><th>working set</th><th>GB/s</th></tr>\n");
    for b in &r.probe.bandwidth {
        let size = match b.bytes >> 20 {
            0 => format!("{} KiB", b.bytes >> 10),
            mib => format!("{mib} MiB"),
        };
        let rate = b.bytes_per_s / 1e9;
        out += &format!(
            "<tr><td>{}</td><td>{size}{}</td><td>{rate:.1}</td></tr>\n",
            b.threads,
            shown_by(&b.by)
        );
    }
    out += "</table>\n<table><tr><th>threads</th><th>dtype</th><th>GFLOP/s</th></tr>\n";
    for p in &r.probe.peak {
        let (dtype, rate) = (text(&p.dtype), p.flops / 1e9);
        out += &format!(
            "<tr><td>{}</td><td>{dtype}{}</td><td>{rate:.0}</td></tr>\n",
            p.threads,
            shown_by(&p.by)
        );
    }
    out + "</table>\n"
}

/// The row that showed a rate.
fn shown_by(by: &Option<String>) -> String {
    let of = |by| format!("<small>{}</small>", text(by));
    by.as_deref().map_or(String::new(), of)
}

/// Escapes what means something in HTML.
fn text(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    for c in s.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            c => out.push(c),
        }
    }
    out
}
