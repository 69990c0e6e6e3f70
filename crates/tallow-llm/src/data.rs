//! Training data: JSON lines, one example a line: `{"text": ..}`, `{"prompt": .., "completion": ..}` or
//! `{"messages": [..]}`.
//! Invariant: memory is bounded by the longest line, whatever the size of the file; a file holds one kind of
//! example. Absent on purpose: shuffling and batches, which are the trainer's.

mod encode;
mod example;
mod folder;
mod lines;

use std::path::Path;

pub use encode::{Encoder, LossOn, Row};
pub use example::{Chat, Example, Kind};
pub use folder::{Folder, Weighted};
pub use lines::{LONGEST_LINE_BYTES, Place, RawLines, STDIN};

use crate::error::{Error, Result};

/// The examples of a JSONL file, in order. Ends after its first error.
pub struct Examples {
    lines: RawLines,
    /// The kind of the first example, and its line from 1.
    kind: Option<(Kind, u64)>,
    done: bool,
}

impl Examples {
    /// Opens a file, or standard input for `-`. A file without a single example is an error when it is read to
    /// its end.
    ///
    /// # Errors
    /// A path that is no file.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self {
            lines: RawLines::open(path)?,
            kind: None,
            done: false,
        })
    }

    /// The number of the line returned last, counted from 1.
    pub fn line(&self) -> u64 {
        self.lines.last().line + 1
    }

    /// Where the line returned last begins.
    pub fn here(&self) -> Place {
        self.lines.last()
    }

    /// Where reading goes on.
    pub fn place(&self) -> Place {
        self.lines.place()
    }

    /// The kind of this file's examples, once one was read.
    pub fn kind(&self) -> Option<Kind> {
        self.kind.map(|k| k.0)
    }

    /// An error of encoding the line returned last, with that line named.
    pub fn blame(&self, e: Error) -> Error {
        match e {
            Error::Chat { problem, hint, .. } => {
                self.lines.bad(format!("chat template: {problem}"), hint)
            }
            other => other,
        }
    }

    /// Goes on from a place given out before.
    ///
    /// # Errors
    /// Standard input cannot be read twice; a file that begins with no example.
    pub fn seek(&mut self, place: Place) -> Result<()> {
        if self.kind.is_none() && place != Place::default() {
            self.lines.seek(Place::default())?;
            self.read()?;
        }
        self.done = false;
        self.lines.seek(place)
    }

    fn read(&mut self) -> Result<Option<Example>> {
        let parsed = match self.lines.next_line()? {
            Some(line) => Example::parse(line),
            None if self.kind.is_some() => return Ok(None),
            None => {
                let path = self.lines.path().to_path_buf();
                return Err(Error::NoExamples { path });
            }
        };
        let example = parsed.map_err(|problem| self.lines.bad(problem, example::HINT))?;
        let (kind, first) = *self.kind.get_or_insert((example.kind(), self.line()));
        if kind == example.kind() {
            return Ok(Some(example));
        }
        let problem = format!(
            "it has {}, but line {first} has {}",
            example.kind().name(),
            kind.name()
        );
        Err(self.lines.bad(problem, "keep one kind of example a file"))
    }
}

impl Iterator for Examples {
    type Item = Result<Example>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let item = self.read().transpose();
        self.done = !matches!(item, Some(Ok(_)));
        item
    }
}

/// The texts of a JSONL file of plain texts, in order. Ends after its first error.
pub struct Lines(Examples);

impl Lines {
    /// As [`Examples::open`].
    ///
    /// # Errors
    /// A path that is no file.
    pub fn open(path: &Path) -> Result<Self> {
        Examples::open(path).map(Self)
    }

    /// The number of the line returned last, counted from 1.
    pub fn line(&self) -> u64 {
        self.0.line()
    }
}

