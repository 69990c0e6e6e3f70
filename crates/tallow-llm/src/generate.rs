//! Text from a prompt, token by token.
//! Invariant: pieces consist of whole characters; nothing of a stop string is ever given out; the same model,
//! prompt and options give the same tokens whatever was generated before.
//! Absent on purpose: chat templates, beams, batches.

mod decoder;
mod draw;

pub use decoder::Decoder;

use std::collections::VecDeque;

use crate::adapter::Adapter;
use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::sample::{Sampler, Sampling, StopStrings};
use crate::tokenizer::{DecodeStream, Tokenizer};

/// How text is continued.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens to add.
    pub max_new_tokens: usize,
    /// Strings that end the text; they are not part of it.
    pub stop: Vec<String>,
    /// Go on behind an end-of-text token.
    pub ignore_eos: bool,
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended it.
    Eos,
    /// One of the stop strings came.
    Stop,
    /// `max_new_tokens` were added.
    MaxNewTokens,
    /// The model has no positions left.
    MaxPositions,
}

impl FinishReason {
    /// Lower-case name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Eos => "eos",
            Self::Stop => "stop",
            Self::MaxNewTokens => "max_new_tokens",
            Self::MaxPositions => "max_positions",
        }
    }
}

/// Continues prompts with one model and, where given, one adapter.
pub struct Generator {
    model: Model,
    adapter: Option<Adapter>,
    options: GenerateOptions,
    decoder: Option<Decoder>,
}

/// What one token added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Whole characters, often none.
    pub text: String,
    /// The token; `None` for text that was held back until the end.
    pub token: Option<u32>,
}

/// A finished text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// Without the prompt.
    pub text: String,
    /// The tokens added, an end-of-text token not included.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish: FinishReason,
}

impl Generator {
    /// Checks the options. Memory is taken when the first prompt comes.
    ///
    /// # Errors
    /// Options that make no sense; an adapter of another model.
    pub fn new(model: &Model, adapter: Option<&Adapter>, options: GenerateOptions) -> Result<Self> {
        Sampler::new(options.sampling)?;
        if let Some(a) = adapter {
            a.check_fits(&model.config)?;
        }
        Ok(Self {
            model: model.clone(),
            adapter: adapter.cloned(),
            options,
            decoder: None,
        })
    }

    /// Begins a text after a prompt; the pieces come as the result is iterated.
    ///
    /// # Errors
    /// An empty prompt; one that is longer than the model allows; no memory.
    pub fn stream<'a>(&'a mut self, tokenizer: &'a Tokenizer, prompt: &str) -> Result<Stream<'a>> {
        let ids = tokenizer.encode_prompt(prompt, &self.model.config)?;
        self.stream_ids(tokenizer, ids)
    }

    /// As [`Generator::stream`], after a prompt of token ids.
    pub fn stream_ids<'a>(
        &'a mut self,
        tokenizer: &'a Tokenizer,
        prompt: Vec<u32>,
    ) -> Result<Stream<'a>> {
        if prompt.is_empty() {
            return Err(Error::Setting {
                name: "prompt",
                want: "at least one token, because this model has no begin-of-text token",
                got: "an empty text".to_owned(),
            });
        }
        let limit = self.model.config.max_positions;
        // The last token added is never fed back.
        let wanted = prompt.len() + self.options.max_new_tokens.saturating_sub(1);
        let tokens = wanted.min(limit).max(prompt.len());
        Ok(Stream {
            text: tokenizer.decode_stream().after(&prompt)?,
            stops: StopStrings::new(self.options.stop.iter().cloned()),
            sampler: Sampler::new(self.options.sampling)?,
            eos: match self.options.ignore_eos {
                true => Vec::new(),
                false => self.model.config.eos.clone(),
            },
            limit,
            left: self.options.max_new_tokens,
            decoder: self.decoder(tokens)?,
            prompt: prompt.len(),
            history: prompt,
            fed: 0,
            ahead: VecDeque::new(),
            finish: None,
            broken: false,
        })
    }

    /// The whole text at once.
    ///
    /// # Errors
    /// Those of [`Generator::stream`], and those of its pieces.
    pub fn generate(&mut self, tokenizer: &Tokenizer, prompt: &str) -> Result<Generated> {
        let mut stream = self.stream(tokenizer, prompt)?;
        let mut text = String::new();
        for piece in &mut stream {
            text.push_str(&piece?.text);
        }
        Ok(Generated {
            text,
            ids: stream.ids().to_vec(),
            finish: stream.finish_reason().unwrap_or(FinishReason::MaxNewTokens),
        })
    }

    /// The decoder of exactly the size these tokens need, so that results do not depend on earlier prompts.
    fn decoder(&mut self, tokens: usize) -> Result<&mut Decoder> {
        let capacity = Cache::capacity_for(tokens, self.model.config.max_positions)?;
        let kept = self.decoder.take().filter(|d| d.capacity() == capacity);
        let mut decoder = match kept {
            Some(d) => d,
            None => {
                let mut new = Decoder::new(&self.model, self.adapter.as_ref(), tokens)?;
                new.draw_by(&self.options.sampling)?;
                new
            }
        };
        decoder.reset();
        Ok(self.decoder.insert(decoder))
    }
}

