//! Jinja as `transformers` runs it: `trim_blocks`, `lstrip_blocks`, Python's methods, and a few functions more.
//! Invariant: rendering is bounded in steps and in depth, whatever the template does; nothing is escaped.
//! Absent on purpose: includes, files, anything that could reach out of a template.

use std::fmt::Write as _;
use std::sync::LazyLock;

use fancy_regex::Regex;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use serde::Deserialize as _;
use serde_json::Map;

use crate::error::quote;

/// What a template prints where the assistant's words begin and end.
pub(super) const BEGIN: &str = "__generation_begin__";
pub(super) const END: &str = "__generation_end__";
/// Instructions of one rendering, at most.
const FUEL: u64 = 50_000_000;
const NAME: &str = "chat";

/// `{%- generation -%}` and its end, with what they do to the space around them.
static GENERATION: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").ok());

/// The environment with the template in it, and whether the template marks what the assistant says.
pub(super) fn environment(text: &str) -> Result<(Environment<'static>, bool), Error> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()?;
    env.set_syntax(syntax);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_fuel(Some(FUEL));
    env.add_function("raise_exception", |why: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, why))
    });
    env.add_function("strftime_now", strftime_now);
    env.add_filter("tojson", tojson);
    let (text, marks) = rewrite(text);
    env.add_template_owned(NAME, text)?;
    Ok((env, marks))
}

pub(super) fn render(
    env: &Environment<'static>,
    all: Map<String, serde_json::Value>,
) -> Result<String, Error> {
    let context = Value::deserialize(serde_json::Value::Object(all))
        .map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    env.get_template(NAME)?.render(context)
}

/// An error of the engine as part of a sentence.
pub(super) fn message(e: &Error) -> String {
    let what = match e.detail() {
        Some(detail) => detail.to_owned(),
        None => e.kind().to_string(),
    };
    // The detail of `raise_exception` is the template's own sentence.
    let what = what.strip_prefix("invalid operation: ").unwrap_or(&what);
    let mut text = quote(what.trim());
    if let Some(line) = e.line() {
        let _ = write!(text, " (line {line} of it)");
    }
    text
}

/// Generation blocks as conditions that print a mark: the engine does not know the tag. The first tag keeps what
/// stands before the block's, the last what stands behind it, so that space is trimmed as it would be.
fn rewrite(text: &str) -> (String, bool) {
    let Some(regex) = &*GENERATION else {
        return (text.to_owned(), false);
    };
    let mut marks = false;
    let replaced = regex.replace_all(text, |found: &fancy_regex::Captures<'_>| {
        marks = true;
        let part = |i: usize| found.get(i).map_or("", |m| m.as_str());
        let name = if part(2).is_empty() { BEGIN } else { END };
        format!(
            "{{%{} if true %}}{{{{ {name} }}}}{{% endif {}%}}",
            part(1),
            part(3)
        )
    });
    let text = replaced.into_owned();
    (text, marks)
}

fn strftime_now(format: String) -> Result<String, Error> {
    let mut text = String::new();
    match write!(text, "{}", chrono::Local::now().format(&format)) {
        Ok(()) => Ok(text),
        Err(_) => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now: {} is no format", quote(&format)),
        )),
    }
}

/// Python's `json.dumps` with `ensure_ascii=False`, which is what the filter does in `transformers`.
fn tojson(value: Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let mut out = String::new();
    let style = Style {
        indent,
        sort_keys: sort_keys.unwrap_or(false),
    };
    style.write(&value, 0, &mut out)?;
    Ok(out)
}

struct Style {
    indent: Option<usize>,
    sort_keys: bool,
}

impl Style {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        let refuse = |what: String| Err(Error::new(ErrorKind::BadSerialization, what));
        if depth > 100 {
            return refuse("tojson: nested too deeply".to_owned());
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => {
                let _ = write!(out, "{value}");
            }
            ValueKind::String => string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let all: Vec<Value> = value.try_iter()?.collect();
                self.list(["[", "]"], all.len(), depth, out, |i, out| {
                    self.write(&all[i], depth + 1, out)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.list(["{", "}"], keys.len(), depth, out, |i, out| {
                    string(&keys[i].to_string(), out);
                    out.push_str(": ");
                    self.write(&value.get_item(&keys[i])?, depth + 1, out)
                })?;
            }
            kind => return refuse(format!("tojson: a value of kind {kind}")),
        }
        Ok(())
    }

    fn list(
        &self,
        [open, close]: [&str; 2],
        n: usize,
        depth: usize,
        out: &mut String,
        mut item: impl FnMut(usize, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push_str(open);
        let line = |depth: usize, out: &mut String| {
            if let Some(indent) = self.indent {
                out.push('\n');
                out.push_str(&" ".repeat(indent * depth));
            }
        };
        for i in 0..n {
            if i > 0 {
                out.push_str(if self.indent.is_some() { "," } else { ", " });
            }
            line(depth + 1, out);
            item(i, out)?;
        }
        if n > 0 {
            line(depth, out);
        }
        out.push_str(close);
        Ok(())
    }
}

/// Quoted as both JSON libraries quote it.
fn string(text: &str, out: &mut String) {
    out.push_str(&serde_json::Value::from(text).to_string());
}
