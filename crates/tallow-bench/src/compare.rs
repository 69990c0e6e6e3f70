//! Two reports side by side: what became faster or slower.
//! Invariant: runs that were not taken together are compared by a 95 % bootstrap interval of the ratio of their medians;
//! a difference is claimed only where the interval leaves out 1. Noise that lasts longer than a run is not in it.

use crate::measure::Figures;
use crate::report::{Group, Report, seconds};
use crate::stats::{Ratio, Summary, bootstrap};

/// One engine on one task in both.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// "seed: softmax 4x16x1024, tallow".
    pub what: String,
    /// Which time.
    pub column: &'static str,
    /// Median seconds before and after.
    pub seconds: [f64; 2],
    /// After over before.
    pub ratio: Ratio,
}

impl Change {
    /// Faster, slower, or not to be told.
    #[must_use]
    pub fn verdict(&self) -> &'static str {
        match &self.ratio {
            r if r.high < 1.0 => "faster",
            r if r.low > 1.0 => "slower",
            _ => "no difference",
        }
    }
}

/// What two reports say together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Compared {
    /// Rows with figures in both.
    pub changes: Vec<Change>,
    /// Rows that have figures in one only, or are in one only.
    pub only_one: Vec<String>,
    /// What else differs, so that a ratio may have another cause.
    pub remarks: Vec<String>,
}

/// Compares `after` with `before`.
#[must_use]
pub fn compare(before: &Report, after: &Report) -> Compared {
    let mut out = Compared {
        remarks: remarks(before, after),
        ..Compared::default()
    };
    let (a, b) = (all(before), all(after));
    for (what, old) in &a {
        match b.iter().find(|(name, _)| name == what) {
            Some((_, new)) => match (old, new) {
                (Some(old), Some(new)) => out.changes.extend(columns(what, old, new)),
                (None, None) => {}
                _ => out
                    .only_one
                    .push(format!("{what}: has figures in one only")),
            },
            None => out.only_one.push(format!("{what}: not in the second")),
        }
    }
    let missing = b
        .iter()
        .filter(|(what, _)| !a.iter().any(|(w, _)| w == what));
    out.only_one
        .extend(missing.map(|(what, _)| format!("{what}: not in the first")));
    out
}

fn all(r: &Report) -> Vec<(String, Option<&Figures>)> {
    let of = |g: &'_ Group, engine: &str| format!("{}: {}, {engine}", g.suite, g.name);
    let rows = r
        .groups
        .iter()
        .flat_map(|g| g.rows.iter().map(move |row| (g, row)));
    rows.map(|(g, row)| (of(g, &row.engine), row.figures()))
        .collect()
}

fn columns(what: &str, old: &Figures, new: &Figures) -> Vec<Change> {
    let pairs: [(&'static str, Option<&Summary>, Option<&Summary>); 3] = [
        ("waited", Some(&old.waited), Some(&new.waited)),
        ("queued", old.queued.as_ref(), new.queued.as_ref()),
        ("in plan", old.in_plan.as_ref(), new.in_plan.as_ref()),
    ];
    let one = |(column, a, b): (&'static str, Option<&Summary>, Option<&Summary>)| {
        let (a, b) = (a?, b?);
        Some(Change {
            what: what.to_owned(),
            column,
            seconds: [a.median, b.median],
            ratio: bootstrap(&b.samples, &a.samples)?,
        })
    };
    pairs.into_iter().filter_map(one).collect()
}

fn device(r: &Report) -> String {
    r.machine
        .device
        .clone()
        .unwrap_or("the processor".to_owned())
}

fn remarks(a: &Report, b: &Report) -> Vec<String> {
    let mut out = vec![];
    let pairs = [
        (
            "processor",
            a.machine.processor.clone(),
            b.machine.processor.clone(),
        ),
        (
            "instruction set",
            a.machine.isa.clone(),
            b.machine.isa.clone(),
        ),
        ("device", device(a), device(b)),
        ("threads", a.threads.to_string(), b.threads.to_string()),
        ("dtype", a.dtype.clone(), b.dtype.clone()),
        ("tallow", a.tallow.clone(), b.tallow.clone()),
    ];
    for (what, a, b) in pairs {
        if a != b {
            out.push(format!("{what}: {a} and {b}"));
        }
    }
    for (which, r) in [("first", a), ("second", b)] {
        if r.stopped {
            out.push(format!("the {which} run was stopped before its end"));
        }
        if let Some(load) = r.machine.load.filter(|l| *l > 0.3) {
            out.push(format!(
                "others were at work when the {which} run began (load {load:.1})"
            ));
        }
    }
    out
}

/// Lines for people.
#[must_use]
pub fn lines(c: &Compared) -> Vec<String> {
    let mut out: Vec<String> = c.remarks.iter().map(|r| format!("note: {r}")).collect();
    if !c.changes.is_empty() {
        out.push("after / before: ratio of medians, 95 % bootstrap interval".to_owned());
    }
    let mut last = "";
    for change in &c.changes {
        if change.what != last {
            out.push(change.what.clone());
            last = &change.what;
        }
        let [a, b] = change.seconds.map(seconds);
        let r = &change.ratio;
        out.push(format!(
            "  {:<8} {a:>9} -> {b:>9}   {:.3} ({:.3} - {:.3})   {}",
            change.column,
            r.middle,
            r.low,
            r.high,
            change.verdict()
        ));
    }
    out.extend(c.only_one.iter().map(|w| format!("{w}: not compared")));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::report;

    #[test]
    fn a_change_is_claimed_only_where_the_interval_leaves_out_1() {
        let (a, b) = (report(1.0), report(2.0));
        let c = compare(&a, &b);
        let slow = &c.changes[0];
        assert_eq!((slow.column, slow.verdict()), ("waited", "slower"));
        assert!((slow.ratio.middle - 2.0).abs() < 1e-9);
        assert_eq!(compare(&b, &a).changes[0].verdict(), "faster");
        assert_eq!(compare(&a, &a).changes[0].verdict(), "no difference");
        assert!(compare(&a, &a).remarks.is_empty());
    }

    #[test]
    fn rows_without_a_partner_and_other_machines_are_said() {
        let (a, mut b) = (report(1.0), report(1.0));
        b.groups[0].rows[0].engine = "other".into();
        b.machine.processor = "another".into();
        b.machine.load = Some(2.0);
        b.stopped = true;
        let c = compare(&a, &b);
        assert_eq!(c.only_one.len(), 2, "{c:?}");
        assert_eq!(c.remarks.len(), 3, "{c:?}");
        let text = lines(&c).join("\n");
        assert!(text.contains("not in the first") && text.contains("note: processor"));
    }
}
