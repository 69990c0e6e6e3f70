//! Text to token ids and back, on `tokenizer.json`.
//! Invariant: text from outside never becomes a special token, whatever it contains; a line begins with at
//! most one bos and ends with at most one eos. Absent on purpose: chat templates, which are in `chat`; truncation
//! and padding that `tokenizer.json` may ask for (they would lose text silently).

mod stream;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde::de::IgnoredAny;
use serde_json::Value;

pub use stream::DecodeStream;

use crate::config::ModelConfig;
use crate::error::{Error, Result, quote};
use crate::{files, json};

/// No `tokenizer.json` is larger than this.
const LIMIT_BYTES: u64 = 512 << 20;

/// The tokenizer of a model folder. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    /// The same, but special tokens in a text are what they say. Made when a chat is first encoded.
    aware: Arc<OnceLock<tokenizers::Tokenizer>>,
    path: PathBuf,
    /// What the tokenizer itself puts before and after a text.
    before: Vec<u32>,
    after: Vec<u32>,
    /// `tokenizer_config.json` says in so many words that there is no bos.
    without_bos: bool,
}

impl Tokenizer {
    /// Reads `tokenizer.json` (and `tokenizer_config.json`, where it is there) of a model folder.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let hint = "give a model folder with a fast tokenizer (transformers: save_pretrained)";
        let bytes = files::read_bounded(&path, LIMIT_BYTES, hint)?;
        let fail = |problem: String| Error::Tokenizer {
            path: path.clone(),
            problem: format!("not a usable tokenizer: {}", quote(&problem)),
            hint: "download the file again",
        };
        let (inner, before, after) = load(&bytes).map_err(fail)?;
        let about = dir.join("tokenizer_config.json");
        let without_bos = about.exists() && {
            let (map, _) = json::read_object(&about, hint)?;
            map.get("bos_token") == Some(&Value::Null)
        };
        Ok(Self {
            inner: Arc::new(inner),
            aware: Arc::default(),
            path,
            before,
            after,
            without_bos,
        })
    }

    /// The ids of a text, nothing added. Special tokens in it are plain text.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|e| self.bad(&e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// A training or evaluation line: bos + text + eos. bos is left out where the model has none (no
    /// `bos_token_id`, or `bos_token` null in `tokenizer_config.json`); eos is the first of the model's list.
    /// Neither is doubled where the tokenizer adds it itself.
    pub fn encode_line(&self, text: &str, config: &ModelConfig) -> Result<Vec<u32>> {
        self.encode(text, config, true)
    }

    /// A prompt: bos + text, with bos as in [`Tokenizer::encode_line`] and without an eos.
    pub fn encode_prompt(&self, text: &str, config: &ModelConfig) -> Result<Vec<u32>> {
        self.encode(text, config, false)
    }

    fn encode(&self, text: &str, config: &ModelConfig, with_eos: bool) -> Result<Vec<u32>> {
        let (mut ids, tail) = self.frame(config);
        ids.extend(self.encode_text(text)?);
        if with_eos {
            ids.extend(tail);
        }
        self.check(ids, config)
    }

    /// What stands before and after a line.
    pub(crate) fn frame(&self, config: &ModelConfig) -> (Vec<u32>, Vec<u32>) {
        let bos = config.bos.filter(|_| !self.without_bos);
        let bos = bos.filter(|bos| !self.before.contains(bos));
        let head = bos.into_iter().chain(self.before.iter().copied()).collect();
        let mut tail = self.after.clone();
        let has_eos = self.after.iter().any(|id| config.eos.contains(id));
        tail.extend(config.eos.first().filter(|_| !has_eos));
        (head, tail)
    }

    /// The ids, if the model has them all.
    pub(crate) fn check(&self, ids: Vec<u32>, config: &ModelConfig) -> Result<Vec<u32>> {
        match ids.iter().find(|&&id| id as usize >= config.vocab) {
            None => Ok(ids),
            Some(id) => Err(Error::Tokenizer {
                path: self.path.clone(),
                problem: format!(
                    "gives token {id}, but the model has only {} (vocab_size)",
                    config.vocab
                ),
                hint: "use the tokenizer that belongs to the model",
            }),
        }
    }

    /// The ids of a text, nothing added, each with its bytes in the text. Special tokens in it become what they say
    /// if `specials` is set, and are plain text otherwise.
    pub(crate) fn encode_spans(
        &self,
        text: &str,
        specials: bool,
    ) -> Result<Vec<(u32, Range<usize>)>> {
        let encode = |t: &tokenizers::Tokenizer| t.encode(text, false).map_err(|e| self.bad(&e));
        let encoding = match specials {
            false => encode(&self.inner)?,
            true => encode(self.aware())?,
        };
        let spans = encoding.get_offsets().iter().map(|(a, b)| *a..*b);
        Ok(encoding.get_ids().iter().copied().zip(spans).collect())
    }

    fn aware(&self) -> &tokenizers::Tokenizer {
        self.aware.get_or_init(|| {
            let mut copy = (*self.inner).clone();
            copy.set_encode_special_tokens(false);
            copy
        })
    }

    /// The tokens marked as special, by text.
    pub(crate) fn special_tokens(&self) -> Vec<(String, u32)> {
        let all = self.inner.get_added_tokens_decoder();
        let special = all.into_iter().filter(|(_, t)| t.special);
        let mut all: Vec<_> = special.map(|(id, t)| (t.content, id)).collect();
        all.sort();
        all
    }

    /// The folder it was read from.
    pub(crate) fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("."))
    }

    /// The text of one token, as it stands in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The text of some ids; special tokens and ids it does not know are left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|e| self.bad(&e))
    }

    /// Turns ids that come one by one into text that consists of whole characters.
    pub fn decode_stream(&self) -> DecodeStream<'_> {
        DecodeStream::new(self)
    }

    /// Tokens it knows, the added ones included.
    pub fn vocab(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of a token, "<|eos|>".
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    fn bad(&self, e: &tokenizers::Error) -> Error {
        Error::Tokenizer {
            path: self.path.clone(),
            problem: quote(&e.to_string()),
            hint: "the tokenizer and the text do not go together, use the model's own tokenizer",
        }
    }
}

