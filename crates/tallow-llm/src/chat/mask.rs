//! A chat's token ids, and which of them are the assistant's words.
//! Invariant: a token counts if it holds a character that the assistant said. Where a template does not mark these
//! itself, they are what a turn adds to the chat before it; a template for which that is not so is refused.
//! Absent on purpose: guessing by role names in the text.

use std::ops::Range;

use serde_json::Value;

use super::ChatTemplate;
use crate::data::Chat;
use crate::error::{Error, Result};

/// Characters that stand nowhere in the template or the messages.
pub(super) struct Marks {
    /// Goes into special tokens that a message mentions.
    pub(super) guard: char,
    begin: char,
    end: char,
}

impl ChatTemplate {
    /// Marks for a chat: from a plane of Unicode that nobody assigns.
    pub(super) fn marks(&self, messages: &[Value], tools: Option<&Value>) -> Marks {
        let mut taken = std::collections::BTreeSet::new();
        let mut see = |text: &str| taken.extend(text.chars().filter(|c| *c >= '\u{f0000}'));
        messages.iter().chain(tools).for_each(|m| each(m, &mut see));
        let mut free = ('\u{f0000}'..='\u{ffffd}').filter(|c| !taken.contains(c));
        // A line of 16 MiB holds 4 million characters: it cannot take them all unless it is made for that.
        let mut next = || free.next().unwrap_or('\u{10fffd}');
        Marks {
            guard: next(),
            begin: next(),
            end: next(),
        }
    }

    /// The messages with each special token they mention broken by the guard.
    pub(super) fn guarded(&self, messages: &[Value], marks: &Marks) -> Vec<Value> {
        let mut all = messages.to_vec();
        for message in &mut all {
            change(message, &|text| self.guard(text, marks.guard));
        }
        all
    }

    fn guard(&self, text: &mut String, guard: char) {
        let found: Vec<usize> = self
            .0
            .finder
            .find_iter(&**text)
            .map(|m| m.start())
            .collect();
        for at in found.into_iter().rev() {
            let first = text[at..].chars().next().map_or(0, char::len_utf8);
            text.insert(at + first, guard);
        }
    }

    /// The ids of a rendered chat, each with its bytes in it. The guards are gone from the ids, but count as bytes.
    pub(super) fn spans(&self, text: &str, guard: char) -> Result<Vec<(u32, Range<usize>)>> {
        let tokenizer = &self.0.tokenizer;
        if !text.contains(guard) {
            return tokenizer.encode_spans(text, true);
        }
        let mut all = vec![];
        let plain = |range: Range<usize>, all: &mut Vec<_>| -> Result<()> {
            let (piece, places) = without(&text[range.clone()], guard);
            for (id, span) in tokenizer.encode_spans(&piece, false)? {
                let place =
                    |at: usize| range.start + places.get(at).copied().unwrap_or(range.len());
                all.push((id, place(span.start)..place(span.end)));
            }
            Ok(())
        };
        let mut from = 0;
        for found in self.0.finder.find_iter(text) {
            plain(from..found.start(), &mut all)?;
            all.push((self.0.specials[found.pattern().as_usize()].1, found.range()));
            from = found.end();
        }
        plain(from..text.len(), &mut all)?;
        Ok(all)
    }

    /// The ids of a chat, and which of them the assistant says.
    ///
    /// # Errors
    /// Messages that the template refuses; a template in which a turn changes those before it.
    pub fn ids_and_answers(&self, chat: &Chat) -> Result<(Vec<u32>, Vec<bool>)> {
        let tools = chat.tools.as_ref();
        let marks = self.marks(&chat.messages, tools);
        let messages = self.guarded(&chat.messages, &marks);
        let (text, answers) = match self.0.marks_answers {
            true => self.marked(&messages, tools, chat.given, &marks)?,
            false => self.nested(&messages, tools, chat.given)?,
        };
        let spans = self.spans(&text, marks.guard)?;
        let said = |span: &Range<usize>| {
            // A token that lost its space when it was measured has no bytes: the one before its end is its own.
            let start = span.start.min(span.end.saturating_sub(1));
            answers.iter().any(|a| start < a.end && span.end > a.start)
        };
        let counted = spans.iter().map(|s| said(&s.1)).collect();
        Ok((spans.into_iter().map(|s| s.0).collect(), counted))
    }

    /// The text of a chat, and the parts that the template marks.
    fn marked(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        given: usize,
        marks: &Marks,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let (begin, end) = (marks.begin.to_string(), marks.end.to_string());
        let render =
            |messages: &[Value]| self.render_marked(messages, tools, false, [&begin, &end]);
        // Answers among the given messages are no targets.
        let skip = match given {
            0 => 0,
            n => render(&messages[..n.min(messages.len())])?
                .matches(marks.begin)
                .count(),
        };
        let (mut text, mut answers, mut open) = (String::new(), vec![], None);
        for c in render(messages)?.chars() {
            if c == marks.begin {
                open = Some(text.len());
            } else if c == marks.end {
                answers.extend(open.take().map(|from| from..text.len()));
            } else {
                text.push(c);
            }
        }
        answers.drain(..skip.min(answers.len()));
        Ok((text, answers))
    }

    /// The text of a chat, and what each of the assistant's turns adds to the chat before it, the beginning of an
    /// answer included in what was before.
    fn nested(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        given: usize,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let text = self.render(messages, tools, false)?;
        let mut answers = vec![];
        for (i, message) in messages.iter().enumerate().skip(given) {
            if message["role"] != "assistant" {
                continue;
            }
            let before = match i {
                0 => String::new(),
                _ => self.render(&messages[..i], tools, true)?,
            };
            let after = self.render(&messages[..=i], tools, false)?;
            if !after.starts_with(&before) || !text.starts_with(&after) {
                return Err(Error::Chat {
                    path: self.0.path.clone(),
                    problem: format!(
                        "message {} is not simply added to the chat before it, so the assistant's words cannot be told from the rest",
                        i + 1
                    ),
                    hint: "give a template with {% generation %} blocks, or count all tokens in the loss",
                });
            }
            answers.push(before.len()..after.len());
        }
        Ok((text, answers))
    }
}

/// A text without a character, and where each of its bytes was.
fn without(text: &str, guard: char) -> (String, Vec<usize>) {
    let (mut piece, mut places) = (String::with_capacity(text.len()), vec![]);
    for (at, c) in text.char_indices().filter(|c| c.1 != guard) {
        piece.push(c);
        places.extend(at..at + c.len_utf8());
    }
    (piece, places)
}

/// Every string in a value.
fn each(value: &Value, f: &mut impl FnMut(&str)) {
    match value {
        Value::String(s) => f(s),
        Value::Array(all) => all.iter().for_each(|v| each(v, f)),
        Value::Object(all) => all.values().for_each(|v| each(v, f)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn change(value: &mut Value, f: &impl Fn(&mut String)) {
    match value {
        Value::String(s) => f(s),
        Value::Array(all) => all.iter_mut().for_each(|v| change(v, f)),
        Value::Object(all) => all.iter_mut().for_each(|(_, v)| change(v, f)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}
