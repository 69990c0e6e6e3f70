//! Where batches come from: an endless source with a cursor that can be written down and restored.
//! Invariant: a restored feed gives the batches that the first one would have given, bit for bit, or an error
//! that says how the data differs. Absent on purpose: devices, and how a batch is computed.
use crate::{
    Error, Result,
    batch::{Batch, Buckets, Doc},
    data::{
        Input, Limits, Sample, Source, Spool, origins, pack, pack::Packer, read_origins,
        source::Opening,
    },
};
use serde_json::{Value, json};
use std::{
    fmt, io,
    path::{Path, PathBuf},
};
use tallow_llm::data::{Encoder, LossOn, STDIN};
use tallow_llm::{ModelConfig, Tokenizer};

/// What is read, and how it becomes batches.
#[derive(Clone, Debug, PartialEq)]
pub struct FeedSettings {
    /// Files, read one after another; `-` is standard input.
    pub paths: Vec<PathBuf>,
    /// A weight for each file: rows are drawn from them in these shares, without end. Empty: passes over all.
    pub weights: Vec<f64>,
    /// Which tokens count.
    pub loss_on: LossOn,
    /// Several documents share a row, of `seq_len` inputs.
    pub packing: bool,
    /// Rows are cut after this many tokens (and after the model's positions).
    pub seq_len: usize,
    /// Rows of a batch.
    pub batch: usize,
    /// Decides the order of the rows.
    pub seed: u64,
    /// How much is held in memory.
    pub limits: Limits,
}

impl FeedSettings {
    /// One document a row, from files whose every row is drawn once a pass.
    pub fn new(paths: Vec<PathBuf>, seq_len: usize, batch: usize, seed: u64) -> Self {
        FeedSettings {
            paths,
            weights: vec![],
            loss_on: LossOn::Answers,
            packing: false,
            seq_len,
            batch,
            seed,
            limits: Limits::USUAL,
        }
    }

    /// Is standard input read? It is read as it is needed, and kept in a temporary file for further passes; a run over
    /// it can be resumed only with the same input once more.
    pub fn reads_stdin(&self) -> bool {
        self.paths.iter().any(|p| p.as_os_str() == STDIN)
    }
}

/// A line of a data file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Line {
    /// The file.
    pub file: PathBuf,
    /// Its number, counted from 1.
    pub line: u64,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// What a batch was made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drawn {
    /// Pass over the data, from 0; with weights, over the file of its first line.
    pub epoch: u64,
    /// Its lines.
    pub lines: Vec<Line>,
}

/// What is known about the data before the first batch. `None` where it is read as it is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FeedStats {
    /// Rows of one pass.
    pub rows: Option<usize>,
    /// Tokens of one pass.
    pub tokens: Option<usize>,
    /// Batches of one pass.
    pub batches: Option<u64>,
    /// With packing: the share of a pass's inputs that is not padding.
    pub filled: Option<f64>,
    /// Rows cut to the longest allowed length.
    pub cut: usize,
    /// Lines left out because they have fewer than two tokens.
    pub too_short: usize,
    /// Lines left out because nothing in what is left of them is to be predicted.
    pub no_target: usize,
}

/// Batches without end.
pub struct Feed {
    settings: FeedSettings,
    source: Source,
    packer: Option<Packer<Sample>>,
    /// Inputs of every row of a pass, where they are known.
    lengths: Option<Vec<usize>>,
    buckets: Buckets,
}

impl Feed {
    /// Opens the data; small files are read and tokenized here, larger ones as they are needed.
    ///
    /// # Errors
    /// Files that cannot be read, weights that do not go with them; data without anything to predict.
    pub fn open(
        settings: &FeedSettings,
        tokenizer: &Tokenizer,
        config: &ModelConfig,
    ) -> Result<Self> {
        check_weights(settings)?;
        let inputs = settings.paths.iter().map(|p| input(p, settings.limits));
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        let longest = settings.seq_len.min(config.max_positions);
        let source = Source::open(Opening {
            inputs: &inputs,
            weights: &settings.weights,
            encoder: Encoder::new(tokenizer, config, settings.loss_on),
            longest,
            seed: settings.seed,
            limits: settings.limits,
        })?;
        let lengths = source.lengths();
        let most = lengths.as_ref().and_then(|l| l.iter().max().copied());
        let buckets = Buckets::up_to(most.unwrap_or(longest - 1));
        Ok(Feed {
            settings: settings.clone(),
            source,
            packer: settings.packing.then(|| Packer::new(settings.seq_len)),
            lengths,
            buckets,
        })
    }

    /// What is known about the data.
    pub fn stats(&self) -> FeedStats {
        let tally = self.source.tally();
        let mut stats = FeedStats {
            cut: tally.cut,
            too_short: tally.too_short,
            no_target: tally.no_target,
            ..FeedStats::default()
        };
        let Some(lengths) = &self.lengths else {
            return stats;
        };
        let mut rows = lengths.len();
        stats.rows = Some(rows);
        stats.tokens = Some(lengths.iter().map(|n| n + 1).sum());
        if self.packer.is_some() {
            let filled;
            (rows, filled) = pack::measure(lengths.iter().copied(), self.settings.seq_len);
            stats.filled = Some(filled);
        }
        stats.batches = Some(rows.div_ceil(self.settings.batch.max(1)) as u64);
        stats
    }