/// A text that is being written: an iterator of its pieces. Ends after its first error.
pub struct Stream<'a> {
    decoder: &'a mut Decoder,
    text: DecodeStream<'a>,
    stops: StopStrings,
    sampler: Sampler,
    eos: Vec<u32>,
    limit: usize,
    left: usize,
    /// The prompt and what was added.
    history: Vec<u32>,
    prompt: usize,
    /// Of the history, and of what is `ahead`: what the decoder has seen.
    fed: usize,
    /// Chosen by the device, not yet given out.
    ahead: VecDeque<u32>,
    finish: Option<FinishReason>,
    broken: bool,
}

impl Stream<'_> {
    /// The tokens added so far.
    pub fn ids(&self) -> &[u32] {
        &self.history[self.prompt..]
    }

    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt
    }

    /// Why the text ended; `None` as long as it has not (or broke off with an error).
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish
    }

    fn step(&mut self) -> Result<Option<Piece>> {
        if self.left == 0 {
            return self.end(FinishReason::MaxNewTokens);
        }
        if self.history.len() > self.limit {
            return self.end(FinishReason::MaxPositions);
        }
        let id = match self.ahead.pop_front() {
            Some(id) => id,
            None => self.choose()?,
        };
        if self.eos.contains(&id) {
            return self.end(FinishReason::Eos);
        }
        self.history.push(id);
        self.left -= 1;
        let text = self.stops.push(&self.text.push(id)?);
        if self.stops.stopped() {
            self.finish = Some(FinishReason::Stop);
        }
        Ok(Some(Piece {
            text,
            token: Some(id),
        }))
    }

    /// The next token. Where the device chose several, the others wait in `ahead`.
    fn choose(&mut self) -> Result<u32> {
        let new = &self.history[self.fed..];
        match self.sampler.takes_likeliest() || self.decoder.draws() {
            true => self
                .ahead
                .extend(self.decoder.feed_choosing(new, self.left)?),
            false => self.decoder.advance(new)?,
        }
        self.fed = self.history.len();
        let Some(id) = self.ahead.pop_front() else {
            let scores = self.decoder.scores()?;
            return self.sampler.next(scores, &self.history);
        };
        self.fed += self.ahead.len();
        Ok(id)
    }

    /// What was held back, if anything.
    fn end(&mut self, why: FinishReason) -> Result<Option<Piece>> {
        let mut text = self.stops.push(&self.text.finish()?);
        text.push_str(&self.stops.finish());
        self.finish = Some(match self.stops.stopped() {
            true => FinishReason::Stop,
            false => why,
        });
        Ok((!text.is_empty()).then_some(Piece { text, token: None }))
    }
}

impl Iterator for Stream<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.finish.is_some() || self.broken {
            return None;
        }
        let piece = self.step();
        self.broken = piece.is_err();
        piece.transpose()
    }
}
