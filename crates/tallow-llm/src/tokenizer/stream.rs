//! Text from ids that come one by one.
//! Invariant: the pieces, joined, are what decoding all ids at once gives, and every piece consists of whole
//! characters. Absent on purpose: a state for each decoder kind; two decodings are compared instead.

use super::Tokenizer;
use crate::error::Result;

/// What decoders put in the place of bytes that are not (yet) a character.
const BROKEN: char = '\u{fffd}';
/// Tokens that may wait for the rest of a character; one has at most four bytes.
const LONGEST_WAIT: usize = 16;
/// Prompt tokens that a continuation is decoded behind.
const CONTEXT: usize = 32;

/// Decodes ids as they come; see [`Tokenizer::decode_stream`].
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The ids whose text is being compared: some already shown, then those that wait.
    window: Vec<u32>,
    /// Of the window: ids whose text is shown completely.
    settled: usize,
    /// Bytes of the window's text that are shown.
    shown: usize,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            window: Vec::new(),
            settled: 0,
            shown: 0,
        }
    }

    /// Continues after these ids: a first token that begins with a space keeps it.
    pub fn after(mut self, prompt: &[u32]) -> Result<Self> {
        self.window = prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec();
        self.settled = self.window.len();
        let text = self.tokenizer.decode(&self.window)?;
        self.shown = text.trim_end_matches(BROKEN).len();
        Ok(self)
    }

    /// Takes one id and returns the text that is complete now, often none.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.window.push(id);
        let text = self.tokenizer.decode(&self.window)?;
        let waited = self.window.len() - self.settled;
        let whole = match waited > LONGEST_WAIT {
            // Not a character after all. The last mark may still become one.
            true => text.strip_suffix(BROKEN).unwrap_or(&text).len(),
            false => text.trim_end_matches(BROKEN).len(),
        };
        let piece = self.take(&text, whole);
        if whole == text.len() {
            self.slide()?;
        }
        Ok(piece)
    }

    /// The ids have ended: returns what was still waiting, broken or not.
    pub fn finish(&mut self) -> Result<String> {
        let text = self.tokenizer.decode(&self.window)?;
        let piece = self.take(&text, text.len());
        self.window.clear();
        self.settled = 0;
        self.shown = 0;
        Ok(piece)
    }

    fn take(&mut self, text: &str, whole: usize) -> String {
        // A decoder may change its mind about text already shown; never cut a character then.
        let from = text.floor_char_boundary(self.shown);
        let piece = text.get(from..whole).unwrap_or_default().to_owned();
        self.shown = self.shown.max(whole);
        piece
    }

    /// Forgets ids that were shown before the last piece; those of the last piece stay as context.
    fn slide(&mut self) -> Result<()> {
        let kept = &self.window[self.settled..];
        let text = self.tokenizer.decode(kept)?;
        // Without text (a special token) they would be no context at all.
        if !text.is_empty() {
            self.window.drain(..self.settled);
            self.shown = text.len();
        }
        self.settled = self.window.len();
        Ok(())
    }
}