    /// Every shape `[b, t]` a batch can have, the largest last.
    pub fn shapes(&self) -> Vec<[usize; 2]> {
        let b = self.settings.batch;
        match self.packer {
            Some(_) => vec![[b, self.settings.seq_len]],
            None => self.buckets.lengths().iter().map(|t| [b, *t]).collect(),
        }
    }

    /// Rows of a batch from here on; the order of the rows stays.
    pub fn set_batch(&mut self, rows: usize) {
        self.settings.batch = rows;
    }

    /// Fills the next batch; it has fewer rows where a pass ends.
    ///
    /// # Errors
    /// Data that cannot be read.
    pub fn next(&mut self, batch: &mut Batch) -> Result<Drawn> {
        let rows = loop {
            let rows = self.rows()?;
            if !rows.is_empty() {
                break rows;
            }
        };
        let b = self.settings.batch;
        let docs = rows.iter().map(|row| row.iter().map(|s| Doc::from(&s.row)));
        if self.packer.is_some() {
            batch.fill_packed([b, self.settings.seq_len], docs)?;
        } else {
            let inputs = docs.clone().flatten().map(|d| d.inputs()).max();
            let inputs = inputs.unwrap_or(1);
            let t = self.buckets.fit(inputs).unwrap_or(inputs);
            batch.fill([b, t], docs.flatten())?;
        }
        let line = |s: &Sample| Line {
            file: self.source.input(&s.origin).shown.clone(),
            line: s.origin.place.line + 1,
        };
        let mut all = rows.iter().flatten();
        Ok(Drawn {
            epoch: all.clone().next().map_or(0, |s| s.origin.epoch),
            lines: all.by_ref().map(line).collect(),
        })
    }

    /// The documents of each row of the next batch; none at the end of a pass that the last batch filled.
    fn rows(&mut self) -> Result<Vec<Vec<Sample>>> {
        let mut rows = vec![];
        while rows.len() < self.settings.batch.max(1) {
            let row = match &mut self.packer {
                Some(packer) => packer.row(|| self.source.next())?,
                None => self.source.next()?.map(|s| vec![s]),
            };
            match row {
                Some(row) => rows.push(row),
                None => break,
            }
        }
        Ok(rows)
    }

    /// The whole cursor, and what it was made from: the files as they were when they were opened.
    pub fn state(&self) -> Value {
        let packer = self.packer.as_ref();
        json!({
            "settings": self.identity(),
            "data": self.source.data(),
            "source": self.source.state(),
            "packer": packer.map(|p| json!({"open": origins(&p.pool), "ended": p.ended})),
        })
    }

    /// Continues where `state` was taken.
    ///
    /// # Errors
    /// [`Error::OtherData`] if the data or what is made of it is not what it was.
    pub fn restore(&mut self, state: &Value) -> Result<()> {
        let path = self.settings.paths.first().cloned().unwrap_or_default();
        let other = |what: String| Error::OtherData {
            path: path.clone(),
            what,
        };
        for (name, now) in [("settings", self.identity()), ("data", self.source.data())] {
            let was = &state[name];
            if *was != now {
                return Err(other(format!("{name} were {was}, are {now}")));
            }
        }
        let damaged = || other("its cursor cannot be read".into());
        self.source.restore(&state["source"])?.ok_or_else(damaged)?;
        if let Some(packer) = &mut self.packer {
            let saved = &state["packer"];
            let open = read_origins(&saved["open"]).ok_or_else(damaged)?;
            packer.ended = saved["ended"].as_bool().ok_or_else(damaged)?;
            packer.pool = self.source.fetch(&open)?.ok_or_else(damaged)?;
        }
        Ok(())
    }

    /// The settings that decide which rows come in which order.
    fn identity(&self) -> Value {
        let s = &self.settings;
        let Limits {
            resident_bytes,
            buffer_rows,
            buffer_tokens,
        } = s.limits;
        // Numbers as text: they come back from a file as they were.
        let weights: Vec<String> = s.weights.iter().map(f64::to_string).collect();
        json!({
            "seed": s.seed,
            "seq_len": s.seq_len,
            "packing": s.packing,
            "loss_on": s.loss_on.name(),
            "weights": weights,
            "limits": [resident_bytes, buffer_rows, buffer_tokens],
            "resident": self.source.is_resident(),
        })
    }
}

fn check_weights(s: &FeedSettings) -> Result<()> {
    let usable = s.weights.iter().all(|w| w.is_finite() && *w > 0.0);
    if usable && (s.weights.is_empty() || s.weights.len() == s.paths.len()) {
        return Ok(());
    }
    Err(Error::Setting {
        name: "weights",
        want: "one above 0 for each file, or none".into(),
        got: format!("{:?} for {} files", s.weights, s.paths.len()),
    })
}

/// A file to read, or standard input as one.
fn input(path: &Path, limits: Limits) -> Result<Input> {
    if path.as_os_str() != STDIN {
        return Ok(Input::file(path.to_path_buf()));
    }
    let stdin = io::BufReader::with_capacity(1 << 16, io::stdin());
    Input::spooled(Spool::new(stdin), path.to_path_buf(), limits.resident_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

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
        FeedSettings::new(vec![write("a", 7), write("b", 4)], 24, 3, 5)
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
            second.restore(&first.state()).unwrap();
            let mut ahead = open();
            ahead.restore(&second.state()).unwrap();
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
        let state = Feed::open(&settings, &tokenizer, &config).unwrap().state();
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
