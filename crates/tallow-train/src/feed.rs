//! Where batches come from: an endless source with a cursor that can be written down and restored.
//! Invariant: a restored feed gives the batches that the first one would have given, bit for bit, or an error
//! that says how the data differs. Absent on purpose: devices, and how a batch is computed.
use crate::{
    Error, Result,
    batch::{Batch, Buckets, Order, Rows},
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::PathBuf};
use tallow_llm::{ModelConfig, Tokenizer};

/// What is read, and how it becomes batches.
#[derive(Clone, Debug, PartialEq)]
pub struct FeedSettings {
    /// Files, read one after another.
    pub paths: Vec<PathBuf>,
    /// Rows are cut after this many tokens (and after the model's positions).
    pub seq_len: usize,
    /// Rows of a batch.
    pub batch: usize,
    /// Decides the order of the rows.
    pub seed: u64,
}

/// A line of a data file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Line {
    /// The file.
    pub file: PathBuf,
    /// Its number, counted from 1.
    pub line: u64,
}

/// What a batch was made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drawn {
    /// Pass over the data, from 0.
    pub epoch: u64,
    /// Its lines.
    pub lines: Vec<Line>,
}

/// What is known about the data before the first batch. `None` where it is read as it is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeedStats {
    /// Rows of one pass.
    pub rows: Option<usize>,
    /// Tokens of one pass.
    pub tokens: Option<usize>,
    /// Batches of one pass.
    pub batches: Option<u64>,
    /// Rows cut to the longest allowed length.
    pub cut: usize,
    /// Lines left out because they have fewer than two tokens.
    pub too_short: usize,
}

/// Batches without end.
pub struct Feed {
    settings: FeedSettings,
    rows: Rows,
    /// Where the rows of each file end.
    ends: Vec<usize>,
    order: Order,
    buckets: Buckets,
}

impl Feed {
    /// Reads and tokenizes the data.
    ///
    /// # Errors
    /// A line that cannot be read; data without a row of two tokens.
    pub fn open(
        settings: &FeedSettings,
        tokenizer: &Tokenizer,
        config: &ModelConfig,
    ) -> Result<Self> {
        let longest = settings.seq_len.min(config.max_positions);
        let (mut rows, mut ends) = (Rows::default(), vec![]);
        for path in &settings.paths {
            rows.read(path, tokenizer, config, longest)?;
            ends.push(rows.len());
        }
        if rows.is_empty() {
            let path = settings.paths.first().cloned().unwrap_or_default();
            return Err(Error::NothingToPredict { path });
        }
        Ok(Feed {
            buckets: Buckets::up_to(rows.longest() - 1),
            order: Order::new(settings.seed, rows.len()),
            settings: settings.clone(),
            rows,
            ends,
        })
    }

    /// What is known about the data.
    pub fn stats(&self) -> FeedStats {
        FeedStats {
            rows: Some(self.rows.len()),
            tokens: Some(self.rows.tokens()),
            batches: Some(self.rows.len().div_ceil(self.settings.batch.max(1)) as u64),
            cut: self.rows.cut,
            too_short: self.rows.too_short,
        }
    }

    /// Every shape `[b, t]` a batch can have, the largest last.
    pub fn shapes(&self) -> Vec<[usize; 2]> {
        let b = self.settings.batch;
        self.buckets.lengths().iter().map(|t| [b, *t]).collect()
    }

    /// Rows of a batch from here on; the order of the rows stays.
    pub fn set_batch(&mut self, rows: usize) {
        self.settings.batch = rows;
    }

    /// Fills the next batch.
    ///
    /// # Errors
    /// Data that cannot be read.
    pub fn next(&mut self, batch: &mut Batch) -> Result<Drawn> {
        let chosen = self.order.next(self.settings.batch);
        let inputs = chosen.iter().map(|i| self.rows.row(*i).len() - 1);
        let inputs = inputs.max().unwrap_or(1);
        let t = self.buckets.fit(inputs).unwrap_or(inputs);
        let rows = chosen.iter().map(|i| self.rows.row(*i));
        batch.fill([self.settings.batch, t], rows)?;
        let line = |i: &usize| {
            let file = self.ends.partition_point(|end| end <= i);
            Line {
                file: self.settings.paths[file].clone(),
                line: self.rows.line(*i),
            }
        };
        let lines = chosen.iter().map(line).collect();
        Ok(Drawn {
            epoch: self.order.epoch(),
            lines,
        })
    }

    /// The whole cursor, and what it was made from.
    ///
    /// # Errors
    /// None here; a feed that reads as it goes may fail.
    pub fn state(&self) -> Result<Value> {
        let (epoch, at) = self.order.cursor();
        Ok(json!({
            "kind": "rows",
            "epoch": epoch,
            "at": at,
            "data": self.data(),
        }))
    }

