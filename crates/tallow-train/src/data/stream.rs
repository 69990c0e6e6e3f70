//! Rows of large files, read and tokenized as they are needed, each drawn from a buffer of bounded size.
//! Invariant: a pass gives every row once; the buffer is within its limits, but for one row; a state names the
//! rows in the buffer, and restoring reads them again.
//! Absent on purpose: reading ahead on another thread.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};

use serde_json::{Value, json};
use tallow_llm::data::{Encoder, Examples, Place};

use super::draw::Draws;
use super::{Input, Limits, Origin, Sample, origins, read_origins};
use crate::batch::Tally;
use crate::{Error, Result};

/// Files of up to this size are told from others of their size by every byte; of larger ones, this much is read.
const COMPARED_BYTES: u64 = 256 << 20;
/// In pieces of this size, spread evenly, the beginning and the end among them.
const PIECE_BYTES: u64 = 1 << 20;
/// The stream of numbers that draws from the buffer.
const STREAM: u64 = 1;

/// Rows from files, without end.
pub(super) struct Stream {
    inputs: Vec<Input>,
    /// What tells the files from others, as they were when they were opened.
    data: Value,
    encoder: Encoder,
    longest: usize,
    limits: Limits,
    /// Number of the file being read, and it; no file after the last.
    file: usize,
    reader: Option<Examples>,
    buffer: Vec<Sample>,
    buffer_tokens: usize,
    draws: Draws,
    epoch: u64,
    /// Rows given out in this pass.
    given: u64,
    pub(super) tally: Tally,
}

impl Stream {
    pub(super) fn new(
        inputs: &[Input],
        encoder: &Encoder,
        longest: usize,
        seed: u64,
        limits: Limits,
    ) -> Result<Self> {
        let data = inputs.iter().map(|i| identity(i, COMPARED_BYTES));
        Ok(Self {
            inputs: inputs.to_vec(),
            data: data.collect::<Result<_>>()?,
            encoder: encoder.clone(),
            longest,
            limits,
            file: 0,
            reader: None,
            buffer: vec![],
            buffer_tokens: 0,
            draws: Draws::new(seed, STREAM),
            epoch: 0,
            given: 0,
            tally: Tally::default(),
        })
    }

    /// The next row; `None` at the end of a pass.
    pub(super) fn next(&mut self) -> Result<Option<Sample>> {
        while self.buffer.len() < self.limits.buffer_rows
            && self.buffer_tokens < self.limits.buffer_tokens
        {
            let Some(sample) = self.read()? else { break };
            self.buffer_tokens += sample.row.ids.len();
            self.buffer.push(sample);
        }
        if self.buffer.is_empty() {
            if self.given == 0 {
                let path = self.inputs.first().map(|i| i.shown.clone());
                let path = path.unwrap_or_default();
                return Err(Error::NothingToPredict { path });
            }
            (self.file, self.given) = (0, 0);
            self.epoch += 1;
            return Ok(None);
        }
        let sample = self.buffer.swap_remove(self.draws.below(self.buffer.len()));
        self.buffer_tokens -= sample.row.ids.len();
        self.given += 1;
        Ok(Some(sample))
    }

    /// The next row of the files; `None` behind the last.
    fn read(&mut self) -> Result<Option<Sample>> {
        loop {
            let Some(input) = self.inputs.get(self.file) else {
                return Ok(None);
            };
            let reader = match &mut self.reader {
                Some(open) => open,
                closed => closed.insert(Examples::open(&input.path)?),
            };
            let Some(example) = reader.next() else {
                if input.grow(reader.place().offset)? {
                    reader.seek(reader.place())?;
                    continue;
                }
                self.reader = None;
                self.file += 1;
                continue;
            };
            let example = example.map_err(|e| input.named(e))?;
            let row = self.encoder.encode(&example);
            let mut row = row.map_err(|e| input.named(reader.blame(e)))?;
            if self.tally.fit(&mut row, self.longest) {
                let origin = Origin {
                    file: self.file,
                    place: reader.here(),
                    row: 0,
                    epoch: self.epoch,
                };
                return Ok(Some(Sample { row, origin }));
            }
        }
    }

    /// Rows given out before, read again; `None` if they are not there.
    pub(super) fn fetch(&mut self, origins: &[Origin]) -> Result<Option<Vec<Sample>>> {
        let mut order: Vec<usize> = (0..origins.len()).collect();
        order.sort_by_key(|i| (origins[*i].file, origins[*i].place.offset));
        let mut found: Vec<Option<Sample>> = vec![None; origins.len()];
        let mut reader: Option<(usize, Examples)> = None;
        for i in order {
            let origin = origins[i];
            let Some(input) = self.inputs.get(origin.file) else {
                return Ok(None);
            };
            let open = match &mut reader {
                Some((file, open)) if *file == origin.file => open,
                other => &mut other.insert((origin.file, Examples::open(&input.path)?)).1,
            };
            input.grow(origin.place.offset)?;
            open.seek(origin.place)?;
            let Some(example) = open.next() else {
                return Ok(None);
            };
            let mut row = self.encoder.encode(&example?)?;
            if !Tally::default().fit(&mut row, self.longest) {
                return Ok(None);
            }
            found[i] = Some(Sample { row, origin });
        }
        Ok(found.into_iter().collect())
    }

