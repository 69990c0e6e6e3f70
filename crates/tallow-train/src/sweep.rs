//! Files of sweeps: settings that all runs share, and in what each differs, listed or as every combination.
//! Invariant: runs have names of their own that are safe as folders; they differ only in settings of their own
//! adapter, never in those of the passes they share.
//! Absent on purpose: what the settings mean; the command line knows.
use crate::{
    Result,
    settings::{bad, check, parse},
};
use serde_json::{Map, Value};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// Adapters that are trained in the same passes.
pub const MOST_RUNS: usize = 32;
/// What runs of a sweep may differ in.
const MAY_DIFFER: [&str; 21] = [
    "rank",
    "alpha",
    "rslora",
    "targets",
    "dora",
    "dropout",
    "layers",
    "rank_pattern",
    "alpha_pattern",
    "loraplus",
    "init",
    "lr",
    "schedule",
    "warmup",
    "optimizer",
    "weight_decay",
    "beta1",
    "beta2",
    "eps",
    "clip",
    "seed",
];
/// Longest name of a run.
const LONGEST_NAME: usize = 80;

/// Names and values of settings.
pub type Settings = BTreeMap<String, Value>;

/// Runs to compare.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sweep {
    /// What all of them share.
    pub shared: Settings,
    /// The runs, in the order of the file.
    pub runs: Vec<SweepRun>,
}

/// One run of a sweep.
#[derive(Clone, Debug, PartialEq)]
pub struct SweepRun {
    /// Its folder.
    pub name: String,
    /// In what it differs from the others.
    pub settings: Settings,
}

/// Reads a sweep: settings as in `train.yaml`, and `runs` (a list of settings, each perhaps with a `name`), `grid`
/// (a list of values for each of some settings, whose combinations are runs), or both.
///
/// # Errors
/// A file that is not there, too long or not of this form; no run, too many, or two of one name.
pub fn read(path: &Path) -> Result<Sweep> {
    let mut shared = parse(path)?;
    let (listed, grid) = (shared.remove("runs"), shared.remove("grid"));
    check(path, &shared)?;
    let mut runs = vec![];
    let refuse = |what: String| Err(bad(path, what));
    match listed {
        None | Some(Value::Null) => {}
        Some(Value::Array(all)) if all.iter().all(Value::is_object) => {
            let objects = all.into_iter().filter_map(|v| match v {
                Value::Object(one) => Some(one),
                _ => None,
            });
            for one in objects {
                runs.push(listed_run(path, one)?);
            }
        }
        Some(_) => return refuse("`runs`: want a list of settings, like `- rank: 8`".into()),
    }
    match grid {
        None | Some(Value::Null) => {}
        Some(Value::Object(axes)) => runs.extend(combinations(path, axes)?),
        Some(_) => {
            return refuse("`grid`: want settings with lists, like `lr: [1e-3, 1e-4]`".into());
        }
    }
    let mut names = BTreeSet::new();
    for run in &runs {
        check_run(path, &shared, run)?;
        if !names.insert(run.name.to_lowercase()) {
            let name = &run.name;
            return refuse(format!(
                "two runs are called `{name}`; give one another `name`"
            ));
        }
    }
    match runs.len() {
        0 => refuse("no run; list some under `runs`, or values under `grid`".into()),
        n if n > MOST_RUNS => refuse(format!("{n} runs; want at most {MOST_RUNS} side by side")),
        _ => Ok(Sweep { shared, runs }),
    }
}

fn listed_run(path: &Path, one: Map<String, Value>) -> Result<SweepRun> {
    let mut settings: Settings = one.into_iter().collect();
    let name = match settings.remove("name") {
        None => named(&settings),
        Some(Value::String(name)) => name,
        Some(Value::Number(n)) => n.to_string(),
        Some(_) => return Err(bad(path, "`name` of a run: want a word".into())),
    };
    Ok(SweepRun { name, settings })
}

/// Every combination of the axes' values, the last axis changing first.
fn combinations(path: &Path, axes: Map<String, Value>) -> Result<Vec<SweepRun>> {
    let mut all = vec![Settings::new()];
    for (key, values) in axes {
        let Value::Array(values) = values else {
            let key: String = key.chars().take(40).collect();
            let what = format!("`grid`: `{}`: want a list of values", key.escape_debug());
            return Err(bad(path, what));
        };
        if all.len() * values.len() > MOST_RUNS {
            let what = format!("`grid`: want at most {MOST_RUNS} combinations");
            return Err(bad(path, what));
        }
        let with = |one: &Settings, v: &Value| {
            let mut one = one.clone();
            one.insert(key.clone(), v.clone());
            one
        };
        let next = all
            .iter()
            .flat_map(|one| values.iter().map(|v| with(one, v)));
        all = next.collect();
    }
    all.retain(|one| !one.is_empty());
    let run = |settings: Settings| SweepRun {
        name: named(&settings),
        settings,
    };
    Ok(all.into_iter().map(run).collect())
}

