//! Lines of a text file or of standard input, each with the place where it begins.
//! Invariant: memory is bounded by [`LONGEST_LINE_BYTES`], whatever the size of the file or of a line; blank lines
//! are skipped; a file can be read on from any place that was given out.
//! Absent on purpose: what is in the lines.

use std::fs::File;
use std::io::{BufRead, BufReader, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, io_error};
use crate::files;

/// No line may be longer than this.
pub const LONGEST_LINE_BYTES: u64 = 16 << 20;
/// The name of standard input.
pub const STDIN: &str = "-";

/// Where a line begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Bytes before it.
    pub offset: u64,
    /// Lines before it.
    pub line: u64,
}

enum Input {
    File(BufReader<File>),
    Stdin(BufReader<std::io::Stdin>),
}

/// The lines of one file that are not blank.
pub struct RawLines {
    path: PathBuf,
    input: Input,
    buffer: Vec<u8>,
    /// Behind the line returned last.
    next: Place,
    /// Where that line began.
    last: Place,
}

impl RawLines {
    /// Opens a regular file, or standard input for `-`.
    ///
    /// # Errors
    /// A path that is no file.
    pub fn open(path: &Path) -> Result<Self> {
        const BUFFER: usize = 1 << 16;
        let hint = "give a file with one JSON object a line, such as {\"text\": \"...\"}";
        let input = if path == Path::new(STDIN) {
            Input::Stdin(BufReader::with_capacity(BUFFER, std::io::stdin()))
        } else {
            Input::File(BufReader::with_capacity(BUFFER, files::open(path, hint)?))
        };
        Ok(Self {
            path: path.to_path_buf(),
            input,
            buffer: vec![],
            next: Place::default(),
            last: Place::default(),
        })
    }

    /// The file, as it was named.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the line returned last begins.
    pub fn last(&self) -> Place {
        self.last
    }

    /// Where reading goes on.
    pub fn place(&self) -> Place {
        self.next
    }

    /// Goes on from a place that [`RawLines::last`] or [`RawLines::place`] gave out.
    ///
    /// # Errors
    /// Standard input cannot be read twice.
    pub fn seek(&mut self, place: Place) -> Result<()> {
        let fail = io_error("read", &self.path, "check the file");
        match &mut self.input {
            Input::File(file) => file.seek(SeekFrom::Start(place.offset)).map_err(fail)?,
            Input::Stdin(_) => {
                let cause = std::io::Error::other("standard input can be read only once");
                return Err(fail(cause));
            }
        };
        self.next = place;
        Ok(())
    }

    /// An error about the line returned last.
    pub fn bad(&self, problem: impl Into<String>, hint: &'static str) -> Error {
        Error::Data {
            path: self.path.clone(),
            line: self.last.line + 1,
            problem: problem.into(),
            hint,
        }
    }

    /// The next line that is not blank; `None` at the end.
    ///
    /// # Errors
    /// A line that is too long or not UTF-8; a file that cannot be read.
    pub fn next_line(&mut self) -> Result<Option<&str>> {
        loop {
            if !self.fill()? {
                return Ok(None);
            }
            if self.buffer.len() as u64 > LONGEST_LINE_BYTES {
                return Err(self.bad("it is longer than 16 MiB", "split the example"));
            }
            if let Err(e) = std::str::from_utf8(&self.buffer) {
                let at = e.valid_up_to() + 1;
                let hint = "save the file as UTF-8";
                return Err(self.bad(format!("byte {at} of it is not UTF-8"), hint));
            }
            let blank = self.text().trim().is_empty();
            if !blank {
                return Ok(Some(self.text()));
            }
        }
    }

    /// The line in the buffer, which is UTF-8.
    fn text(&self) -> &str {
        let text = std::str::from_utf8(&self.buffer).unwrap_or_default();
        match self.last.line {
            0 => text.trim_start_matches('\u{feff}'),
            _ => text,
        }
    }

    /// Reads a line, or as much of it as is allowed and one byte; false at the end.
    fn fill(&mut self) -> Result<bool> {
        self.buffer.clear();
        let input: &mut dyn BufRead = match &mut self.input {
            Input::File(file) => file,
            Input::Stdin(stdin) => stdin,
        };
        let read = input
            .take(LONGEST_LINE_BYTES + 1)
            .read_until(b'\n', &mut self.buffer)
            .map_err(io_error("read", &self.path, "check the file"))?;
        self.last = self.next;
        self.next.offset += read as u64;
        self.next.line += u64::from(read > 0);
        Ok(read > 0)
    }
}
