//! Reading keys of a JSON object with errors that name the file and the key.
//! Invariant: `null` means absent, as it does in the files transformers and PEFT write.
//! Absent on purpose: derive-based parsing, whose messages name neither.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result, quote};
use crate::files;

/// No configuration file is larger than this.
const LIMIT_BYTES: u64 = 64 << 20;

/// Reads a file that holds one JSON object; also returns its text.
pub(crate) fn read_object(path: &Path, hint: &str) -> Result<(Map<String, Value>, Vec<u8>)> {
    let bytes = files::read_bounded(path, LIMIT_BYTES, hint)?;
    match serde_json::from_slice::<Value>(&bytes) {
        Ok(Value::Object(map)) => Ok((map, bytes)),
        Ok(other) => Err(Error::Json {
            path: path.to_path_buf(),
            problem: format!("want an object {{...}}, got {}", brief(&other)),
        }),
        Err(e) => Err(Error::Json {
            path: path.to_path_buf(),
            problem: syntax_problem(&bytes, &e),
        }),
    }
}

/// What the parser said, and the line it stopped at: a bare `NaN` is found by its key.
fn syntax_problem(bytes: &[u8], error: &serde_json::Error) -> String {
    let line = error
        .line()
        .checked_sub(1)
        .and_then(|i| bytes.split(|&b| b == b'\n').nth(i))
        .map(|l| String::from_utf8_lossy(l).trim().to_owned())
        .filter(|l| !l.is_empty());
    match line {
        Some(line) => format!("{error}, in {}", quote(&line)),
        None => error.to_string(),
    }
}

/// A value in at most 60 characters.
pub(crate) fn brief(value: &Value) -> String {
    let text = match value {
        Value::Object(_) => return "an object".to_owned(),
        other => other.to_string(),
    };
    if text.chars().count() <= 60 {
        return text;
    }
    let mut short: String = text.chars().take(60).collect();
    short.push('…');
    short
}

/// True for what Python takes as true.
pub(crate) fn truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(b) => *b,
        Value::Number(n) => n.as_f64() != Some(0.0),
        Value::String(s) => !s.is_empty(),
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
    }
}

/// A whole number, also where it is written as `16.0`.
pub(crate) fn whole(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| {
        let f = value.as_f64()?;
        ((0.0..9e15).contains(&f) && f.fract() == 0.0).then_some(f as u64)
    })
}

/// The keys of one object of one file.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    pub(crate) path: &'a Path,
    /// Comes before the key in messages: "" or "rope_scaling.".
    pub(crate) prefix: &'static str,
    pub(crate) map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The value of `key` unless it is absent or null.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    pub(crate) fn bad(&self, key: &str, want: impl Into<String>, got: impl Into<String>) -> Error {
        Error::Key {
            path: self.path.to_path_buf(),
            key: format!("{}{key}", self.prefix),
            want: want.into(),
            got: got.into(),
        }
    }

    /// A whole number in `1..=most`, or `None` where absent.
    pub(crate) fn count(&self, key: &str, most: u64) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match whole(value) {
            Some(n @ 1..) if n <= most => Ok(Some(n as usize)),
            _ => Err(self.bad(
                key,
                format!("a whole number from 1 to {most}"),
                brief(value),
            )),
        }
    }

    /// As [`Fields::count`], but the key must be there.
    pub(crate) fn need_count(&self, key: &str, most: u64) -> Result<usize> {
        let want = || format!("a whole number from 1 to {most}");
        self.count(key, most)?
            .ok_or_else(|| self.bad(key, want(), "nothing"))
    }

    /// A finite number, or `None` where absent.
    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(f) if f.is_finite() => Ok(Some(f)),
            _ => Err(self.bad(key, "a number", brief(value))),
        }
    }

    /// true or false; absent is `default`.
    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(self.bad(key, "true or false", brief(other))),
        }
    }

    /// A string, or `None` where absent.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.bad(key, "a string", brief(other))),
        }
    }

    /// A string or a list of strings, or `None` where absent.
    pub(crate) fn texts(&self, key: &str) -> Result<Option<Vec<String>>> {
        let want = "a string or a list of strings";
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(vec![s.clone()])),
            Some(Value::Array(items)) => items
                .iter()
                .map(|v| {
                    let text = v.as_str().map(str::to_owned);
                    text.ok_or_else(|| self.bad(key, want, brief(v)))
                })
                .collect::<Result<_>>()
                .map(Some),
            Some(other) => Err(self.bad(key, want, brief(other))),
        }
    }
}
