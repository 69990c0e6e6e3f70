//! `tallow train --config FILE`, or what runs share of `--sweep FILE`: settings as if they had been typed before
//! everything else.
//! Invariant: one list of settings, the options of `tallow train`; what is typed too wins over the file.
//! Absent on purpose: checks of values; the command line makes them.
use anyhow::Result;
use serde_json::Value;
use std::{ffi::OsString, path::Path};
use tallow::train::{
    settings,
    sweep::{self, Settings},
};

/// Keys of `train.yaml` that only tell how a run went.
const TOLD: [&str; 3] = ["tallow_version", "steps_done", "last_loss"];
/// Keys of `train.yaml` that are called otherwise on the command line.
const CALLED: [(&str, &str); 1] = [("base_model", "model")];

/// The command line, with the settings of `--config` put behind `train`.
pub(crate) fn expand(args: Vec<OsString>) -> Result<Vec<OsString>> {
    let Some(verb) = args.iter().position(|a| a == "train") else {
        return Ok(args);
    };
    let after = &args[verb + 1..];
    let given = |option: &str| {
        let mut all = after.iter().enumerate();
        all.find_map(|(i, a)| match a.to_str()?.strip_prefix(option)? {
            "" => after.get(i + 1).cloned(),
            text => text.strip_prefix('=').map(OsString::from),
        })
    };
    let mut settings = vec![];
    if let Some(file) = given("--config") {
        settings.push(settings::read(Path::new(&file))?);
    }
    if let Some(file) = given("--sweep") {
        settings.push(sweep::read(Path::new(&file))?.shared);
    }
    if settings.is_empty() {
        return Ok(args);
    }
    let typed = after.iter().filter_map(|a| a.to_str());
    let typed: Vec<&str> = typed.map(|a| a.split('=').next().unwrap_or(a)).collect();
    let mut all = args[..=verb].to_vec();
    for one in &settings {
        all.extend(options(one, &typed));
    }
    all.extend_from_slice(after);
    Ok(all)
}

/// Settings as options, but those that were typed.
pub(super) fn options(settings: &Settings, typed: &[&str]) -> Vec<OsString> {
    let mut all = vec![];
    for (key, value) in settings {
        let flag = flag(key);
        if TOLD.contains(&key.as_str()) || typed.contains(&flag.as_str()) {
            continue;
        }
        let one = |v: &Value| match v {
            Value::String(s) => format!("{flag}={s}").into(),
            other => format!("{flag}={other}").into(),
        };
        match value {
            Value::Null | Value::Bool(false) => {}
            Value::Bool(true) => all.push(flag.into()),
            Value::Array(several) => all.extend(several.iter().map(one)),
            plain => all.push(one(plain)),
        }
    }
    all
}

/// The option that a setting is.
pub(super) fn flag(key: &str) -> String {
    let called = CALLED.iter().find(|(k, _)| *k == key);
    let name = called.map_or(key, |c| c.1).replace('_', "-");
    format!("--{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(yaml: &str, typed: &[&str]) -> Result<Vec<String>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), yaml).unwrap();
        let name = file.path().display().to_string();
        let mut args: Vec<OsString> = vec!["tallow".into(), "train".into()];
        args.push(format!("--config={name}").into());
        args.extend(typed.iter().map(OsString::from));
        let all = expand(args).map_err(|e| e.to_string().replace(&name, "FILE"))?;
        let text = all.into_iter().map(|a| a.into_string().unwrap());
        Ok(text.filter(|a| !a.starts_with("--config")).collect())
    }

    #[test]
    fn settings_become_options_and_what_is_typed_wins() {
        let yaml = "tallow_version: \"0.1\"\nbase_model: dir\nlr: 0.001\nseq_len: 64\nsteps: null\n\
                    rslora: true\nskip_nonfinite: false\ndata: [\"a b\", c]\nsteps_done: 7\n";
        let got = expanded(yaml, &["--lr", "1", "--seq-len=9"]).unwrap();
        let want = "tallow train --model=dir --data=a b --data=c --rslora --lr 1 --seq-len=9";
        assert_eq!(got.join(" "), want);
    }

    #[test]
    fn other_command_lines_stay_as_they_are() {
        let args: Vec<OsString> = ["tallow", "eval", "--config", "x"].map(Into::into).into();
        assert_eq!(expand(args.clone()).unwrap(), args);
    }
}
