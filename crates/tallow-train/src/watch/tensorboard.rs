//! Curves as TensorBoard reads them: records of protobuf messages in a file of their own for each run.
//! Invariant: a record is written whole, so that a reader at the same time sees no half of one.
//! Absent on purpose: images, histograms, graphs. The format: tensorflow/core/lib/io/record_writer.h (frames) and
//! tensorflow/core/util/event.proto (messages).
use serde_json::Value;
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

/// An event file that is being written.
pub struct TensorBoard {
    file: File,
}

/// Numbers of an event that become curves, and what these are called.
const CURVES: [(&str, &str, &str); 7] = [
    ("step", "loss", "train/loss"),
    ("step", "lr", "train/learning_rate"),
    ("step", "grad_norm", "train/grad_norm"),
    ("step", "tokens_per_s", "train/tokens_per_s"),
    ("step", "memory_bytes", "train/memory_bytes"),
    ("eval", "loss", "valid/loss"),
    ("eval", "perplexity", "valid/perplexity"),
];

impl TensorBoard {
    /// Begins a file in a folder, which is made. `from_step`: steps done before; what older files say of later
    /// ones is no longer shown.
    ///
    /// # Errors
    /// A folder or file that cannot be made.
    pub fn create(dir: &Path, from_step: u64) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let seconds = now();
        let name = format!(
            "events.out.tfevents.{:010}.tallow.{}",
            seconds as u64,
            std::process::id()
        );
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(dir.join(name))?;
        let mut made = Self { file };
        let mut version = Message::event(seconds, 0);
        version.bytes(3, b"brain.Event:2");
        made.write(&version)?;
        if from_step > 0 {
            // SessionLog with status START: forget what was said of this step and later ones.
            let mut start = Message::event(seconds, from_step + 1);
            let mut log = Message::default();
            log.varint(1, 1);
            start.bytes(7, &log.0);
            made.write(&start)?;
        }
        Ok(made)
    }

    /// Adds the curves' next points, from a line of `metrics.jsonl`.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn add(&mut self, line: &Value) -> io::Result<()> {
        let (Some(kind), Some(step)) = (line["event"].as_str(), line["step"].as_u64()) else {
            return Ok(());
        };
        let mut summary = Message::default();
        for (event, key, tag) in CURVES {
            if let Some(value) = line[key].as_f64().filter(|_| event == kind) {
                let mut point = Message::default();
                point.bytes(1, tag.as_bytes());
                point.float(2, value as f32);
                summary.bytes(1, &point.0);
            }
        }
        if summary.0.is_empty() {
            return Ok(());
        }
        let mut event = Message::event(now(), step);
        event.bytes(5, &summary.0);
        self.write(&event)
    }

    /// One record: length, its checksum, data, its checksum.
    fn write(&mut self, message: &Message) -> io::Result<()> {
        let data = &message.0;
        let length = (data.len() as u64).to_le_bytes();
        let mut frame = Vec::with_capacity(data.len() + 16);
        frame.extend_from_slice(&length);
        frame.extend_from_slice(&masked_crc(&length).to_le_bytes());
        frame.extend_from_slice(data);
        frame.extend_from_slice(&masked_crc(data).to_le_bytes());
        self.file.write_all(&frame)
    }
}

/// CRC-32C, turned and shifted, as the record format wants it.
#[must_use]
pub fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

/// Seconds since 1970.
fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |d| d.as_secs_f64())
}

/// A protobuf message that is being written, field by field.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    /// `Event` with its wall time and step.
    fn event(seconds: f64, step: u64) -> Self {
        let mut m = Message::default();
        m.key(1, 1);
        m.0.extend_from_slice(&seconds.to_le_bytes());
        m.varint(2, step);
        m
    }

    fn key(&mut self, field: u64, kind: u64) {
        self.number(field << 3 | kind);
    }

    fn varint(&mut self, field: u64, value: u64) {
        self.key(field, 0);
        self.number(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, 5);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.key(field, 2);
        self.number(value.len() as u64);
        self.0.extend_from_slice(value);
    }

    fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Splits a file into the data of its records; checks every checksum.
    fn records(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut all = vec![];
        while !bytes.is_empty() {
            let (length, rest) = bytes.split_at(8);
            let (crc, rest) = rest.split_at(4);
            assert_eq!(masked_crc(length).to_le_bytes(), crc);
            let n = u64::from_le_bytes(length.try_into().unwrap()) as usize;
            let (data, rest) = rest.split_at(n);
            let (crc, rest) = rest.split_at(4);
            assert_eq!(masked_crc(data).to_le_bytes(), crc);
            all.push(data.to_vec());
            bytes = rest;
        }
        all
    }

    #[test]
    fn a_checksum_that_others_computed() {
        // RFC 3720, B.4: 32 bytes of zeros have the CRC-32C 8a9136aa.
        let want = 0x8a91_36aa_u32.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(masked_crc(&[0; 32]), want);
    }

    #[test]
    fn a_step_becomes_its_curves() {
        let dir = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(dir.path(), 7).unwrap();
        board
            .add(&json!({"event": "step", "step": 300, "loss": 1.5, "lr": 0.25}))
            .unwrap();
        board.add(&json!({"event": "saved", "dir": "x"})).unwrap();
        let file = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap();
        let all = records(&fs::read(file.path()).unwrap());
        assert_eq!(
            all.len(),
            3,
            "version, session start, one event with points"
        );
        assert!(all[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        // Steps from 8 on are said again: field 2 is 8, field 7 holds status 1.
        assert_eq!(&all[1][9..], b"\x10\x08\x3a\x02\x08\x01");
        // Step 300 as a varint, then the summary with two values.
        assert_eq!(&all[2][9..12], b"\x10\xac\x02");
        let tag = b"\x0a\x0atrain/loss\x15\x00\x00\xc0\x3f";
        assert!(all[2].windows(tag.len()).any(|w| w == tag));
        let tag = b"\x0a\x13train/learning_rate\x15\x00\x00\x80\x3e";
        assert!(all[2].windows(tag.len()).any(|w| w == tag));
    }
}
