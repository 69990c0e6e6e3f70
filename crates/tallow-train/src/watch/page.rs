//! A run, or runs beside one another, as one self-contained page: the report at the end, and the same page live.
//! Invariant: text of the run (prompts, paths) is data of the page and never markup; nothing is loaded from elsewhere.
//! Absent on purpose: serving it.
use serde_json::{Value, json};
use std::collections::BTreeSet;

use super::{Record, best};

/// The pages without their data, and what they share.
const RUN: &str = include_str!("page/run.html");
const COMPARE: &str = include_str!("page/compare.html");
const STYLE: &str = include_str!("page/style.css");
const COMMON: &str = include_str!("page/common.js");
/// Where the data goes.
const DATA: &str = "/*DATA*/null";

/// The page of a record. `live`: it asks its server for newer data every other second, at `run.json`.
#[must_use]
pub fn html(record: &Record, live: bool) -> String {
    page(RUN, data(record), live)
}

/// The page of runs side by side, by name; live as [`html`].
#[must_use]
pub fn compare_html(title: &str, runs: &[(String, Record)], live: bool) -> String {
    page(COMPARE, compare_data(title, runs), live)
}

fn page(page: &str, mut data: Value, live: bool) -> String {
    data["live"] = json!(live);
    // Inside a script element only "</" and "<!" could end what a browser takes for the script.
    let text = data.to_string().replace('<', "\\u003c");
    let page = page.replacen("/*STYLE*/", STYLE, 1);
    let page = page.replacen("/*COMMON*/", COMMON, 1);
    page.replacen(DATA, &text, 1)
}

/// What the page of runs side by side draws.
#[must_use]
pub fn compare_data(title: &str, runs: &[(String, Record)]) -> Value {
    let differ = differing(runs);
    let one = |(name, record): &(String, Record)| {
        let fact = |wanted: &&str| {
            let found = record.facts.iter().find(|f| f.0 == **wanted);
            found.map_or_else(String::new, |f| f.1.clone())
        };
        let now = record.standing();
        json!({
            "name": name,
            "settings": differ.iter().map(fact).collect::<Vec<_>>(),
            "step": record.points.iter().map(|p| p.step).collect::<Vec<_>>(),
            "loss": record.points.iter().map(|p| figure(p.loss)).collect::<Vec<_>>(),
            "evals": evals(record),
            "now": now.loss.map(figure),
            "valid": now.valid.map(figure),
            "total": record.total,
            "done": record.done,
            "failed": record.failed,
        })
    };
    let seconds = |r: &Record| r.points.iter().map(|p| p.seconds).sum::<f64>();
    let tokens = |r: &Record| r.points.iter().map(|p| p.tokens).sum::<f64>();
    json!({
        "title": title,
        "differ": differ,
        "runs": runs.iter().map(one).collect::<Vec<_>>(),
        "best": best(runs).map(|i| runs[i].0.clone()),
        // Each run's steps take the time of all of them.
        "seconds": runs.iter().map(|(_, r)| seconds(r)).fold(0.0, f64::max),
        "tokens": runs.iter().map(|(_, r)| tokens(r)).sum::<f64>(),
        "memory_bytes": runs.iter().map(|(_, r)| r.memory_bytes).max(),
    })
}

/// Settings in which the runs differ, but for where they are written.
fn differing(runs: &[(String, Record)]) -> Vec<&str> {
    let facts = runs.iter().flat_map(|(_, r)| &r.facts);
    let names: BTreeSet<&str> = facts.map(|f| f.0.as_str()).collect();
    let values = |name: &str| {
        let of = |r: &Record| r.facts.iter().find(|f| f.0 == name).map(|f| f.1.clone());
        runs.iter().map(|(_, r)| of(r)).collect::<BTreeSet<_>>()
    };
    let told = ["out", "parameters_trained"];
    let differs = |name: &&str| !told.contains(name) && values(name).len() > 1;
    names.into_iter().filter(differs).collect()
}

fn evals(record: &Record) -> Vec<Value> {
    let one = |(s, l): &(u64, f64)| json!([s, figure(*l)]);
    record.evals.iter().map(one).collect()
}

