//! Chat templates: messages to text as Hugging Face's `apply_chat_template` does it, and to token ids with which
//! of them the assistant said.
//! Invariant: special tokens come from the template alone; one that a message only mentions is plain text. (Hugging
//! Face makes it a special token. Where no message mentions one, ids are equal.)
//! Absent on purpose: system prompts, tools or thinking of our own; what a template says is what a model gets.

mod dialect;
mod mask;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;

use aho_corasick::{AhoCorasick, MatchKind};
use minijinja::Environment;
use serde_json::{Map, Value};

use crate::config::ModelConfig;
use crate::error::{Error, Result, list, quote};
use crate::tokenizer::Tokenizer;
use crate::{files, json};

/// A template of its own file, beside the tokenizer.
const FILE: &str = "chat_template.jinja";
const CONFIG: &str = "tokenizer_config.json";
/// No template is larger than this.
const LIMIT_BYTES: u64 = 4 << 20;
/// The template used where a model has several.
const DEFAULT: &str = "default";
/// Under which templates know special tokens.
const TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
];

/// A model's chat template. Cheap to clone.
#[derive(Clone)]
pub struct ChatTemplate(Arc<Inner>);

struct Inner {
    /// Where it was found.
    path: PathBuf,
    env: Environment<'static>,
    /// The names and texts of special tokens.
    tokens: Map<String, Value>,
    /// It marks itself what the assistant says.
    marks_answers: bool,
    tokenizer: Tokenizer,
    /// Texts and ids of all special tokens, in the order of the finder's patterns.
    specials: Vec<(String, u32)>,
    finder: AhoCorasick,
}

impl ChatTemplate {
    /// The template beside a tokenizer: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`. Where
    /// there are several, the one called `name`, or "default".
    ///
    /// # Errors
    /// A model without a chat template, or one that cannot be read.
    pub fn open(tokenizer: &Tokenizer, name: Option<&str>) -> Result<Self> {
        let dir = tokenizer.folder();
        let (config, file) = (dir.join(CONFIG), dir.join(FILE));
        let mut about = Map::new();
        if config.exists() {
            about = json::read_object(&config, "give a model folder")?.0;
        }
        if file.exists() && name.is_none_or(|n| n == DEFAULT) {
            let bytes = files::read_bounded(&file, LIMIT_BYTES, "give a model folder")?;
            let text = String::from_utf8(bytes).map_err(|_| Error::Chat {
                path: file.clone(),
                problem: "it is not UTF-8".to_owned(),
                hint: "save the file as UTF-8",
            })?;
            return Self::build(tokenizer, file, &text, &about);
        }
        match choose(about.get("chat_template"), name) {
            Ok(text) => Self::build(tokenizer, config, text, &about),
            Err(problem) => Err(Error::Chat {
                path: dir.to_path_buf(),
                problem,
                hint: "use a model that was made for chats, or give texts or prompts with completions",
            }),
        }
    }

    /// A template given as text, for a tokenizer.
    ///
    /// # Errors
    /// A template with a syntax error.
    pub fn from_text(tokenizer: &Tokenizer, text: &str) -> Result<Self> {
        let path = tokenizer.folder().join(CONFIG);
        let about = match path.exists() {
            true => json::read_object(&path, "give a model folder")?.0,
            false => Map::new(),
        };
        Self::build(tokenizer, path, text, &about)
    }

    fn build(
        tokenizer: &Tokenizer,
        path: PathBuf,
        text: &str,
        about: &Map<String, Value>,
    ) -> Result<Self> {
        let fail = |problem: String| Error::Chat {
            path: path.clone(),
            problem,
            hint: "correct the template, or download the model again",
        };
        let (env, marks_answers) =
            dialect::environment(text).map_err(|e| fail(dialect::message(&e)))?;
        let mut tokens = Map::new();
        for name in TOKENS {
            // A string, or an object as `AddedToken` is written.
            let value = match about.get(name) {
                Some(Value::Object(o)) => o.get("content"),
                other => other,
            };
            if let Some(Value::String(s)) = value {
                tokens.insert(name.to_owned(), Value::String(s.clone()));
            }
        }
        let specials = tokenizer.special_tokens();
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(specials.iter().map(|s| &s.0))
            .map_err(|e| fail(quote(&e.to_string())))?;
        Ok(Self(Arc::new(Inner {
            path,
            env,
            tokens,
            marks_answers,
            tokenizer: tokenizer.clone(),
            specials,
            finder,
        })))
    }

    /// The chat as text, as `apply_chat_template(tokenize=False)` gives it. `add_generation_prompt`: with the
    /// beginning of the assistant's answer.
    ///
    /// # Errors
    /// Messages that the template refuses.
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        self.render_marked(messages, tools, add_generation_prompt, ["", ""])
    }

    /// The token ids of a chat.
    ///
    /// # Errors
    /// Messages that the template refuses.
    pub fn ids(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>> {
        let marks = self.marks(messages, tools);
        let messages = self.guarded(messages, &marks);
        let text = self.render(&messages, tools, add_generation_prompt)?;
        let spans = self.spans(&text, marks.guard)?;
        Ok(spans.into_iter().map(|s| s.0).collect())
    }

    /// The token ids of a chat with the beginning of the assistant's answer, for a model to go on from.
    ///
    /// # Errors
    /// Messages that the template refuses; a tokenizer of another model.
    pub fn prompt(&self, config: &ModelConfig, messages: &[Value]) -> Result<Vec<u32>> {
        self.0
            .tokenizer
            .check(self.ids(messages, None, true)?, config)
    }

    fn render_marked(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
        [begin, end]: [&str; 2],
    ) -> Result<String> {
        let mut all = self.0.tokens.clone();
        let mut set = |name: &str, value: Value| all.insert(name.to_owned(), value);
        set("messages", Value::Array(messages.to_vec()));
        set("tools", tools.cloned().unwrap_or_default());
        set("documents", Value::Null);
        set("add_generation_prompt", Value::Bool(add_generation_prompt));
        set(dialect::BEGIN, Value::String(begin.to_owned()));
        set(dialect::END, Value::String(end.to_owned()));
        dialect::render(&self.0.env, all).map_err(|e| Error::Chat {
            path: self.0.path.clone(),
            problem: dialect::message(&e),
            hint: "change the messages to what this model's template takes",
        })
    }
}

/// The template's text: a string, or a list of named ones.
fn choose<'a>(
    found: Option<&'a Value>,
    name: Option<&str>,
) -> std::result::Result<&'a str, String> {
    let wanted = name.unwrap_or(DEFAULT);
    match found {
        None | Some(Value::Null) => Err("this model has none".to_owned()),
        Some(Value::String(text)) if wanted == DEFAULT => Ok(text),
        Some(Value::String(_)) => Err(format!(
            "there is only one, not one called {}",
            quote(wanted)
        )),
        Some(Value::Array(all)) => {
            let field = |v: &'a Value, key: &str| v.get(key).and_then(Value::as_str);
            let named = all.iter().find(|t| field(t, "name") == Some(wanted));
            named.and_then(|t| field(t, "template")).ok_or_else(|| {
                let names = list(all.iter().filter_map(|t| field(t, "name")).map(quote));
                format!("none is called {}; there are {names}", quote(wanted))
            })
        }
        Some(other) => Err(format!(
            "want a string or a list, got {}",
            json::brief(other)
        )),
    }
}
