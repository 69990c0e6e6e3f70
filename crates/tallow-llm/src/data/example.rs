//! What a line says: a text, a prompt with its completion, or a chat.
//! Invariant: a line has exactly one reading, or is refused with the keys it has.
//! Absent on purpose: tokens; see `encode`.

use serde_json::{Map, Value};

use crate::error::{list, quote};
use crate::json;

/// One training example.
#[derive(Clone, Debug, PartialEq)]
pub enum Example {
    /// Plain text.
    Text(String),
    /// A text and how it goes on.
    Completion {
        /// What is given.
        prompt: String,
        /// What is to be learnt.
        completion: String,
    },
    /// Messages for the model's chat template.
    Chat(Chat),
}

/// A conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Chat {
    /// Objects with a `role` and usually a `content`, as chat templates want them.
    pub messages: Vec<Value>,
    /// Functions the model may call, where the line has any.
    pub tools: Option<Value>,
    /// This many messages in front are a prompt: never learnt unless everything is.
    pub given: usize,
}

/// The kinds of examples. A file holds one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Lines with `text`.
    Text,
    /// Lines with strings under `prompt` and `completion`.
    Completion,
    /// Lines with `messages`, or lists of messages under `prompt` and `completion`.
    Chat,
}

impl Kind {
    /// The keys its lines have.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Completion => "prompt and completion",
            Self::Chat => "messages",
        }
    }
}

pub(super) const HINT: &str = "make each line a JSON object with \"text\", with \"prompt\" and \"completion\", or with \"messages\"";

impl Example {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Text(_) => Kind::Text,
            Self::Completion { .. } => Kind::Completion,
            Self::Chat(_) => Kind::Chat,
        }
    }

    /// Reads a line; the error says what is wrong with it.
    pub fn parse(line: &str) -> Result<Self, String> {
        let value: Value =
            serde_json::from_str(line).map_err(|e| format!("not valid JSON ({e})"))?;
        let Value::Object(mut map) = value else {
            return Err(format!("want an object, got {}", json::brief(&value)));
        };
        let has = |key: &str| map.get(key).is_some_and(|v| !v.is_null());
        let halves = has("prompt") && has("completion");
        let found: Vec<&str> = [
            ("text", has("text")),
            ("messages", has("messages")),
            ("prompt and completion", halves),
        ]
        .into_iter()
        .filter_map(|(name, there)| there.then_some(name))
        .collect();
        match found[..] {
            ["text"] => Ok(Self::Text(string(&mut map, "text")?)),
            ["messages"] => {
                let messages = messages(&mut map, "messages")?;
                let tools = tools(&mut map)?;
                Ok(Self::Chat(Chat {
                    messages,
                    tools,
                    given: 0,
                }))
            }
            [_] => completion(&mut map),
            [] => Err(no_keys(&map)),
            _ => Err(format!(
                "it has {}, but one line is one kind of example",
                found.join(" and ")
            )),
        }
    }
}

fn no_keys(map: &Map<String, Value>) -> String {
    if map.is_empty() {
        return "no key `text` in an empty object".to_owned();
    }
    let keys = list(map.keys().map(|k| quote(k)));
    for (one, other) in [("prompt", "completion"), ("completion", "prompt")] {
        if map.contains_key(one) {
            return format!("`{one}` without `{other}`; the keys are {keys}");
        }
    }
    format!("no key `text`, `prompt` or `messages`; the keys are {keys}")
}

fn string(map: &mut Map<String, Value>, key: &str) -> Result<String, String> {
    match map.remove(key) {
        Some(Value::String(text)) => Ok(text),
        other => Err(format!(
            "`{key}`: want a string, got {}",
            json::brief(&other.unwrap_or_default())
        )),
    }
}

/// Two strings, or two lists of messages.
fn completion(map: &mut Map<String, Value>) -> Result<Example, String> {
    if map["prompt"].is_array() && map["completion"].is_array() {
        let mut all = messages(map, "prompt")?;
        let given = all.len();
        all.extend(messages(map, "completion")?);
        return Ok(Example::Chat(Chat {
            messages: all,
            tools: tools(map)?,
            given,
        }));
    }
    Ok(Example::Completion {
        prompt: string(map, "prompt")?,
        completion: string(map, "completion")?,
    })
}

