//! A run as one self-contained page: the report at its end, and the same page live.
//! Invariant: text of the run (prompts, paths) is data of the page and never markup; nothing is loaded from elsewhere.
//! Absent on purpose: serving it.
use serde_json::{Value, json};

use super::Record;

/// The page without its data.
const PAGE: &str = include_str!("page.html");
/// Where the data goes.
const DATA: &str = "/*DATA*/null";

/// The page of a record. `live`: it asks its server for newer data every other second, at `run.json`.
#[must_use]
pub fn html(record: &Record, live: bool) -> String {
    let mut data = data(record);
    data["live"] = json!(live);
    // Inside a script element only "</" and "<!" could end what a browser takes for the script.
    let text = data.to_string().replace('<', "\\u003c");
    PAGE.replacen(DATA, &text, 1)
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
        "evals": record.evals.iter().map(|(s, l)| json!([s, figure(*l)])).collect::<Vec<_>>(),
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
    }
}
