//! Files of settings, one `name: value` a line, as `train.yaml` is written.
//! Invariant: a file is small; names are words, values are plain or lists of plain ones.
//! Absent on purpose: what the names mean; the command line knows.
use crate::{Error, Result};
use serde_json::Value;
use std::{collections::BTreeMap, path::Path};
use tallow_llm::files;

/// No file of settings is longer.
const LONGEST_BYTES: u64 = 1 << 20;

/// The settings in a file.
///
/// # Errors
/// A file that is not there, too long or no list of settings.
pub fn read(path: &Path) -> Result<BTreeMap<String, Value>> {
    let all = parse(path)?;
    check(path, &all)?;
    Ok(all)
}

/// A file's names and values, whatever they are.
pub(crate) fn parse(path: &Path) -> Result<BTreeMap<String, Value>> {
    let bytes = files::read_bounded(path, LONGEST_BYTES, "give a file like a run's train.yaml")?;
    let bad = |problem: String| bad(path, problem);
    let text = String::from_utf8(bytes).map_err(|_| bad("it is not UTF-8".to_owned()))?;
    serde_saphyr::from_str(&text).map_err(|e| {
        let e = e.to_string();
        let first: String = e
            .lines()
            .next()
            .unwrap_or_default()
            .chars()
            .take(200)
            .collect();
        bad(format!(
            "want lines `name: value` ({})",
            first.escape_debug()
        ))
    })
}

/// Refuses names that are no words, and values that are not plain.
pub(crate) fn check(path: &Path, all: &BTreeMap<String, Value>) -> Result<()> {
    for (name, value) in all {
        let word = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let known = !name.is_empty() && name.chars().all(word);
        if !known || !is_plain(value) {
            let name: String = name.chars().take(40).collect();
            let name = name.escape_debug();
            let want = "want a setting of `tallow train` with a plain value";
            return Err(bad(path, format!("`{name}`: {want}")));
        }
    }
    Ok(())
}

pub(crate) fn bad(path: &Path, problem: String) -> Error {
    Error::Settings {
        path: path.to_path_buf(),
        problem,
    }
}

/// A plain value, or a list of some that say something.
fn is_plain(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => true,
        Value::Array(all) => all.iter().all(|v| v.is_number() || v.is_string()),
        Value::Object(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &[u8]) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let name = file.path().display().to_string();
        read(file.path())
            .unwrap_err()
            .to_string()
            .replace(&name, "FILE")
    }

    #[test]
    fn files_that_are_no_settings_are_refused() {
        assert!(refused(b"- 1\n- 2\n").starts_with("FILE: want lines `name: value`"));
        assert!(refused(b"a: {b: 1}").starts_with("FILE: `a`: want a setting"));
        assert!(refused(b"a: [1, [2]]").starts_with("FILE: `a`: want a setting"));
        assert!(refused(b"\"a b\": 1").starts_with("FILE: `a b`: want a setting"));
        assert!(refused(b": : [").contains("want lines"));
        assert_eq!(
            refused(b"a: \xff"),
            "FILE: it is not UTF-8; correct the file"
        );
        assert!(refused(&b"a: 1\n".repeat(1 << 18)).contains("larger than 1048576 bytes"));
    }

    #[test]
    fn yaml_10_000_deep_and_yaml_that_grows_are_refused() {
        let deep = format!("a: {}", "[".repeat(10_000));
        assert!(refused(deep.as_bytes()).contains("want lines"));
        // Ten names, each ten times the one before: a billion values.
        let mut bomb = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n".to_owned();
        for i in 1..10 {
            let list = vec![format!("*a{}", i - 1); 10].join(", ");
            bomb += &format!("a{i}: &a{i} [{list}]\n");
        }
        assert!(refused(bomb.as_bytes()).contains("want lines"));
    }
}