impl Iterator for Lines {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        let refused = match self.0.next()? {
            Ok(Example::Text(text)) => return Some(Ok(text)),
            Ok(Example::Completion { .. } | Example::Chat(_)) => {
                let problem = "no key `text`, and nothing else can be used here";
                self.0.lines.bad(problem, "give a file with plain texts")
            }
            Err(e) => e,
        };
        self.0.done = true;
        Some(Err(refused))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> std::result::Result<Vec<String>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let name = file.path().display().to_string();
        let texts: Result<Vec<String>> = Lines::open(file.path()).unwrap().collect();
        texts.map_err(|e| e.to_string().replace(&name, "FILE"))
    }

    #[test]
    fn texts_come_in_order_whatever_the_line_ends() {
        let got =
            read("\u{feff}{\"text\": \"a\\nb\"}\r\n\n  \n{\"id\": 1, \"text\": \"é\"}".as_bytes());
        assert_eq!(got.unwrap(), ["a\nb", "é"]);
    }

    #[test]
    fn every_bad_line_is_named() {
        let cases: [(&[u8], &str); 8] = [
            (b"", "FILE: holds no examples; give a file"),
            (b"\n \n", "FILE: holds no examples; give a file"),
            (
                b"{\"text\":\"a\"}\n{\"text\":\"\xff\"}",
                "FILE, line 2: byte 10 of it is not UTF-8; save",
            ),
            (
                b"{\"text\":",
                "FILE, line 1: not valid JSON (EOF while parsing a value",
            ),
            (
                b"[1]",
                "FILE, line 1: want an object, got [1]; make each line",
            ),
            (
                b"{\"text\":[1]}",
                "FILE, line 1: `text`: want a string, got [1]; make",
            ),
            (
                b"{\"prompt\":1,\"x\":2}",
                "FILE, line 1: `prompt` without `completion`; the keys are \"prompt\", \"x\"; make",
            ),
            (
                b"{}",
                "FILE, line 1: no key `text` in an empty object; make",
            ),
        ];
        for (bytes, want) in cases {
            let got = read(bytes).unwrap_err();
            assert!(got.starts_with(want), "want {want}, got {got}");
        }
    }

    #[test]
    fn a_line_without_end_is_refused_without_holding_it() {
        let mut bytes = b"{\"text\":\"".to_vec();
        bytes.resize(LONGEST_LINE_BYTES as usize + 100, b'x');
        assert!(read(&bytes).unwrap_err().contains("longer than 16 MiB"));
    }

    #[test]
    fn a_line_of_200_mb_is_refused_in_bounded_memory() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        // A sparse file: zeros are cheap, and a line has no end in them.
        std::io::Write::write_all(&mut file, b"{\"text\":\"").unwrap();
        file.as_file().set_len(200 << 20).unwrap();
        let mut lines = RawLines::open(file.path()).unwrap();
        let text = lines.next_line().unwrap_err().to_string();
        assert!(text.contains("line 1: it is longer than 16 MiB"), "{text}");
        assert!(lines.place().offset <= LONGEST_LINE_BYTES + 1);
    }

    #[test]
    fn a_mixture_of_kinds_is_refused_by_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "{\"text\":\"a\"}\n\n{\"prompt\":\"a\",\"completion\":\"b\"}\n";
        std::fs::write(file.path(), text).unwrap();
        let all: Result<Vec<Example>> = Examples::open(file.path()).unwrap().collect();
        let text = all.unwrap_err().to_string();
        let want = "line 3: it has prompt and completion, but line 1 has text; keep one kind";
        assert!(text.contains(want), "{text}");
    }

    #[test]
    fn reading_goes_on_from_any_place() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let lines = "\u{feff}{\"text\":\"a\"}\n\n{\"text\":\"b\"}\r\n{\"text\":\"c\"}";
        std::fs::write(file.path(), lines).unwrap();
        let mut all = Examples::open(file.path()).unwrap();
        let mut places = vec![];
        while let Some(e) = all.next() {
            places.push((e.unwrap(), all.here(), all.place(), all.line()));
        }
        assert_eq!(places.iter().map(|p| p.3).collect::<Vec<_>>(), [1, 3, 4]);
        for (i, (example, last, next, _)) in places.iter().enumerate() {
            let mut again = Examples::open(file.path()).unwrap();
            again.seek(*last).unwrap();
            assert_eq!(again.next().unwrap().unwrap(), *example);
            let mut rest = Examples::open(file.path()).unwrap();
            rest.seek(*next).unwrap();
            assert_eq!(rest.by_ref().count(), 2 - i);
            assert!(rest.next().is_none());
        }
    }

    #[test]
    fn after_an_error_nothing_follows() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "nonsense\n{\"text\":\"a\"}\n").unwrap();
        let mut lines = Lines::open(file.path()).unwrap();
        assert!(lines.next().unwrap().is_err());
        assert!(lines.next().is_none());
    }
}