    /// Size and checksum of each file.
    pub(super) fn data(&self) -> Value {
        self.data.clone()
    }

    pub(super) fn state(&self) -> Value {
        let place = self.reader.as_ref().map(|r| {
            let Place { offset, line } = r.place();
            json!([offset, line])
        });
        let Tally {
            cut,
            too_short,
            no_target,
        } = self.tally;
        json!({
            "epoch": self.epoch,
            "given": self.given,
            "file": self.file,
            "place": place,
            "draws": self.draws.state(),
            "buffer": origins(&self.buffer),
            "tally": [cut, too_short, no_target],
        })
    }

    /// `None` if the state is not one of these files.
    pub(super) fn restore(&mut self, state: &Value) -> Result<Option<()>> {
        let parse = || {
            let n = |v: &Value| v.as_u64();
            let place = match &state["place"] {
                Value::Null => None,
                p => Some(Place {
                    offset: n(&p[0])?,
                    line: n(&p[1])?,
                }),
            };
            let tally = &state["tally"];
            let tally = Tally {
                cut: n(&tally[0])? as usize,
                too_short: n(&tally[1])? as usize,
                no_target: n(&tally[2])? as usize,
            };
            let file = n(&state["file"])? as usize;
            let numbers = (n(&state["epoch"])?, n(&state["given"])?, file);
            Some((numbers, place, tally, read_origins(&state["buffer"])?))
        };
        let Some(((epoch, given, file), place, tally, buffer)) = parse() else {
            return Ok(None);
        };
        if self.draws.restore(&state["draws"]).is_none() {
            return Ok(None);
        }
        let Some(buffer) = self.fetch(&buffer)? else {
            return Ok(None);
        };
        self.reader = match (place, self.inputs.get(file)) {
            (None, _) => None,
            (Some(_), None) => return Ok(None),
            (Some(place), Some(input)) => {
                input.grow(place.offset)?;
                let mut open = Examples::open(&input.path)?;
                open.seek(place)?;
                Some(open)
            }
        };
        self.buffer_tokens = buffer.iter().map(|s| s.row.ids.len()).sum();
        (self.epoch, self.given, self.file) = (epoch, given, file);
        (self.buffer, self.tally) = (buffer, tally);
        Ok(Some(()))
    }
}

/// Size and CRC-32C of a file (of standard input: of what was read of it at first): of all of it, or of `compared_bytes` in pieces spread evenly.
fn identity(input: &Input, compared_bytes: u64) -> Result<Value> {
    let fail = |cause: io::Error| Error::ReadData {
        path: input.shown.clone(),
        cause,
    };
    let mut file = File::open(&input.path).map_err(fail)?;
    let bytes = file.metadata().map_err(fail)?.len();
    let pieces = compared_bytes.div_ceil(PIECE_BYTES).max(2);
    let (mut sum, mut piece) = (0, vec![]);
    for i in 0..pieces {
        let at = match bytes <= compared_bytes {
            true => i * PIECE_BYTES,
            // In 128 bits: the first is at 0, the last ends with the file.
            false => {
                let room = u128::from(bytes - PIECE_BYTES);
                (room * u128::from(i) / u128::from(pieces - 1)) as u64
            }
        };
        file.seek(SeekFrom::Start(at)).map_err(fail)?;
        piece.clear();
        let mut part = file.by_ref().take(PIECE_BYTES);
        part.read_to_end(&mut piece).map_err(fail)?;
        sum = crc32c::crc32c_append(sum, &piece);
    }
    Ok(json!({"bytes": bytes, "checksum": sum}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(bytes: &[u8], compared_bytes: u64) -> Value {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        identity(&Input::file(file.path().into()), compared_bytes).unwrap()
    }

    #[test]
    fn a_changed_byte_is_noticed_wherever_it_lies() {
        let mib = PIECE_BYTES as usize;
        let mut bytes: Vec<u8> = (0..3 * mib + 7).map(|i| (i % 251) as u8).collect();
        let whole = of(&bytes, COMPARED_BYTES);
        assert_eq!(whole["checksum"], crc32c::crc32c(&bytes));
        for at in [0, 100, mib - 1, mib, 2 * mib + 3, 3 * mib, 3 * mib + 6] {
            bytes[at] ^= 1;
            assert_ne!(of(&bytes, COMPARED_BYTES), whole, "{at}");
            bytes[at] ^= 1;
        }
        assert_ne!(of(&bytes[..3 * mib], COMPARED_BYTES), whole);
    }

    #[test]
    fn of_a_file_too_large_to_compare_pieces_are_with_both_ends() {
        let mib = PIECE_BYTES as usize;
        let mut bytes = vec![0; 9 * mib + 5];
        let n = bytes.len();
        let pieces = of(&bytes, 3 << 20);
        for (at, seen) in [
            (0, true),
            (mib + 9, false),
            (n / 2, true),
            (n - mib - 1, false),
            (n - 1, true),
        ] {
            bytes[at] ^= 1;
            assert_eq!(of(&bytes, 3 << 20) != pieces, seen, "{at}");
            bytes[at] ^= 1;
        }
    }
}