    /// Continues where `state` was taken.
    ///
    /// # Errors
    /// [`Error::OtherData`] if the data or what is made of it is not what it was.
    pub fn restore(&mut self, state: &Value) -> Result<()> {
        let other = |what: String| Error::OtherData {
            path: self.settings.paths.first().cloned().unwrap_or_default(),
            what,
        };
        if state["kind"] != "rows" {
            return Err(other(format!("it was read as {}", state["kind"])));
        }
        for (name, now) in self.data() {
            let was = &state["data"][name];
            if *was != now {
                return Err(other(format!("{name} was {was}, is {now}")));
            }
        }
        let number = |name: &str| state[name].as_u64();
        let (Some(epoch), Some(at)) = (number("epoch"), number("at")) else {
            return Err(other("its cursor is not a number".into()));
        };
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        if at > self.rows.len() {
            return Err(other(format!("its cursor is at row {at}")));
        }
        self.order.seek(epoch, at);
        Ok(())
    }

    /// What tells this data from other data.
    fn data(&self) -> BTreeMap<&'static str, Value> {
        BTreeMap::from([
            ("rows", json!(self.rows.len())),
            ("tokens", json!(self.rows.tokens())),
            ("checksum", json!(self.rows.checksum())),
            ("seed", json!(self.settings.seed)),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, path::Path};

    fn tiny() -> (Tokenizer, ModelConfig) {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny");
        (
            Tokenizer::open(&dir).unwrap(),
            ModelConfig::read(&dir).unwrap(),
        )
    }

    fn settings(dir: &Path) -> FeedSettings {
        let write = |name: &str, lines: usize| {
            let path = dir.join(name);
            let line = |i| format!("{{\"text\": \"{name} {}\"}}\n", "word ".repeat(1 + i * 3));
            fs::write(&path, (0..lines).map(line).collect::<String>()).unwrap();
            path
        };
        FeedSettings {
            paths: vec![write("a", 7), write("b", 4)],
            seq_len: 24,
            batch: 3,
            seed: 5,
        }
    }

    #[test]
    fn a_restored_feed_goes_on_where_it_was_left() {
        let dir = tempfile::tempdir().unwrap();
        let (tokenizer, config) = tiny();
        let settings = settings(dir.path());
        let open = || Feed::open(&settings, &tokenizer, &config).unwrap();
        let mut first = open();
        let mut batch = Batch::default();
        for after in 0..9 {
            let mut second = open();
            second.restore(&first.state().unwrap()).unwrap();
            let mut ahead = open();
            ahead.restore(&second.state().unwrap()).unwrap();
            let (mut b, mut c) = (Batch::default(), Batch::default());
            for _ in 0..5 {
                assert_eq!(second.next(&mut b).unwrap(), ahead.next(&mut c).unwrap());
                assert_eq!(b, c, "after {after}");
            }
            first.next(&mut batch).unwrap();
        }
    }

    #[test]
    fn an_epoch_names_every_line_of_every_file_once() {
        let dir = tempfile::tempdir().unwrap();
        let (tokenizer, config) = tiny();
        let mut feed = Feed::open(&settings(dir.path()), &tokenizer, &config).unwrap();
        let stats = feed.stats();
        assert_eq!((stats.rows, stats.batches), (Some(11), Some(4)));
        let mut batch = Batch::default();
        let mut lines = vec![];
        for _ in 0..4 {
            let drawn = feed.next(&mut batch).unwrap();
            assert_eq!(drawn.epoch, 0);
            assert!(feed.shapes().contains(&[batch.b, batch.t]));
            lines.extend(drawn.lines);
        }
        lines.sort();
        let name = |l: &Line| format!("{}:{}", l.file.file_name().unwrap().display(), l.line);
        let names: Vec<String> = lines.iter().map(name).collect();
        let want = (1..=7).map(|i| format!("a:{i}"));
        let want: Vec<String> = want.chain((1..=4).map(|i| format!("b:{i}"))).collect();
        assert_eq!(names, want);
        assert_eq!(feed.next(&mut batch).unwrap().epoch, 1);
    }

    #[test]
    fn other_data_is_refused_and_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let (tokenizer, config) = tiny();
        let settings = settings(dir.path());
        let state = Feed::open(&settings, &tokenizer, &config)
            .unwrap()
            .state()
            .unwrap();
        let text = fs::read_to_string(&settings.paths[1]).unwrap();
        fs::write(&settings.paths[1], text.replacen("word", "king", 1)).unwrap();
        let mut changed = Feed::open(&settings, &tokenizer, &config).unwrap();
        let error = changed.restore(&state).unwrap_err().to_string();
        assert!(
            error.contains("not the data of the checkpoint: "),
            "{error}"
        );
        let reseeded = FeedSettings {
            seed: 6,
            ..settings
        };
        let mut reseeded = Feed::open(&reseeded, &tokenizer, &config).unwrap();
        assert!(reseeded.restore(&state).is_err());
    }
}
