//! Examples as token ids, with which of them a model is to predict.
//! Invariant: the first id of a row is never a target; text from a file never becomes a special token.
//! Absent on purpose: cutting. A row is as long as its example.

use super::{Chat, Example};
use crate::chat::ChatTemplate;
use crate::config::ModelConfig;
use crate::error::{Error, Result, quote};
use crate::tokenizer::Tokenizer;

/// Which tokens count in the loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LossOn {
    /// Completions and what the assistant says; plain texts whole.
    #[default]
    Answers,
    /// Every token.
    Everything,
}

impl LossOn {
    /// Lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Answers => "answers",
            Self::Everything => "everything",
        }
    }
}

impl std::str::FromStr for LossOn {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "answers" => Ok(Self::Answers),
            "everything" => Ok(Self::Everything),
            other => Err(Error::Setting {
                name: "loss_on",
                want: "answers or everything",
                got: quote(other),
            }),
        }
    }
}

/// An example as token ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// All of it.
    pub ids: Vec<u32>,
    /// Which ids are to be predicted from those before them; never the first.
    pub counted: Vec<bool>,
}

impl Row {
    /// Keeps the first `longest` ids; true if there were more.
    pub fn cut(&mut self, longest: usize) -> bool {
        let more = self.ids.len() > longest;
        self.ids.truncate(longest);
        self.counted.truncate(longest);
        more
    }

    /// Ids to be predicted.
    pub fn targets(&self) -> usize {
        self.counted.iter().filter(|c| **c).count()
    }

    /// Ids of which those from `first` on are targets.
    fn from(ids: Vec<u32>, first: usize) -> Self {
        let counted = (0..ids.len()).map(|i| i >= first.max(1)).collect();
        Self { ids, counted }
    }
}

/// Turns examples into rows, for one model. Cheap to clone.
#[derive(Clone)]
pub struct Encoder {
    tokenizer: Tokenizer,
    config: ModelConfig,
    loss_on: LossOn,
    template: Option<ChatTemplate>,
}

impl Encoder {
    /// For a model and its tokenizer. The chat template is looked for when the first chat comes.
    pub fn new(tokenizer: &Tokenizer, config: &ModelConfig, loss_on: LossOn) -> Self {
        Self {
            tokenizer: tokenizer.clone(),
            config: config.clone(),
            loss_on,
            template: None,
        }
    }

    /// Which tokens count.
    pub fn loss_on(&self) -> LossOn {
        self.loss_on
    }

    /// A text becomes bos + text + eos, all of it to be predicted; a prompt and its completion bos + prompt +
    /// completion + eos, with only the completion and eos to be predicted; a chat what the model's template makes
    /// of it, with only the assistant's words to be predicted. [`LossOn::Everything`] counts all tokens.
    ///
    /// # Errors
    /// A tokenizer of another model; a chat that the template refuses.
    pub fn encode(&mut self, example: &Example) -> Result<Row> {
        match example {
            Example::Text(text) => {
                let ids = self.tokenizer.encode_line(text, &self.config)?;
                Ok(Row::from(ids, 1))
            }
            Example::Completion { prompt, completion } => self.completion(prompt, completion),
            Example::Chat(chat) => self.chat(chat),
        }
    }

    /// The completion follows the prompt's own tokens, as it will when the model is asked to go on. They are cut
    /// into tokens together where that leaves the prompt's as they are, else each for itself.
    fn completion(&self, prompt: &str, completion: &str) -> Result<Row> {
        let (mut ids, tail) = self.tokenizer.frame(&self.config);
        let given = self.tokenizer.encode_text(prompt)?;
        let first = ids.len() + given.len();
        let together = self
            .tokenizer
            .encode_text(&format!("{prompt}{completion}"))?;
        if together.starts_with(&given) {
            ids.extend(together);
        } else {
            ids.extend(given);
            ids.extend(self.tokenizer.encode_text(completion)?);
        }
        ids.extend(tail);
        let ids = self.tokenizer.check(ids, &self.config)?;
        Ok(Row::from(
            ids,
            match self.loss_on {
                LossOn::Answers => first,
                LossOn::Everything => 1,
            },
        ))
    }

    fn chat(&mut self, chat: &Chat) -> Result<Row> {
        let template = match &mut self.template {
            Some(found) => found,
            none => none.insert(ChatTemplate::open(&self.tokenizer, None)?),
        };
        let (ids, mut counted) = match self.loss_on {
            LossOn::Everything => {
                let ids = template.ids(&chat.messages, chat.tools.as_ref(), false)?;
                let counted = vec![true; ids.len()];
                (ids, counted)
            }
            LossOn::Answers => template.ids_and_answers(chat)?,
        };
        if let Some(first) = counted.first_mut() {
            *first = false;
        }
        let ids = self.tokenizer.check(ids, &self.config)?;
        Ok(Row { ids, counted })
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;

    fn tiny() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny")
    }

    fn encode(loss_on: LossOn, line: &str) -> Result<Row> {
        let config = ModelConfig::read(&tiny()).unwrap();
        let mut encoder = Encoder::new(&Tokenizer::open(&tiny()).unwrap(), &config, loss_on);
        let row = encoder.encode(&Example::parse(line).unwrap())?;
        assert_eq!(row.ids.len(), row.counted.len());
        assert!(!row.counted[0]);
        Ok(row)
    }

    #[test]
    fn a_text_counts_whole() {
        let row = encode(LossOn::Answers, r#"{"text": "table: 1"}"#).unwrap();
        assert_eq!(row.targets(), row.ids.len() - 1);
    }

    #[test]
    fn a_completion_counts_with_its_end_and_its_prompt_does_not() {
        let tokenizer = Tokenizer::open(&tiny()).unwrap();
        let eos = tokenizer.token_id("<|eos|>").unwrap();
        for (prompt, completion) in [
            ("columns: A\nQ: how many", " SELECT A"),
            // Cut in the middle of a word, where tokens of the whole would span the cut.
            ("SEL", "ECT A FROM"),
            ("", "x"),
            ("x", ""),
        ] {
            let line = serde_json::json!({"prompt": prompt, "completion": completion}).to_string();
            let row = encode(LossOn::Answers, &line).unwrap();
            let given = tokenizer.encode_text(prompt).unwrap();
            let first = row.counted.iter().position(|c| *c).unwrap();
            assert_eq!(first, 1 + given.len(), "{prompt}");
            assert_eq!(row.ids[1..first], given);
            assert!(row.counted[first..].iter().all(|c| *c));
            let said = &row.ids[first..];
            assert_eq!(said.last(), Some(&eos));
            assert_eq!(tokenizer.decode(said).unwrap(), completion);
            let all = encode(LossOn::Everything, &line).unwrap();
            assert_eq!(all.ids, row.ids);
            assert_eq!(all.targets(), row.ids.len() - 1);
        }
    }

    #[test]
    fn a_chat_needs_a_template() {
        let line = r#"{"messages": [{"role": "user", "content": "hi"}]}"#;
        let message = encode(LossOn::Answers, line).unwrap_err().to_string();
        assert!(message.contains("this model has none"), "{message}");
    }

    #[test]
    fn cutting_keeps_ids_and_targets_together() {
        let mut row = Row::from(vec![1, 2, 3, 4], 2);
        assert!(!row.clone().cut(4));
        assert!(row.cut(3));
        assert_eq!((row.ids.len(), row.targets()), (3, 1));
    }
}