type Loaded = (tokenizers::Tokenizer, Vec<u32>, Vec<u32>);

/// Builds the tokenizer and asks it what it puts around a text.
fn load(bytes: &[u8]) -> std::result::Result<Loaded, String> {
    // First the syntax by itself: the library panics on some files that are no JSON.
    let text = std::str::from_utf8(bytes).map_err(|e| e.to_string())?;
    serde_json::from_str::<IgnoredAny>(text).map_err(|e| e.to_string())?;
    let build = || -> tokenizers::Result<Loaded> {
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes)?;
        inner.set_encode_special_tokens(true);
        inner.with_padding(None);
        inner.with_truncation(None)?;
        let (before, after) = around(&inner)?;
        Ok((inner, before, after))
    };
    // It also panics on some values it does not expect, deep in its readers.
    match std::panic::catch_unwind(build) {
        Ok(built) => built.map_err(|e| e.to_string()),
        Err(_) => Err("the tokenizers library cannot read it".to_owned()),
    }
}

/// What a tokenizer puts around a text: the tokens marked as special around a letter.
fn around(inner: &tokenizers::Tokenizer) -> tokenizers::Result<(Vec<u32>, Vec<u32>)> {
    let encoding = inner.encode_fast("a", true)?;
    let (ids, mask) = (encoding.get_ids(), encoding.get_special_tokens_mask());
    let before = mask.iter().take_while(|&&m| m == 1).count();
    let after = mask[before..].iter().rev().take_while(|&&m| m == 1).count();
    Ok((ids[..before].to_vec(), ids[ids.len() - after..].to_vec()))
}