/// What the page draws.
#[must_use]
pub fn data(record: &Record) -> Value {
    let column = |f: &dyn Fn(&super::Point) -> f64| -> Vec<Value> {
        record.points.iter().map(|p| figure(f(p))).collect()
    };
    json!({
        "title": record.title,
        "facts": record.facts,
        "step": record.points.iter().map(|p| p.step).collect::<Vec<_>>(),
        "loss": column(&|p| p.loss),
        "lr": column(&|p| p.lr),
        "grad_norm": column(&|p| p.grad_norm),
        "speed": column(&|p| p.tokens / p.seconds.max(1e-9)),
        "evals": evals(record),
        "marks": record.marks.iter().map(|m| json!([m.step, m.text])).collect::<Vec<_>>(),
        "samples": record.samples.iter().map(|s| json!({
            "prompt": s.prompt, "wanted": s.wanted, "before": s.before, "after": s.after,
        })).collect::<Vec<_>>(),
        "total": record.total,
        "seconds": record.points.iter().map(|p| p.seconds).sum::<f64>(),
        "tokens": record.points.iter().map(|p| p.tokens).sum::<f64>(),
        "memory_bytes": record.memory_bytes,
        "done": record.done,
    })
}

/// Seven digits are enough for a picture; what is no number is a gap.
fn figure(x: f64) -> Value {
    let short = format!("{x:.6e}").parse::<f64>();
    short
        .ok()
        .filter(|x| x.is_finite())
        .map_or(Value::Null, Value::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::Sample;

    #[test]
    fn text_of_a_run_cannot_become_markup() {
        let evil = "</script><img src=x onerror=alert(1)>";
        let mut record = Record {
            title: evil.to_owned(),
            samples: vec![Sample {
                prompt: evil.to_owned(),
                wanted: evil.to_owned(),
                before: evil.to_owned(),
                after: evil.to_owned(),
            }],
            ..Record::default()
        };
        record
            .add(&json!({"event": "step", "step": 1, "loss": f64::NAN, "tokens": 1, "seconds": 1}));
        let page = html(&record, false);
        assert_eq!(page.matches("</script>").count(), 1, "the page's own");
        assert!(!page.contains("<img"));
        assert!(page.contains("\"loss\":[null]") && page.contains("\"live\":false"));
        assert!(!page.contains(DATA) && !page.contains("http://") && !page.contains("https://"));
        let page = compare_html(evil, &[(evil.to_owned(), record)], true);
        assert_eq!(page.matches("</script>").count(), 1, "the page's own");
        assert!(!page.contains("<img") && page.contains("\"live\":true"));
        assert!(
            !page.contains("/*") || !page.contains("/*STYLE*/") && !page.contains("/*COMMON*/")
        );
        assert!(!page.contains(DATA) && !page.contains("http://") && !page.contains("https://"));
    }

    #[test]
    fn runs_are_told_apart_by_what_differs() {
        let run = |name: &str, rank: u64, losses: &[f64]| {
            let mut record = Record::default();
            let settings = json!({"rank": rank, "lr": 0.1, "out": name});
            record.add(&json!({"event": "start", "total": 2, "settings": settings}));
            for (i, loss) in losses.iter().enumerate() {
                record.add(&json!({"event": "step", "step": i + 1, "loss": loss, "tokens": 5, "seconds": 2}));
            }
            (name.to_owned(), record)
        };
        let mut runs = vec![run("a", 4, &[3.0, 2.5]), run("b", 8, &[3.0, 2.0])];
        let data = compare_data("both", &runs);
        assert_eq!(data["differ"], json!(["rank"]));
        assert_eq!(data["runs"][1]["settings"], json!(["8"]));
        assert_eq!(
            (&data["best"], &data["seconds"]),
            (&json!("b"), &json!(4.0))
        );
        assert_eq!(data["tokens"], json!(20.0));
        // The validation text decides where there is one, and who failed is not chosen.
        for (run, loss) in runs.iter_mut().zip([1.5, 1.6]) {
            run.1
                .add(&json!({"event": "eval", "step": 2, "loss": loss}));
        }
        assert_eq!(compare_data("both", &runs)["best"], json!("a"));
        runs[0]
            .1
            .add(&json!({"event": "failed", "step": 3, "text": "no"}));
        let data = compare_data("both", &runs);
        assert_eq!(
            (&data["best"], &data["runs"][0]["failed"]),
            (&json!("b"), &json!("no"))
        );
    }
}