/// A name that says what is set: "lr-0.001_rank-8".
fn named(settings: &Settings) -> String {
    let one = |(key, value): (&String, &Value)| {
        let text = value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned);
        let safe = |c: char| if is_safe(c) { c } else { '-' };
        let text: String = text.chars().map(safe).collect();
        format!("{key}-{}", text.trim_matches('-'))
    };
    let all: Vec<String> = settings.iter().map(one).collect();
    all.join("_")
}

fn is_safe(c: char) -> bool {
    c.is_ascii_alphanumeric() || "._-".contains(c)
}

fn check_run(path: &Path, shared: &Settings, run: &SweepRun) -> Result<()> {
    let name = &run.name;
    let word = !name.is_empty() && name.len() <= LONGEST_NAME && name.chars().all(is_safe);
    if !word || name.starts_with('.') {
        let name: String = name.chars().take(40).collect();
        let want = "want letters, digits, `-`, `_` and `.`, and at most 80 of them";
        return Err(bad(
            path,
            format!("name of a run `{}`: {want}", name.escape_debug()),
        ));
    }
    check(path, &run.settings)?;
    for (key, value) in &run.settings {
        let key = key.replace('-', "_");
        if !MAY_DIFFER.contains(&key.as_str()) {
            let rest = MAY_DIFFER.join(", ");
            let what =
                format!("run `{name}`: `{key}` is one for all runs; they may differ in {rest}");
            return Err(bad(path, what));
        }
        if *value == Value::Bool(false) && shared.get(&key) == Some(&Value::Bool(true)) {
            let what = format!(
                "run `{name}`: `{key}` is on for all runs; take it from the shared settings"
            );
            return Err(bad(path, what));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn sweep(text: &str) -> Result<Sweep, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let name = file.path().display().to_string();
        read(file.path()).map_err(|e| e.to_string().replace(&name, "FILE"))
    }

    #[test]
    fn runs_are_listed_or_combined() {
        let got = sweep(
            "model: dir\nsteps: 9\nruns:\n  - {name: small, rank: 4}\n  - {rank: 16, lr: 0.001}\n\
             grid:\n  lr: [0.1, 1e-4]\n  targets: [all-linear, 'q_proj,v_proj']\n",
        )
        .unwrap();
        assert_eq!(got.shared["steps"], json!(9));
        let names: Vec<&str> = got.runs.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "small",
                "lr-0.001_rank-16",
                "lr-0.1_targets-all-linear",
                "lr-0.1_targets-q_proj-v_proj",
                "lr-0.0001_targets-all-linear",
                "lr-0.0001_targets-q_proj-v_proj",
            ]
        );
        assert_eq!(got.runs[1].settings["lr"], json!(0.001));
    }

    #[test]
    fn what_is_no_sweep_is_refused() {
        let refused = |text: &str| sweep(text).unwrap_err();
        assert!(refused("rank: 8").contains("FILE: no run"));
        assert!(refused("runs: 7").contains("want a list of settings"));
        assert!(refused("runs: [{batch: 3}]").contains("`batch` is one for all runs"));
        assert!(refused("runs: [{rank: 3}, {rank: 3}]").contains("two runs are called `rank-3`"));
        assert!(refused("runs: [{name: ../x, rank: 3}]").contains("name of a run `../x`"));
        assert!(refused("runs: [{name: .x}]").contains("name of a run"));
        assert!(refused("runs: [{}]").contains("name of a run ``"));
        assert!(refused("runs: [{rank: {a: 1}}]").contains("plain value"));
        assert!(refused("grid: {rank: 8}").contains("want a list of values"));
        assert!(refused("grid: {rank: []}").contains("no run"));
        let many = "grid: {rank: [1,2,3,4,5,6], lr: [1,2,3,4,5,6]}";
        assert!(refused(many).contains("at most 32 combinations"));
        let off = "dora: true\nruns: [{name: a, dora: false}]";
        assert!(refused(off).contains("`dora` is on for all runs"));
    }
}