fn messages(map: &mut Map<String, Value>, key: &str) -> Result<Vec<Value>, String> {
    let all = match map.remove(key) {
        Some(Value::Array(all)) if !all.is_empty() => all,
        Some(Value::Array(_)) => return Err(format!("`{key}` is an empty list")),
        other => {
            let got = json::brief(&other.unwrap_or_default());
            return Err(format!("`{key}`: want a list of messages, got {got}"));
        }
    };
    for (i, message) in all.iter().enumerate() {
        let at = format!("`{key}`, message {}", i + 1);
        let Some(message) = message.as_object() else {
            let got = json::brief(message);
            return Err(format!(
                "{at}: want an object with `role` and `content`, got {got}"
            ));
        };
        match message.get("role") {
            Some(Value::String(_)) => {}
            Some(other) => {
                let got = json::brief(other);
                return Err(format!("{at}: `role`: want a string, got {got}"));
            }
            None => return Err(format!("{at}: no `role`")),
        }
        let said = message.get("content").is_some_and(|c| !c.is_null());
        if !said && !message.contains_key("tool_calls") {
            return Err(format!("{at}: no `content`"));
        }
    }
    Ok(all)
}

fn tools(map: &mut Map<String, Value>) -> Result<Option<Value>, String> {
    match map.remove("tools") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(all)) => Ok((!all.is_empty()).then_some(Value::Array(all))),
        Some(other) => Err(format!("`tools`: want a list, got {}", json::brief(&other))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(line: &str) -> String {
        Example::parse(line).unwrap_err()
    }

    #[test]
    fn each_kind_is_told_by_its_keys() {
        let text = Example::parse(r#"{"id": 1, "text": "a", "prompt": null}"#).unwrap();
        assert_eq!(text, Example::Text("a".into()));
        let halves = Example::parse(r#"{"prompt": "a", "completion": " b"}"#).unwrap();
        assert_eq!(halves.kind(), Kind::Completion);
        let line = r#"{"messages": [{"role": "user", "content": "hi"}], "tools": []}"#;
        let Example::Chat(chat) = Example::parse(line).unwrap() else {
            panic!("not a chat");
        };
        assert_eq!((chat.messages.len(), chat.given, chat.tools), (1, 0, None));
        let line = r#"{"prompt": [{"role": "user", "content": "a"}],
            "completion": [{"role": "assistant", "content": "b"}]}"#;
        let Example::Chat(chat) = Example::parse(line).unwrap() else {
            panic!("not a chat");
        };
        assert_eq!((chat.messages.len(), chat.given), (2, 1));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (line, want) in [
            (r#"{"text": 1}"#, "`text`: want a string, got 1"),
            (
                r#"{"text": "", "messages": [1]}"#,
                "it has text and messages, but one line is one kind of example",
            ),
            (
                r#"{"prompt": "a"}"#,
                "`prompt` without `completion`; the keys are \"prompt\"",
            ),
            (
                r#"{"prompt": "a", "completion": []}"#,
                "`completion`: want a string, got []",
            ),
            (r#"{"messages": []}"#, "`messages` is an empty list"),
            (
                r#"{"messages": "hi"}"#,
                "`messages`: want a list of messages, got \"hi\"",
            ),
            (
                r#"{"messages": ["hi"]}"#,
                "`messages`, message 1: want an object with `role` and `content`, got \"hi\"",
            ),
            (
                r#"{"messages": [{"role": "user", "content": "x"}, {"content": "y"}]}"#,
                "`messages`, message 2: no `role`",
            ),
            (
                r#"{"messages": [{"role": "user", "content": null}]}"#,
                "`messages`, message 1: no `content`",
            ),
            (
                r#"{"messages": [{"role": "user", "content": ""}], "tools": {}}"#,
                "`tools`: want a list, got an object",
            ),
            (
                r#"{"x": 1}"#,
                "no key `text`, `prompt` or `messages`; the keys are \"x\"",
            ),
        ] {
            assert_eq!(problem(line), want, "{line}");
        }
    }

    #[test]
    fn json_nested_10_000_deep_is_refused() {
        let deep = format!("{{\"text\": {}{}}}", "[".repeat(10_000), "]".repeat(10_000));
        assert!(
            problem(&deep).contains("recursion limit"),
            "{}",
            problem(&deep)
        );
        let deep = "{\"a\":".repeat(10_000);
        assert!(problem(&deep).contains("recursion limit"));
    }
}
