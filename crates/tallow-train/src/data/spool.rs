//! Standard input as a file that grows as it is read, so that rows can be read again.
//! Invariant: the file holds whole lines, and no more of them than were asked for.
//! Absent on purpose: reading ahead.

use std::io::{self, BufRead, Read as _, Write as _};
use std::path::Path;

use tallow_llm::data::LONGEST_LINE_BYTES;

/// Read at once, and to the end of the line.
const PIECE_BYTES: usize = 1 << 20;

/// What was read so far, in a temporary file, and where the rest comes from.
pub(crate) struct Spool {
    file: tempfile::NamedTempFile,
    bytes: u64,
    /// `None` behind the end.
    rest: Option<Box<dyn BufRead + Send>>,
    piece: Vec<u8>,
}

impl std::fmt::Debug for Spool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let at = self.file.path().display();
        write!(f, "{} bytes in {at}", self.bytes)
    }
}

impl Spool {
    /// Of an input from which nothing was read.
    pub(crate) fn new(from: impl BufRead + Send + 'static) -> io::Result<Self> {
        Ok(Self {
            file: tempfile::NamedTempFile::new()?,
            bytes: 0,
            rest: Some(Box::new(from)),
            piece: vec![],
        })
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Reads on until there is something behind `offset`, or nothing is left; false if so.
    pub(crate) fn reach(&mut self, offset: u64) -> io::Result<bool> {
        while self.bytes <= offset {
            let Some(rest) = &mut self.rest else {
                return Ok(false);
            };
            self.piece.clear();
            let mut read = 1;
            while read > 0 && self.piece.len() < PIECE_BYTES {
                // A longer line is refused by who reads the file, in parts as it is.
                let mut line = rest.take(LONGEST_LINE_BYTES + 1);
                read = line.read_until(b'\n', &mut self.piece)?;
            }
            if read == 0 {
                self.rest = None;
            }
            self.file.write_all(&self.piece)?;
            self.bytes += self.piece.len() as u64;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_read_than_is_asked_for_and_lines_stay_whole() {
        let line = "x".repeat(999) + "\n";
        let endless = io::Cursor::new(line.clone().into_bytes().repeat(5000));
        let mut spool = Spool::new(endless).unwrap();
        assert!(spool.reach(0).unwrap());
        let size = |s: &Spool| std::fs::metadata(s.path()).unwrap().len();
        let first = size(&spool);
        assert!(
            first < 2 * PIECE_BYTES as u64 && first.is_multiple_of(1000),
            "{first}"
        );
        assert!(spool.reach(first - 1).unwrap());
        assert_eq!(size(&spool), first);
        assert!(spool.reach(first).unwrap());
        assert!(size(&spool) > first);
        assert!(spool.reach(4_999_999).unwrap());
        assert!(!spool.reach(5_000_000).unwrap());
        assert_eq!(
            std::fs::read_to_string(spool.path()).unwrap(),
            line.repeat(5000)
        );
    }
}
