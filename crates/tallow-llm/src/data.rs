//! Training text: JSON lines, `{"text": "..."}`, one example a line.
//! Invariant: memory is bounded by the longest line, whatever the size of the file; blank lines are skipped.
//! Absent on purpose: other layouts (chat, prompt and completion), shuffling, tokenizing.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result, io_error, list, quote};
use crate::{files, json};

/// No line may be longer than this.
pub const LONGEST_LINE_BYTES: u64 = 16 << 20;

/// The texts of a JSONL file, in order. Ends after its first error.
#[derive(Debug)]
pub struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    buffer: Vec<u8>,
    line: u64,
    found_any: bool,
    done: bool,
}

impl Lines {
    /// Opens a file; a file without a single example is an error when it is read to its end.
    pub fn open(path: &Path) -> Result<Self> {
        let hint = "give a file with a line {\"text\": \"...\"} for each example";
        let file = files::open(path, hint)?;
        Ok(Self {
            path: path.to_path_buf(),
            reader: BufReader::with_capacity(1 << 16, file),
            buffer: Vec::new(),
            line: 0,
            found_any: false,
            done: false,
        })
    }

    /// The number of the line returned last, counted from 1.
    pub fn line(&self) -> u64 {
        self.line
    }

    fn bad(&self, problem: impl Into<String>, hint: &'static str) -> Error {
        Error::Data {
            path: self.path.clone(),
            line: self.line,
            problem: problem.into(),
            hint,
        }
    }

    fn read(&mut self) -> Result<Option<String>> {
        loop {
            self.buffer.clear();
            let mut limited = self.reader.by_ref().take(LONGEST_LINE_BYTES + 1);
            let read = limited
                .read_until(b'\n', &mut self.buffer)
                .map_err(io_error("read", &self.path, "check the file"))?;
            if read == 0 {
                let path = self.path.clone();
                return match self.found_any {
                    true => Ok(None),
                    false => Err(Error::NoExamples { path }),
                };
            }
            self.line += 1;
            if read as u64 > LONGEST_LINE_BYTES {
                return Err(self.bad("it is longer than 16 MiB", "split the example"));
            }
            let text = std::str::from_utf8(&self.buffer).map_err(|e| {
                let at = e.valid_up_to() + 1;
                let hint = "save the file as UTF-8";
                self.bad(format!("byte {at} of it is not UTF-8"), hint)
            })?;
            let text = match self.line {
                1 => text.trim_start_matches('\u{feff}'),
                _ => text,
            };
            if !text.trim().is_empty() {
                self.found_any = true;
                return self.text_of(text).map(Some);
            }
        }
    }

    fn text_of(&self, line: &str) -> Result<String> {
        const HINT: &str = "make each line a JSON object with a string under \"text\"";
        let value: Value = serde_json::from_str(line)
            .map_err(|e| self.bad(format!("not valid JSON ({e})"), HINT))?;
        let Value::Object(mut map) = value else {
            let problem = format!("want an object, got {}", json::brief(&value));
            return Err(self.bad(problem, HINT));
        };
        match map.remove("text") {
            Some(Value::String(text)) => Ok(text),
            Some(other) => {
                let problem = format!("`text`: want a string, got {}", json::brief(&other));
                Err(self.bad(problem, HINT))
            }
            None if map.is_empty() => Err(self.bad("no key `text` in an empty object", HINT)),
            None => {
                let keys = list(map.keys().map(|k| quote(k)));
                Err(self.bad(format!("no key `text`; the keys are {keys}"), HINT))
            }
        }
    }
}

impl Iterator for Lines {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let item = self.read().transpose();
        self.done = !matches!(item, Some(Ok(_)));
        item
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
                "FILE, line 1: no key `text`; the keys are \"prompt\", \"x\"; make",
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
    fn after_an_error_nothing_follows() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "nonsense\n{\"text\":\"a\"}\n").unwrap();
        let mut lines = Lines::open(file.path()).unwrap();
        assert!(lines.next().unwrap().is_err());
        assert!(lines.next().is_none());
    }
}
